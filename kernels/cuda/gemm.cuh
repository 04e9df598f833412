// out[m, n] = activation(alpha * sum over k of x[m, k] w[n, k] + bias[n]) + residual[m, n] on tensor cores.
//
// w is the left operand of mma (16 of its rows), x the right one (8 of its rows), so few rows of x waste little.
// Both tiles come by cp.async in their own packed form, as they lie in memory, and become operands in registers.
//
// In a block of 32 * Run columns lane t of four takes octets Run t .. Run t + Run - 1 of either operand:
//
//     columns    0 .. 7      8 .. 15     16 .. 23    24 .. 31        (Run = 1)
//     lane       t = 0       t = 1       t = 2       t = 3
//
// It is the same permutation of k on both sides, so the sum does not notice.
//
// Scales: a segment is a run of columns that ends wherever a scale changes. Segmented kernels add up a segment
// before its scales meet the sum, acc = fma(x_scale, w_scale * float(sum), acc); segments come in ascending order.
// Folded ones multiply scales into w's numbers first, and takes blocks of any width.
#pragma once
#include "operands.cuh"
#include "results.cuh"

namespace lb {

// ---- tiles in shared memory --------------------------------------------------------------------------------
// Rows lie so far apart that the lanes of a warp find their octets in different banks.
LB_DEV constexpr int row_pitch(int bytes, int span) {
    int pitch = (bytes + 15) / 16 * 16;
    const int step = span < 16 || span % 16 || span >= 128 ? 16 : span;
    while (pitch % 16 || (pitch % 128 / step) % 2 == 0 || pitch % 128 % step) pitch += 16;
    return pitch;
}
template <class C> struct GemmTiles {
    static constexpr int w_row = C::depth / 8 * C::w_octet, x_row = C::depth / 8 * C::x_octet;
    static constexpr int w_pitch = row_pitch(w_row, 4 * C::run * C::w_octet), x_pitch = row_pitch(x_row, 4 * C::run * C::x_octet);
    struct Stage {
        alignas(16) u8 w[C::rows][w_pitch];
        alignas(16) u8 x[C::columns][x_pitch];
    };
    union {
        Stage stage[C::stages];
        ResultTile<C::rows, C::columns> result;
    };
    int ticket;
};

// Brings rows first.. of a matrix, a stage's bytes at a time, to a tile; what lies outside of the matrix is zero.
// Pieces are of `Piece` bytes, to which address and pitch are aligned; of 1 byte they are plain copies.
template <int Piece, int Rows, int RowBytes, int Pitch, int Threads> struct Fetch {
    static constexpr int pieces = RowBytes / Piece, total = Rows * pieces, each = (total + Threads - 1) / Threads;
    static constexpr bool regular = Threads % pieces == 0;  // a thread stays at one place of all its rows
    const u8* matrix;
    long long pitch;
    int first, rows, bytes;  // bytes of a whole row of the matrix

    LB_DEV void operator()(u8 (&tile)[Rows][Pitch], int stage) const {
        if constexpr (regular) {
            const int r = threadIdx.x / pieces, at = threadIdx.x % pieces * Piece;
            const int valid = clamped(bytes - stage * RowBytes - at);
            const u8* from = matrix + (first + r) * pitch + stage * RowBytes + at;
#pragma unroll
            for (int j = 0; j < each; ++j) {
                const int row = r + j * (Threads / pieces);
                if (total % Threads == 0 || row < Rows) copy(&tile[row][at], from + j * (Threads / pieces) * pitch, first + row < rows ? valid : 0);
            }
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < total; i += Threads) {
                const int row = i / pieces, at = i % pieces * Piece;
                const int valid = first + row < rows ? clamped(bytes - stage * RowBytes - at) : 0;
                copy(&tile[row][at], matrix + (first + row) * pitch + stage * RowBytes + at, valid);
            }
        }
    }

  private:
    static LB_DEV int clamped(int left) { return max(0, min(left, Piece)); }
    static LB_DEV void copy(u8* to, const u8* from, int valid) {
        if constexpr (Piece >= 4) cp_async<Piece>(to, from, valid);
        else *to = valid ? *from : u8(0);
    }
};

// ---- the kernel ------------------------------------------------------------------------------------------------
template <class C>
__global__ void __launch_bounds__(C::threads, C::resident)
gemm(const u8* __restrict__ x, long long x_pitch, const u8* __restrict__ w, long long w_pitch,
     const typename C::Scale::Stored* __restrict__ scales, const typename C::Zero::Stored* __restrict__ zeros,
     const typename C::Scale::Stored* __restrict__ biases, int scale_pitch, int block_rows, int block_columns,
     const typename C::XScale::Stored* __restrict__ x_scales, int x_scale_pitch, int x_block_rows, int x_block_columns,
     const float* __restrict__ w_factor, const float* __restrict__ x_factor, double alpha,
     const float* __restrict__ bias, const typename C::Residual* __restrict__ residual, long long residual_pitch,
     typename C::Out* __restrict__ out, long long out_pitch, typename C::W::Sum* __restrict__ partial, int* __restrict__ arrived,
     int M, int N, int K, int segment) {
    using W = typename C::W;
    using X = typename C::X;
    using Sum = typename W::Sum;
    using Tiles = GemmTiles<C>;
    constexpr int WT = C::w_tiles, XT = C::x_tiles, run = C::run, block = 32 * run, blocks = C::depth / block;
    constexpr int w_words = (run * W::octet + 3) / 4, x_words = (X::octet + 3) / 4;
    Tiles& tiles = dynamic_shared<Tiles>();
    const int g = lane() / 4, t = lane() % 4;
    const int w0 = int(warp()) % C::w_warps * WT * 16, x0 = int(warp()) / C::w_warps * XT * 8;
    const int n0 = blockIdx.x * C::rows, m0 = blockIdx.y * C::columns;

    // This block's share of the columns, in stages.
    const auto [begin, end] = Share<C>((K + C::depth - 1) / C::depth);
    const auto row_bytes = [K](int octet) { return int(((long long)K * octet + 7) / 8); };
    const Fetch<C::w_piece, C::rows, Tiles::w_row, Tiles::w_pitch, C::threads> fetch_w{w, w_pitch, n0, N, row_bytes(W::octet)};
    const Fetch<C::x_piece, C::columns, Tiles::x_row, Tiles::x_pitch, C::threads> fetch_x{x, x_pitch, m0, M, row_bytes(X::octet)};
    auto load = [&](int stage) {
        fetch_w(tiles.stage[stage % C::stages].w, stage);
        fetch_x(tiles.stage[stage % C::stages].x, stage);
    };
#pragma unroll
    for (int s = 0; s < C::stages - 1; ++s) {
        if (begin + s < end) load(begin + s);
        cp_async_commit();
    }

    const typename C::Blocks w_blocks{scales, biases, zeros, scale_pitch, block_rows, block_columns, K};
    auto row_of = [&](int wt, int half) { return min(n0 + w0 + wt * 16 + half * 8 + g, N - 1); };
    // Scales and zero points of a segment, brought while the one before is multiplied. Folded scales are in w already.
    float scale[WT][2], zero[WT][2], next_scale[WT][2], next_zero[WT][2];
    auto look_ahead = [&](int column) {
#pragma unroll
        for (int wt = 0; wt < WT; ++wt)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float none;
                if constexpr (C::folded) next_scale[wt][half] = 1.f, next_zero[wt][half] = 0.f;
                else w_blocks.load(next_scale[wt][half], next_zero[wt][half], none, row_of(wt, half), column);
            }
    };
    auto advance = [&](int column) {
#pragma unroll
        for (int wt = 0; wt < WT; ++wt)
#pragma unroll
            for (int half = 0; half < 2; ++half) scale[wt][half] = next_scale[wt][half], zero[wt][half] = next_zero[wt][half];
        if (column < K) look_ahead(column);
    };

    float acc[WT][XT][4] = {};
    Sum sum[WT][XT][4] = {};
    [[maybe_unused]] Sum ones[XT][4] = {};  // sums of x, where zero points are taken off afterwards
    auto flush = [&](int column) {  // of the segment that this column is in
#pragma unroll
        for (int xt = 0; xt < XT; ++xt) {
            float left[2] = {1.f, 1.f};
            if constexpr (C::x_scaled) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int m = min(m0 + x0 + xt * 8 + t * 2 + j, M - 1);
                    left[j] = C::XScale::load(x_scales[(long long)(m / x_block_rows) * x_scale_pitch + column / x_block_columns]);
                }
            }
#pragma unroll
            for (int wt = 0; wt < WT; ++wt)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    Sum whole = sum[wt][xt][i];
                    if constexpr (C::x_sums) whole -= ones[xt][i % 2] * Sum(zero[wt][i / 2]);
                    const float scaled = __fmul_rn(scale[wt][i / 2], float(whole));
                    acc[wt][xt][i] = C::x_scaled ? __fmaf_rn(left[i % 2], scaled, acc[wt][xt][i])
                                                 : __fmaf_rn(scale[wt][i / 2], float(whole), acc[wt][xt][i]);
                    sum[wt][xt][i] = 0;
                }
            if constexpr (C::x_sums)
#pragma unroll
                for (int i = 0; i < 4; ++i) ones[xt][i] = 0;
        }
    };

    look_ahead(begin * C::depth);  // no share is empty
    int ends = (begin * C::depth / segment + 1) * segment;  // of the present segment
    advance(ends);
    for (int stage = begin; stage < end; ++stage) {
        cp_async_wait<C::stages - 2>();
        __syncthreads();
        if (stage + C::stages - 1 < end) load(stage + C::stages - 1);
        cp_async_commit();

        const auto& from = tiles.stage[stage % C::stages];
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            const int column = stage * C::depth + b * block;
            if (column == ends && column < K) {
                flush(column - 1);
                ends += segment;
                advance(ends);
            }
            const int octet = b * 4 * run + run * t;
            u32 packed[WT][2][w_words];
#pragma unroll
            for (int wt = 0; wt < WT; ++wt)
#pragma unroll
                for (int half = 0; half < 2; ++half) words_of<run * W::octet>(packed[wt][half], &from.w[w0 + wt * 16 + half * 8 + g][octet * W::octet]);
#pragma unroll
            for (int i = 0; i < run; ++i) {
                u32 a[WT][2][W::registers];
#pragma unroll
                for (int wt = 0; wt < WT; ++wt)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        if constexpr (C::folded) W::decode(a[wt][half], packed[wt][half], i, w_blocks, row_of(wt, half), column + (run * t + i) * 8);
                        else W::decode(a[wt][half], packed[wt][half], i, zero[wt][half]);
                    }
#pragma unroll
                for (int xt = 0; xt < XT; ++xt) {
                    u32 given[x_words], p[X::terms][W::registers];
                    words_of<X::octet>(given, &from.x[x0 + xt * 8 + g][(octet + i) * X::octet]);
                    X::template decode<W::order>(p, given);
#pragma unroll
                    for (int term = 0; term < X::terms; ++term) {
#pragma unroll
                        for (int wt = 0; wt < WT; ++wt) W::multiply(sum[wt][xt], a[wt][0], a[wt][1], p[term]);
                        if constexpr (C::x_sums) {
                            constexpr u32 one = 0x01010101u;
                            const u32 all[2] = {one, one};
                            Wholes<Bytes<8, true>, false>::multiply(ones[xt], all, all, p[term]);
                        }
                    }
                }
            }
        }
    }
    cp_async_wait<0>();
    if constexpr (!C::partial_sums) flush(min(ends, K) - 1);

    __syncthreads();  // nobody reads a stage any more
#pragma unroll
    for (int wt = 0; wt < WT; ++wt)
#pragma unroll
        for (int xt = 0; xt < XT; ++xt)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32& to = tiles.result.sum[x0 + xt * 8 + t * 2 + i % 2][w0 + wt * 16 + i / 2 * 8 + g];
                if constexpr (C::partial_sums) to = bits<u32>(sum[wt][xt][i]);
                else to = bits<u32>(acc[wt][xt][i]);
            }
    double factor = alpha;
    if constexpr (C::w_factor) factor *= double(*w_factor);
    if constexpr (C::x_factor) factor *= double(*x_factor);
    const Finish<C> finish{float(factor), bias, residual, residual_pitch, out, out_pitch};
    const auto scaled = [&](Sum total, int m, int n) {
        if constexpr (C::partial_sums) {
            float by, none;
            w_blocks.load(by, none, none, n, 0);
            const float left = C::XScale::load(x_scales[(long long)(m / x_block_rows) * x_scale_pitch]);
            return __fmul_rn(left, __fmul_rn(by, float(total)));
        } else {
            return float(total);
        }
    };
    const Results<C, Sum, C::rows, C::columns> results{
        tiles.result, tiles.ticket, M, N, m0, n0, int(warp()), C::threads / 32, partial, arrived};
    results.leave([] { __syncthreads(); }, scaled, finish);
}

}  // namespace lb

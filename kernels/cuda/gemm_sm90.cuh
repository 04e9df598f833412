// out = activation(alpha * x w^T + bias) + residual on Hopper: TMA -> mbarriers -> wgmma.
//
// As in gemm.cuh w is the left operand, decoded in registers; x is the right one, read from shared memory where TMA
// has put it. Nothing is permuted here: in a step of 16 columns lane t of four holds columns 2 t, 2 t + 1 and
// 2 t + 8, 2 t + 9 of rows g and g + 8, so it takes codes 2 t and 2 t + 1 of every octet.
//
// One producer warp, two warpgroups of 64 rows of w each. While the tensor cores work on a stage, its warpgroup
// decodes the next one. A segment of columns is added up before its scales meet the sum, in ascending order.
#pragma once
#include "operands.cuh"
#include "results.cuh"
#include "sm90.cuh"

namespace lb {

constexpr int hopper_depth = 64;  // columns of a stage: 128 bytes of x, which TMA swizzles

template <class C> struct HopperTiles {
    struct alignas(1024) Stage {
        u8 x[C::columns][128];
        u8 w[2 * 64][8 * C::Element::Bits];
    };
    union {
        Stage stage[C::stages];
        ResultTile<128, C::columns> result;
    };
    int ticket;
    Mbarrier full[C::stages], empty[C::stages];
};

template <class C>
__global__ void __launch_bounds__(384, 1)
gemm_sm90(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
          const typename C::Scale::Stored* __restrict__ scales, const typename C::Zero::Stored* __restrict__ zeros,
          int scale_pitch, int block_rows, int block_columns, const float* __restrict__ w_factor, double alpha,
          const float* __restrict__ bias, const typename C::Residual* __restrict__ residual, long long residual_pitch,
          typename C::Out* __restrict__ out, long long out_pitch, float* __restrict__ partial, int* __restrict__ arrived, int M, int N, int K, int segment) {
    using Op = typename C::Element::Op;
    constexpr int bits = C::Element::Bits, columns = C::columns, sums = columns / 2;
    auto& shared = dynamic_shared<HopperTiles<C>>();
    const int m0 = blockIdx.x * columns, n0 = blockIdx.y * 128;
    const Share<C> share((K + hopper_depth - 1) / hopper_depth);
    const int first = share.begin, count = share.end - first;  // stages are counted from the first of this block
    if (threadIdx.x == 0) {
        for (int s = 0; s < C::stages; ++s) mbarrier_init(&shared.full[s], 1), mbarrier_init(&shared.empty[s], 256);
        mbarrier_fence_init();
    }
    __syncthreads();
    if (warp() >= 8) {  // the producer's warpgroup, of which one thread works
        registers_lower<40>();
        if (warp() == 8 && lane() == 0)
            for (int i = 0; i < count; ++i) {
                auto& to = shared.stage[i % C::stages];
                Mbarrier* full = &shared.full[i % C::stages];
                mbarrier_wait(&shared.empty[i % C::stages], i / C::stages & 1 ^ 1);
                mbarrier_arrive_expect(full, sizeof(to.x) + sizeof(to.w));
                tma_load_2d(to.x, &x_map, (first + i) * hopper_depth, m0, full);
                tma_load_2d(to.w, &w_map, (first + i) * 8 * bits, n0, full);
            }
        return;
    }
    registers_raise<232>();

    const int g = lane() / 4, t = lane() % 4, row = int(warp()) * 16 + g;  // of the tile; the other is 8 below
    const WeightBlocks<typename C::Scale, typename C::Zero, false, true> blocks{
        scales, nullptr, zeros, scale_pitch, block_rows, block_columns, K};
    float scale[2], zero[2], next_scale[2], next_zero[2];
    auto look_ahead = [&](int column) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float none;
            blocks.load(next_scale[h], next_zero[h], none, min(n0 + row + 8 * h, N - 1), column);
        }
    };
    auto advance = [&](int column) {
#pragma unroll
        for (int h = 0; h < 2; ++h) scale[h] = next_scale[h], zero[h] = next_zero[h];
        if (column < K) look_ahead(column);
    };

    float acc[C::whole ? 1 : sums] = {}, sum[sums] = {};
    auto flush = [&](const float (&by)[2]) {
        if constexpr (!C::whole)
#pragma unroll
            for (int i = 0; i < sums; ++i) acc[i] = __fmaf_rn(by[i / 2 % 2], sum[i], acc[i]), sum[i] = 0.f;
    };

    // Operands of a stage: four steps of 16 columns.
    auto decode = [&](u32 (&a)[4][4], int i) {
        mbarrier_wait(&shared.full[i % C::stages], i / C::stages & 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 words[2 * bits];
            words_of<8 * bits>(words, shared.stage[i % C::stages].w[row + 8 * h]);
#pragma unroll
            for (int o = 0; o < 8; ++o) {
                u32 pair = C::Element::pair(neighbours_at<bits>(words, o, t));
                if constexpr (C::Zero::present) pair = Op::fma(pair, twice(Op::power(0)), Op::pack(-zero[h], -zero[h]));
                a[o / 2][o % 2 * 2 + h] = pair;
            }
        }
    };
    int ends = (first * hopper_depth / segment + 1) * segment;  // of the segment whose scales are at hand
    // Starts the products of stage i and decodes stage i + 1 meanwhile.
    auto step = [&](const u32 (&a)[4][4], u32 (&next)[4][4], int i) {
        const u64 x = descriptor_sw128(shared.stage[i % C::stages].x);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) wgmma<columns, typename Op::Number>(sum, a[s], x + 2 * s);
        wgmma_commit();
        const int column = (first + i + 1) * hopper_depth;
        const bool closes = column == ends || i + 1 == count;
        const float own[2] = {scale[0], scale[1]};
        if (i + 1 < count) {
            if (column == ends) ends += segment, advance(ends);
            decode(next, i + 1);
        }
        wgmma_wait<0>(sum);
        mbarrier_arrive(&shared.empty[i % C::stages]);
        if (closes) flush(own);
    };
    look_ahead(first * hopper_depth);
    advance(ends);
    u32 even[4][4], odd[4][4];
    decode(even, 0);
#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
        step(even, odd, i);
        if (i + 1 < count) step(odd, even, i + 1);
    }

    double factor = alpha;
    if constexpr (C::w_factor) factor *= double(*w_factor);
    const Finish<C> finish{float(factor), bias, residual, residual_pitch, out, out_pitch};
    const auto sync = [] { named_barrier_sync(1, 256); };
    sync();  // nobody reads a stage any more
#pragma unroll
    for (int j = 0; j < columns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float v = C::whole ? __fmul_rn(scale[i / 2], sum[4 * j + i]) : acc[C::whole ? 0 : 4 * j + i];
            shared.result.sum[8 * j + 2 * t + i % 2][row + 8 * (i / 2)] = lb::bits<u32>(v);
        }
    const Results<C, float, 128, columns> results{shared.result, shared.ticket, M, N, m0, n0, int(warp()), 8, partial, arrived};
    results.leave(sync, [](float total, int, int) { return total; }, finish);
}

}  // namespace lb

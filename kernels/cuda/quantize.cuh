// Numbers read once: extremes, scale and codes of a block while its numbers stand in registers.
//
// An octet, eight numbers of a row from a multiple of eight on, is a thread's unit of work: its codes are
// `width` whole bytes of the row's bit stream.
#pragma once
#include "quantize_rule.cuh"

namespace lb::quant {

// Where numbers come from: a matrix of rows `pitch` bytes and columns `step` bytes apart.
template <class X_> struct Plain {
    using X = X_;
    static constexpr int threads = 1024;  // of a multiprocessor
    const u8* at;
    i64 pitch, step;
    int align;
    LB_DEV Plain(const u8* x, const u8*, i64 pitch_, i64, i64 step_, int align_) : at(x), pitch(pitch_), step(step_), align(align_) {}
    LB_DEV Octet<X> load(i64 row, i64 column, int count) const {
        return quant::load<X>(at + row * pitch + column * step, step, count, align);
    }
};

// Blocks of one row and `wide` columns, a multiple of 8 up to 256 (or the whole row): 2^(log_group) lanes
// own one, 2^log_lanes of the thread block's 256 a row. Each thread looks at `Rows` rows.
template <class F, class Input, int Rows>
__global__ void __launch_bounds__(256)
quantize_groups(const u8* __restrict__ x, const u8* __restrict__ y, i64 x_pitch, i64 y_pitch, i64 step, int align,
                u8* __restrict__ codes, i64 codes_pitch, int codes_align, void* scales, void* zeros, void* biases,
                const float* __restrict__ second, u32* flag, i64 rows, i64 columns, i64 across, int wide,
                int log_group, int log_lanes) {
    const Input input(x, y, x_pitch, y_pitch, step, align);
    const Parts parts{scales, zeros, biases};
    float factor = 1.f;
    if constexpr (F::tensor_scale) factor = *second;
    const int lanes = 1 << log_lanes, first = threadIdx.x & (lanes - 1), tall = 256 >> log_lanes;
    const i64 top = (i64(blockIdx.x) * Rows) * tall + (threadIdx.x >> log_lanes);
    for (i64 slot = i64(blockIdx.y) * lanes; slot >> log_group < across; slot += i64(gridDim.y) * lanes) {
        const i64 group = (slot + first) >> log_group;
        const int begin = 8 * ((slot + first) & ((1 << log_group) - 1));
        const i64 column = group * wide + begin;
        const bool inside = begin < wide && column < columns;
        const int count = int(min(columns - column, i64(8)));
        Octet<typename Input::X> octet[Rows];
#pragma unroll
        for (int u = 0; u < Rows; ++u)
            if (inside && top + u * tall < rows) octet[u] = input.load(top + u * tall, column, count);
#pragma unroll
        for (int u = 0; u < Rows; ++u) {
            const i64 row = top + u * tall;
            const bool valid = inside && row < rows;
            Extremes<F::apart> found;
            if (valid) take(found, octet[u]);
            across_lanes(found, 1 << log_group);
            if (!valid) continue;  // no lane is waited for within the block's last row
            const Coder coder = block_parts<F>(found, factor, parts, row * across + group, begin == 0, flag);
            const u64 stream = encode<F, F::tensor_scale>(octet[u], count, coder);
            store_codes<F>(codes + row * codes_pitch, column, count, codes_align, stream);
        }
    }
}

// Thread blocks that a multiprocessor is to hold: room for `most` threads where numbers take few registers.
template <class F, class X, int Threads, int Held, int most>
constexpr int resident = Held * Octet<X>::words <= 16 ? (F::Element::searched ? most - 256 : most) / Threads : 1;

// A thread block owns a block of `tall` rows and `wide` columns, a multiple of 8 (or whole rows), which
// are no more than Held octets a thread.
template <class F, class Input, int Threads, int Held>
__global__ void __launch_bounds__(Threads, resident<F, typename Input::X, Threads, Held, Input::threads>)
quantize_tiles(const u8* __restrict__ x, const u8* __restrict__ y, i64 x_pitch, i64 y_pitch, i64 step, int align,
               u8* __restrict__ codes, i64 codes_pitch, int codes_align, void* scales, void* zeros, void* biases,
               const float* __restrict__ second, u32* flag, i64 rows, i64 columns, i64 across, i64 tall, i64 wide) {
    const Input input(x, y, x_pitch, y_pitch, step, align);
    const Parts parts{scales, zeros, biases};
    float factor = 1.f;
    if constexpr (F::tensor_scale) factor = *second;
    const i64 top = blockIdx.x * tall, left = blockIdx.y * wide;
    const int high = int(min(tall, rows - top)), width = int(min(wide, columns - left));
    const u32 octets = (width + 7) / 8;
    Octet<typename Input::X> octet[Held];
    int row[Held], column[Held];
    Extremes<F::apart> found;
#pragma unroll
    for (int h = 0; h < Held; ++h) {
        const u32 i = h * Threads + threadIdx.x;
        row[h] = high == 1 ? i >= octets : i / octets;
        column[h] = 8 * (i - row[h] * octets);
        if (row[h] < high) octet[h] = input.load(top + row[h], left + column[h], min(width - column[h], 8));
    }
#pragma unroll
    for (int h = 0; h < Held; ++h)
        if (row[h] < high) take(found, octet[h]);
    across_block<Threads>(found);
    const Coder coder = block_parts<F>(found, factor, parts, blockIdx.x * across + blockIdx.y, threadIdx.x == 0, flag);
#pragma unroll
    for (int h = 0; h < Held; ++h) {
        if (row[h] >= high) continue;
        const int count = min(width - column[h], 8);
        const u64 stream = encode<F, F::tensor_scale>(octet[h], count, coder);
        store_codes<F>(codes + (top + row[h]) * codes_pitch, left + column[h], count, codes_align, stream);
    }
}

}  // namespace lb::quant

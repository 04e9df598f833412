// Numbers read twice, for blocks of any shape and for scales that are given: extremes, then the rule,
// then codes.
#pragma once
#include "quantize_rule.cuh"

namespace lb::quant {

// Every warp looks at a part of a block, `part_rows` rows by `part_columns` columns of it; what it finds
// joins that of others. Members as in `Extremes`, which start as 0.
template <class X, bool Apart>
__global__ void __launch_bounds__(256)
extremes(const u8* __restrict__ x, i64 pitch, i64 step, int align, u32* most, u32* rest, i64 rows, i64 columns,
         i64 tall, i64 wide, i64 across, i64 part_rows, i64 part_columns, i64 row_parts, i64 column_parts) {
    const i64 down = i64(blockIdx.x) * 8 + warp();  // parts of rows of blocks
    const i64 block_row = whole_quotient(down, row_parts);
    const i64 top = block_row * tall + (down - block_row * row_parts) * part_rows;
    const i64 bottom = min(min(top + part_rows, block_row * tall + tall), rows);
    for (i64 right = blockIdx.y; right < across * column_parts; right += gridDim.y) {
        const i64 block_column = whole_quotient(right, column_parts);
        const i64 left = block_column * wide + (right - block_column * column_parts) * part_columns;
        const i64 end = min(min(left + part_columns, block_column * wide + wide), columns);
        if (top >= bottom || left >= end) continue;  // all of the warp
        Extremes<Apart> found;
        const int width = int(end - left);
        const u32 octets = (width + 7) / 8, all = u32(bottom - top) * octets;
        for (u32 i = lane(); i < all; i += 32) {
            const u32 row = i / octets;
            const int column = 8 * (i - row * octets);
            const u8* at = x + (top + row) * pitch + (left + column) * step;
            take(found, load<X>(at, step, min(width - column, 8), align));
        }
        across_lanes(found, 32);
        if (lane() == 0) {
            const i64 index = block_row * across + block_column;
            atomicMax(most + index, found.most);
            if constexpr (Apart) atomicMax(rest + index, found.rest);
        }
    }
}

template <bool Apart> LB_DEV Extremes<Apart> found_at(const u32* most, const u32* rest, i64 index) {
    Extremes<Apart> found;
    found.most = most[index];
    if constexpr (Apart) found.rest = rest[index];
    return found;
}

// Scales, zero points and biases of `blocks` blocks from their extremes.
template <class F>
__global__ void __launch_bounds__(256)
block_rule(const u32* __restrict__ most, const u32* __restrict__ rest, void* scales, void* zeros, void* biases,
           const float* __restrict__ second, u32* flag, i64 blocks) {
    const i64 index = i64(blockIdx.x) * 256 + threadIdx.x;
    if (index >= blocks) return;
    float factor = 1.f;
    if constexpr (F::tensor_scale) factor = *second;
    block_parts<F>(found_at<F::apart>(most, rest, index), factor, Parts{scales, zeros, biases}, index, true, flag);
}

// The same where scales are given, and zero points perhaps: float64, `given_row` and `given_column`
// entries apart. Extremes are looked at only where what is not given follows from them.
template <class F>
__global__ void __launch_bounds__(256)
given_rule(const u32* __restrict__ most, const u32* __restrict__ rest, void* scales, void* zeros, void* biases,
           u32* flag, i64 blocks, i64 across, const double* __restrict__ scale, i64 scale_row, i64 scale_column,
           const double* __restrict__ zero, i64 zero_row, i64 zero_column, int has_zero) {
    using Scale = typename F::Scale;
    using Zero = typename F::Zero;
    const i64 index = i64(blockIdx.x) * 256 + threadIdx.x;
    if (index >= blocks) return;
    const i64 row = whole_quotient(index, across), column = index - row * across;
    bool bad = false;
    const double wanted = scale[row * scale_row + column * scale_column];
    typename Scale::Stored stored;
    if constexpr (Scale::codes) bad |= !Scale::given(wanted, stored);
    else stored = Scale::narrow(wanted);
    const float step = step_of<F>(stored, 1.f, bad);
    keep<Scale>(scales, index, stored);
    if constexpr (Zero::present || F::bias) {
        float low = 0.f, high = 0.f;
        if (!has_zero) {
            const auto found = found_at<F::apart>(most, rest, index);
            bad |= !found.finite();
            low = found.low(), high = found.high();
            count_zero<F>(low, high);
        }
        if constexpr (F::bias) {
            if (F::low() == 0.f && bits<u32>(low) == 0x80000000u) bad = true;
            const auto bias = Scale::narrow(sub(low, mul(F::low(), step)));
            checked<Scale>(bias, bad);
            keep<Scale>(biases, index, bias);
        }
        if constexpr (Zero::present) {
            const double given = has_zero ? zero[row * zero_row + column * zero_column] : 0.;
            if (given != given) bad = true;
            const auto kept_zero = has_zero ? Zero::narrow(given) : Zero::narrow(sub(F::low(), div(low, step)));
            checked<Zero>(kept_zero, bad);
            keep<Zero>(zeros, index, kept_zero);
        }
    }
    if (bad) refuse(flag);
}

// The tensor scale from the extremes of a matrix: its largest block then has the largest block scale.
template <class F>
__global__ void __launch_bounds__(32)
tensor_rule(const u32* __restrict__ most, const u32* __restrict__ rest, float* second, u32* flag) {
    if (threadIdx.x) return;
    const auto found = found_at<F::apart>(most, rest, 0);
    bool bad = !found.finite();
    float low = found.low(), high = found.high();
    count_zero<F>(low, high);
    if ((F::bottom() == 0.f && low < 0.f) || (F::top() == 0.f && high > 0.f)) bad = true;
    float wanted = 0.f;
    if (F::top() > 0.f) wanted = fmaxf(wanted, div(high, F::second_top()));
    if (F::bottom() < 0.f) wanted = fmaxf(wanted, div(low, F::second_bottom()));
    wanted = not_underflowed(fabsf(wanted), (high > -low ? high : low) != 0.f);
    if (!finite(wanted)) bad = true;
    *second = wanted > 0.f ? wanted : 1.f;
    if (bad) refuse(flag);
}

// Codes of numbers whose blocks' scales, zero points and biases are there: 2^log_lanes of a thread
// block's 256 threads take octets of a row.
template <class F, class X>
__global__ void __launch_bounds__(256)
encode_rows(const u8* __restrict__ x, i64 pitch, i64 step, int align, u8* __restrict__ codes, i64 codes_pitch,
            int codes_align, const void* __restrict__ scales, const void* __restrict__ zeros,
            const void* __restrict__ biases, const float* __restrict__ second, u32* flag, i64 rows, i64 columns,
            i64 across, i64 tall, i64 wide, int log_lanes) {
    using Scale = typename F::Scale;
    using Zero = typename F::Zero;
    float factor = 1.f;
    if constexpr (F::tensor_scale) factor = *second;
    bool bad = false;
    const auto coder_of = [&](i64 index) {
        float offset = 0.f;
        if constexpr (F::bias) offset = kept<Scale>(biases, index);
        if constexpr (Zero::present) offset = kept<Zero>(zeros, index);
        const auto stored = static_cast<const typename Scale::Stored*>(scales)[index];
        return Coder(step_of<F>(stored, factor, bad), offset, multiplies<F, true>);
    };
    const int lanes = 1 << log_lanes;
    const i64 row = i64(blockIdx.x) * (256 >> log_lanes) + (threadIdx.x >> log_lanes);
    if (row >= rows) return;
    const i64 blocks = whole_quotient(row, tall) * across;
    for (i64 column = 8 * (i64(blockIdx.y) * lanes + (threadIdx.x & (lanes - 1))); column < columns;
         column += 8 * lanes * i64(gridDim.y)) {
        const int count = int(min(columns - column, i64(8)));
        const auto octet = load<X>(x + row * pitch + column * step, step, count, align);
        Extremes<false> found;
        take(found, octet);
        bad |= !found.finite();
        const i64 block = whole_quotient(column, wide);
        u64 stream = 0;
        if (column + count <= (block + 1) * wide) {
            const Coder coder = coder_of(blocks + block);
            stream = encode<F, true>(octet, count, coder);
        } else {
            // Several blocks meet in the octet.
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i >= count) break;
                const Coder coder = coder_of(blocks + whole_quotient(column + i, wide));
                const float v = mul(numerator<F>(octet.number(i), coder), coder.moved);
                stream |= u64(code_of<F, true>(v, coder)) << i * F::Element::width;
            }
        }
        store_codes<F>(codes + row * codes_pitch, column, count, codes_align, stream);
    }
    if (bad) refuse(flag);
}

}  // namespace lb::quant

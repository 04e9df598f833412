// Codes to numbers: ((value - zero) * scale * tensor scale) + bias, as formats/reference.py computes it in
// float64 and rounds it once.
//
//     single    float32 products are that rounded number, or exact and rounded once more
//     directed  of the products rounded down and up the one with an odd last bit: both are the same
//               if it is exact, else rounding it to a narrower type is the only rounding that counts
//     twofold   float64, operation for operation
#pragma once
#include "quantize_rule.cuh"

namespace lb::quant {

enum class Way { single, directed, twofold };
template <Way> struct Arithmetic { using Number = float; };
template <> struct Arithmetic<Way::twofold> { using Number = double; };

template <int Bytes> LB_DEV u64 load_bytes(const u8* at, int count, int align) {
    if constexpr (Bytes == 8) {
        if (count == 8 && align >= 8) {
            const uint2 v = *reinterpret_cast<const uint2*>(at);
            return v.x | u64(v.y) << 32;
        }
    }
    u64 value = 0;
    if constexpr (Bytes % 4 == 0) {
        if (count == Bytes && align >= 4) {
#pragma unroll
            for (int i = 0; i < Bytes; i += 4) value |= u64(*reinterpret_cast<const u32*>(at + i)) << 8 * i;
            return value;
        }
    }
#pragma unroll
    for (int i = 0; i < Bytes; ++i)
        if (i < count) value |= u64(at[i]) << 8 * i;
    return value;
}

// What the codes of a block are multiplied by and moved by.
template <class F, Way way> struct Block {
    using Scale = typename F::Scale;
    using Zero = typename F::Zero;
    using Number = typename Arithmetic<way>::Number;
    Number scale, zero = 0, bias = 0;
    LB_DEV Block(const void* scales, const void* zeros, const void* biases, float second, i64 index) {
        scale = kept<Scale>(scales, index);
        if constexpr (F::tensor_scale && way == Way::twofold) scale = mul(scale, Number(second));
        if constexpr (Zero::present) zero = kept<Zero>(zeros, index);
        if constexpr (F::bias) bias = kept<Scale>(biases, index);
    }
};

template <class F, class Out, Way way>
LB_DEV u32 value_of(u32 code, const Block<F, way>& block, float second) {
    const float v = F::Element::decode(code);
    if constexpr (way == Way::twofold) {
        double wide = v;
        if constexpr (F::Zero::present) wide = sub(wide, block.zero);
        wide = mul(wide, block.scale);
        if constexpr (F::bias) wide = add(wide, block.bias);
        return Out::narrow(wide);
    } else {
        float left = v, right = block.scale;
        if constexpr (F::Zero::present) left = sub(v, block.zero);
        if constexpr (F::tensor_scale) left = mul(v, block.scale), right = second;
        if constexpr (way == Way::single) return Out::narrow(mul(left, right));
        const float low = mul_down(left, right);
        return Out::narrow(bits<u32>(low) & 1 ? low : mul_up(left, right));
    }
}

// 2^log_lanes of a thread block's 256 threads take octets of a row.
template <class F, class Out, Way way>
__global__ void __launch_bounds__(256)
dequantize_rows(const u8* __restrict__ codes, i64 codes_pitch, int codes_align, const void* __restrict__ scales,
                const void* __restrict__ zeros, const void* __restrict__ biases, const float* __restrict__ seconds,
                u8* __restrict__ out, i64 out_pitch, int out_align, i64 rows, i64 columns, i64 across, i64 tall,
                i64 wide, int log_lanes) {
    constexpr int width = F::Element::width, size = sizeof(typename Out::Stored);
    using Of = Block<F, way>;
    float second = 1.f;
    if constexpr (F::tensor_scale) second = *seconds;
    const int lanes = 1 << log_lanes;
    const i64 row = i64(blockIdx.x) * (256 >> log_lanes) + (threadIdx.x >> log_lanes);
    if (row >= rows) return;
    const i64 blocks = whole_quotient(row, tall) * across;
    for (i64 column = 8 * (i64(blockIdx.y) * lanes + (threadIdx.x & (lanes - 1))); column < columns;
         column += 8 * lanes * i64(gridDim.y)) {
        const int count = int(min(columns - column, i64(8)));
        const u8* at = codes + row * codes_pitch + column / 8 * width;
        const u64 stream = load_bytes<width>(at, (count * width + 7) / 8, codes_align);
        const i64 first = whole_quotient(column, wide);
        Octet<Out> octet{};
        if (column + count <= (first + 1) * wide) {
            const Of block(scales, zeros, biases, second, blocks + first);
#pragma unroll
            for (int i = 0; i < 8; ++i) octet.put(i, value_of<F, Out>(unpack<width>(stream, i), block, second));
        } else {
            // Several blocks meet in the octet.
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i >= count) break;
                const Of block(scales, zeros, biases, second, blocks + whole_quotient(column + i, wide));
                octet.put(i, value_of<F, Out>(unpack<width>(stream, i), block, second));
            }
        }
        store(out + row * out_pitch + column * size, octet, count, out_align);
    }
}

}  // namespace lb::quant

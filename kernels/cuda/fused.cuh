// What layers compute just before they quantize, without a way through memory. Steps are rounded to the
// dtype of x where separate layers would write their results; see fused.py for the formulas.
#pragma once
#include "activation.cuh"
#include "quantize.cuh"

namespace lb::quant {

// silu(gate) * up, as an input of the kernels in quantize.cuh.
template <class X_> struct SiluMul {
    using X = X_;
    static constexpr int threads = 768;
    const u8 *gate, *up;
    i64 gate_pitch, up_pitch, step;
    int align;
    LB_DEV SiluMul(const u8* x, const u8* y, i64 x_pitch, i64 y_pitch, i64 step_, int align_)
        : gate(x), up(y), gate_pitch(x_pitch), up_pitch(y_pitch), step(step_), align(align_) {}
    LB_DEV Octet<X> load(i64 row, i64 column, int count) const {
        const auto g = quant::load<X>(gate + row * gate_pitch + column * step, step, count, align);
        const auto u = quant::load<X>(up + row * up_pitch + column * step, step, count, align);
        Octet<X> product;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float v = g.number(i);
            // The limit at -infinity would hide it.
            const float s = finite(v) ? X::number(X::narrow(activate<Activation::silu>(v))) : bits<float>(not_a_number);
            product.put(i, X::narrow(mul(s, u.number(i))));
        }
        return product;
    }
};

template <int Threads> LB_DEV float block_sum(float v) {
    auto& partial = static_shared<float[Threads / 32], 1>();
    v = warp_sum(v);
    if (lane() == 0) partial[warp()] = v;
    __syncthreads();
    v = partial[0];
#pragma unroll
    for (int w = 1; w < Threads / 32; ++w) v = add(v, partial[w]);
    return v;
}

// A thread block owns a row of up to 8 * Held * Threads numbers: x (plus the residual, which it updates),
// divided by the root of its mean square, times the weight. Blocks of scales are the row, or, if Grouped,
// 2^log_group octets.
template <class F, class X, class W, int Threads, int Held, bool Residual, bool Grouped>
__global__ void __launch_bounds__(Threads, resident<F, X, Threads, Held, 1024>)
rmsnorm_rows(const u8* __restrict__ x, i64 x_pitch, int x_align, const u8* __restrict__ residual, i64 residual_pitch,
             int residual_align, u8* __restrict__ updated, i64 updated_pitch, int updated_align,
             const u8* __restrict__ weight, int weight_align, float epsilon, u8* __restrict__ codes, i64 codes_pitch,
             int codes_align, void* scales, void* zeros, void* biases, u32* flag, int columns, i64 across,
             int log_group) {
    constexpr int size = sizeof(typename X::Stored), weight_size = sizeof(typename W::Stored);
    const Parts parts{scales, zeros, biases};
    const i64 row = blockIdx.x;
    Octet<X> octet[Held];
    float sum = 0.f;
#pragma unroll
    for (int h = 0; h < Held; ++h) {
        const int column = 8 * (h * Threads + threadIdx.x), count = min(columns - column, 8);
        if (count <= 0) break;
        octet[h] = load<X>(x + row * x_pitch + column * size, size, count, x_align);
        if constexpr (Residual) {
            const auto other = load<X>(residual + row * residual_pitch + column * size, size, count, residual_align);
            const auto own = octet[h];
#pragma unroll
            for (int i = 0; i < 8; ++i) octet[h].put(i, X::narrow(add(own.number(i), other.number(i))));
            store(updated + row * updated_pitch + column * size, octet[h], count, updated_align);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float v = octet[h].number(i);
            if (i < count) sum = __fmaf_rn(v, v, sum);
        }
    }
    sum = block_sum<Threads>(sum);
    if (threadIdx.x == 0 && !finite(sum)) refuse(flag);
    const float factor = div(1.f, __fsqrt_rn(add(div(sum, float(columns)), epsilon)));
    Extremes<F::apart> found;
#pragma unroll
    for (int h = 0; h < Held; ++h) {
        const int column = 8 * (h * Threads + threadIdx.x), count = min(columns - column, 8);
        if (count <= 0) break;
        const auto w = load<W>(weight + column * weight_size, weight_size, count, weight_align);
        const auto own = octet[h];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float v = X::number(X::narrow(mul(own.number(i), factor)));
            octet[h].put(i, X::narrow(mul(v, w.number(i))));
        }
        if constexpr (!Grouped) take(found, octet[h]);
    }
    if constexpr (!Grouped) across_block<Threads>(found);
#pragma unroll
    for (int h = 0; h < Held; ++h) {
        const int place = h * Threads + threadIdx.x, column = 8 * place, count = min(columns - column, 8);
        if constexpr (Grouped) {
            found = Extremes<F::apart>();
            if (count > 0) take(found, octet[h]);
            across_lanes(found, 1 << log_group);
        }
        if (count <= 0) continue;
        const int group = Grouped ? place >> log_group : 0;
        const bool writes = Grouped ? place == group << log_group : place == 0;
        const Coder coder = block_parts<F>(found, 1.f, parts, row * across + group, writes, flag);
        const u64 stream = encode<F, F::tensor_scale>(octet[h], count, coder);
        store_codes<F>(codes + row * codes_pitch, column, count, codes_align, stream);
    }
}

}  // namespace lb::quant

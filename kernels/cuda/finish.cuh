// What surrounds a product that a library computes: operands converted, its result finished.
#pragma once
#include "activation.cuh"

namespace lb {

template <class C>
__global__ void convert(const typename C::In* __restrict__ from, long long pitch, typename C::Out* __restrict__ to, int columns, long long rows) {
    const long long size = rows * columns;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < size; i += (long long)gridDim.x * blockDim.x)
        to[i] = C::narrow(C::widen(from[i / columns * pitch + i % columns]));
}

// out = activation(alpha * product + bias) + residual.
template <class C>
__global__ void finish(const float* __restrict__ product, double alpha, const float* __restrict__ bias,
                       const typename C::Residual* __restrict__ residual, long long residual_pitch,
                       typename C::Out* __restrict__ out, long long out_pitch, int columns, long long rows) {
    const long long size = rows * columns;
    const float times = float(alpha);
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < size; i += (long long)gridDim.x * blockDim.x) {
        const long long m = i / columns, n = i % columns;
        float v = C::bias ? __fmaf_rn(times, product[i], bias[n]) : __fmul_rn(times, product[i]);
        v = activate<C::activation>(v);
        if constexpr (C::residual) v = __fadd_rn(v, C::widen(residual[m * residual_pitch + n]));
        out[m * out_pitch + n] = C::narrow(v);
    }
}

}  // namespace lb

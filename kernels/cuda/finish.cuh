// What surrounds a product that a library computes: operands converted, its result finished.
#pragma once
#include "epilogue.cuh"

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
    const Finish<C> finished{float(alpha), bias, residual, residual_pitch, out, out_pitch};
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < size; i += (long long)gridDim.x * blockDim.x) {
        finished(i / columns, int(i % columns), product[i]);
    }
}

}  // namespace lb

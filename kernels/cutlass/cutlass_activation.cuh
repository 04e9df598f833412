// Activation functions for CUTLASS's visitors: those of every other kernel, bit for bit.
#pragma once
#include "cutlass/array.h"
#ifndef LOWBIT_HOST
#include "activation.cuh"
#endif

namespace lb::visitors {

template <int A, class T> struct Apply {};
template <int A, class T, int N> struct Apply<A, cutlass::Array<T, N>> {
    CUTLASS_DEVICE cutlass::Array<T, N> operator()(const cutlass::Array<T, N>& x) const {
        cutlass::Array<T, N> y;
#ifndef LOWBIT_HOST
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = activate<Activation(A)>(x[i]);
#endif
        return y;
    }
};

// In the order of lb::Activation.
template <class T> using relu = Apply<1, T>;
template <class T> using gelu = Apply<2, T>;
template <class T> using gelu_tanh = Apply<3, T>;
template <class T> using silu = Apply<4, T>;

}  // namespace lb::visitors

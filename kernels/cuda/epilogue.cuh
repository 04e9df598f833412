// What follows a sum: activation(alpha * v + bias[n]) + residual[m, n], rounded once.
#pragma once
#include "activation.cuh"

namespace lb {

template <class C> struct Finish {
    float times;
    const float* bias;
    const typename C::Residual* residual;
    long long residual_pitch;
    typename C::Out* out;
    long long out_pitch;

    LB_DEV void operator()(long long m, int n, float v) const {
        v = C::bias ? __fmaf_rn(times, v, bias[n]) : __fmul_rn(times, v);
        v = activate<C::activation>(v);
        if constexpr (C::residual) v = __fadd_rn(v, C::widen(residual[m * residual_pitch + n]));
        out[m * out_pitch + n] = C::narrow(v);
    }
};

}  // namespace lb

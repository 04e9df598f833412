// Activation functions of float32, bit for bit those of the CPU kernels: fma, division and bit patterns alone.
#pragma once
#include "primitives.cuh"

namespace lb {

enum class Activation { none, relu, gelu, gelu_tanh, silu };

template <int N> LB_DEV float polynomial(float x, const float (&coefficients)[N]) {
    float total = coefficients[N - 1];
#pragma unroll
    for (int i = N - 2; i >= 0; --i) total = __fmaf_rn(total, x, coefficients[i]);
    return total;
}

// exp(high + low) for high <= 0 and a small correction; 0 from -105 down.
LB_DEV float exponential(float high, float low) {
    const float q[5] = {0x1.fffffap-2f, 0x1.555472p-3f, 0x1.555988p-5f, 0x1.125132p-7f, 0x1.69fd9cp-10f};
    const bool tiny = high < -105.f;
    high = tiny ? -105.f : high;
    low = tiny ? 0.f : low;
    const float moved = __fmaf_rn(high, 0x1.715476p+0f, 12582912.f), whole = __fsub_rn(moved, 12582912.f);
    float rest = __fmaf_rn(whole, -0x1.62e43p-1f, high);
    rest = __fmaf_rn(whole, 0x1.05c61p-29f, rest);
    rest = __fadd_rn(rest, low);
    float part = polynomial(rest, q);
    part = __fadd_rn(__fmaf_rn(__fmul_rn(rest, rest), part, rest), 1.f);
    // Two factors: one alone could not reach the subnormal numbers.
    const int power = int(bits<u32>(moved) - bits<u32>(12582912.f)), first = power >> 1;
    part = __fmul_rn(part, bits<float>(u32(first + 127) << 23));
    return __fmul_rn(part, bits<float>(u32(power - first + 127) << 23));
}

LB_DEV float gelu(float x) {
    const float w[10] = {0x1.fea13cp-4f, 0x1.fef7b6p-4f, 0x1.ca5b66p-4f, 0x1.709db8p-4f, 0x1.c9513cp-5f, -0x1.947892p-9f, 0x1.3310aep-4f, -0x1.367f22p-3f, 0x1.77708ap-4f, -0x1.38678p-6f};
    const float half = __fmul_rn(x, 0.5f), square = __fmul_rn(half, x), lost = __fmaf_rn(half, x, -square);
    const float power = exponential(-square, -lost);
    const float t = __fdiv_rn(1.f, __fmaf_rn(fabsf(x), 0.3125f, 1.f));
    const float tail = __fmul_rn(power, __fmul_rn(t, polynomial(t, w)));
    return __fmul_rn(x, x < 0.f ? tail : __fsub_rn(1.f, tail));
}

// x / (1 + exp(-v)) where v has the sign of x and the size high + low.
LB_DEV float times_logistic(float x, float high, float low) {
    const float power = exponential(-high, -low);
    return __fdiv_rn(x < 0.f ? __fmul_rn(x, power) : x, __fadd_rn(power, 1.f));
}

// v = x (linear + cubic x^2) in two float32.
LB_DEV float gelu_tanh(float x) {
    const float size = fabsf(x), square = __fmul_rn(size, size), square_rest = __fmaf_rn(size, size, -square);
    const float product = __fmul_rn(0x1.2444f2p-4f, square);
    float product_rest = __fmaf_rn(0x1.2444f2p-4f, square, -product);
    product_rest = __fmaf_rn(0x1.2444f2p-4f, square_rest, product_rest);
    product_rest = __fmaf_rn(0x1.49b16ap-29f, square, product_rest);
    const float factor = __fadd_rn(0x1.988454p+0f, product), back = __fsub_rn(factor, 0x1.988454p+0f);
    const float lost = __fadd_rn(__fsub_rn(0x1.988454p+0f, __fsub_rn(factor, back)), __fsub_rn(product, back));
    const float factor_rest = __fadd_rn(__fadd_rn(lost, product_rest), -0x1.857936p-25f);
    const float high = __fmul_rn(size, factor);
    return times_logistic(x, high, __fmaf_rn(size, factor_rest, __fmaf_rn(size, factor, -high)));
}

template <Activation A> LB_DEV float activate(float x) {
    if constexpr (A == Activation::relu) return x <= 0.f ? 0.f : x;
    float y = x;
    if constexpr (A == Activation::gelu) y = gelu(x);
    if constexpr (A == Activation::gelu_tanh) y = gelu_tanh(x);
    if constexpr (A == Activation::silu) y = times_logistic(x, fabsf(x), 0.f);
    // There the exponential is 0; an infinite x would make it NaN.
    return A != Activation::none && x < -105.f ? -0.f : y;
}

}  // namespace lb

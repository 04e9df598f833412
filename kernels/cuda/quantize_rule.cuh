// The scale rule: formats/scaling.py and formats/reference.py for one block, one float32 operation after
// another. What they refuse sets the flag; the caller then asks them.
//
// F, written from a format's declaration by emit_quantize.py, has: Element; Scale, Zero (how they are
// kept, None without zero points); bias, tensor_scale, rule, apart (whether both extremes count, or the
// largest magnitude alone); bottom, top, the values that the ends of a block map to; low, the smallest
// value; levels, between the smallest and the largest value; exponent and mantissa, for the MX rules;
// quick, whether its codes leave quotients below 2^-30 to the code of zero.
#pragma once
#include "quantize_elements.cuh"

namespace lb::quant {

enum class Rule { absmax, signed_max, power_floor, power_ceil, power_rceil, power_even };

// How scales and zero points are kept: a float dtype, codes of an element, or whole numbers.
struct None { using Stored = u8; static constexpr bool present = false, whole = false; };
template <class X> struct Float : X { static constexpr bool present = true, power = false, codes = false; };
template <class E, bool IsPower, class T> struct Codes {
    using Stored = u8;
    static constexpr bool present = true, power = IsPower, codes = true;
    static LB_DEV float number(Stored s) { return E::decode(s); }
    static LB_DEV float most() { return T::most(); }
    static LB_DEV u32 nearest(float v) { return max(E::encode(v), T::least); }
    // What a given scale becomes; false: it lies outside of the range.
    static LB_DEV bool given(double v, Stored& s) {
        s = u8(E::encode(odd(v)));
        return v >= T::given_low() && v <= T::given_high();
    }
};
template <class T> struct Integers {  // zero points of a byte
    using Stored = u8;
    static constexpr bool present = true, whole = true;
    static LB_DEV float number(Stored s) { return T::negative ? float(static_cast<signed char>(s)) : float(s); }
    static LB_DEV Stored narrow(float v) { return u8(int(rintf(fminf(fmaxf(v, T::low()), T::high())))); }
    static LB_DEV Stored narrow(double v) { return u8(int(rint(fmin(fmax(v, double(T::low())), double(T::high()))))); }
};

// From numbers to codes: y = (x - bias) / step + zero.
struct Coder {
    float step, inverse, offset;
    LB_DEV Coder(float step_, float offset_) : step(step_), inverse(div(1.f, step_)), offset(offset_) {}
    // Whether `scaled` may multiply by the reciprocal: neither it, nor remainders, nor quotients of
    // magnitudes up to `most` leave float32's normal range. Numerators below 2^-100 lose remainders;
    // their quotients are below 2^-30.
    template <class F> LB_DEV bool quick(float most) const {
        const float size = fabsf(step);
        return F::quick && size >= bits<float>(57u << 23) && size <= bits<float>(227u << 23)  // 2^-70, 2^100
            && fabsf(mul(most, inverse)) <= bits<float>(253u << 23);              // 2^126
    }
};

LB_DEV void refuse(u32* flag) { atomicExch(flag, 1u); }

LB_DEV float not_underflowed(float wanted, bool needed) {
    return wanted == 0.f && needed ? copysignf(tiny(), wanted) : wanted;
}

// scaling.ideal; `bad` is set where the element lacks the data's sign.
template <class F> LB_DEV float ideal(float low, float high, bool& bad) {
    if constexpr (F::Zero::present || F::bias) {
        const float span = sub(high, low);
        const float wanted = finite(span) ? div(span, F::levels()) : sub(div(high, F::levels()), div(low, F::levels()));
        return not_underflowed(wanted, high > low);
    } else {
        if ((F::bottom() == 0.f && low < 0.f) || (F::top() == 0.f && high > 0.f)) bad = true;
        const float extreme = high > -low ? high : low;
        if constexpr (F::rule == Rule::signed_max) return not_underflowed(div(extreme, F::low()), extreme != 0.f);
        if constexpr (F::rule == Rule::power_floor || F::rule == Rule::power_ceil || F::rule == Rule::power_even)
            return fabsf(extreme);
        if constexpr (!F::apart) return not_underflowed(div(high, F::top()), high > 0.f);
        float wanted = 0.f;
        if (F::top() > 0.f) wanted = fmaxf(wanted, div(high, F::top()));
        if (F::bottom() < 0.f) wanted = fmaxf(wanted, div(low, F::bottom()));
        return not_underflowed(fabsf(wanted), extreme != 0.f);
    }
}

// scaling.power_codes
template <class F> LB_DEV u32 power_code(float size, bool& bad) {
    if (size == 0.f) return 127;
    int down = 127;
    if (bits<u32>(size) < 0x00800000u) size = mul(size, 16777216.f), down += 24;  // subnormal
    const u32 pattern = bits<u32>(size), part = pattern & 0x7fffffu;
    int exponent = int(pattern >> 23) - down;
    if constexpr (F::rule == Rule::power_ceil || F::rule == Rule::power_rceil) exponent += part != 0;
    if constexpr (F::rule == Rule::power_even) exponent += part >= 0x800000u - (0x400000u >> F::mantissa);
    if constexpr (F::rule != Rule::power_rceil) exponent -= F::exponent;
    if (exponent > 127) bad = true;
    return max(exponent + 127, 0) & 0xff;
}

// scaling.encode_scales
template <class F> LB_DEV typename F::Scale::Stored stored_scale(float wanted, bool& bad) {
    using Scale = typename F::Scale;
    if constexpr (Scale::power) return u8(power_code<F>(wanted, bad));
    if (wanted == 0.f) wanted = 1.f;
    if constexpr (Scale::codes) {
        const float size = fabsf(wanted);
        if (!(size <= Scale::most())) bad = true;
        return u8(Scale::nearest(size));
    } else {
        typename Scale::Stored s = Scale::narrow(wanted);
        if (Scale::number(s) == 0.f) s |= 1;  // of every float type the smallest number, of either sign
        if (!finite(Scale::number(s))) bad = true;
        return s;
    }
}

template <class Kept> LB_DEV void keep(void* at, i64 index, typename Kept::Stored s) {
    static_cast<typename Kept::Stored*>(at)[index] = s;
}
template <class Kept> LB_DEV float kept(const void* at, i64 index) {
    return Kept::number(static_cast<const typename Kept::Stored*>(at)[index]);
}

// Scales, zero points and biases of a matrix, a row of blocks after the other.
struct Parts {
    void *scales, *zeros, *biases;
};

template <class F> LB_DEV float step_of(typename F::Scale::Stored s, float second, bool& bad) {
    float step = F::Scale::number(s);
    if constexpr (F::tensor_scale) step = mul(step, second);
    if (!finite(step) || step == 0.f) bad = true;
    return step;
}

// The float32 of a zero point or a bias that was rounded to a float type.
template <class Kept> LB_DEV float checked(typename Kept::Stored s, bool& bad) {
    const float v = Kept::number(s);
    if (!finite(v)) bad = true;
    return v;
}

// Zero is counted in unless the offset is a float.
template <class F> LB_DEV void count_zero(float& low, float& high) {
    if constexpr (!F::bias && (!F::Zero::present || F::Zero::whole)) low = fminf(low, 0.f), high = fmaxf(high, 0.f);
}

template <class F> LB_DEV float wanted_scale(float low, float high, float second, bool& bad) {
    float wanted = ideal<F>(low, high, bad);
    if constexpr (F::tensor_scale) {  // reference._shared_out
        const bool needed = wanted != 0.f;
        wanted = div(wanted, second);
        if constexpr (F::Scale::codes) wanted = fminf(fmaxf(wanted, -F::Scale::most()), F::Scale::most());
        if (wanted == 0.f && needed) wanted = tiny();
    }
    return wanted;
}

// One block's numbers from its extremes; `writes` by the one thread that stores them.
template <class F> LB_DEV Coder block_parts(const Extremes<F::apart>& found, float second, const Parts& parts, i64 index,
                                            bool writes, u32* flag) {
    using Scale = typename F::Scale;
    using Zero = typename F::Zero;
    bool bad = !found.finite();
    float low = found.low(), high = found.high(), offset = 0.f;
    count_zero<F>(low, high);
    if constexpr (F::tensor_scale) bad |= !(second > 0.f && finite(second));
    const auto stored = stored_scale<F>(wanted_scale<F>(low, high, second, bad), bad);
    const float step = step_of<F>(stored, second, bad);
    if (writes) keep<Scale>(parts.scales, index, stored);
    if constexpr (F::bias) {
        // Which zero NumPy takes for the least number is its own affair.
        if (F::low() == 0.f && bits<u32>(low) == 0x80000000u) bad = true;
        const auto bias = Scale::narrow(sub(low, mul(F::low(), step)));
        offset = checked<Scale>(bias, bad);
        if (writes) keep<Scale>(parts.biases, index, bias);
    }
    if constexpr (Zero::present) {
        const auto zero = Zero::narrow(sub(F::low(), div(low, step)));
        offset = checked<Zero>(zero, bad);
        if (writes) keep<Zero>(parts.zeros, index, zero);
    }
    if (writes && bad) refuse(flag);
    return Coder(step, offset);
}

template <class F> LB_DEV u32 code_of(float quotient, const Coder& coder) {
    if constexpr (F::Zero::present) quotient = add(quotient, coder.offset);
    return F::Element::encode(quotient);
}
// The number that the step divides.
template <class F> LB_DEV float numerator(float v, const Coder& coder) {
    if constexpr (F::bias) return sub(v, coder.offset);
    return v;
}

// The codes of the first `count` numbers; those of the others are 0.
template <class F, class X> LB_DEV u64 encode(const Octet<X>& octet, int count, const Coder& coder, bool quick) {
    constexpr int width = F::Element::width;
    float y[8];
    u32 code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = numerator<F>(octet.number(i), coder);
    if (quick) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // Markstein: the product with the rounded reciprocal, mended by its exact remainder, is
            // the rounded quotient. The signs keep that of -0.
            const float guess = mul(y[i], coder.inverse);
            y[i] = __fmaf_rn(-__fmaf_rn(coder.step, guess, -y[i]), coder.inverse, guess);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = div(y[i], coder.step);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = code_of<F>(y[i], coder);
    u64 stream = pack<width>(code);
    if (count < 8) stream &= ~(~u64(0) << count * width);
    return stream;
}

template <class F> LB_DEV void store_codes(u8* row, i64 column, int count, int align, u64 stream) {
    constexpr int width = F::Element::width;
    store_bytes<width>(row + column / 8 * width, stream, (count * width + 7) / 8, align);
}

}  // namespace lb::quant

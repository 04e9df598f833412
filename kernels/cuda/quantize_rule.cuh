// The scale rule: formats/scaling.py and formats/reference.py for one block, one float32 operation after
// another. What they refuse sets the flag; the caller then asks them.
//
// F, written from a format's declaration by emit_quantize.py, has: Element; Scale, Zero (how they are
// kept, None without zero points); bias, tensor_scale, rule, apart (whether both extremes count, or the
// largest magnitude alone); bottom, top, the values that the ends of a block map to; low, the smallest
// value; levels, between the smallest and the largest value; exponent and mantissa, for the MX rules;
// quick, whether quotients below 2^-30 have the code of a zero, and none above 2^90 one of its own.
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

// Whether quotients are products with the reciprocal: not for elements that tell very small or very large
// ones apart, nor where a zero point might bring a quotient of any size back into range.
template <class F, bool Unbounded> constexpr bool multiplies = F::quick && !(Unbounded && F::Zero::present && !F::Zero::whole);

// From numbers to codes: y = (x - bias) / step + zero. Where the step is no divisor for `quotient`, both
// it and numerators are moved by a power of two, which is exact for all that do not saturate or vanish.
struct Coder {
    float moved, step, inverse, offset;
    LB_DEV Coder(float step_, float offset_, bool moves) : offset(offset_) {
        const float size = fabsf(step_);
        moved = !moves ? 1.f : size < power(-70) ? power(100) : size > power(100) ? power(-64) : 1.f;
        step = mul(step_, moved);
        inverse = div(1.f, step);
    }
    static LB_DEV float power(int exponent) { return bits<float>(u32(127 + exponent) << 23); }
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
    using Stored = typename Kept::Stored;
    return Kept::number(load_number<Stored>(static_cast<const u8*>(at) + index * i64(sizeof(Stored))));
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
    return Coder(step, offset, multiplies<F, F::tensor_scale>);
}

// v / step, rounded once. Markstein: the product with the rounded reciprocal, mended by its exact remainder,
// is the rounded quotient; the signs keep that of -0. It takes steps in [2^-70, 2^100] and quotients that
// are no larger than 2^100. Numerators below 2^-100 lose remainders, but their quotients are below 2^-30.
// Unbounded: larger quotients than the element's values may come, for which any will do.
template <class F, bool Unbounded> LB_DEV float quotient(float v, const Coder& coder) {
    if constexpr (!multiplies<F, Unbounded>) return div(v, coder.step);
    const float guess = mul(v, coder.inverse);
    const float mended = __fmaf_rn(-__fmaf_rn(coder.step, guess, -v), coder.inverse, guess);
    if constexpr (Unbounded) return fabsf(guess) <= Coder::power(100) ? mended : guess;
    return mended;
}
// What is divided.
template <class F> LB_DEV float numerator(float v, const Coder& coder) {
    if constexpr (F::bias) return sub(v, coder.offset);
    return v;
}
template <class F, bool Unbounded> LB_DEV u32 code_of(float numerator, const Coder& coder) {
    float y = quotient<F, Unbounded>(numerator, coder);
    if constexpr (F::Zero::present) y = add(y, coder.offset);
    return F::Element::encode(y);
}

// The codes of the first `count` numbers; those of the others are 0.
template <class F, bool Unbounded, class X> LB_DEV u64 encode(const Octet<X>& octet, int count, const Coder& coder) {
    constexpr int width = F::Element::width;
    float v[8];
    u32 code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = numerator<F>(octet.number(i), coder);
    if (coder.moved != 1.f) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = mul(v[i], coder.moved);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = code_of<F, Unbounded>(v[i], coder);
    u64 stream = pack<width>(code);
    if (count < 8) stream &= ~(~u64(0) << count * width);
    return stream;
}

template <class F> LB_DEV void store_codes(u8* row, i64 column, int count, int align, u64 stream) {
    constexpr int width = F::Element::width;
    store_bytes<width>(row + column / 8 * width, stream, (count * width + 7) / 8, align);
}

}  // namespace lb::quant

// Codes of every kind of element: encode(y) is the code of the nearest value, ties to the even code,
// beyond the ends the last one; decode(code) the value.
#pragma once
#include "quantize_numbers.cuh"

namespace lb::quant {

// Two's complement if Signed, times 2^Exponent.
template <int Bits, bool Signed, int Exponent> struct Whole {
    static constexpr int width = Bits;
    static constexpr bool searched = false;
    static LB_DEV u32 encode(float y) {
        constexpr float low = Signed ? -float(1 << (Bits - 1)) : 0.f, high = float((1 << (Bits - Signed)) - 1);
        if constexpr (Exponent != 0) y = mul(y, bits<float>(u32(127 - Exponent) << 23));
        y = fminf(fmaxf(y, low), high);
        // Next to 1.5 * 2^23 the spacing is 1: the addition rounds, and the low bits are the number.
        return bits<u32>(add(y, 12582912.f)) & ((1u << Bits) - 1);
    }
    static LB_DEV float decode(u32 code) {
        // 2^23 + u is a number, and so is what is left of it.
        constexpr u32 offset = Signed ? 1u << (Bits - 1) : 0;
        const float v = bits<float>(code ^ (0x4b000000u | offset)) - (8388608.f + float(offset));
        if constexpr (Exponent != 0) return mul(v, bits<float>(u32(127 + Exponent) << 23));
        return v;
    }
};

enum class Special { none, top_is_nan, ieee, minus_zero_is_nan };

// Sign, exponent, mantissa.
template <int Bits, int Mantissa, int Bias, Special Specials> struct Minifloat {
    static constexpr int width = Bits;
    static constexpr bool searched = false;
    static constexpr u32 sign = 1u << (Bits - 1), place = 23 - Mantissa;
    static constexpr u32 top =  // the largest finite magnitude
        Specials == Special::ieee ? ((sign - 1) & ~((1u << Mantissa) - 1)) - 1 : sign - 1 - (Specials == Special::top_is_nan);
    static LB_DEV u32 encode(float y) {
        constexpr u32 first = u32(128 - Bias) << 23;  // the smallest normal number
        constexpr u32 largest = (top << place) + (u32(127 - Bias) << 23);
        const u32 pattern = bits<u32>(y), size = min(pattern & 0x7fffffffu, largest);
        const u32 exponent = max(size, first) & infinite;
        // Next to 1.0 units in the last place times 2^23 a number is rounded as the mantissa is;
        // subnormal ones have the unit of the smallest normal number.
        const u32 unit = exponent + (place << 23);
        const u32 rounded = bits<u32>(add(bits<float>(size), bits<float>(unit))) - unit;
        const u32 code = rounded + ((exponent - first) >> place);
        if constexpr (Specials == Special::minus_zero_is_nan) {
            if (code == 0) return 0;
        }
        return code | (pattern >> (32 - Bits) & sign);
    }
    static LB_DEV float decode(u32 code) {
        const u32 size = code & (sign - 1);
        u32 v = bits<u32>(mul(bits<float>(size << place), bits<float>(u32(254 - Bias) << 23)));
        if constexpr (Specials == Special::top_is_nan) {
            if (size > top) v = not_a_number;
        }
        if constexpr (Specials == Special::ieee) {
            if (size > top) v = size == top + 1 ? infinite : not_a_number;
        }
        v |= (code & sign) << (32 - Bits);
        if constexpr (Specials == Special::minus_zero_is_nan) {
            if (code == sign) v = not_a_number;
        }
        return bits<float>(v);
    }
};

// Any table. T has: width; distinct, the number of its finite values in ascending order; edge(i), above
// which a number is nearer to value i + 1; code(i); zero and minus_zero, the codes of both, or -1;
// pattern(code), the float32 of a code.
template <class T> struct Table {
    static constexpr int width = T::width;
    static constexpr bool searched = true;  // in registers, which takes some
    static LB_DEV u32 encode(float y) {
        u32 code;
        if constexpr (T::distinct <= 16) {
            bool above[4] = {};
            above[0] = y > edge<0>(above);
            above[1] = y > edge<1>(above);
            above[2] = y > edge<2>(above);
            above[3] = y > edge<3>(above);
            code = T::code(above[0] * 8 + above[1] * 4 + above[2] * 2 + above[3]);
        } else {
            int index = 0;
            for (int half = 128; half; half >>= 1) {
                const int i = index + half - 1;
                if (i < T::distinct - 1 && y > T::edge(i)) index += half;
            }
            code = T::code(index);
        }
        if constexpr (T::minus_zero >= 0) {
            if (code == T::zero && bits<u32>(y) >> 31) code = T::minus_zero;
        }
        return code;
    }
    static LB_DEV float decode(u32 code) { return bits<float>(T::pattern(code)); }

  private:
    // The edge in the middle of what the first `Level` comparisons leave of 15.
    template <int Level, int I = 0, int Base = 0> static LB_DEV float edge(const bool (&above)[4]) {
        if constexpr (I == Level) return T::edge(Base + (8 >> Level) - 1);
        else return above[I] ? edge<Level, I + 1, Base + (8 >> I)>(above) : edge<Level, I + 1, Base>(above);
    }
};

// E8M0: 2^(code - 127).
struct Power {
    static constexpr int width = 8;
    static constexpr bool searched = false;
    static LB_DEV float decode(u32 code) {
        if (code == 255) return bits<float>(not_a_number);
        return bits<float>(code ? code << 23 : 0x00400000u);
    }
    // The nearest power, ties to the even code.
    static LB_DEV u32 encode(float y) {
        u32 pattern = bits<u32>(y);
        if (pattern <= 0x00400000u) return 0;  // 2^-127 and less
        if (pattern < 0x00800000u) return pattern > 0x00600000u;  // 1.5 * 2^-127 is a tie
        const u32 code = pattern >> 23, part = pattern & 0x7fffffu;
        return min(code + (part > 0x400000u || (part == 0x400000u && code % 2)), 254u);
    }
};

// Eight codes as `Bits` bytes, code i in bits [i * Bits, (i + 1) * Bits).
template <int Bits> LB_DEV u64 pack(const u32 (&code)[8]) {
    u32 low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) low |= code[i] << i * Bits, high |= code[i + 4] << i * Bits;
    return low | u64(high) << 4 * Bits;
}
template <int Bits> LB_DEV u32 unpack(u64 stream, int i) {
    return u32(stream >> i * Bits) & ((1u << Bits) - 1);
}

}  // namespace lb::quant

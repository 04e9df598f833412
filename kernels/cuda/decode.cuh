// From packed codes to the operands of tensor cores, in registers.
//
// Codes come in octets: eight codes of `Bits` bits, codes 0..3 in the low 4 * Bits bits of `low`, codes
// 4..7 in those of `high` (bits above them may be anything). An octet becomes four registers of two
// 16-bit numbers each. Their order is the element's choice, and x follows it:
//
//     Adjacent   (0, 1) (2, 3) (4, 5) (6, 7)      Spread   (0, 4) (1, 5) (2, 6) (3, 7)
//
// `pair` does the same for two codes in the halves of a register.
//
// A sum over k does not care which code meets which lane of the tensor core, as long as x's does.
#pragma once
#include "primitives.cuh"

namespace lb {

LB_DEV constexpr u32 twice(u32 half) { return half | half << 16; }

// ---- what tensor cores multiply ---------------------------------------------------------------------------
// `magic` holds 2^mantissa: with a whole number u < 2^mantissa in its low bits it is 2^mantissa + u.
struct Half {
    using Number = __half;
    using Sum = float;
    static constexpr int mantissa = 10, bias = 15;
    static constexpr u32 magic = 0x6400;
    static LB_DEV u32 fma(u32 a, u32 b, u32 c) { return bits<u32>(hfma2(bits<__half2>(a), bits<__half2>(b), bits<__half2>(c))); }
    static LB_DEV u32 pack(float a, float b) { return bits<u32>(__floats2half2_rn(a, b)); }
    static LB_DEV float low(u32 pair) { return __low2float(bits<__half2>(pair)); }
    static LB_DEV float high(u32 pair) { return __high2float(bits<__half2>(pair)); }
    static LB_DEV void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_m16n8k16_f16(c, a, b); }
    // The bits of 2^exponent.
    static LB_DEV constexpr u32 power(int exponent) { return u32(exponent + bias) << mantissa; }
};
struct Bfloat16 {
    using Number = __nv_bfloat16;
    using Sum = float;
    static constexpr int mantissa = 7, bias = 127;
    static constexpr u32 magic = 0x4300;
    static LB_DEV u32 fma(u32 a, u32 b, u32 c) { return bits<u32>(bfma2(bits<__nv_bfloat162>(a), bits<__nv_bfloat162>(b), bits<__nv_bfloat162>(c))); }
    static LB_DEV u32 pack(float a, float b) { return bits<u32>(__floats2bfloat162_rn(a, b)); }
    static LB_DEV float low(u32 pair) { return bits<float>(pair << 16); }
    static LB_DEV float high(u32 pair) { return bits<float>(pair & 0xffff0000u); }
    static LB_DEV void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_m16n8k16_bf16(c, a, b); }
    static LB_DEV constexpr u32 power(int exponent) { return u32(exponent + bias) << mantissa; }
};
// The bits of a whole number below 2^(mantissa + 1), times 2^-down: exact.
template <class Op> LB_DEV constexpr u32 whole(u32 number, int down = 0) {
    int exponent = 0;
    while (number >> (exponent + 1)) ++exponent;
    const u32 fraction = number ? (number << (Op::mantissa - exponent)) & ((1u << Op::mantissa) - 1) : 0;
    return number ? u32(exponent - down + Op::bias) << Op::mantissa | fraction : 0;
}

// ---- octets ---------------------------------------------------------------------------------------------------
// Bits [At, At + Count) of a string of words; what lies above them in the result may be anything.
template <int Words> LB_DEV u32 field(const u32 (&words)[Words], int at, int count) {
    const int word = at / 32, shift = at % 32;
    return shift + count <= 32 ? words[word] >> shift : __funnelshift_r(words[word], words[word + 1 < Words ? word + 1 : word], shift);
}
template <int Bits, int Words> LB_DEV void octet(u32& low, u32& high, const u32 (&words)[Words], int index) {
    low = field(words, 8 * Bits * index, 4 * Bits);
    high = field(words, 8 * Bits * index + 4 * Bits, 4 * Bits);
}
// Codes of up to 4 bits, code j in bits j * Bits.. and code j + 4 sixteen bits above it.
template <int Bits> LB_DEV u32 spread(u32 low, u32 high) {
    if constexpr (Bits == 4) return (low & 0xffffu) | high << 16;
    return (low & ((1u << 4 * Bits) - 1)) | high << 16;
}
// Codes 2 j and 2 j + 1 in the halves of a register.
template <int Bits> LB_DEV u32 neighbours(u32 low, u32 high, int j) {
    const u32 from = j < 2 ? low : high;
    const int at = j % 2 * 2 * Bits;
    if constexpr (Bits == 8) return __byte_perm(from, 0, at ? 0x4342 : 0x4140);
    constexpr u32 mask = (1u << Bits) - 1;
    return (from >> at & mask) | (from >> at + Bits & mask) << 16;
}

// Codes 2 t and 2 t + 1 of an octet, where t is known at run time only.
template <int Bits, int Words> LB_DEV u32 neighbours_at(const u32 (&words)[Words], int index, int t) {
    if constexpr (Bits == 4) return __byte_perm(words[index], words[index] >> 4, 0x0400 + t * 0x0101) & 0x000f000fu;
    u32 low, high;
    octet<Bits>(low, high, words, index);
    constexpr u32 mask = (1u << Bits) - 1;
    const u32 codes = (t & 2 ? high : low) >> (t & 1) * 2 * Bits;
    return (codes & mask) | (codes >> Bits & mask) << 16;
}

// ---- elements -------------------------------------------------------------------------------------------------
// Two's complement if Signed. Exact: 2^mantissa + u is a number, and so is what is left of it.
template <class Op_, int Bits_, bool Signed> struct Integer {
    using Op = Op_;
    static constexpr int Bits = Bits_;
    static constexpr bool adjacent = Bits > 4;
    static constexpr u32 offset = Signed ? 1u << (Bits - 1) : 0;  // added to make codes unsigned
    static LB_DEV void decode(u32 (&out)[4], u32 low, u32 high) {
        if constexpr (adjacent) {
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] = pair(neighbours<Bits>(low, high, j));
        } else {
            u32 codes = spread<Bits>(low, high);
            if constexpr (Signed) codes ^= twice(offset * (1u | 1u << Bits | 1u << 2 * Bits | 1u << 3 * Bits));
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] = number(codes, j);
        }
    }
    static LB_DEV u32 pair(u32 codes) {
        if constexpr (Bits == 8 && Op::mantissa < 8) {
            // Seven bits as they are, the eighth as -128.
            if constexpr (!Signed) codes ^= 0x00800080u;
            const u32 number = (codes & 0x007f007fu) | 0x43004300u, top = (codes & 0x00800080u) | 0xc300c300u;
            const u32 found = Op::fma(number, twice(Op::power(0)), top);
            return Signed ? found : Op::fma(found, twice(Op::power(0)), twice(whole<Op>(128)));
        }
        return Op::fma((codes ^ twice(offset)) | twice(Op::magic), twice(Op::power(0)), twice(minus(0)));
    }

  private:
    // A field that lies `place` bits up is 2^place times the number: fewer shifts.
    static LB_DEV u32 number(u32 codes, int j) {
        constexpr int room = Op::mantissa / Bits;  // fields that one shift serves
        constexpr u32 mask = (1u << Bits) - 1;
        const int place = j % room * Bits, shift = j * Bits - place;
        const u32 field = (codes >> shift & twice(mask << place)) | twice(Op::magic);
        return Op::fma(field, twice(Op::power(-place)), twice(minus(place)));
    }
    static LB_DEV constexpr u32 minus(int place) {  // -(2^mantissa 2^-place + offset)
        return 1u << 15 | whole<Op>((1u << (Op::mantissa - place)) + offset);
    }
};

#if defined(LOWBIT_EMU) || __CUDA_ARCH__ >= 890
constexpr bool converts_e4m3 = true;  // to halves, by one instruction for two
#else
constexpr bool converts_e4m3 = false;
#endif

enum class Special { none, top_is_nan, ieee, minus_zero_is_nan };

// Sign, exponent, mantissa: the fields move to where Op has them, and a product mends the exponent.
template <class Op_, int Bits_, int Mantissa, int Bias, Special Specials> struct Minifloat {
    using Op = Op_;
    static constexpr int Bits = Bits_;
    static constexpr bool adjacent = Bits > 4;
    static constexpr bool converts = converts_e4m3 && Op::mantissa == 10 && Mantissa == 3 && Specials == Special::top_is_nan;
    static LB_DEV void decode(u32 (&out)[4], u32 low, u32 high) {
        if constexpr (converts) {
            out[0] = bits<u32>(e4m3_to_half2(low & 0xffffu)), out[1] = bits<u32>(e4m3_to_half2(low >> 16));
            out[2] = bits<u32>(e4m3_to_half2(high & 0xffffu)), out[3] = bits<u32>(e4m3_to_half2(high >> 16));
            return;
        }
        [[maybe_unused]] u32 codes = 0;
        if constexpr (!adjacent) codes = spread<Bits>(low, high);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (adjacent) out[j] = pair(neighbours<Bits>(low, high, j));
            else out[j] = pair(codes >> j * Bits);
        }
    }
    static LB_DEV u32 pair(u32 codes) {
        if constexpr (converts) return bits<u32>(e4m3_to_half2(__byte_perm(codes, 0, 0x4420)));
        const u32 magnitude = (codes & twice((1u << (Bits - 1)) - 1)) << (Op::mantissa - Mantissa);
        const u32 sign = (codes & twice(1u << (Bits - 1))) << (16 - Bits);
        u32 number = magnitude | sign;
        if constexpr (Op::bias != Bias) number = Op::fma(number, twice(Op::power(Op::bias - Bias)), 0x80008000u);
        return special(number, codes);
    }

  private:
    static LB_DEV u32 special(u32 number, u32 pair) {
        if constexpr (Specials == Special::none || (Specials == Special::ieee && Op::bias == Bias)) return number;
        u32 found = 0;
        if constexpr (Specials == Special::minus_zero_is_nan) {
            if ((pair & 0x00ffu) == 0x0080u) found |= 0x7fffu;
            if ((pair & 0x00ff0000u) == 0x00800000u) found |= 0x7fff0000u;
        } else {
            constexpr u32 least = Specials == Special::top_is_nan ? 0x7f : 0x7f & ~((1u << Mantissa) - 1);
            constexpr u32 all = Specials == Special::top_is_nan ? 0x7fff : ((1u << (15 - Op::mantissa)) - 1) << Op::mantissa;
            if ((pair & 0x007fu) >= least) found |= all;
            if ((pair & 0x007f0000u) >= least << 16) found |= all << 16;
        }
        return number | found;
    }
};

// A table of numbers, rounded to Op's: up to 16 of them in registers, looked up by byte permutes.
template <class Table> struct Codebook {
    using Op = typename Table::Op;
    static constexpr int Bits = Table::bits;
    static constexpr bool adjacent = true;
    static LB_DEV void decode(u32 (&out)[4], u32 low, u32 high) {
        if constexpr (Bits > 4) {
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] = pair(neighbours<Bits>(low, high, j));
        } else {
            four(out[0], out[1], nibbles(low));
            four(out[2], out[3], nibbles(high));
        }
    }
    static LB_DEV u32 pair(u32 codes) {
        if constexpr (Bits > 4) {
            return Table::at(codes & 0xffffu) | u32(Table::at(codes >> 16)) << 16;
        } else {
            u32 found, other;
            four(found, other, (codes & 15u) | (codes >> 12 & 0xf0u));
            return found;
        }
    }

  private:
    static LB_DEV u32 nibbles(u32 codes) {
        if constexpr (Bits == 4) return codes & 0xffffu;
        constexpr u32 mask = (1u << Bits) - 1;
        return (codes & mask) | (codes >> Bits & mask) << 4 | (codes >> 2 * Bits & mask) << 8 | (codes >> 3 * Bits & mask) << 12;
    }
    // Bit 3 of a code chooses between the halves of the table, bits 0..2 within them.
    static LB_DEV void four(u32& first, u32& second, u32 codes) {
        const u32 inside = codes & 0x7777u, half = 0x3210u | (codes & 0x8888u) >> 1;
        const u32 low = __byte_perm(__byte_perm(Table::low(0), Table::low(1), inside), __byte_perm(Table::low(2), Table::low(3), inside), half);
        const u32 high = __byte_perm(__byte_perm(Table::high(0), Table::high(1), inside), __byte_perm(Table::high(2), Table::high(3), inside), half);
        first = __byte_perm(low, high, 0x5140);
        second = __byte_perm(low, high, 0x7362);
    }
};

// ---- operands of integer tensor cores: bytes ---------------------------------------------------------------------
// An octet becomes two registers of four signed (or, for uint8, unsigned) bytes each. Codes of 4 bits or fewer come
// as (0, 2, 4, 6) (1, 3, 5, 7), else as (0, 1, 2, 3) (4, 5, 6, 7).
template <int Bits_, bool Signed> struct Bytes {
    static constexpr int Bits = Bits_;
    static constexpr bool alternating = Bits == 4;
    static LB_DEV void decode(u32 (&out)[2], u32 low, u32 high) {
        if constexpr (alternating) {
            const u32 codes = (low & 0xffffu) | high << 16;
            out[0] = codes & 0x0f0f0f0fu;
            out[1] = codes >> 4 & 0x0f0f0f0fu;
        } else if constexpr (Bits == 8) {
            out[0] = low, out[1] = high;
        } else {
            out[0] = four(low), out[1] = four(high);
        }
        if constexpr (Signed && Bits < 8) {
            // x ^ s - s of every byte: without borrows, as x ^ s < 2^Bits and the top bit is set beforehand.
            constexpr u32 sign = 0x01010101u << (Bits - 1);
#pragma unroll
            for (int i = 0; i < 2; ++i) out[i] = (((out[i] ^ sign) | 0x80808080u) - sign) ^ 0x80808080u;
        }
    }

  private:
    static LB_DEV u32 four(u32 codes) {
        constexpr u32 mask = (1u << Bits) - 1;
        return (codes & mask) | (codes >> Bits & mask) << 8 | (codes >> 2 * Bits & mask) << 16 | (codes >> 3 * Bits & mask) << 24;
    }
};

}  // namespace lb

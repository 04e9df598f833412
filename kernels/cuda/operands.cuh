// How the rows of both operands become registers of tensor cores, and where a weight's scales are found.
#pragma once
#include "decode.cuh"

namespace lb {

// ---- words -------------------------------------------------------------------------------------------------
// Bytes of shared memory to words, by loads as wide as their number allows.
template <int Bytes, int Words> LB_DEV void words_of(u32 (&words)[Words], const u8* from) {
    static_assert(Words == (Bytes + 3) / 4, "words_of: too many or too few words");
    if constexpr (Bytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < Bytes / 16; ++i) {
            const uint4 v = reinterpret_cast<const uint4*>(from)[i];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else if constexpr (Bytes % 8 == 0) {
#pragma unroll
        for (int i = 0; i < Bytes / 8; ++i) {
            const uint2 v = reinterpret_cast<const uint2*>(from)[i];
            words[2 * i] = v.x, words[2 * i + 1] = v.y;
        }
    } else if constexpr (Bytes % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Bytes / 4; ++i) words[i] = reinterpret_cast<const u32*>(from)[i];
    } else {
        constexpr int size = Bytes % 2 ? 1 : 2;
#pragma unroll
        for (int i = 0; i < Words; ++i) words[i] = 0;
#pragma unroll
        for (int i = 0; i < Bytes / size; ++i) {
            const u32 piece = size == 2 ? reinterpret_cast<const unsigned short*>(from)[i] : from[i];
            words[i * size / 4] |= piece << i * size % 4 * 8;
        }
    }
}

// ---- operands of x -----------------------------------------------------------------------------------------
// Each gives `terms` operands that add up to x, in the order of w's: adjacent or spread; see decode.cuh.
template <bool Adjacent> LB_DEV void order(u32 (&p)[4]) {  // from adjacent
    if constexpr (!Adjacent) {
        const u32 first = __byte_perm(p[0], p[2], 0x5410), second = __byte_perm(p[0], p[2], 0x7632);
        const u32 third = __byte_perm(p[1], p[3], 0x5410), fourth = __byte_perm(p[1], p[3], 0x7632);
        p[0] = first, p[1] = second, p[2] = third, p[3] = fourth;
    }
}
template <class A, class B> constexpr bool same_type = false;
template <class A> constexpr bool same_type<A, A> = true;

template <class Op_, class Number> struct Dense {  // in Op's own numbers, or as a sum of bfloat16 ones
    using Op = Op_;
    static constexpr bool same = same_type<Number, typename Op::Number>;
    static constexpr int octet = 8 * int(sizeof(Number)), terms = same ? 1 : sizeof(Number) == 4 ? 3 : 2;
    template <bool Adjacent, int Words> static LB_DEV void decode(u32 (&out)[terms][4], const u32 (&words)[Words]) {
        if constexpr (same) {
#pragma unroll
            for (int j = 0; j < 4; ++j) out[0][j] = words[j];
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float a, b;
                if constexpr (sizeof(Number) == 4) a = bits<float>(words[2 * j]), b = bits<float>(words[2 * j + 1]);
                else a = Half::low(words[j]), b = Half::high(words[j]);
#pragma unroll
                for (int term = 0; term < terms; ++term) {  // what one number leaves, the next one takes
                    out[term][j] = __byte_perm(bits<u32>(a), bits<u32>(b), 0x7632);  // cut, which never overflows
                    a = rest(a, Op::low(out[term][j])), b = rest(b, Op::high(out[term][j]));
                }
            }
        }
#pragma unroll
        for (int term = 0; term < terms; ++term) order<Adjacent>(out[term]);
    }

  private:
    static LB_DEV float rest(float a, float taken) { return fabsf(a) == bits<float>(0x7f800000u) ? 0.f : a - taken; }
};
template <class Element> struct Coded {  // codes of a format
    using Op = typename Element::Op;
    static constexpr int octet = Element::Bits, terms = 1;
    template <bool Adjacent, int Words> static LB_DEV void decode(u32 (&out)[1][4], const u32 (&words)[Words]) {
        u32 low, high;
        lb::octet<Element::Bits>(low, high, words, 0);
        Element::decode(out[0], low, high);
        if constexpr (Element::adjacent) order<Adjacent>(out[0]);
        else if constexpr (Adjacent) {
            const u32 (&p)[4] = out[0];
            const u32 first = __byte_perm(p[0], p[1], 0x5410), second = __byte_perm(p[2], p[3], 0x5410);
            const u32 third = __byte_perm(p[0], p[1], 0x7632), fourth = __byte_perm(p[2], p[3], 0x7632);
            out[0][0] = first, out[0][1] = second, out[0][2] = third, out[0][3] = fourth;
        }
    }
};
struct CodedFloat8 {
    static constexpr int octet = 8, terms = 1;
    template <bool, int Words> static LB_DEV void decode(u32 (&out)[1][2], const u32 (&words)[Words]) {
        out[0][0] = words[0], out[0][1] = words[1];
    }
};
template <int Bits> struct CodedBytes {  // of signed whole numbers
    static constexpr int octet = Bits, terms = 1;
    template <bool Alternating, int Words> static LB_DEV void decode(u32 (&out)[1][2], const u32 (&words)[Words]) {
        u32 low, high;
        lb::octet<Bits>(low, high, words, 0);
        Bytes<Bits, true>::decode(out[0], low, high);
        if constexpr (Alternating != Bytes<Bits, true>::alternating) {
            const u32 a = out[0][0], b = out[0][1];
            out[0][0] = __byte_perm(a, b, Alternating ? 0x6420 : 0x5140);
            out[0][1] = __byte_perm(a, b, Alternating ? 0x7531 : 0x7362);
        }
    }
};

// ---- operands of w -------------------------------------------------------------------------------------------
// Numbers, with integer zero points taken off: exact.
template <class Element_, bool Zeros> struct Numbers {
    using Element = Element_;
    using Op = typename Element::Op;
    using Sum = float;
    static constexpr int octet = Element::Bits, registers = 4;
    static constexpr bool order = Element::adjacent;
    template <int Words> static LB_DEV void decode(u32 (&out)[4], const u32 (&words)[Words], int i, float zero) {
        u32 low, high;
        lb::octet<Element::Bits>(low, high, words, i);
        Element::decode(out, low, high);
        if constexpr (Zeros) {
            const u32 minus = Op::pack(-zero, -zero);
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] = Op::fma(out[j], twice(Op::power(0)), minus);
        }
    }
    static LB_DEV void multiply(float (&c)[4], const u32 (&first)[4], const u32 (&second)[4], const u32 (&x)[4]) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const u32 a[4] = {first[2 * s], second[2 * s], first[2 * s + 1], second[2 * s + 1]}, b[2] = {x[2 * s], x[2 * s + 1]};
            Op::mma(c, a, b);
        }
    }
};
// Whole numbers whose sums are exact; `Unsigned` ones of 8 bits have an instruction of their own.
template <class Element_, bool Unsigned> struct Wholes {
    using Element = Element_;
    using Sum = int;
    static constexpr int octet = Element::Bits, registers = 2;
    static constexpr bool order = Element::alternating;
    template <int Words> static LB_DEV void decode(u32 (&out)[2], const u32 (&words)[Words], int i, float) {
        u32 low, high;
        lb::octet<Element::Bits>(low, high, words, i);
        Element::decode(out, low, high);
    }
    static LB_DEV void multiply(int (&c)[4], const u32 (&first)[2], const u32 (&second)[2], const u32 (&x)[2]) {
        const u32 a[4] = {first[0], second[0], first[1], second[1]};
        if constexpr (Unsigned) mma_m16n8k32_u8s8(c, a, x);
        else mma_m16n8k32_s8(c, a, x);
    }
};
// float8 as it is, on both sides; true is e5m2, false e4m3.
template <bool Left, bool Right> struct Float8s {
    using Sum = float;
    static constexpr int octet = 8, registers = 2;
    static constexpr bool order = false;
    template <int Words> static LB_DEV void decode(u32 (&out)[2], const u32 (&words)[Words], int i, float) {
        out[0] = words[2 * i], out[1] = words[2 * i + 1];
    }
    static LB_DEV void multiply(float (&c)[4], const u32 (&first)[2], const u32 (&second)[2], const u32 (&x)[2]) {
        const u32 a[4] = {first[0], second[0], first[1], second[1]};
        if constexpr (Left && Right) mma_m16n8k32_e5m2(c, a, x);
        else if constexpr (Left) mma_m16n8k32_e5m2e4m3(c, a, x);
        else if constexpr (Right) mma_m16n8k32_e4m3e5m2(c, a, x);
        else mma_m16n8k32_e4m3(c, a, x);
    }
};
// Every number scaled before it is rounded to Op's: for blocks that are too short for sums of their own.
template <class Element_, class Blocks> struct Folded {
    using Element = Element_;
    using Op = typename Element::Op;
    using Sum = float;
    static constexpr int octet = Element::Bits, registers = 4;
    static constexpr bool order = Element::adjacent;
    template <int Words>
    static LB_DEV void decode(u32 (&out)[4], const u32 (&words)[Words], int i, const Blocks& blocks, int row, int column) {
        u32 low, high;
        lb::octet<Element::Bits>(low, high, words, i);
        Element::decode(out, low, high);
        float scale, zero, bias;
        if (column >= blocks.columns) return;  // x is zero there
        blocks.load(scale, zero, bias, row, column);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int a = order ? 2 * j : j, b = order ? 2 * j + 1 : j + 4;
            if (!Blocks::octets) blocks.load(scale, zero, bias, row, column + a);
            const float first = fmaf(Op::low(out[j]) - zero, scale, bias);
            if (!Blocks::octets) blocks.load(scale, zero, bias, row, column + b);
            out[j] = Op::pack(first, fmaf(Op::high(out[j]) - zero, scale, bias));
        }
    }
    static LB_DEV void multiply(float (&c)[4], const u32 (&first)[4], const u32 (&second)[4], const u32 (&x)[4]) {
        Numbers<Element, false>::multiply(c, first, second, x);
    }
};

// ---- scales --------------------------------------------------------------------------------------------------
// Of a weight: a float dtype, or codes of an element; see emit.py. Blocks lie in rows, `pitch` of them each.
template <class Scale, class Zero, bool Biases, bool Octets> struct WeightBlocks {
    static constexpr bool octets = Octets;  // no block ends within an octet
    const typename Scale::Stored *scales, *biases;
    const typename Zero::Stored* zeros;
    int pitch, rows, width, columns;  // of a block: rows, columns; columns of all
    LB_DEV void load(float& scale, float& zero, float& bias, int row, int column) const {
        const int block = column < columns ? column / width : 0;
        const long long at = (long long)(row / rows) * pitch + block;
        scale = Scale::load(scales[at]);
        zero = Zero::present ? Zero::load(zeros[at]) : 0.f;
        bias = Biases ? Scale::load(biases[at]) : 0.f;
    }
};

}  // namespace lb

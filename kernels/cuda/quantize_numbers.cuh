// Numbers on their way into codes: float32 with one rounding a step, and octets of them in registers.
#pragma once
#include "primitives.cuh"

namespace lb::quant {

using u16 = unsigned short;
using u64 = unsigned long long;
using i64 = long long;

// ---- arithmetic of one rounding: never contracted into an fma ------------------------------------
LB_DEV float add(float a, float b) { return __fadd_rn(a, b); }
LB_DEV float sub(float a, float b) { return __fsub_rn(a, b); }
LB_DEV float mul(float a, float b) { return __fmul_rn(a, b); }
LB_DEV float div(float a, float b) { return __fdiv_rn(a, b); }
LB_DEV double add(double a, double b) { return __dadd_rn(a, b); }
LB_DEV double sub(double a, double b) { return __dsub_rn(a, b); }
LB_DEV double mul(double a, double b) { return __dmul_rn(a, b); }
#ifdef LOWBIT_EMU
// Exact in float64, so that the rounding to float32 tells on which side the product lies.
LB_DEV float mul_down(float a, float b) {
    const float near = a * b;
    return double(near) > double(a) * double(b) ? std::nextafter(near, -INFINITY) : near;
}
LB_DEV float mul_up(float a, float b) {
    const float near = a * b;
    return double(near) < double(a) * double(b) ? std::nextafter(near, INFINITY) : near;
}
#else
LB_DEV float mul_down(float a, float b) { return __fmul_rd(a, b); }
LB_DEV float mul_up(float a, float b) { return __fmul_ru(a, b); }
#endif

constexpr u32 infinite = 0x7f800000u, not_a_number = 0x7fc00000u;
LB_DEV u32 magnitude(float v) { return bits<u32>(v) & 0x7fffffffu; }
LB_DEV bool finite(float v) { return magnitude(v) < infinite; }
LB_DEV float tiny() { return bits<float>(1u); }  // 2^-149

// The float32 below a float64, its last bit set if it is not the number itself. Whatever rounds
// that to 22 bits or fewer rounds the float64.
LB_DEV float odd(double v) {
    u32 near = bits<u32>(float(v));
    if (fabs(double(bits<float>(near))) > fabs(v)) --near;
    if (double(bits<float>(near)) != v) near |= 1;
    return bits<float>(near);
}

// ---- float dtypes in memory -------------------------------------------------------------------------
struct Float32 {
    using Stored = u32;
    static constexpr bool whole = false;
    static LB_DEV float number(Stored s) { return bits<float>(s); }
    static LB_DEV Stored narrow(float v) { return bits<u32>(v); }
    static LB_DEV Stored narrow(double v) { return bits<u32>(float(v)); }
};
struct Float16 {
    using Stored = u16;
    static constexpr bool whole = false;
    static LB_DEV float number(Stored s) { return __half2float(bits<__half>(s)); }
    static LB_DEV Stored narrow(float v) { return bits<u16>(__float2half_rn(v)); }
    static LB_DEV Stored narrow(double v) { return narrow(odd(v)); }
};
struct Bfloat16 {
    using Stored = u16;
    static constexpr bool whole = false;
    static LB_DEV float number(Stored s) { return bits<float>(u32(s) << 16); }
    static LB_DEV Stored narrow(float v) { return bits<u16>(__float2bfloat16_rn(v)); }
    static LB_DEV Stored narrow(double v) { return narrow(odd(v)); }
};

// ---- eight numbers -----------------------------------------------------------------------------------
template <class X> struct Octet {
    static constexpr int size = sizeof(typename X::Stored), words = 2 * size;
    u32 word[words];
    LB_DEV typename X::Stored stored(int i) const {
        if constexpr (size == 4) return word[i];
        else return u16(word[i / 2] >> i % 2 * 16);
    }
    LB_DEV float number(int i) const {
        if constexpr (size == 4) return X::number(word[i]);
        else return X::number(stored(i));
    }
    // In ascending order: the first of a pair leaves none of what the word held.
    LB_DEV void put(int i, u32 s) {
        if constexpr (size == 4) word[i] = s;
        else word[i / 2] = i % 2 ? (word[i / 2] & 0xffffu) | s << 16 : s;
    }
};

// Numbers may lie anywhere: those of a view of bytes begin at odd addresses.
template <class T> LB_DEV T load_number(const u8* at) {
    if (reinterpret_cast<u64>(at) % sizeof(T) == 0) return *reinterpret_cast<const T*>(at);
    T number;
    memcpy(&number, at, sizeof number);
    return number;
}
template <class T> LB_DEV void store_number(u8* to, T number) {
    if (reinterpret_cast<u64>(to) % sizeof(T) == 0) *reinterpret_cast<T*>(to) = number;
    else memcpy(to, &number, sizeof number);
}

// The first `count` numbers from `at`, `step` bytes apart; others repeat the first one, which changes
// no extreme. `align` is what the address of every octet of the array is a multiple of.
template <class X> LB_DEV Octet<X> load(const u8* at, i64 step, int count, int align) {
    using Stored = typename X::Stored;
    Octet<X> octet;
    if (count == 8 && align >= 16) {
#pragma unroll
        for (int i = 0; i < octet.words; i += 4) {
            const uint4 v = load_once<uint4>(at + 4 * i);
            octet.word[i] = v.x, octet.word[i + 1] = v.y, octet.word[i + 2] = v.z, octet.word[i + 3] = v.w;
        }
    } else if (count == 8 && align >= 4) {
#pragma unroll
        for (int i = 0; i < octet.words; ++i) octet.word[i] = *reinterpret_cast<const u32*>(at + 4 * i);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) octet.put(i, load_number<Stored>(at + (i < count ? i * step : 0)));
    }
    return octet;
}

// The first `count` numbers to memory.
template <class X> LB_DEV void store(u8* to, const Octet<X>& octet, int count, int align) {
    if (count == 8 && align >= 8) {
#pragma unroll
        for (int i = 0; i < octet.words; i += 2) store8(to + 4 * i, make_uint2(octet.word[i], octet.word[i + 1]));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) store_number(to + i * sizeof(typename X::Stored), octet.stored(i));
    }
}

// The first `count` of `Bytes` bytes, in pieces that `align` allows.
template <int Bytes> LB_DEV void store_bytes(u8* to, u64 value, int count, int align) {
    if constexpr (Bytes == 8) {
        if (count == 8 && align >= 8) return store8(to, make_uint2(u32(value), u32(value >> 32)));
    }
    if constexpr (Bytes % 4 == 0) {
        if (count == Bytes && align >= 4) {
#pragma unroll
            for (int i = 0; i < Bytes; i += 4) store4(to + i, u32(value >> 8 * i));
            return;
        }
    }
    if constexpr (Bytes % 2 == 0) {
        if (count == Bytes && align >= 2) {
#pragma unroll
            for (int i = 0; i < Bytes; i += 2) *reinterpret_cast<u16*>(to + i) = u16(value >> 8 * i);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < Bytes; ++i)
        if (i < count) to[i] = u8(value >> 8 * i);
}

// ---- extremes of a block -------------------------------------------------------------------------------
// Patterns of floats, compared as integers of the same order: NaN and infinities come out at the ends.
// Both members start as 0 and only grow.
template <bool Apart> struct Extremes {  // the largest magnitude
    u32 most = 0, rest = 0;
    LB_DEV void take(float v) { most = max(most, magnitude(v)); }
    LB_DEV void merge(u32 other_most, u32) { most = max(most, other_most); }
    LB_DEV bool finite() const { return most < infinite; }
    LB_DEV float high() const { return bits<float>(most); }
    LB_DEV float low() const { return -high(); }
};
template <> struct Extremes<true> {  // the largest number, and the complement of the smallest; -0 below 0
    u32 most = 0, rest = 0;
    static LB_DEV u32 key(u32 pattern) { return pattern ^ (u32(int(pattern) >> 31) | 0x80000000u); }
    static LB_DEV float number(u32 key) { return bits<float>(key >> 31 ? key ^ 0x80000000u : ~key); }
    LB_DEV void take(float v) {
        const u32 k = key(bits<u32>(v));
        most = max(most, k), rest = max(rest, ~k);
    }
    LB_DEV void merge(u32 other_most, u32 other_rest) { most = max(most, other_most), rest = max(rest, other_rest); }
    // The complement of a key is that of the negative number.
    LB_DEV bool finite() const { return max(most, rest) < (infinite | 0x80000000u); }
    LB_DEV float high() const { return number(most); }
    LB_DEV float low() const { return number(~rest); }
};

template <bool Apart, class X> LB_DEV void take(Extremes<Apart>& found, const Octet<X>& octet) {
#pragma unroll
    for (int i = 0; i < 8; ++i) found.take(octet.number(i));
}
// Over `lanes` neighbours, a power of two: all of the warp must come.
template <bool Apart> LB_DEV void across_lanes(Extremes<Apart>& found, int lanes) {
    for (int d = lanes / 2; d; d >>= 1) {
        const u32 most = __shfl_xor_sync(0xffffffffu, found.most, d);
        u32 rest = 0;
        if constexpr (Apart) rest = __shfl_xor_sync(0xffffffffu, found.rest, d);
        found.merge(most, rest);
    }
}
template <int Threads, bool Apart> LB_DEV void across_block(Extremes<Apart>& found) {
    struct Partial { u32 most[Threads / 32], rest[Threads / 32]; };
    auto& partial = static_shared<Partial>();
    across_lanes(found, 32);
    if (lane() == 0) partial.most[warp()] = found.most, partial.rest[warp()] = found.rest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < Threads / 32; ++w) found.merge(partial.most[w], partial.rest[w]);
}

// a / b, of numbers that are not negative. 64-bit division is a call whose registers spill; what needs it
// are arrays of 2^32 rows or columns.
LB_DEV i64 whole_quotient(i64 a, i64 b) {
    if (((a | b) >> 32) == 0) return u32(a) / u32(b);
    u64 rest = 0, found = 0;
#pragma unroll 1
    for (int i = 63; i >= 0; --i) {
        rest = rest << 1 | (u64(a) >> i & 1);
        found <<= 1;
        if (rest >= u64(b)) rest -= u64(b), found |= 1;
    }
    return i64(found);
}

}  // namespace lb::quant

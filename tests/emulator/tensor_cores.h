// lb:: primitives of a warp's tensor core: ldmatrix and mma.sync; arithmetic of pairs.
#pragma once
#include "copies.h"

namespace emu {
// Lane l brings row l % 8 of matrix l / 8. Of each matrix it takes the pair (row l / 4, columns
// 2 (l % 4) + 0, 1), of the transpose if so asked.
EMU_QUIET inline void ldmatrix(u32 mask, const Slots& in, Slots& out, u32 transpose) {
    if (mask != ~0u) fail("ldmatrix: only lanes %08x of the warp take part", mask);
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m)
            for (int h = 0; h < 2; ++h) {
                const int r = lane / 4, c = lane % 4 * 2 + h;
                put(out, lane, transpose ? get<u16>(in, 8 * m + c, r) : get<u16>(in, 8 * m + r, c), 2 * m + h);
            }
}
template <int Matrices> void ldmatrix_call(u32 (&r)[Matrices], const void* row, bool transpose, Where at) {
    uint4 own{};
    if (lane_in_warp() < 8 * Matrices) {  // the other lanes' addresses are not used
        aligned(row, 16, "ldmatrix", at);
        check_shared(row, 16, "ldmatrix", at);
        __tsan_read_range(const_cast<void*>(row), 16);
        own = *static_cast<const uint4*>(row);
    }
    collective({"ldmatrix", at, ~0u, ldmatrix, transpose}, &own, 16, r, sizeof r);
}

struct F16 {
    using Bits = u16;
    static float number(u16 bits) {
        static const auto table = [] {
            auto* t = new float[65536];
            for (u32 i = 0; i < 65536; ++i) { __half_raw h; h.x = u16(i); t[i] = __half2float(__half(h)); }
            return t;
        }();
        return table[bits];
    }
};
struct BF16 {
    using Bits = u16;
    static float number(u16 bits) { return emu::bits<float>(u32(bits) << 16); }
};
template <__nv_fp8_interpretation_t Kind> struct F8 {
    using Bits = u8;
    static float number(u8 bits) {
        static const auto table = [] {
            auto* t = new float[256];
            for (u32 i = 0; i < 256; ++i) t[i] = __half2float(__half(__nv_cvt_fp8_to_halfraw(u8(i), Kind)));
            return t;
        }();
        return table[bits];
    }
};
using E4M3 = F8<__NV_E4M3>;
using E5M2 = F8<__NV_E5M2>;
struct S8 { using Bits = u8; static int number(u8 bits) { return static_cast<signed char>(bits); } };
struct U8 { using Bits = u8; static int number(u8 bits) { return bits; } };

// D = A B + C of mma.m16n8kK (PTX ISA, "Matrix fragments for mma"): with P numbers to a register,
// g = lane / 4 and t = lane % 4, register i of A holds row g + 8 (i & 1), columns
// P (t + 4 (i >> 1)) + 0..; register i of B holds rows P (t + 4 i) + 0.. of column g; number i of C
// holds row g + 8 (i >> 1), column 2 t + (i & 1).
template <class A, class B, class Sum>
EMU_QUIET void mma(u32 mask, const Slots& in, Slots& out, u32) {
    if (mask != ~0u) fail("mma: only lanes %08x of the warp take part", mask);
    constexpr int P = 4 / sizeof(typename A::Bits), K = 8 * P;
    Sum a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            for (int p = 0; p < P; ++p)
                a[g + 8 * (i & 1)][P * (t + 4 * (i >> 1)) + p] = A::number(get<typename A::Bits>(in, lane, i * P + p));
            d[g + 8 * (i >> 1)][2 * t + (i & 1)] = get<Sum>(in, lane, 6 + i);
        }
        for (int i = 0; i < 2; ++i)
            for (int p = 0; p < P; ++p)
                b[P * (t + 4 * i) + p][g] = B::number(get<typename B::Bits>(in, lane, (4 + i) * P + p));
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n) {
                if constexpr (std::is_same_v<Sum, int>) d[m][n] = int(u32(d[m][n]) + u32(a[m][k] * b[k][n]));  // wraps
                else d[m][n] += a[m][k] * b[k][n];
            }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) put(out, lane, d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)], i);
}
template <class A, class B, class Sum>
void mma_call(const char* op, Sum (&c)[4], const u32 (&a)[4], const u32 (&b)[2], Where at) {
    u8 in[40];
    std::memcpy(in, a, 16);
    std::memcpy(in + 16, b, 8);
    std::memcpy(in + 24, c, 16);
    collective({op, at, ~0u, mma<A, B, Sum>}, in, sizeof in, c, 16);
}
}  // namespace emu

namespace lb {
inline void ldmatrix_x2(u32 (&r)[2], const void* row, emu::Where at = emu::Where::here()) { emu::ldmatrix_call(r, row, false, at); }
inline void ldmatrix_x2_trans(u32 (&r)[2], const void* row, emu::Where at = emu::Where::here()) { emu::ldmatrix_call(r, row, true, at); }
inline void ldmatrix_x4(u32 (&r)[4], const void* row, emu::Where at = emu::Where::here()) { emu::ldmatrix_call(r, row, false, at); }
inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, emu::Where at = emu::Where::here()) { emu::ldmatrix_call(r, row, true, at); }

#define LB_MMA(NAME, A, B, SUM)                                                                                     \
    inline void NAME(SUM (&c)[4], const u32 (&a)[4], const u32 (&b)[2], emu::Where at = emu::Where::here()) {      \
        emu::mma_call<emu::A, emu::B>(#NAME, c, a, b, at);                                                          \
    }
LB_MMA(mma_m16n8k16_f16, F16, F16, float)
LB_MMA(mma_m16n8k16_bf16, BF16, BF16, float)
LB_MMA(mma_m16n8k32_s8, S8, S8, int)
LB_MMA(mma_m16n8k32_u8s8, U8, S8, int)
LB_MMA(mma_m16n8k32_s8u8, S8, U8, int)
LB_MMA(mma_m16n8k32_e4m3, E4M3, E4M3, float)
LB_MMA(mma_m16n8k32_e5m2, E5M2, E5M2, float)
LB_MMA(mma_m16n8k32_e4m3e5m2, E4M3, E5M2, float)
LB_MMA(mma_m16n8k32_e5m2e4m3, E5M2, E4M3, float)
#undef LB_MMA

template <u32 Table> u32 lop3(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 8; ++i)
        if (Table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}
// CUDA's host __hfma2 goes through float and rounds twice. A product of two halves or two bfloat16s is
// exact in double; the sum is rounded to odd there, so that the last rounding is the only one.
inline double product_plus(double a, double b, double c) {
    const double product = a * b, sum = product + c;
    const double back = sum - product, rest = (product - (sum - back)) + (c - back);
    if (rest == 0 || !std::isfinite(sum) || (emu::bits<unsigned long long>(sum) & 1)) return sum;
    return std::nextafter(sum, rest > 0 ? HUGE_VAL : -HUGE_VAL);
}
inline __half2 hfma2(__half2 a, __half2 b, __half2 c) {
    const auto one = [](__half x, __half y, __half z) {
        return __double2half(product_plus(__half2float(x), __half2float(y), __half2float(z)));
    };
    return __halves2half2(one(a.x, b.x, c.x), one(a.y, b.y, c.y));
}
inline __nv_bfloat162 bfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    const auto one = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
        return __double2bfloat16(product_plus(__bfloat162float(x), __bfloat162float(y), __bfloat162float(z)));
    };
    return __halves2bfloat162(one(a.x, b.x, c.x), one(a.y, b.y, c.y));
}
}  // namespace lb

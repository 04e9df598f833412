// CUDA's built-in functions that kernels use and the host's headers lack.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

#include <cmath>
#include <limits>

#include "core.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static_assert(false, "use lb::static_shared<T>()");
#define LB_DEV inline

// ---- synchronisation ------------------------------------------------------------------------------------
inline void __syncthreads(emu::Where at = emu::Where::here()) { emu::barrier(0, 0, true, at); }
inline void __syncwarp(unsigned mask = ~0u, emu::Where at = emu::Where::here()) {
    emu::collective({"__syncwarp", at, mask, nullptr, 0, true});
}
inline void __threadfence() { emu::fence(); emu::yield(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, emu::Where at = emu::Where::here()) { emu::spin(at); }
[[noreturn]] inline void __trap(emu::Where at = emu::Where::here()) { emu::fail_at(at, "__trap"); }

// ---- shuffles and votes ---------------------------------------------------------------------------------
namespace emu {
template <class T> EMU_QUIET void shuffle(u32 mask, const Slots& in, Slots& out, u32) {
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const int from = get<int>(in, lane);
        if (!(mask >> from & 1)) fail("shuffle: lane %d reads lane %d, which the mask leaves out", lane, from);
        std::memcpy(out.lane[lane], in.lane[from] + 8, sizeof(T));
    }
}
template <class T> T shuffle_from(const char* op, Where at, u32 mask, T value, int from) {
    static_assert(sizeof(T) <= 8, "CUDA shuffles numbers of at most 8 bytes");
    u8 in[8 + sizeof(T)] = {};
    std::memcpy(in, &from, sizeof from);
    std::memcpy(in + 8, &value, sizeof value);
    T result;
    collective({op, at, mask, shuffle<T>}, in, sizeof in, &result, sizeof result);
    return result;
}
EMU_QUIET inline void ballot(u32 mask, const Slots& in, Slots& out, u32) {
    u32 bits = 0;
    for (int l = 0; l < 32; ++l)
        if (mask >> l & 1) bits |= u32(get<int>(in, l) != 0) << l;
    for (int l = 0; l < 32; ++l) put(out, l, bits);
}
}  // namespace emu
template <class T> T __shfl_sync(unsigned mask, T v, int from, int width = 32, emu::Where at = emu::Where::here()) {
    const int lane = emu::lane_in_warp();
    return emu::shuffle_from("__shfl_sync", at, mask, v, (lane & -width) | (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int flip, int width = 32, emu::Where at = emu::Where::here()) {
    const int lane = emu::lane_in_warp(), from = lane ^ flip;
    return emu::shuffle_from("__shfl_xor_sync", at, mask, v, from < (lane & -width) + width ? from : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, int delta, int width = 32, emu::Where at = emu::Where::here()) {
    const int lane = emu::lane_in_warp();
    return emu::shuffle_from("__shfl_down_sync", at, mask, v, (lane & (width - 1)) + delta < width ? lane + delta : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, int delta, int width = 32, emu::Where at = emu::Where::here()) {
    const int lane = emu::lane_in_warp();
    return emu::shuffle_from("__shfl_up_sync", at, mask, v, (lane & (width - 1)) >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Where at = emu::Where::here()) {
    unsigned result;
    emu::collective({"__ballot_sync", at, mask, emu::ballot}, &predicate, 4, &result, 4);
    return result;
}
inline int __any_sync(unsigned mask, int p, emu::Where at = emu::Where::here()) { return __ballot_sync(mask, p, at) != 0; }
inline int __all_sync(unsigned mask, int p, emu::Where at = emu::Where::here()) { return __ballot_sync(mask, !p, at) == 0; }

// ---- atomics: relaxed, as CUDA's are --------------------------------------------------------------------
namespace emu {
template <class T, class F> T atomic(T* p, F f, Where at) {
    aligned(p, sizeof(T), "atomic", at);
    T old, now;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do { now = f(old); } while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template <class T> using Same = std::common_type_t<T>;  // takes no part in deduction
}  // namespace emu
template <class T> T atomicAdd(T* p, emu::Same<T> v, emu::Where at = emu::Where::here()) { return emu::atomic(p, [v](T o) { return T(o + v); }, at); }
template <class T> T atomicMax(T* p, emu::Same<T> v, emu::Where at = emu::Where::here()) { return emu::atomic(p, [v](T o) { return o < v ? v : o; }, at); }
template <class T> T atomicMin(T* p, emu::Same<T> v, emu::Where at = emu::Where::here()) { return emu::atomic(p, [v](T o) { return v < o ? v : o; }, at); }
template <class T> T atomicOr(T* p, emu::Same<T> v, emu::Where at = emu::Where::here()) { return emu::atomic(p, [v](T o) { return T(o | v); }, at); }
template <class T> T atomicExch(T* p, emu::Same<T> v, emu::Where at = emu::Where::here()) { return emu::atomic(p, [v](T) { return v; }, at); }
template <class T> T atomicCAS(T* p, emu::Same<T> was, emu::Same<T> v, emu::Where at = emu::Where::here()) {
    return emu::atomic(p, [was, v](T o) { return o == was ? v : o; }, at);
}
inline unsigned atomicInc(unsigned* p, unsigned last, emu::Where at = emu::Where::here()) {
    return emu::atomic(p, [last](unsigned o) { return o >= last ? 0u : o + 1; }, at);
}

// ---- arithmetic: nothing is contracted, so x_rn is x ----------------------------------------------------
template <class T> T min(T a, emu::Same<T> b) { return b < a ? b : a; }
template <class T> T max(T a, emu::Same<T> b) { return a < b ? b : a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return float(1. / std::sqrt(double(a))); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }

// ---- conversions: saturating; what becomes of a NaN is in the PTX ISA, cvt ------------------------------
namespace emu {
template <class To, class From> To to_integer(From rounded) {
    const From low = From(std::numeric_limits<To>::min()), high = From(std::numeric_limits<To>::max());
    if (std::isnan(rounded)) return sizeof(From) == 4 && sizeof(To) == 4 ? To(0) : To(To(1) << (8 * sizeof(To) - 1));
    if (rounded <= low) return std::numeric_limits<To>::min();
    return rounded >= high ? std::numeric_limits<To>::max() : To(rounded);
}
}  // namespace emu
inline int __float2int_rn(float v) { return emu::to_integer<int>(std::nearbyint(v)); }
inline int __float2int_rz(float v) { return emu::to_integer<int>(std::trunc(v)); }
inline int __float2int_rd(float v) { return emu::to_integer<int>(std::floor(v)); }
inline int __float2int_ru(float v) { return emu::to_integer<int>(std::ceil(v)); }
inline unsigned __float2uint_rn(float v) { return emu::to_integer<unsigned>(std::nearbyint(v)); }
inline unsigned __float2uint_rz(float v) { return emu::to_integer<unsigned>(std::trunc(v)); }
inline long long __float2ll_rn(float v) { return emu::to_integer<long long>(std::nearbyint(v)); }
inline int __double2int_rn(double v) { return emu::to_integer<int>(std::nearbyint(v)); }
inline int __double2int_rz(double v) { return emu::to_integer<int>(std::trunc(v)); }
inline long long __double2ll_rn(double v) { return emu::to_integer<long long>(std::nearbyint(v)); }
inline float __double2float_rn(double v) { return float(v); }
inline float __int2float_rn(int v) { return float(v); }
inline float __uint2float_rn(unsigned v) { return float(v); }
inline float __ll2float_rn(long long v) { return float(v); }
inline double __int2double_rn(int v) { return v; }

// ---- bits -----------------------------------------------------------------------------------------------
namespace emu {
template <class To, class From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emu
inline unsigned __float_as_uint(float v) { return emu::bits<unsigned>(v); }
inline int __float_as_int(float v) { return emu::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emu::bits<float>(v); }
inline float __int_as_float(int v) { return emu::bits<float>(v); }
inline long long __double_as_longlong(double v) { return emu::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emu::bits<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (v >> i & 1) << (31 - i);
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {  // bit 3 of a nibble: the sign of that byte
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned s = selector >> 4 * i & 15, byte = ((s & 4 ? b : a) >> 8 * (s & 3)) & 0xff;
        result |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    unsigned sum = unsigned(c);
    for (int i = 0; i < 4; ++i) sum += unsigned(static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i));
    return int(sum);
}

// ---- loads ----------------------------------------------------------------------------------------------
template <class T> T __ldg(const T* p, emu::Where at = emu::Where::here()) {
    emu::aligned(p, sizeof(T), "__ldg", at);
    __tsan_read_range(const_cast<T*>(p), sizeof(T));
    return *p;
}

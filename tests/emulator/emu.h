// Host version of lowbit_prims.cuh: lets g++/clang++ compile a kernel's own source and run it on the CPU, each
// CUDA thread (lane) a fiber.  Test-only.  This header is compiled with the kernels, sanitizers included; the
// scheduler (emu.cpp) is not, so that ThreadSanitizer sees the kernel's memory accesses and no others.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__  // kernels use lb::static_shared / lb::dynamic_shared
#define __shared__ static_assert(false, "use lb::static_shared<T>()");
#define LB_DEV inline
#define EMU_QUIET __attribute__((no_sanitize("thread"), noinline))  // touches the emulator's own memory only
#define EMU_LINE int line = __builtin_LINE()

extern uint3 threadIdx, blockIdx;  // set at every switch: of the lane now running
extern dim3 blockDim, gridDim;

#ifdef EMU_TSAN  // GCC leaves copies of small structs (uint4) uninstrumented: the primitives tell of theirs
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#else
inline void __tsan_read_range(void*, unsigned long) {}
inline void __tsan_write_range(void*, unsigned long) {}
#endif

// ---- scheduler (emu.cpp) -----------------------------------------------------------------------------------
namespace emu {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int slot = 64;                    // bytes a lane may bring to, and take from, a collective
struct Slots { alignas(16) u8 lane[32][slot]; };
using Combine = void (*)(u32 mask, const Slots& in, Slots& out, u32 immediate);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void barrier(int line);                     // __syncthreads
void fence();                               // __threadfence, for ThreadSanitizer
// Waits until every lane of mask has come to the same op on the same line; the last to come runs combine.
void collective(const char* op, int line, u32 mask, const void* in, int in_bytes, void* out, int out_bytes,
                Combine combine, u32 immediate = 0, bool orders_memory = false);
void* static_shared(const void* identity, size_t bytes, size_t alignment);
void* dynamic_shared(size_t bytes);
void check_shared(const void* p, size_t bytes, const char* op, int line);
u32 lane_in_warp();
u32 coin();
void engine_wrote(void* p);                 // 16 bytes, for ThreadSanitizer
void yield();
void mbarrier_init(const void* b, u32 count);
void mbarrier_update(const void* b, int arrivals, long bytes);
void mbarrier_wait(const void* b, u32 parity, int line);
void async_later(void (*run)(void*), const void* data, size_t bytes);
u32 shared_offset(const void* p);
char* shared_at(u32 offset);

struct Pending { void* destination; alignas(16) u8 data[16]; };
void async_issue(const Pending& copy);
void async_commit();
bool async_complete(int keep_groups, Pending& next);  // the next copy that is due, if any

struct Launch { u32 grid[3], block[3]; u32 shared_bytes; u64 seed; const u64* only; u64 only_count; };  // only: some blocks
const char* run(const Launch&, void (*body)(void*), void* context);  // null, or what went wrong

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(args[I])...);
}
template <class... A>
const char* launch(void (*kernel)(A...), const Launch& config, void** args) {
    struct Context { void (*kernel)(A...); void** args; } context{kernel, args};
    return run(config, [](void* p) {
        auto* c = static_cast<Context*>(p);
        call(c->kernel, c->args, std::index_sequence_for<A...>());
    }, &context);
}
// One letter and the size a parameter: 'c' const pointer, 'p' pointer, 'v' value.
template <class... A>
const char* signature(void (*)(A...)) {
    static char text[8 * sizeof...(A) + 1], *end = text;
    if (end == text)
        ((end += __builtin_sprintf(end, "%c%d ", !std::is_pointer_v<A> ? 'v'
              : std::is_const_v<std::remove_pointer_t<A>> ? 'c' : 'p', int(sizeof(A)))), ...);
    return text;
}
inline void aligned(const void* p, size_t bytes, const char* op, int line) {
    if (reinterpret_cast<size_t>(p) % bytes) fail("%s: %p is not %zu-byte aligned (line %d)", op, p, bytes, line);
}
template <class T> T get(const Slots& s, int lane, int i = 0) {
    T v;
    std::memcpy(&v, s.lane[lane] + i * sizeof(T), sizeof(T));
    return v;
}
template <class T> void put(Slots& s, int lane, T v, int i = 0) {
    std::memcpy(s.lane[lane] + i * sizeof(T), &v, sizeof(T));
}
}  // namespace emu

// ---- CUDA built-ins ------------------------------------------------------------------------------------------
inline void __syncthreads(EMU_LINE) { emu::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, EMU_LINE) {
    emu::collective("__syncwarp", line, mask, nullptr, 0, nullptr, 0, nullptr, 0, true);
}
inline void __threadfence() { emu::fence(); emu::yield(); }
inline void __threadfence_block() {}

namespace emu {
template <class T> EMU_QUIET void shuffle(u32 mask, const Slots& in, Slots& out, u32) {
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const int from = get<int>(in, lane, 0);
        if (!(mask >> from & 1)) fail("shuffle: lane %d reads lane %d, which the mask leaves out", lane, from);
        std::memcpy(out.lane[lane], in.lane[from] + 8, sizeof(T));
    }
}
template <class T> T shuffle_from(const char* op, int line, u32 mask, T value, int from) {
    static_assert(sizeof(T) <= slot - 8);
    u8 in[8 + sizeof(T)] = {};
    std::memcpy(in, &from, sizeof from);
    std::memcpy(in + 8, &value, sizeof value);
    T result;
    collective(op, line, mask, in, sizeof in, &result, sizeof result, shuffle<T>);
    return result;
}
EMU_QUIET inline void ballot(u32 mask, const Slots& in, Slots& out, u32) {
    u32 bits = 0;
    for (int l = 0; l < 32; ++l) if (mask >> l & 1) bits |= u32(get<int>(in, l) != 0) << l;
    for (int l = 0; l < 32; ++l) put(out, l, bits);
}
}  // namespace emu
template <class T> T __shfl_sync(unsigned mask, T v, int from, int width = 32, EMU_LINE) {
    const int lane = emu::lane_in_warp();
    return emu::shuffle_from("__shfl_sync", line, mask, v, (lane & -width) | (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int flip, int width = 32, EMU_LINE) {
    const int lane = emu::lane_in_warp(), from = lane ^ flip;
    return emu::shuffle_from("__shfl_xor_sync", line, mask, v, from < (lane & -width) + width ? from : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, int delta, int width = 32, EMU_LINE) {
    const int lane = emu::lane_in_warp();
    return emu::shuffle_from("__shfl_down_sync", line, mask, v, (lane & (width - 1)) + delta < width ? lane + delta : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, int delta, int width = 32, EMU_LINE) {
    const int lane = emu::lane_in_warp();
    return emu::shuffle_from("__shfl_up_sync", line, mask, v, (lane & (width - 1)) >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_LINE) {
    unsigned result;
    emu::collective("__ballot_sync", line, mask, &predicate, 4, &result, 4, emu::ballot);
    return result;
}
inline int __any_sync(unsigned mask, int p, EMU_LINE) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_LINE) { return __ballot_sync(mask, !p, line) == 0; }

template <class T, class F> T emu_atomic(T* p, F f, int line) {
    emu::aligned(p, sizeof(T), "atomic", line);
    T old, now;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do { now = f(old); } while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template <class T> T atomicAdd(T* p, std::common_type_t<T> v, EMU_LINE) { return emu_atomic(p, [v](T o) { return T(o + v); }, line); }
template <class T> T atomicMax(T* p, std::common_type_t<T> v, EMU_LINE) { return emu_atomic(p, [v](T o) { return o < v ? v : o; }, line); }
template <class T> T atomicExch(T* p, std::common_type_t<T> v, EMU_LINE) { return emu_atomic(p, [v](T) { return v; }, line); }
template <class T> T atomicCAS(T* p, std::common_type_t<T> c, std::common_type_t<T> v, EMU_LINE) { return emu_atomic(p, [c, v](T o) { return o == c ? v : o; }, line); }

template <class T> const T& min(const T& a, const T& b) { return b < a ? b : a; }
template <class T> const T& max(const T& a, const T& b) { return a < b ? b : a; }
inline int __float2int_rn(float v) { return int(std::nearbyintf(std::fmin(std::fmax(v, -2147483648.f), 2147483520.f))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned s = selector >> 4 * i & 15, byte = ((s & 4 ? b : a) >> 8 * (s & 3)) & 0xff;
        result |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(static_cast<signed char>(a >> 8 * i)) * static_cast<signed char>(b >> 8 * i);
    return c;
}

// ---- lb:: primitives --------------------------------------------------------------------------------------------
namespace lb {
using u8 = unsigned char;
using u32 = unsigned int;

template <class T, int Tag = 0> T& static_shared() {
    static const char identity = 0;
    return *static_cast<T*>(emu::static_shared(&identity, sizeof(T), alignof(T)));
}
template <class T> T& dynamic_shared() { return *static_cast<T*>(emu::dynamic_shared(sizeof(T))); }

inline uint4 load16(const void* p, EMU_LINE) {
    emu::aligned(p, 16, "load16", line);
    __tsan_read_range(const_cast<void*>(p), 16);
    return *static_cast<const uint4*>(p);
}
inline uint4 load16_once(const void* p, EMU_LINE) { return load16(p, line); }
inline void store8(void* p, uint2 v, EMU_LINE) { emu::aligned(p, 8, "store8", line); __tsan_write_range(p, 8); *static_cast<uint2*>(p) = v; }
inline void store4(void* p, u32 v, EMU_LINE) { emu::aligned(p, 4, "store4", line); __tsan_write_range(p, 4); *static_cast<u32*>(p) = v; }

// At issue the destination becomes NaN, and the data lands only in the wait that covers it: a missing wait, and a
// buffer refilled while others still read it, both show in the result whatever the order of lanes.
inline void cp_async16(void* shared, const void* global, bool valid, EMU_LINE) {
    emu::aligned(shared, 16, "cp.async (shared)", line);
    emu::aligned(global, 16, "cp.async (global)", line);
    emu::check_shared(shared, 16, "cp.async", line);
    emu::Pending copy{shared, {}};
    if (valid) *reinterpret_cast<uint4*>(copy.data) = *static_cast<const uint4*>(global);
    __tsan_write_range(shared, 16);
    *static_cast<uint4*>(shared) = make_uint4(~0u, ~0u, ~0u, ~0u);
    emu::async_issue(copy);
}
inline void cp_async_commit() { emu::async_commit(); }
template <int N> void cp_async_wait() {
    for (emu::Pending copy; emu::async_complete(N, copy);) {
        __tsan_write_range(copy.destination, 16);
        std::memcpy(copy.destination, copy.data, 16);
    }
}

}  // namespace lb

namespace emu {
// Lane l brings row l % 8 of matrix l / 8.  It takes, of each matrix, the pair (row l / 4, columns 2 (l % 4) + 0, 1),
// of the transpose if so asked.
EMU_QUIET inline void ldmatrix(u32, const Slots& in, Slots& out, u32 transpose) {
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m)
            for (int h = 0; h < 2; ++h) {
                const int r = lane / 4, c = lane % 4 * 2 + h;
                put(out, lane, transpose ? get<u16>(in, 8 * m + c, r) : get<u16>(in, 8 * m + r, c), 2 * m + h);
            }
}
inline float from_half(u16 bits) {
    static const auto table = [] {
        auto* t = new float[65536];
        for (u32 i = 0; i < 65536; ++i) { __half_raw h; h.x = u16(i); t[i] = __half2float(__half(h)); }
        return t;
    }();
    return table[bits];
}
inline float from_bf16(u16 bits) { const u32 wide = u32(bits) << 16; float f; std::memcpy(&f, &wide, 4); return f; }
inline float from_e4m3(u8 bits) { __nv_fp8_e4m3 v; v.__x = bits; return float(v); }
inline int from_s8(u8 bits) { return static_cast<signed char>(bits); }

// D = A B + C of mma.m16n8kK (PTX ISA, "Matrix fragments for mma"): with P numbers to a register, g = lane / 4 and
// t = lane % 4, register i of A holds row g + 8 (i & 1), columns P (t + 4 (i >> 1)) + 0.. ; register i of B holds
// rows P (t + 4 i) + 0.. of column g ; number i of C holds row g + 8 (i >> 1), column 2 t + (i & 1).
template <int K, class Bits, class Number, Number (*Convert)(Bits)>
EMU_QUIET void mma(u32 mask, const Slots& in, Slots& out, u32) {
    if (mask != ~0u) fail("mma: only lanes %08x of the warp take part", mask);
    constexpr int P = 4 / sizeof(Bits);
    Number a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            for (int p = 0; p < P; ++p) a[g + 8 * (i & 1)][P * (t + 4 * (i >> 1)) + p] = Convert(get<Bits>(in, lane, i * P + p));
            d[g + 8 * (i >> 1)][2 * t + (i & 1)] = get<Number>(in, lane, 6 + i);
        }
        for (int i = 0; i < 2; ++i)
            for (int p = 0; p < P; ++p) b[P * (t + 4 * i) + p][g] = Convert(get<Bits>(in, lane, (4 + i) * P + p));
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) put(out, lane, d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)], i);
}
template <class T> void mma_call(const char* op, int line, T (&c)[4], const u32 (&a)[4], const u32 (&b)[2], Combine combine) {
    u8 in[40];
    std::memcpy(in, a, 16);
    std::memcpy(in + 16, b, 8);
    std::memcpy(in + 24, c, 16);
    collective(op, line, ~0u, in, sizeof in, c, 16, combine);
}
}  // namespace emu

namespace lb {
inline void ldmatrix_x4(u32 (&r)[4], const void* row, bool transpose = false, EMU_LINE) {
    emu::aligned(row, 16, "ldmatrix", line);
    emu::check_shared(row, 16, "ldmatrix", line);
    __tsan_read_range(const_cast<void*>(row), 16);
    const uint4 own = *static_cast<const uint4*>(row);
    emu::collective("ldmatrix", line, ~0u, &own, 16, r, 16, emu::ldmatrix, transpose);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, EMU_LINE) { ldmatrix_x4(r, row, true, line); }
inline void mma_m16n8k16_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], EMU_LINE) {
    emu::mma_call("mma.f16", line, c, a, b, emu::mma<16, emu::u16, float, emu::from_half>);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], EMU_LINE) {
    emu::mma_call("mma.bf16", line, c, a, b, emu::mma<16, emu::u16, float, emu::from_bf16>);
}
inline void mma_m16n8k32_s8(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2], EMU_LINE) {
    emu::mma_call("mma.s8", line, c, a, b, emu::mma<32, emu::u8, int, emu::from_s8>);
}
inline void mma_m16n8k32_e4m3(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], EMU_LINE) {
    emu::mma_call("mma.e4m3", line, c, a, b, emu::mma<32, emu::u8, float, emu::from_e4m3>);
}
template <u32 Table> u32 lop3(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 8; ++i)
        if (Table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}
inline __nv_bfloat162 bfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    const auto one = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
        return __double2bfloat16(std::fma(double(__bfloat162float(x)), double(__bfloat162float(y)), double(__bfloat162float(z))));
    };
    return __halves2bfloat162(one(a.x, b.x, c.x), one(a.y, b.y, c.y));
}
inline __half2 hfma2(__half2 a, __half2 b, __half2 c) {  // each product is exact in double; one rounding to half
    const auto one = [](__half x, __half y, __half z) {
        return __double2half(double(__half2float(x)) * double(__half2float(y)) + double(__half2float(z)));
    };
    return __halves2half2(one(a.x, b.x, c.x), one(a.y, b.y, c.y));
}
}  // namespace lb

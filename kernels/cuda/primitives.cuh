// Every hardware-specific operation that a kernel may use, and nothing else.
//
// The device's face is the inline PTX below; in tests, g++ compiles the same kernels with -DLOWBIT_EMU
// and finds the same names in the emulator's headers. Kernels themselves hold no asm, no __cvta, no
// __shared__; they may use CUDA's built-in functions and its 8- and 16-bit types.
#pragma once
#ifdef LOWBIT_EMU
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define LB_DEV __device__ __forceinline__

namespace lb {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

LB_DEV u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- shared memory ---------------------------------------------------------------------------------
// One object of type T per block; `Tag` tells apart two objects of one type in one kernel.
template <class T, int Tag = 0>
LB_DEV T& static_shared() {
    __shared__ T object;
    return object;
}
// The dynamic allocation of the launch, seen as a T that is no larger than the launch's shared_mem.
template <class T>
LB_DEV T& dynamic_shared() {
    extern __shared__ __align__(1024) u8 lb_dynamic_shared[];
    return *reinterpret_cast<T*>(lb_dynamic_shared);
}

// ---- global memory ---------------------------------------------------------------------------------
// Read-only data that one thread reads once, such as weights: past L1. T has 1, 2, 4, 8 or 16 bytes and
// lies at a multiple of its size.
template <class T>
LB_DEV T load_once(const void* p) {
    T v;
    if constexpr (sizeof(T) == 16) {
        uint4 raw;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "l"(p));
        memcpy(&v, &raw, sizeof v);
    } else if constexpr (sizeof(T) == 8) {
        uint2 raw;
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(raw.x), "=r"(raw.y) : "l"(p));
        memcpy(&v, &raw, sizeof v);
    } else if constexpr (sizeof(T) == 4) {
        u32 raw;
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(raw) : "l"(p));
        memcpy(&v, &raw, sizeof v);
    } else {
        static_assert(sizeof(T) <= 2, "load_once: 1, 2, 4, 8 or 16 bytes");
        u16 raw;
        if constexpr (sizeof(T) == 2) asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(raw) : "l"(p));
        else asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=h"(raw) : "l"(p));
        memcpy(&v, &raw, sizeof v);
    }
    return v;
}
LB_DEV void store4(void* p, u32 v) { *static_cast<u32*>(p) = v; }
LB_DEV void store8(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }
LB_DEV void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// Flags between blocks: what was written before a release is seen after the acquire that reads it.
LB_DEV u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
LB_DEV void store_release(u32* p, u32 v) { asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }

// ---- copies to shared memory, under way until the wait that covers them ------------------------------
// Copies the first `valid_bytes` of `Bytes`, at most all, and writes zeros for the rest; both addresses
// are multiples of `Bytes`. With 0 valid bytes nothing is read, but the address must still be one.
template <int Bytes>
LB_DEV void cp_async(void* shared, const void* global, u32 valid_bytes) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared_address(shared)), "l"(global), "n"(Bytes), "r"(valid_bytes) : "memory");
}
LB_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's newest groups are under way; others see the data after a barrier.
template <int N>
LB_DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// ---- tensor cores ----------------------------------------------------------------------------------
// Lane l gives the address of row l % 8 of matrix l / 8: 8 rows of 16 bytes a matrix, 2 or 4 of them.
#define LB_LDMATRIX(NAME, PTX, COUNT, REGISTERS, LAST, ...)                                               \
    LB_DEV void NAME(u32 (&r)[COUNT], const void* row) {                                                  \
        asm volatile("ldmatrix.sync.aligned.m8n8." PTX ".shared.b16 " REGISTERS ", [" LAST "];"           \
                     : __VA_ARGS__ : "r"(shared_address(row)) : "memory");                                \
    }
LB_LDMATRIX(ldmatrix_x2, "x2", 2, "{%0,%1}", "%2", "=r"(r[0]), "=r"(r[1]))
LB_LDMATRIX(ldmatrix_x2_trans, "x2.trans", 2, "{%0,%1}", "%2", "=r"(r[0]), "=r"(r[1]))
LB_LDMATRIX(ldmatrix_x4, "x4", 4, "{%0,%1,%2,%3}", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))
LB_LDMATRIX(ldmatrix_x4_trans, "x4.trans", 4, "{%0,%1,%2,%3}", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))
#undef LB_LDMATRIX

// c += a b, a of 16 rows, b of 8 columns; two names of elements are a's and b's.
#define LB_MMA(NAME, PTX, SUM, REGISTER)                                                                  \
    LB_DEV void NAME(SUM (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {                                 \
        asm volatile("mma.sync.aligned." PTX " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"     \
                     : "+" REGISTER(c[0]), "+" REGISTER(c[1]), "+" REGISTER(c[2]), "+" REGISTER(c[3])     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
    }
LB_MMA(mma_m16n8k16_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")
LB_MMA(mma_m16n8k16_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
LB_MMA(mma_m16n8k32_s8, "m16n8k32.row.col.s32.s8.s8.s32", int, "r")
LB_MMA(mma_m16n8k32_u8s8, "m16n8k32.row.col.s32.u8.s8.s32", int, "r")
LB_MMA(mma_m16n8k32_s8u8, "m16n8k32.row.col.s32.s8.u8.s32", int, "r")
#if __CUDA_ARCH__ >= 890
LB_MMA(mma_m16n8k32_e4m3, "m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "f")
LB_MMA(mma_m16n8k32_e5m2, "m16n8k32.row.col.f32.e5m2.e5m2.f32", float, "f")
LB_MMA(mma_m16n8k32_e4m3e5m2, "m16n8k32.row.col.f32.e4m3.e5m2.f32", float, "f")
LB_MMA(mma_m16n8k32_e5m2e4m3, "m16n8k32.row.col.f32.e5m2.e4m3.f32", float, "f")
#endif
#undef LB_MMA

// ---- bits and pairs --------------------------------------------------------------------------------
// Bit 4 a + 2 b + c of `Table` is the result for bits a, b, c: write it as an expression of 0xf0, 0xcc, 0xaa.
template <u32 Table>
LB_DEV u32 lop3(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
    return d;
}
// a b + c with one rounding; CUDA's __hfma2 of the host has two.
LB_DEV __half2 hfma2(__half2 a, __half2 b, __half2 c) { return __hfma2(a, b, c); }
LB_DEV __nv_bfloat162 bfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return __hfma2(a, b, c); }

}  // namespace lb
#endif

// ---- built from the above, the same text for device and host ----------------------------------------
namespace lb {

// Reading one type's bits as another's, without breaking aliasing rules.
template <class To, class From>
LB_DEV To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
LB_DEV u32 lane() { return threadIdx.x & 31; }
LB_DEV u32 warp() { return threadIdx.x >> 5; }

// Two e4m3 or e5m2 numbers to two halves, exactly: one instruction from sm_89 on.
LB_DEV __half2 e4m3_to_half2(u32 pair) {
    return __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
}
LB_DEV __half2 e5m2_to_half2(u32 pair) { return bits<__half2>(__byte_perm(pair, 0, 0x1404)); }

LB_DEV float warp_max(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}
LB_DEV float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}
// Of all threads of the block, for all of them. A second call in one kernel wants a barrier before it.
template <int Threads>
LB_DEV float block_max(float v) {
    auto& partial = static_shared<float[Threads / 32]>();
    v = warp_max(v);
    if (lane() == 0) partial[warp()] = v;
    __syncthreads();
    v = partial[0];
#pragma unroll
    for (int w = 1; w < Threads / 32; ++w) v = fmaxf(v, partial[w]);
    return v;
}

}  // namespace lb

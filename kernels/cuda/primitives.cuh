// Every hardware-specific operation that a kernel may use, and nothing else.
// Device build (NVRTC): inline PTX below. Host build of the tests (-DLOWBIT_EMU): emu.h supplies
// the same names. Kernels themselves contain no asm, no __cvta, no extern __shared__.
#pragma once
#ifdef LOWBIT_EMU
#include "emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define LB_DEV __device__ __forceinline__

namespace lb {

using u8 = unsigned char;
using u32 = unsigned int;

LB_DEV u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- shared memory -------------------------------------------------------------------------------------
// One object of type T per block; `Tag` tells apart two objects of one type in one kernel.
template <class T, int Tag = 0>
LB_DEV T& static_shared() {
    __shared__ T object;
    return object;
}
// The dynamic allocation of the launch, seen as a T.  sizeof(T) must equal the launch's shared_mem.
template <class T>
LB_DEV T& dynamic_shared() {
    extern __shared__ __align__(128) u8 lb_dynamic_shared[];
    return *reinterpret_cast<T*>(lb_dynamic_shared);
}

// ---- global memory, 16 bytes a lane ----------------------------------------------------------------------
LB_DEV uint4 load16(const void* p) {
    return __ldg(static_cast<const uint4*>(p));
}
LB_DEV uint4 load16_once(const void* p) {  // streamed weights: do not keep in L1
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
LB_DEV void store8(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }
LB_DEV void store4(void* p, u32 v) { *static_cast<u32*>(p) = v; }

// ---- cp.async --------------------------------------------------------------------------------------------
LB_DEV void cp_async16(void* shared, const void* global, bool valid) {  // invalid: writes 16 zero bytes
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
LB_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
LB_DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// ---- tensor cores ----------------------------------------------------------------------------------------
LB_DEV void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
LB_DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

#define LB_MMA(NAME, PTX, ACC, REG)                                                                       \
    LB_DEV void NAME(ACC (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {                                  \
        asm volatile(PTX " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                          \
                     : "+" REG(c[0]), "+" REG(c[1]), "+" REG(c[2]), "+" REG(c[3])                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                  \
    }
LB_MMA(mma_m16n8k16_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", float, "f")
LB_MMA(mma_m16n8k16_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
LB_MMA(mma_m16n8k32_s8, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", int, "r")
#if __CUDA_ARCH__ >= 890
LB_MMA(mma_m16n8k32_e4m3, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "f")
#endif
#undef LB_MMA

// ---- bits --------------------------------------------------------------------------------------------------
template <u32 Table>
LB_DEV u32 lop3(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
    return d;
}
// One rounding, on the host too, where __hfma2 rounds twice.
LB_DEV __half2 hfma2(__half2 a, __half2 b, __half2 c) { return __hfma2(a, b, c); }
LB_DEV __nv_bfloat162 bfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return __hfma2(a, b, c); }

}  // namespace lb
#endif

// ---- built from the above, the same text for device and host ------------------------------------------------
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

// Eight unsigned 4-bit numbers u -> eight halves u-8, exactly.  Pair c is (nibble c, nibble c+4).
LB_DEV void int4_to_half(__half2 (&out)[4], u32 word) {
    constexpr u32 and_or = (0xf0 & 0xcc) | 0xaa;  // lop3: (a & b) | c
    const __half2 bias = bits<__half2>(0x64086408u);       // 1024 + 8
    const __half2 sixteenth = bits<__half2>(0x2c002c00u);  // 1/16
    const __half2 minus72 = bits<__half2>(0xd480d480u);    // -(64 + 8)
#pragma unroll
    for (int i = 0; i < 2; ++i, word >>= 8) {
        const u32 low = lop3<and_or>(word, 0x000f000fu, 0x64006400u);   // halves 1024 + u
        const u32 high = lop3<and_or>(word, 0x00f000f0u, 0x64006400u);  // halves 1024 + 16 u
        out[2 * i] = __hsub2(bits<__half2>(low), bias);
        out[2 * i + 1] = hfma2(bits<__half2>(high), sixteenth, minus72);
    }
}

}  // namespace lb

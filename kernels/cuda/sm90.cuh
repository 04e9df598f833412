// Hopper's primitives (sm_90a): mbarriers, TMA, named barriers, wgmma.
#pragma once
#include "primitives.cuh"
#ifdef LOWBIT_EMU
#include "emulator_sm90.h"
#else
namespace lb {
using u64 = unsigned long long;

// ---- mbarrier: a phase ends when `count` threads have arrived and the bytes they expect have come -----
using Mbarrier = u64;

LB_DEV void mbarrier_init(Mbarrier* b, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory");
}
// By the thread that has initialised them, before a __syncthreads.
LB_DEV void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LB_DEV void mbarrier_arrive(Mbarrier* b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(b)) : "memory");
}
LB_DEV void mbarrier_arrive_expect(Mbarrier* b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(b)), "r"(bytes) : "memory");
}
// Until the phase of that parity has ended; the first phase has parity 0.
LB_DEV void mbarrier_wait(Mbarrier* b, u32 parity) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
    } while (!done);
}

// ---- TMA ---------------------------------------------------------------------------------------------
// By one thread: the map's box at column x, row y, zeros outside of the array; `to` at a multiple of 1024 bytes.
struct alignas(64) TensorMap { u64 opaque[16]; };
LB_DEV void tma_load_2d(void* to, const TensorMap* map, int x, int y, Mbarrier* b) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(shared_address(to)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y) : "memory");
}
// Between plain writes to shared memory and a TMA or wgmma that reads them, by the threads that wrote.
LB_DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- parts of a block: barriers 1..15 of their own, registers handed from one part to another ----------
LB_DEV void named_barrier_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
LB_DEV void named_barrier_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
template <int Count> LB_DEV void registers_raise() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(Count)); }
template <int Count> LB_DEV void registers_lower() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(Count)); }

// ---- wgmma: d[64, N] += a[64, 16] b[N, 16]^T, under way until the wait that covers it --------------------
// Both operands K-major; T is __half or __nv_bfloat16. wgmma.py writes the text for each N.
template <int N, class T> struct Wgmma;
template <int N, class T> LB_DEV void wgmma(float (&d)[N / 2], u64 a, u64 b) { Wgmma<N, T>::multiply(d, a, b); }
template <int N, class T> LB_DEV void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b) { Wgmma<N, T>::multiply(d, a, b); }

// Before the first wgmma, and between any other access to its registers, a's too, and the next wgmma.
LB_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LB_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups are under way; d is what the others make valid.
template <int N, int R>
LB_DEV void wgmma_wait(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
}
}  // namespace lb
#endif
namespace lb {
// A K-major tile of 128-byte rows, 128-byte swizzle, groups of 8 rows 1024 bytes apart; 32 bytes further
// along k is the descriptor plus 2.
LB_DEV u64 descriptor_sw128(const void* p) {
    return u64((shared_address(p) & 0x3ffff) >> 4) | 1ull << 16 | u64(1024 >> 4) << 32 | 1ull << 62;
}
}  // namespace lb

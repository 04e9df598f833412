// lb:: primitives of a warpgroup's tensor core. Each warp is on its own here and owns 16 rows of D.
//
// Sums are kept apart and D is NaN until the wait that covers it; operands in shared memory are read, as
// the coin falls, at issue or only in that wait. Operands in registers are read at issue.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "tensor_cores.h"

namespace emu {
inline u32 swizzle128(u32 offset) { return offset ^ (offset >> 7 & 7) << 4; }  // of offsets in shared memory

struct Wgmma {
    u64 a, b;                     // descriptors in shared memory
    bool from_registers, done;
    u32 registers[32][4];         // of A, if from_registers
    float* d[32];                 // of each lane
    void (*compute)(Wgmma&, std::vector<float>* sums, u32 warp);
};
struct Accumulator { float* d[32]; std::vector<float> sums[32]; u32 pending; };
struct WarpWgmma {
    std::vector<Wgmma> uncommitted;
    std::deque<std::vector<Wgmma>> groups;
    std::vector<Accumulator> accumulators;
    bool fenced = false;
};
inline WarpWgmma warp_wgmma[32];
inline const bool wgmma_resets = (at_block_start([] { for (auto& w : warp_wgmma) w = {}; }), true);

// Number k of a row of a K-major tile with 128-byte swizzle.
template <class Element> float from_shared(u64 descriptor, u32 row, u32 k) {
    if (descriptor >> 62 != 1) fail("wgmma: only 128-byte swizzle is modelled");
    const u32 start = u32(descriptor & 0x3fff) * 16, stride = u32(descriptor >> 32 & 0x3fff) * 16;
    u16 bits;
    std::memcpy(&bits, shared_at(swizzle128(start + row / 8 * stride + row % 8 * 128 + k * 2)), 2);
    return Element::number(bits);
}
// PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": A as mma.m16n8k16 of the warp's rows; number
// i of D holds row lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4) + i % 2.
template <int N, class Element> void wgmma_compute(Wgmma& op, std::vector<float>* sums, u32 warp) {
    float a[16][16], b[N][16];
    for (u32 k = 0; k < 16; ++k) {
        for (u32 m = 0; m < 16 && !op.from_registers; ++m) a[m][k] = from_shared<Element>(op.a, warp % 4 * 16 + m, k);
        for (u32 n = 0; n < N; ++n) b[n][k] = from_shared<Element>(op.b, n, k);
    }
    for (int lane = 0; lane < 32 && op.from_registers; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int p = 0; p < 2; ++p)
                a[lane / 4 + 8 * (i & 1)][2 * (lane % 4 + 4 * (i >> 1)) + p] = Element::number(u16(op.registers[lane][i] >> 16 * p));
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < N / 2; ++i) {
            const int m = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) sums[lane][i] += a[m][k] * b[n][k];
        }
}
inline Accumulator& accumulator_of(WarpWgmma& w, const Wgmma& op) {
    for (auto& a : w.accumulators)
        if (a.d[0] == op.d[0]) return a;
    fail("wgmma: an accumulator is lost");
}
inline void wgmma_run(WarpWgmma& w, Wgmma& op, u32 warp) {
    if (!op.done) op.compute(op, accumulator_of(w, op).sums, warp);
    op.done = true;
}

struct WgmmaOperands { float* d; u64 b, a; u32 registers[4]; };
static_assert(sizeof(WgmmaOperands) <= slot);
template <int N, class Element, bool FromRegisters>
void wgmma_issue(u32 mask, const Slots& in, Slots&, u32 warp) {
    WarpWgmma& w = warp_wgmma[warp];
    if (mask != ~0u) fail("wgmma: only lanes %08x of the warp take part", mask);
    if (!w.fenced) fail("wgmma without wgmma_fence since the registers were last valid");
    const auto first = get<WgmmaOperands>(in, 0);
    Wgmma op{first.a, first.b, FromRegisters, false, {}, {}, wgmma_compute<N, Element>};
    for (int lane = 0; lane < 32; ++lane) {
        const auto own = get<WgmmaOperands>(in, lane);
        if (own.a != op.a || own.b != op.b) fail("wgmma: descriptors differ within the warp");
        op.d[lane] = own.d;
        std::memcpy(op.registers[lane], own.registers, sizeof own.registers);
    }
    Accumulator* accumulator = nullptr;
    for (auto& a : w.accumulators)
        if (a.d[0] == op.d[0]) accumulator = &a;
    if (!accumulator) {
        accumulator = &w.accumulators.emplace_back();
        accumulator->pending = 0;
        for (int lane = 0; lane < 32; ++lane) {
            float* d = accumulator->d[lane] = op.d[lane];
            accumulator->sums[lane].assign(d, d + N / 2);
            std::fill(d, d + N / 2, NAN);
        }
    }
    ++accumulator->pending;
    w.uncommitted.push_back(op);
    if (!coin()) return;
    for (auto& group : w.groups)  // sums are added to in the order of issue
        for (Wgmma& before : group) wgmma_run(w, before, warp);
    for (Wgmma& before : w.uncommitted) wgmma_run(w, before, warp);
}
inline void wgmma_mark(u32, const Slots&, Slots&, u32 commits) {
    WarpWgmma& w = warp_wgmma[warp_in_block()];
    if (commits) w.groups.push_back(std::move(w.uncommitted)), w.uncommitted.clear();
    else w.fenced = true;
}
inline void wgmma_drain(u32, const Slots&, Slots&, u32 keep) {
    const u32 warp = warp_in_block();
    WarpWgmma& w = warp_wgmma[warp];
    for (; w.groups.size() > keep; w.groups.pop_front())
        for (Wgmma& op : w.groups.front()) {
            wgmma_run(w, op, warp);
            --accumulator_of(w, op).pending;
        }
    for (size_t i = w.accumulators.size(); i--;) {
        auto& a = w.accumulators[i];
        if (a.pending) continue;
        for (int lane = 0; lane < 32; ++lane) std::copy(a.sums[lane].begin(), a.sums[lane].end(), a.d[lane]);
        w.accumulators.erase(w.accumulators.begin() + i);
        w.fenced = false;
    }
}
template <class T> struct WgmmaElement;
template <> struct WgmmaElement<__half> { using Type = F16; };
template <> struct WgmmaElement<__nv_bfloat16> { using Type = BF16; };
}  // namespace emu

namespace lb {
using u64 = unsigned long long;
inline u32 shared_address(const void* p) { return emu::shared_offset(p); }
inline void wgmma_fence(emu::Where at = emu::Where::here()) { emu::collective({"wgmma_fence", at, ~0u, emu::wgmma_mark, 0}); }
inline void wgmma_commit(emu::Where at = emu::Where::here()) { emu::collective({"wgmma_commit", at, ~0u, emu::wgmma_mark, 1}); }
template <int N, int R> void wgmma_wait(float (&)[R], emu::Where at = emu::Where::here()) {
    emu::collective({"wgmma_wait", at, ~0u, emu::wgmma_drain, N});
}
template <int N, class T> void wgmma(float (&d)[N / 2], u64 a, u64 b, emu::Where at = emu::Where::here()) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    const emu::WgmmaOperands in{d, b, a, {}};
    emu::collective({"wgmma", at, ~0u, emu::wgmma_issue<N, typename emu::WgmmaElement<T>::Type, false>, emu::warp_in_block()}, &in, sizeof in, nullptr, 0);
}
template <int N, class T> void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, emu::Where at = emu::Where::here()) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    const emu::WgmmaOperands in{d, b, 0, {a[0], a[1], a[2], a[3]}};
    emu::collective({"wgmma", at, ~0u, emu::wgmma_issue<N, typename emu::WgmmaElement<T>::Type, true>, emu::warp_in_block()}, &in, sizeof in, nullptr, 0);
}
}  // namespace lb

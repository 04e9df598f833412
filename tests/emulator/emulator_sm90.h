// The host face of sm90.cuh: mbarriers, TMA, named barriers; wgmma is in wgmma.h.
// Not modelled: clusters, multicast, proxy fences, numbers of registers.
#pragma once
#include "wgmma.h"

namespace lb {
struct alignas(64) TensorMap {  // as emulator.py's TensorMap writes it
    u64 address, width, height, pitch;  // elements, rows, bytes
    u32 box_width, box_height, element, swizzle;
    u64 unused[10];
};
static_assert(sizeof(TensorMap) == 128);
using Mbarrier = u64;

inline void mbarrier_init(Mbarrier* b, u32 count, emu::Where at = emu::Where::here()) { emu::mbarrier_init(b, count, at); }
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(Mbarrier* b, emu::Where at = emu::Where::here()) {
    emu::mbarrier_update(b, 1, 0, at);
    emu::yield();
}
inline void mbarrier_arrive_expect(Mbarrier* b, u32 bytes, emu::Where at = emu::Where::here()) {
    emu::mbarrier_update(b, 0, bytes, at);
    emu::mbarrier_update(b, 1, 0, at);
    emu::yield();
}
inline void mbarrier_wait(Mbarrier* b, u32 parity, emu::Where at = emu::Where::here()) { emu::mbarrier_wait(b, parity, at); }

inline void named_barrier_sync(u32 id, u32 threads, emu::Where at = emu::Where::here()) { emu::barrier(id, threads, true, at); }
inline void named_barrier_arrive(u32 id, u32 threads, emu::Where at = emu::Where::here()) { emu::barrier(id, threads, false, at); }
inline void fence_proxy_async() {}
template <int Count> void registers_raise() { static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256); }
template <int Count> void registers_lower() { static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256); }
}  // namespace lb

namespace emu {
struct TmaLoad { lb::TensorMap map; char* to; const void* barrier; int x, y; Where at; };
// Visits the tile in units of 16 bytes: (place in shared memory, its source, how many of its bytes are
// inside the array).
template <class F> void tma_chunks(const TmaLoad& op, F f) {
    const auto& m = op.map;
    const u32 row_bytes = m.box_width * m.element, base = shared_offset(op.to);
    for (u32 r = 0; r < m.box_height; ++r)
        for (u32 c = 0; c < row_bytes; c += 16) {
            const u32 offset = base + r * row_bytes + c;
            const long long x = op.x + (long long)(c / m.element), y = (long long)op.y + r;
            const bool inside = x >= 0 && y >= 0 && x < (long long)m.width && y < (long long)m.height;
            f(shared_at(m.swizzle == 128 ? swizzle128(offset) : offset),
              inside ? reinterpret_cast<const char*>(m.address + y * m.pitch + x * m.element) : nullptr,
              inside ? size_t(min((long long)16, ((long long)m.width - x) * m.element)) : 0);
        }
}
inline void tma_run(void* data) {
    const TmaLoad& op = *static_cast<TmaLoad*>(data);
    long total = 0;
    tma_chunks(op, [&](char* to, const char* from, size_t bytes) {
        std::memset(to, 0, 16);
        if (bytes) std::memcpy(to, from, bytes);
        engine_wrote(to);
        total += 16;
    });
    mbarrier_update(op.barrier, 0, -total, op.at);
}
}  // namespace emu

namespace lb {
// Until it lands, at some time before the mbarrier's phase ends, the tile is NaN.
inline void tma_load_2d(void* to, const TensorMap* map, int x, int y, Mbarrier* b, emu::Where at = emu::Where::here()) {
    emu::aligned(to, map->swizzle == 128 ? 1024 : 128, "TMA", at);
    emu::check_shared(to, size_t(map->box_height) * map->box_width * map->element, "TMA", at);
    const emu::TmaLoad op{*map, static_cast<char*>(to), b, x, y, at};
    emu::tma_chunks(op, [](char* chunk, const char*, size_t) {
        __tsan_write_range(chunk, 16);
        std::memset(chunk, 0xff, 16);
    });
    emu::async_later(emu::tma_run, &op, sizeof op);
}
}  // namespace lb

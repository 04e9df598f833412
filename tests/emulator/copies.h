// lb:: primitives of memory: shared objects, wide loads and stores, cp.async.
#pragma once
#include "builtins.h"

namespace lb {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

template <class T, int Tag = 0> T& static_shared() {
    static const char identity = 0;
    return *static_cast<T*>(emu::static_shared(&identity, sizeof(T), alignof(T)));
}
template <class T> T& dynamic_shared() { return *static_cast<T*>(emu::dynamic_shared(sizeof(T))); }

template <class T> T load_once(const void* p, emu::Where at = emu::Where::here()) {
    emu::aligned(p, sizeof(T), "load_once", at);
    __tsan_read_range(const_cast<void*>(p), sizeof(T));
    return *static_cast<const T*>(p);
}
template <class T> void store(void* p, T v, emu::Where at) {
    emu::aligned(p, sizeof(T), "store", at);
    __tsan_write_range(p, sizeof(T));
    *static_cast<T*>(p) = v;
}
inline void store4(void* p, u32 v, emu::Where at = emu::Where::here()) { store(p, v, at); }
inline void store8(void* p, uint2 v, emu::Where at = emu::Where::here()) { store(p, v, at); }
inline void store16(void* p, uint4 v, emu::Where at = emu::Where::here()) { store(p, v, at); }

inline u32 load_acquire(const u32* p, emu::Where at = emu::Where::here()) {
    emu::aligned(p, 4, "load_acquire", at);
    emu::spin(at);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release(u32* p, u32 v, emu::Where at = emu::Where::here()) {
    emu::aligned(p, 4, "store_release", at);
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
    emu::yield();
}

// At issue the destination becomes NaN, and the data lands only in the wait that covers it: a missing
// wait, and a buffer refilled while others still read it, both show whatever the order of lanes.
template <int Bytes>
void cp_async(void* shared, const void* global, u32 valid_bytes, emu::Where at = emu::Where::here()) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    emu::aligned(shared, Bytes, "cp.async (shared)", at);
    emu::aligned(global, Bytes, "cp.async (global)", at);
    emu::check_shared(shared, Bytes, "cp.async", at);
    if (valid_bytes > Bytes) emu::fail_at(at, "cp.async: %u valid bytes of %d", valid_bytes, Bytes);
    emu::Pending copy{shared, Bytes, {}};
    if (valid_bytes) {
        __tsan_read_range(const_cast<void*>(global), valid_bytes);
        std::memcpy(copy.data, global, valid_bytes);
    }
    __tsan_write_range(shared, Bytes);
    std::memset(shared, 0xff, Bytes);
    emu::async_issue(copy);
}
inline void cp_async_commit() { emu::async_commit(); }
template <int N> void cp_async_wait() {
    for (emu::Pending copy; emu::async_complete(N, copy);) {
        __tsan_write_range(copy.destination, copy.bytes);
        std::memcpy(copy.destination, copy.data, copy.bytes);
    }
}
}  // namespace lb

// What kernels and the headers of this folder ask of the scheduler (scheduler.h and the .cpp files).
//
// These headers are compiled with a kernel, sanitizers included; the .cpp files are not, so that
// ThreadSanitizer sees the kernel's memory accesses and no others.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#define EMU_QUIET __attribute__((no_sanitize("thread"), noinline))  // touches the emulator's memory only

extern uint3 threadIdx, blockIdx;  // of the lane that runs
extern dim3 blockDim, gridDim;

#ifdef EMU_TSAN  // GCC leaves copies of small structs (uint4) uninstrumented: primitives tell of theirs
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#else
inline void __tsan_read_range(void*, unsigned long) {}
inline void __tsan_write_range(void*, unsigned long) {}
#endif

namespace emu {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Where in a kernel a primitive is called; always the last parameter, by default the call's own place.
struct Where {
    const char* file;
    int line;
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
    bool operator==(const Where& other) const { return file == other.file && line == other.line; }
};

// ---- lanes --------------------------------------------------------------------------------------------
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_at(Where at, const char* format, ...) __attribute__((format(printf, 2, 3)));
void yield();                  // others may run first, and see what this lane did
void spin(Where at);           // as yield; too many of them are a deadlock
u32 lane_in_warp();
u32 warp_in_block();
u32 coin();                    // 0 or 1, drawn from the launch's seed
void at_block_start(void (*reset)());

// ---- waiting for each other ---------------------------------------------------------------------------
void barrier(u32 id, u32 threads, bool waits, Where at);  // threads 0: the whole block
void fence();                                             // __threadfence, for ThreadSanitizer

constexpr int slot = 64;       // bytes a lane may bring to, and take from, a collective
struct Slots { alignas(16) u8 lane[32][slot]; };
using Combine = void (*)(u32 mask, const Slots& in, Slots& out, u32 immediate);
struct Collective {
    const char* op;
    Where at;
    u32 mask = ~0u;
    Combine combine = nullptr;
    u32 immediate = 0;
    bool orders_memory = false;
};
// Waits until every lane of the mask has come to the same place; the last to come runs combine.
void collective(const Collective& what, const void* in, size_t in_bytes, void* out, size_t out_bytes);
inline void collective(const Collective& what) { collective(what, nullptr, 0, nullptr, 0); }

// ---- memory -------------------------------------------------------------------------------------------
void* static_shared(const void* identity, size_t bytes, size_t alignment);
void* dynamic_shared(size_t bytes);
void check_shared(const void* p, size_t bytes, const char* op, Where at);
u32 shared_offset(const void* p);  // within dynamic shared memory
char* shared_at(u32 offset);

// ---- copies under way ---------------------------------------------------------------------------------
struct Pending { void* destination; u32 bytes; alignas(16) u8 data[16]; };
void async_issue(const Pending& copy);
void async_commit();
bool async_complete(u32 keep_groups, Pending& next);  // the next copy that is due, if any
void async_later(void (*run)(void*), const void* data, size_t bytes);
void engine_wrote(void* p);        // 16 bytes, for ThreadSanitizer
void mbarrier_init(const void* b, u32 count, Where at);
void mbarrier_update(const void* b, u32 arrivals, long bytes, Where at);  // bytes > 0: to come, < 0: have come
void mbarrier_wait(const void* b, u32 parity, Where at);

// ---- a launch -----------------------------------------------------------------------------------------
struct Launch {  // as emulator.py's _Launch
    u32 grid[3], block[3], shared_bytes, shared_limit;
    u64 seed;
    const u64* only;  // linear indices of the blocks to run; none: all
    u64 only_count;
};
const char* run(const Launch&, void (*body)(void*), void* context);  // null, or what went wrong

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}
template <class... A>
const char* launch(void (*kernel)(A...), const Launch& config, void** arguments) {
    struct Context { void (*kernel)(A...); void** arguments; } context{kernel, arguments};
    return run(config, [](void* p) {
        auto* c = static_cast<Context*>(p);
        call(c->kernel, c->arguments, std::index_sequence_for<A...>());
    }, &context);
}
// A letter and the size of each parameter: 'c' pointer to const, 'p' pointer, 'v' value.
template <class... A>
const char* signature(void (*)(A...)) {
    static char text[8 * sizeof...(A) + 1];
    [[maybe_unused]] char* end = text;
    ((end += __builtin_sprintf(end, "%c%d ", !std::is_pointer_v<A> ? 'v'
          : std::is_const_v<std::remove_pointer_t<A>> ? 'c' : 'p', int(sizeof(A)))), ...);
    return text;
}

inline void aligned(const void* p, size_t bytes, const char* op, Where at) {
    if (reinterpret_cast<size_t>(p) % bytes) fail_at(at, "%s: %p is not %zu-byte aligned", op, p, bytes);
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

// What ThreadSanitizer must know of the scheduler: which fiber runs, what orders what, what to ignore.
#pragma once
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_write16(void*);
}
namespace emu {
// The scheduler's own memory, which it also reaches through libtsan's memcpy and malloc, is no part
// of the kernel.
struct Quiet {
    Quiet() { AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0); }
    ~Quiet() { AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0); }
};
inline void acquire(void* p) { __tsan_acquire(p); }
inline void release(void* p) { __tsan_release(p); }
inline void* new_thread() { return __tsan_create_fiber(0); }
inline void end_thread(void* thread) { __tsan_destroy_fiber(thread); }
inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void switch_thread(void* to) { __tsan_switch_to_fiber(to, 1); }  // 1: a switch orders nothing
constexpr bool sanitized = true;
}  // namespace emu
#else
namespace emu {
struct Quiet { Quiet() {} };
inline void acquire(void*) {}
inline void release(void*) {}
inline void* new_thread() { return nullptr; }
inline void end_thread(void*) {}
inline void* this_thread() { return nullptr; }
inline void switch_thread(void*) {}
constexpr bool sanitized = false;
}  // namespace emu
#endif

// Fibers: a stack of its own each, entered and left only by `switch_stack`.
#pragma once
#include "core.h"

extern "C" void emu_switch(void** save, void* load);  // keeps this stack's pointer, goes to that of `load`

namespace emu {
constexpr size_t page = 4096, stack_bytes = 64 * 1024;

struct Fiber { char* stack; void* thread; };  // thread: ThreadSanitizer's

char* map_between_guards(size_t bytes);
void unmap_between_guards(char* start, size_t bytes);
void* first_frame(char* top, void (*entry)());  // what to load to enter a stack for the first time
}  // namespace emu

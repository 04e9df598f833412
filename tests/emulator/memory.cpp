// Shared memory: poisoned at the start of each block, each object ending at a guard.
#include <sys/mman.h>

#include <map>

#include "scheduler.h"

namespace emu {
namespace {
struct Object {
    char* pages;
    size_t bytes, mapped;
    char* start() const { return pages + mapped - bytes; }
    bool holds(const char* p, size_t n) const { return p >= start() && p + n <= start() + bytes; }
};
Object make_object(size_t bytes, size_t alignment) {
    bytes = (bytes + alignment - 1) / alignment * alignment;
    const size_t mapped = (bytes + page - 1) / page * page;
    return {map_between_guards(mapped), bytes, mapped};
}
void poison(const Object& o) { memset(o.pages, 0xff, o.mapped); }

std::map<const void*, Object> statics;  // by the address of what stands for each in its kernel
Object dynamic;
std::vector<Object> used;
u32 shared_limit;
constexpr size_t static_limit = 48 * 1024;
}  // namespace

void reset_shared(u32 dynamic_bytes, u32 limit) {
    shared_limit = limit;
    // ThreadSanitizer must not take the shared memory of two blocks for one: new memory for every block.
    if (sanitized)
        for (auto& [_, s] : statics) used.push_back(s), s = make_object(s.bytes, 1);
    for (auto& [_, s] : statics) poison(s);
    if (!dynamic.pages || sanitized) {
        if (dynamic.pages) used.push_back(dynamic);
        dynamic = make_object(dynamic_bytes, 16);  // a multiple of 1024 bytes also starts at one
    }
    poison(dynamic);
}
void release_shared() {
    if (dynamic.pages) used.push_back(dynamic);
    dynamic = {};
    for (auto& o : used) munmap(o.pages - page, o.mapped + 2 * page);
    used.clear();
}

void* static_shared(const void* identity, size_t bytes, size_t alignment) {
    auto [at, is_new] = statics.try_emplace(identity);
    if (is_new) {
        Quiet quiet;
        at->second = make_object(bytes, alignment);
        poison(at->second);
        size_t total = 0;
        for (auto& [_, s] : statics) total += s.bytes;
        if (total > static_limit) fail("%zu bytes of static shared memory, a block has at most %zu", total, static_limit);
        if (total + dynamic.bytes > shared_limit)
            fail("%zu bytes of static and %zu of dynamic shared memory, a block has at most %u", total, dynamic.bytes, shared_limit);
    }
    return at->second.start();
}
void* dynamic_shared(size_t bytes) {
    if ((bytes + 15) / 16 * 16 > dynamic.bytes)
        fail("the kernel wants %zu bytes of dynamic shared memory, the launch gives %zu", bytes, dynamic.bytes);
    return dynamic.start();
}
void check_shared(const void* p, size_t bytes, const char* op, Where at) {
    const char* a = static_cast<const char*>(p);
    if (dynamic.holds(a, bytes)) return;
    for (auto& [_, s] : statics)
        if (s.holds(a, bytes)) return;
    fail_at(at, "%s: %p is not in shared memory", op, p);
}
u32 shared_offset(const void* p) { return u32(static_cast<const char*>(p) - dynamic.start()); }
char* shared_at(u32 offset) { return dynamic.start() + offset; }
}  // namespace emu

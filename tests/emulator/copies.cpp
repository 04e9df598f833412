// Copies under way: groups of cp.async, the TMA engine, and the mbarriers that tell of its copies.
#include <map>

#include "scheduler.h"

namespace emu {
namespace {
// A copy of the engine lands at any later switch, or only once all lanes wait: as the coin falls.
struct Operation {
    void (*run)(void*);
    char* sync;
    alignas(64) char data[256];
};
std::vector<Operation> soon, late;
void* engine_thread;

// A phase ends when no arrival is pending and the bytes announced have come.
struct Mbarrier {
    u32 count, pending, phase;
    long bytes;
    std::vector<u32> waiting;
    char* sync[2];
};
std::map<const void*, Mbarrier> mbarriers;
Mbarrier& state_of(const void* b, Where at) {
    const auto found = mbarriers.find(b);
    if (found == mbarriers.end()) fail_at(at, "mbarrier %p used before mbarrier_init", b);
    return found->second;
}
}  // namespace

void reset_copies() {
    soon.clear(), late.clear(), mbarriers.clear();
    if (engine_thread) end_thread(engine_thread);
    engine_thread = new_thread();
}
void check_finished(const Lane& lane) {
    for (auto& group : lane.groups)
        if (!group.empty()) fail("thread %u ended with cp.async copies it never waited for", lane.id);
    if (!lane.uncommitted.empty()) fail("thread %u ended with cp.async copies it never committed", lane.id);
}
void check_block_finished() {
    if (!soon.empty() || !late.empty()) fail("the block ended with %zu TMA copies under way", soon.size() + late.size());
}

void async_issue(const Pending& copy) {
    Quiet quiet;
    current->uncommitted.push_back(copy);
}
void async_commit() {
    Quiet quiet;
    current->groups.push_back(std::move(current->uncommitted));
    current->uncommitted.clear();
}
bool async_complete(u32 keep_groups, Pending& next) {
    Quiet quiet;
    Lane* self = current;
    while (self->groups.size() > keep_groups) {
        auto& group = self->groups.front();
        if (self->delivered < group.size()) {
            next = group[self->delivered++];
            return true;
        }
        self->groups.pop_front();
        self->delivered = 0;
    }
    return false;
}

void async_later(void (*run)(void*), const void* data, size_t bytes) {
    Quiet quiet;
    Operation op{run, new_sync(), {}};
    release(op.sync);
    memcpy(op.data, data, bytes);
    (coin() ? soon : late).push_back(op);
}
size_t engine_ready(bool lanes_ready) {
    if (!lanes_ready && soon.empty()) std::swap(soon, late);
    return soon.size();
}
void engine_run(Lane* self) {
    const size_t i = draw() % soon.size();
    Operation op = soon[i];
    soon[i] = soon.back();
    soon.pop_back();
    switch_thread(engine_thread);
    acquire(op.sync);
    {
        Quiet quiet;  // it runs on a lane's stack; engine_wrote tells of the writes that count
        op.run(op.data);
    }
    switch_thread(self->fiber->thread);
}
void engine_wrote([[maybe_unused]] void* p) {
#ifdef EMU_TSAN
    AnnotateIgnoreWritesEnd("", 0);
    __tsan_write16(p);
    AnnotateIgnoreWritesBegin("", 0);
#endif
}

void mbarrier_init(const void* b, u32 count, Where at) {
    Quiet quiet;
    check_shared(b, 8, "mbarrier_init", at);
    mbarriers[b] = {count, count, 0, 0, {}, {new_sync(), new_sync()}};
}
void mbarrier_update(const void* b, u32 arrivals, long bytes, Where at) {
    Quiet quiet;
    Mbarrier& s = state_of(b, at);
    release(s.sync[s.phase & 1]);
    if (arrivals > s.pending) fail_at(at, "mbarrier %p: more arrivals than its count of %u", b, s.count);
    s.pending -= arrivals, s.bytes += bytes;
    if (s.pending || s.bytes) return;
    s.pending = s.count, ++s.phase;
    for (u32 i : s.waiting) wake(lanes[i]);
    s.waiting.clear();
}
void mbarrier_wait(const void* b, u32 parity, Where at) {
    Quiet quiet;
    while ((state_of(b, at).phase & 1) == parity) {
        state_of(b, at).waiting.push_back(current->id);
        wait("mbarrier_wait", at);
    }
    acquire(state_of(b, at).sync[parity]);
}
}  // namespace emu

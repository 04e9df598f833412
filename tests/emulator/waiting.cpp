// Where lanes wait for each other: barriers of a block, collectives of a warp.
#include "scheduler.h"

namespace emu {
namespace {
struct Barrier {  // bar.sync: 16 of them a block
    u32 threads, arrived, phase;
    Where at;
    std::vector<u32> waiting;
    char* sync[2];  // two, as a fast lane may reach the next phase before a slow one leaves
};
Barrier barriers[16];
char fence_sync;

struct Open {  // a collective that not all lanes have come to, or left
    Collective what;
    char* sync;
    u32 arrived, leaving;
    Slots in, out;
};
struct Warp {
    u32 present;
    std::vector<std::unique_ptr<Open>> open, spare;
};
std::vector<Warp> warps;
}  // namespace

void reset_barriers() {
    for (auto& b : barriers) b = {0, 0, 0, {}, {}, {new_sync(), new_sync()}};
    warps.clear();
    warps.resize((lane_count + 31) / 32);
    for (u32 i = 0; i < lane_count; ++i) warps[i / 32].present |= 1u << i % 32;
}
bool someone_waits_at_barrier(Where& at) {
    at = barriers[0].at;
    return barriers[0].arrived;
}

void barrier(u32 id, u32 threads, bool waits, Where at) {
    Quiet quiet;
    Barrier& b = barriers[id];
    if (!threads) threads = lane_count;
    if (b.arrived && id == 0 && !(b.at == at)) fail_at(at, "__syncthreads: others are at the one of line %d", b.at.line);
    if (b.arrived && b.threads != threads) fail_at(at, "barrier %u of %u threads: others want %u", id, threads, b.threads);
    b.at = at, b.threads = threads;
    char* sync = b.sync[b.phase & 1];
    release(sync);
    if (++b.arrived == threads) {
        b.arrived = 0, ++b.phase;
        for (u32 i : b.waiting) wake(lanes[i]);
        b.waiting.clear();
        let_others_run();  // this lane too may be overtaken
    } else if (waits) {
        b.waiting.push_back(current->id);
        wait(id ? "a named barrier" : "__syncthreads", at);
    }
    if (waits) acquire(sync);
}
void fence() {
    release(&fence_sync);
    acquire(&fence_sync);
}

void collective(const Collective& what, const void* in, size_t in_bytes, void* out, size_t out_bytes) {
    Quiet quiet;
    Lane* self = current;
    Warp& warp = warps[self->id / 32];
    const u32 lane = self->id % 32, bit = 1u << lane;
    if (!(what.mask & bit)) fail_at(what.at, "%s: the mask leaves out the calling lane", what.op);
    const u32 mask = what.mask & warp.present;
    Open* c = nullptr;
    for (auto& o : warp.open)
        if (o->what.mask == mask && o->arrived != mask) c = o.get();
    if (!c) {
        if (warp.spare.empty()) warp.spare.push_back(std::make_unique<Open>()), warp.spare[0]->sync = new_sync();
        warp.open.push_back(std::move(warp.spare.back()));
        warp.spare.pop_back();
        c = warp.open.back().get();
        c->what = what, c->what.mask = mask, c->arrived = 0, c->leaving = mask;
    } else if (!(c->what.at == what.at) || strcmp(c->what.op, what.op) || c->what.immediate != what.immediate) {
        fail_at(what.at, "divergent warp: this lane at %s, others of its warp at %s of line %d", what.op, c->what.op, c->what.at.line);
    }
    if (in_bytes) memcpy(c->in.lane[lane], in, in_bytes);
    c->arrived |= bit;
    if (what.orders_memory) release(c->sync);
    if (c->arrived == mask) {
        if (what.combine) what.combine(mask, c->in, c->out, what.immediate);
        for (u32 i = 0; i < 32; ++i)
            if ((mask & ~bit) >> i & 1) wake(lanes[self->id / 32 * 32 + i]);
        let_others_run();
    } else {
        wait(what.op, what.at);
    }
    if (what.orders_memory) acquire(c->sync);
    if (out_bytes) memcpy(out, c->out.lane[lane], out_bytes);
    if (c->leaving &= ~bit) return;
    for (auto& o : warp.open)
        if (o.get() == c) {
            warp.spare.push_back(std::move(o));
            o = std::move(warp.open.back());
            warp.open.pop_back();
            return;
        }
}
}  // namespace emu

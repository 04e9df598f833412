// The scheduler: runs the blocks of a launch one after the other, the lanes of a block as fibers that switch only
// where they wait for each other.  Order of blocks and of runnable lanes is drawn from the launch's seed.
#include "emu.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <vector>
#include <sys/mman.h>
#include <unistd.h>
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_write16(void*);
}
// The emulator's own memory (also reached through libtsan's memcpy and malloc) is not part of the kernel.
struct Quiet {
    Quiet() { AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0); }
    ~Quiet() { AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0); }
};
static void acquire(void* p) { __tsan_acquire(p); }
static void release(void* p) { __tsan_release(p); }
#else
struct Quiet { Quiet() {} };
static void acquire(void*) {}
static void release(void*) {}
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" void emu_switch(void** save, void* load);
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
asm(R"(
.text
.type emu_switch,@function
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
static void* first_frame(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 2;
    *sp = reinterpret_cast<void*>(entry);
    return sp - 6;
}
#elif defined(__aarch64__) && !defined(EMU_UCONTEXT)
asm(R"(
.text
.type emu_switch,%function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch, .-emu_switch
)");
static void* first_frame(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 20;
    sp[11] = reinterpret_cast<void*>(entry);
    return sp;
}
#else
#include <ucontext.h>
void emu_switch(void** save, void* load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(load));
}
static void* first_frame(char* top, void (*entry)()) {
    ucontext_t* c = reinterpret_cast<ucontext_t*>(top - 2048);
    getcontext(c);
    c->uc_stack.ss_sp = top - 64 * 1024;
    c->uc_stack.ss_size = 62 * 1024;
    c->uc_link = nullptr;
    makecontext(c, entry, 0);
    return c;
}
#endif

namespace emu {
namespace {

constexpr size_t page = 4096, stack_bytes = 64 * 1024;
constexpr u32 max_lanes = 1024;

char* map(size_t bytes) {  // bytes, rounded up to pages, between two guard pages
    bytes = (bytes + page - 1) / page * page;
    char* p = static_cast<char*>(mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(p + page, bytes, PROT_READ | PROT_WRITE);
    return p + page;
}

struct SharedObject { char* pages; size_t bytes, mapped; char* start() { return pages + mapped - bytes; } };
SharedObject make_shared_object(size_t bytes, size_t alignment) {  // ends at a guard page
    bytes = (bytes + alignment - 1) / alignment * alignment;
    const size_t mapped = (bytes + page - 1) / page * page;
    return {map(mapped), bytes, mapped};
}

struct Collective {
    const char* op; int line; u32 mask, arrived, leaving, immediate;
    Slots in, out;
};
struct Warp { u32 present; std::vector<std::unique_ptr<Collective>> open, spare; };

enum class State { ready, waiting, done };
struct Lane {
    void* sp; uint3 index; u32 id; State state; const char* op; int line;
    std::deque<std::vector<Pending>> groups;  // committed, oldest first
    std::vector<Pending> uncommitted;
    size_t delivered;                         // of the oldest group
    void* asan;
    struct Fiber* fiber;
};
struct Fiber { char* stack; void* tsan; };

Lane lanes[max_lanes], *current;
Fiber fibers[max_lanes];
std::vector<u32> ready;
std::vector<Warp> warps;
u32 lane_count, live, at_barrier;
int barrier_line;
char barrier_sync[2], launch_start, launch_end, fence_sync; u32 barrier_phase;
std::map<const void*, SharedObject> statics;
[[maybe_unused]] std::vector<SharedObject> used;
SharedObject dynamic;
struct Async { void (*run)(void*); char* sync; alignas(16) char data[256]; };
std::vector<Async> async_ops, lazy_ops;     // TMA copies under way: at any later switch, or only once all lanes wait
char async_sync[1024]; u32 async_count;
std::map<const void*, std::vector<u32>> waiting_on;
struct BarrierState { u32 count, pending, phase; long transactions; char sync[2]; };
std::map<const void*, BarrierState> mbarriers;
u64 random_state;
void (*body)(void*); void* body_context;
void* main_sp; void* main_tsan; [[maybe_unused]] void* engine_tsan; void* main_asan; const void* main_stack; size_t main_stack_bytes;
char error[1024];
bool failed;
sigjmp_buf after_fault;

u64 draw() { random_state ^= random_state << 13; random_state ^= random_state >> 7; return random_state ^= random_state << 17; }

template <class T> void shuffle(std::vector<T>& v) { for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[draw() % i]); }

void resume(Lane* to, void** save, void** asan_save) {
    current = to;
    threadIdx = to->index;
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(to->fiber->tsan, 1);  // 1: a switch orders nothing
#endif
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(asan_save, to->fiber->stack, stack_bytes);
#endif
    (void)asan_save;
    emu_switch(save, to->sp);
}
void back_to_main(void** save, void** asan_save) {
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(main_tsan, 1);
#endif
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(asan_save, main_stack, main_stack_bytes);
#endif
    (void)asan_save;
    emu_switch(save, main_sp);
}
void arrived([[maybe_unused]] void* fake) {
#ifdef EMU_ASAN
    const void* bottom; size_t size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (!main_stack) main_stack = bottom, main_stack_bytes = size;
#endif
}

// Gives the processor to a runnable lane drawn at random; returns when this lane is resumed.
void switch_away(Lane* self) {
    while (true) {
        if (ready.empty() && async_ops.empty()) std::swap(async_ops, lazy_ops);
        if (async_ops.empty() || draw() % (ready.size() + async_ops.size()) < ready.size()) break;
        const size_t i = draw() % async_ops.size();
        Async op = async_ops[i];
        async_ops[i] = async_ops.back();
        async_ops.pop_back();
#ifdef EMU_TSAN
        __tsan_switch_to_fiber(engine_tsan, 1);
        acquire(op.sync);
#endif
        {
            Quiet quiet;  // it runs on a lane's stack; engine_wrote tells of the writes that count
            op.run(op.data);
        }
#ifdef EMU_TSAN
        __tsan_switch_to_fiber(self->fiber->tsan, 1);
#endif
    }
    if (ready.empty()) {
        if (live) {
            int n = snprintf(error, sizeof error, "deadlock in block (%u,%u,%u):", blockIdx.x, blockIdx.y, blockIdx.z);
            std::map<std::pair<const void*, int>, std::pair<u32, u32>> where;  // op, line -> count, a lane
            for (u32 i = 0; i < lane_count; ++i) {
                auto& w = where[{lanes[i].state == State::done ? "exited" : lanes[i].op, lanes[i].line}];
                ++w.first, w.second = i;
            }
            for (auto& [at, w] : where)
                if (n < int(sizeof error)) n += snprintf(error + n, sizeof error - n, " %u threads (e.g. %u) at %s line %d;",
                                                         w.first, w.second, static_cast<const char*>(at.first), at.second);
            failed = true;
        }
        back_to_main(&self->sp, self->state == State::done ? nullptr : &self->asan);
    } else {
        const size_t i = draw() % ready.size();
        Lane* next = &lanes[ready[i]];
        ready[i] = ready.back();
        ready.pop_back();
        if (next == self) return;
        resume(next, &self->sp, self->state == State::done ? nullptr : &self->asan);
    }
    arrived(self->asan);
}
void wait(Lane* self, const char* op, int line) {
    self->state = State::waiting, self->op = op, self->line = line;
    switch_away(self);
}
void wake(Lane& lane) { lane.state = State::ready; ready.push_back(lane.id); }


void lane_main() {
    arrived(nullptr);
    Lane* self = current;
    acquire(&launch_start);
    body(body_context);
    release(&launch_end);
    {
        Quiet quiet;  // ends before the last switch: the fiber serves again
        if (!self->groups.empty() || !self->uncommitted.empty())
            for (auto& g : self->groups) if (!g.empty()) fail("thread %u ended with cp.async copies it never waited for", self->id);
        self->state = State::done, self->line = 0;
        if (--live && at_barrier) fail("thread %u exited while others wait at __syncthreads (line %d)", self->id, barrier_line);
    }
    if (!live && async_ops.size() + lazy_ops.size()) fail("the block ended with %zu TMA copies under way", async_ops.size() + lazy_ops.size());
    switch_away(self);
    abort();
}

struct sigaction old_segv, old_bus;
void on_fault(int signal, siginfo_t* info, void*) {
    failed = true;
    snprintf(error, sizeof error, "%s at address %p, thread %u of block (%u,%u,%u)", signal == SIGSEGV ? "out-of-bounds access" : "bus error",
             info->si_addr, current ? current->id : 0, blockIdx.x, blockIdx.y, blockIdx.z);
    siglongjmp(after_fault, 1);
}

}  // namespace

void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    int n = vsnprintf(error, sizeof error, format, list);
    va_end(list);
    snprintf(error + n, sizeof error - n, ", thread %u of block (%u,%u,%u)", current->id, blockIdx.x, blockIdx.y, blockIdx.z);
    failed = true;
    back_to_main(&current->sp, nullptr);
    abort();
}

void engine_wrote([[maybe_unused]] void* p) {
#ifdef EMU_TSAN
    AnnotateIgnoreWritesEnd("", 0);
    __tsan_write16(p);
    AnnotateIgnoreWritesBegin("", 0);
#endif
}
u32 coin() { return draw() & 1; }
void yield() {  // what this lane did may be seen, and acted on, before what it does next
    Quiet quiet;
    ready.push_back(current->id);
    switch_away(current);
}
u32 lane_in_warp() { return current->id % 32; }

void barrier(int line) {
    Quiet quiet;
    Lane* self = current;
    if (at_barrier && barrier_line != line)
        fail("__syncthreads: this thread at line %d, others at line %d", line, barrier_line);
    barrier_line = line;
    char* sync = &barrier_sync[barrier_phase & 1];  // two, as a fast lane may reach the next barrier before a slow one leaves
    release(sync);
    if (++at_barrier == lane_count) {
        at_barrier = 0, ++barrier_phase;
        for (u32 i = 0; i < lane_count; ++i) if (&lanes[i] != self) wake(lanes[i]);
        ready.push_back(self->id);  // this lane too may be overtaken
        switch_away(self);
    } else {
        wait(self, "__syncthreads", line);
    }
    acquire(sync);
}

void collective(const char* op, int line, u32 mask, const void* in, int in_bytes, void* out, int out_bytes,
                Combine combine, u32 immediate, bool orders_memory) {
    Quiet quiet;
    Lane* self = current;
    Warp& warp = warps[self->id / 32];
    const u32 bit = 1u << self->id % 32;
    if (!(mask & bit)) fail("%s (line %d): the mask leaves out the calling lane", op, line);
    mask &= warp.present;
    Collective* c = nullptr;
    for (auto& o : warp.open) if (o->mask == mask && o->arrived != mask) c = o.get();
    if (!c) {
        if (warp.spare.empty()) warp.spare.push_back(std::make_unique<Collective>());
        warp.open.push_back(std::move(warp.spare.back()));
        warp.spare.pop_back();
        c = warp.open.back().get();
        c->op = op, c->line = line, c->mask = mask, c->arrived = 0, c->leaving = mask, c->immediate = immediate;
    } else if (c->line != line || strcmp(c->op, op) || c->immediate != immediate) {
        fail("divergent warp: this lane at %s line %d, others of its warp at %s line %d", op, line, c->op, c->line);
    }
    if (in_bytes) memcpy(c->in.lane[self->id % 32], in, in_bytes);
    c->arrived |= bit;
    if (orders_memory) release(c);
    if (c->arrived == mask) {
        if (combine) combine(mask, c->in, c->out, immediate);
        for (u32 i = 0; i < 32; ++i)
            if ((mask & ~bit) >> i & 1) wake(lanes[self->id / 32 * 32 + i]);
        ready.push_back(self->id);
        switch_away(self);
    } else {
        wait(self, op, line);
    }
    if (orders_memory) acquire(c);
    if (out_bytes) memcpy(out, c->out.lane[self->id % 32], out_bytes);
    if (!(c->leaving &= ~bit))
        for (auto& o : warp.open)
            if (o.get() == c) {
                warp.spare.push_back(std::move(o));
                o = std::move(warp.open.back());
                warp.open.pop_back();
                break;
            }
}

// ---- mbarrier: a phase ends when no arrival is pending and the bytes announced have come ----------------------
void mbarrier_init(const void* b, u32 count) {
    Quiet quiet;
    check_shared(b, 8, "mbarrier", 0);
    mbarriers[b] = {count, count, 0, 0, {}};
}
static BarrierState& state_of(const void* b) {
    const auto at = mbarriers.find(b);
    if (at == mbarriers.end()) fail("mbarrier %p used before mbarrier_init", b);
    return at->second;
}
void mbarrier_update(const void* b, int arrivals, long bytes) {  // bytes > 0: to expect; < 0: have come
    Quiet quiet;
    BarrierState& s = state_of(b);
    release(&s.sync[s.phase & 1]);
    if (u32(arrivals) > s.pending) fail("mbarrier %p: more arrivals than its count of %u", b, s.count);
    s.pending -= arrivals, s.transactions += bytes;
    if (s.pending || s.transactions) return;
    s.pending = s.count, ++s.phase;
    for (u32 i : waiting_on[b]) wake(lanes[i]);
    waiting_on[b].clear();
}
void mbarrier_wait(const void* b, u32 parity, int line) {
    Quiet quiet;
    while ((state_of(b).phase & 1) == parity) {
        waiting_on[b].push_back(current->id);
        wait(current, "mbarrier_wait", line);
    }
    acquire(&state_of(b).sync[parity]);
}
void async_later(void (*run)(void*), const void* data, size_t bytes) {
    Quiet quiet;
    Async op{run, &async_sync[async_count++ % 1024], {}};
    release(op.sync);
    memcpy(op.data, data, bytes);
    (draw() & 1 ? async_ops : lazy_ops).push_back(op);
}
u32 shared_offset(const void* p) { return u32(static_cast<const char*>(p) - dynamic.start()); }
char* shared_at(u32 offset) { return dynamic.start() + offset; }

void* static_shared(const void* identity, size_t bytes, size_t alignment) {
    auto [at, is_new] = statics.try_emplace(identity);
    if (is_new) {
        Quiet quiet;
        at->second = make_shared_object(bytes, alignment);
        memset(at->second.pages, 0xff, at->second.mapped);
    }
    return at->second.start();
}
void* dynamic_shared(size_t bytes) {
    if ((bytes + 15) / 16 * 16 > dynamic.bytes) fail("the kernel wants %zu bytes of dynamic shared memory, the launch gives %zu", bytes, dynamic.bytes);
    return dynamic.start();
}
void check_shared(const void* p, size_t bytes, const char* op, int line) {
    const char* a = static_cast<const char*>(p);
    const auto inside = [&](SharedObject& s) { return a >= s.start() && a + bytes <= s.start() + s.bytes; };
    if (inside(dynamic)) return;
    for (auto& [_, s] : statics) if (inside(s)) return;
    fail("%s (line %d): %p is not in shared memory", op, line, p);
}

void async_issue(const Pending& copy) { Quiet quiet; current->uncommitted.push_back(copy); }
void async_commit() { Quiet quiet; current->groups.push_back(std::move(current->uncommitted)); current->uncommitted.clear(); }
bool async_complete(int keep_groups, Pending& next) {
    Quiet quiet;
    Lane* self = current;
    while (int(self->groups.size()) > keep_groups) {
        auto& group = self->groups.front();
        if (self->delivered < group.size()) { next = group[self->delivered++]; return true; }
        self->groups.pop_front();
        self->delivered = 0;
    }
    return false;
}

void fence() { release(&fence_sync); acquire(&fence_sync); }

static void run_block() {
    Quiet quiet;
    ready.clear();
    ready.reserve(max_lanes + 1);
    live = lane_count, at_barrier = 0, barrier_phase = 0;
    warps.clear();
    mbarriers.clear(), waiting_on.clear(), async_ops.clear(), lazy_ops.clear();
    warps.resize((lane_count + 31) / 32);
#ifdef EMU_TSAN  // new memory for every block: two blocks' shared memory must not look like one
    for (auto& [_, s] : statics) used.push_back(s), s = make_shared_object(s.bytes, 1);
    used.push_back(dynamic), dynamic = make_shared_object(dynamic.bytes, 1);
#endif
    for (auto& [_, s] : statics) memset(s.pages, 0xff, s.mapped);
    memset(dynamic.pages, 0xff, dynamic.mapped);
    // Lanes take fibers in a new order each block: ThreadSanitizer then tells thread t of one block from t of another.
    std::vector<u32> order(lane_count);
    std::iota(order.begin(), order.end(), 0u);
    shuffle(order);
    for (u32 i = 0; i < lane_count; ++i) {
        Lane& l = lanes[i];
        l.fiber = &fibers[order[i]];
        if (!l.fiber->stack) {
            l.fiber->stack = map(stack_bytes);
#ifdef EMU_TSAN
            l.fiber->tsan = __tsan_create_fiber(0);
#endif
        }
#ifdef EMU_ASAN
        __asan_unpoison_memory_region(l.fiber->stack, stack_bytes);  // of the frames the last block left there
#endif
        l.sp = first_frame(l.fiber->stack + stack_bytes, lane_main);
        l.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        l.id = i, l.asan = nullptr, l.delivered = 0;
        l.groups.clear(), l.uncommitted.clear();
        warps[i / 32].present |= 1u << i % 32;
        wake(l);
    }
    const size_t i = draw() % ready.size();
    Lane* first = &lanes[ready[i]];
    ready[i] = ready.back();
    ready.pop_back();
    resume(first, &main_sp, &main_asan);
    arrived(main_asan);
}

const char* run(const Launch& launch, void (*kernel_body)(void*), void* context) {
    gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    blockDim = dim3(launch.block[0], launch.block[1], launch.block[2]);
    lane_count = blockDim.x * blockDim.y * blockDim.z;
    if (!lane_count || lane_count > max_lanes) return "bad block size";
    if (launch.shared_bytes > 227 * 1024) return "more than 227 KiB of dynamic shared memory";
    body = kernel_body, body_context = context;
    random_state = launch.seed * 0x9e3779b97f4a7c15ull + 0x1234567;
    failed = false;
    dynamic = make_shared_object(launch.shared_bytes, 16);  // a multiple of 1024 bytes also starts at one
#ifdef EMU_TSAN
    main_tsan = __tsan_get_current_fiber();
    if (!engine_tsan) engine_tsan = __tsan_create_fiber(0);
#endif
    release(&launch_start);
#if !defined(EMU_TSAN) && !defined(EMU_ASAN)
    static char* alternate = map(64 * 1024);
    stack_t stack{alternate, 0, 64 * 1024}, old_stack;
    sigaltstack(&stack, &old_stack);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    if (!sigsetjmp(after_fault, 1))
#endif
    {
        std::vector<u64> order(launch.only, launch.only + launch.only_count);
        if (order.empty()) {
            order.resize(size_t(gridDim.x) * gridDim.y * gridDim.z);
            std::iota(order.begin(), order.end(), 0ull);
        }
        shuffle(order);
        for (u64 b : order) {
            blockIdx = {u32(b % gridDim.x), u32(b / gridDim.x % gridDim.y), u32(b / gridDim.x / gridDim.y)};
            run_block();
            if (failed) break;
        }
    }
#if !defined(EMU_TSAN) && !defined(EMU_ASAN)
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
#endif
    acquire(&launch_end);
    used.push_back(dynamic);
    for (auto& s : used) munmap(s.pages - page, s.mapped + 2 * page);
    used.clear();
    return failed ? error : nullptr;
}

}  // namespace emu

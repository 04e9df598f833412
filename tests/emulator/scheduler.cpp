// Runs the blocks of a launch one after the other, the lanes of a block as fibers that switch only where
// they wait for each other. The order of blocks and of runnable lanes is drawn from the launch's seed.
#include "scheduler.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
Lane lanes[max_lanes], *current;
u32 lane_count, live;

namespace {
constexpr u32 most_spins = 1 << 20;

Fiber fibers[max_lanes];
std::vector<u32> ready;
u64 random_state;
u32 spins;
void (*body)(void*);
void* body_context;
void *main_sp, *main_thread;
char launch_start, launch_end;
std::deque<char> syncs;
char error[2048];
bool failed;
std::vector<void (*)()>& resets() {
    static std::vector<void (*)()> list;
    return list;
}

template <class T> void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[draw() % i]);
}
// In one block of two, some warps are seldom drawn while others can go on: those run far ahead.
u32 slow_warps;
Lane* take_ready() {
    size_t i = draw() % ready.size();
    for (int tries = 0; tries < 8 && slow_warps >> ready[i] / 32 & 1 && draw() % 32; ++tries) i = draw() % ready.size();
    Lane* lane = &lanes[ready[i]];
    ready[i] = ready.back();
    ready.pop_back();
    return lane;
}
void resume(Lane* to, void** save) {
    current = to;
    threadIdx = to->index;
    switch_thread(to->fiber->thread);
    emu_switch(save, to->sp);
}
void back_to_main(void** save) {
    switch_thread(main_thread);
    emu_switch(save, main_sp);
}

void describe_deadlock() {
    int n = snprintf(error, sizeof error, "deadlock in block (%u,%u,%u):", blockIdx.x, blockIdx.y, blockIdx.z);
    std::map<std::pair<std::string, int>, std::pair<u32, u32>> where;  // op, line -> count, a lane
    for (u32 i = 0; i < lane_count; ++i) {
        const bool done = lanes[i].state == State::done;
        auto& w = where[{done ? "their end" : lanes[i].op, done ? 0 : lanes[i].at.line}];
        ++w.first, w.second = i;
    }
    for (auto& [at, w] : where)
        if (n < int(sizeof error))
            n += snprintf(error + n, sizeof error - n, " %u threads (one is %u) at %s, line %d;", w.first, w.second,
                          at.first.c_str(), at.second);
}

// Gives the processor to a runnable lane drawn at random; returns when this lane is resumed.
void switch_away(Lane* self) {
    while (const size_t copies = engine_ready(!ready.empty())) {
        if (draw() % (ready.size() + copies) < ready.size()) break;
        engine_run(self);
    }
    if (ready.empty()) {
        if (live) {
            describe_deadlock();
            failed = true;
        }
        back_to_main(&self->sp);
    } else if (Lane* next = take_ready(); next != self) {
        resume(next, &self->sp);
    }
}

void lane_main() {
    Lane* self = current;
    acquire(&launch_start);
    body(body_context);
    release(&launch_end);
    {
        Quiet quiet;  // ends before the last switch: the fiber serves again
        check_finished(*self);
        self->state = State::done;
        --live;
        Where at;
        if (live && someone_waits_at_barrier(at)) fail_at(at, "thread %u ends while others wait at __syncthreads", self->id);
        if (!live) check_block_finished();
    }
    switch_away(self);
    abort();
}

// ThreadSanitizer takes a new thread for one that has ended, so threads end with the launch; or before,
// as there can be 8,000 of them.
std::vector<void*> ended_threads;
constexpr size_t most_ended_threads = 4096;
void end_threads() {
    for (void* thread : ended_threads) end_thread(thread);
    ended_threads.clear();
}
void drop_fibers() {
    for (Fiber& fiber : fibers) {
        if (!fiber.stack) continue;
        if (sanitized) ended_threads.push_back(fiber.thread);
        unmap_between_guards(fiber.stack, stack_bytes);
        fiber.stack = nullptr;
    }
    if (ended_threads.size() > most_ended_threads) end_threads();
}

void run_block(const Launch& launch) {
    Quiet quiet;
    if (sanitized) drop_fibers();  // a thread, or a stack, that had been in two blocks would order them
    ready.clear();
    ready.reserve(max_lanes + 1);
    live = lane_count, spins = 0;
    reset_barriers();
    reset_copies();
    reset_shared(launch.shared_bytes, launch.shared_limit);
    for (auto reset : resets()) reset();
    for (u32 i = 0; i < lane_count; ++i) {
        Lane& lane = lanes[i];
        lane.fiber = &fibers[i];
        if (!lane.fiber->stack) *lane.fiber = {map_between_guards(stack_bytes), new_thread()};
        lane.sp = first_frame(lane.fiber->stack + stack_bytes, lane_main);
        lane.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        lane.id = i, lane.delivered = 0;
        lane.groups.clear(), lane.uncommitted.clear();
        wake(lane);
    }
    slow_warps = coin() ? u32(draw()) : 0;
    resume(take_ready(), &main_sp);
}

// ---- faults -------------------------------------------------------------------------------------------------
constexpr int fault_signals[] = {SIGSEGV, SIGBUS, SIGFPE};
sigjmp_buf after_fault;
void on_fault(int signal, siginfo_t* info, void*) {
    failed = true;
    const char* what = signal == SIGFPE ? "division by zero" : "access out of bounds";
    snprintf(error, sizeof error, "%s at address %p, thread %u of block (%u,%u,%u)", what, info->si_addr,
             current ? current->id : 0, blockIdx.x, blockIdx.y, blockIdx.z);
    siglongjmp(after_fault, 1);
}
struct CatchFaults {  // on a stack of its own, as a lane's may be what overflowed
    struct sigaction before[3];
    stack_t stack_before;
    CatchFaults() {
        if (sanitized) return;  // they have handlers of their own
        static char* alternate = map_between_guards(64 * 1024);
        const stack_t stack{alternate, 0, 64 * 1024};
        sigaltstack(&stack, &stack_before);
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; ++i) sigaction(fault_signals[i], &action, &before[i]);
    }
    ~CatchFaults() {
        if (sanitized) return;
        for (int i = 0; i < 3; ++i) sigaction(fault_signals[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

void run_blocks(const Launch& launch) {
    CatchFaults catching;
    if (sigsetjmp(after_fault, 1)) return;
    std::vector<u64> order(launch.only, launch.only + launch.only_count);
    if (order.empty()) {
        order.resize(size_t(gridDim.x) * gridDim.y * gridDim.z);
        std::iota(order.begin(), order.end(), 0ull);
    }
    shuffle(order);
    for (u64 b : order) {
        blockIdx = {u32(b % gridDim.x), u32(b / gridDim.x % gridDim.y), u32(b / gridDim.x / gridDim.y)};
        run_block(launch);
        if (failed) return;
    }
}
}  // namespace

// ---- what the other parts and the kernels use ---------------------------------------------------------------
char* new_sync() {
    static char only;
    return sanitized ? &syncs.emplace_back() : &only;
}
u64 draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}
u32 coin() { return draw() & 1; }
u32 lane_in_warp() { return current->id % 32; }
u32 warp_in_block() { return current->id / 32; }
void at_block_start(void (*reset)()) { resets().push_back(reset); }

void wake(Lane& lane) {
    lane.state = State::ready;
    ready.push_back(lane.id);
}
void wait(const char* op, Where at) {
    current->state = State::waiting, current->op = op, current->at = at;
    switch_away(current);
}
void let_others_run() {
    ready.push_back(current->id);
    switch_away(current);
}
void yield() {
    Quiet quiet;
    let_others_run();
}
void spin(Where at) {
    if (++spins > most_spins)
        fail_at(at, "the block waits for what none of its threads will do (blocks run one after the other)");
    yield();
}
void give_up() {
    const int n = strlen(error);
    snprintf(error + n, sizeof error - n, ", thread %u of block (%u,%u,%u)", current->id, blockIdx.x, blockIdx.y, blockIdx.z);
    failed = true;
    back_to_main(&current->sp);
    abort();
}
void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(error, sizeof error, format, list);
    va_end(list);
    give_up();
}
void fail_at(Where at, const char* format, ...) {
    va_list list;
    va_start(list, format);
    const int n = vsnprintf(error, sizeof error, format, list);
    va_end(list);
    const char* name = strrchr(at.file, '/');
    snprintf(error + n, sizeof error - n, " (%s line %d)", name ? name + 1 : at.file, at.line);
    give_up();
}

const char* run(const Launch& launch, void (*kernel_body)(void*), void* context) {
    gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    blockDim = dim3(launch.block[0], launch.block[1], launch.block[2]);
    lane_count = blockDim.x * blockDim.y * blockDim.z;
    body = kernel_body, body_context = context;
    random_state = launch.seed * 0x9e3779b97f4a7c15ull + 0x1234567;
    failed = false;
    main_thread = this_thread();
    release(&launch_start);
    run_blocks(launch);
    acquire(&launch_end);
    release_shared();
    drop_fibers();  // a process has 65,530 mappings at most, three of them a stack
    end_threads();
    syncs.clear();
    return failed ? error : nullptr;
}
}  // namespace emu

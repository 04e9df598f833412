// The scheduler's own state, shared by the .cpp files: the lanes of the block that runs.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "fiber.h"
#include "sanitizer.h"

namespace emu {
constexpr u32 max_lanes = 1024;

enum class State { ready, waiting, done };
struct Lane {
    void* sp;
    uint3 index;
    u32 id;
    State state;
    const char* op;   // what it waits for, and where
    Where at;
    Fiber* fiber;
    std::deque<std::vector<Pending>> groups;  // of cp.async: committed, oldest first
    std::vector<Pending> uncommitted;
    size_t delivered;                         // of the oldest group
};

extern Lane lanes[max_lanes], *current;
extern u32 lane_count, live;       // of the block; of those that have not ended

u64 draw();                        // from the launch's seed
void wait(const char* op, Where at);          // until another lane wakes this one
void wake(Lane& lane);
void let_others_run();             // this lane stays ready
[[noreturn]] void give_up();       // the launch has failed

// What release and acquire are told, for ThreadSanitizer. No address serves twice in a launch: it would
// order the blocks, which are concurrent.
char* new_sync();

// Of each part, at the start of a block.
void reset_barriers();
void reset_copies();
void reset_shared(u32 dynamic_bytes, u32 limit);

bool someone_waits_at_barrier(Where& at);
void check_finished(const Lane& lane);        // a lane ends: has it waited for its copies?
void check_block_finished();
void release_shared();             // at the end of a launch

// Copies of the TMA engine, which runs beside the lanes.
size_t engine_ready(bool lanes_ready);        // how many could land now
void engine_run(Lane* self);       // one of them, drawn at random
}  // namespace emu

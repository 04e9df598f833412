"""The thread pool's hot path as LLVM IR, for 64-bit little-endian Linux.

One word, the gate, says everything about a job, so that every step is one atomic operation:

    63          32 31     16 15      14         0
    [ job number ] [ seats ] [ dozing ] [ active ]

- publish: the owner of the pool stores job number + 1, seats = workers wanted, active = 0. No
  worker is inside then, and none can enter without a seat, so the job's fields are written before.
- enter: a worker swaps (seats, active) for (seats - 1, active + 1). The swap fails if anything
  changed, and there is no seat between jobs: a late worker cannot run a stale job.
- leave: active - 1, which releases what the tiles wrote.
- close: the owner takes the seats away, then waits until active is 0. Only then is the memory of
  the caller left alone for good, and the pool free for the next owner.

Idle workers sleep on the job number (upper half of the gate), a waiting owner on the lower half.
A worker counts itself as sleeping before the kernel compares the number, and the owner publishes
before it reads that count, both sequentially consistent: one of them sees the other.
"""

from __future__ import annotations

from string import Template

from lowbit.kernels.cpu import float_mode

FUTEX_SYSCALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
"""Number of futex(2) by platform.machine()."""

DONE, OPEN, LOST = -1, -2, -3
"""What the entry points return; a number from 0 up is the tile at which to go on serially."""

MOST_WORKERS = 1023

# pause takes 40 to 140 cycles on x86-64; elsewhere "yield" is a hint of one cycle.
_PAUSE = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}

_TEXT = Template("""
%State = type { i64, [56 x i8], i64, [56 x i8], i64, [56 x i8], i64, [56 x i8],
                i64, i64, [48 x i8], %Job }
;          gate 0, next tile 2, owner's ticket 4, sleepers 6, workers 8, orphaned 9, job 11
%Job = type { ptr, ptr, i64, i64, ptr, i32 }
;          function, argument, tiles, scratch bytes, the owner's scratch, the owner's processor
%Call = type { ptr, i64, ptr, ptr, i64, i64, i64, ptr, i64 }
;          state, ticket, function, argument, first tile, tiles, scratch bytes, scratch, helpers

@worker_name = private constant [14 x i8] c"lowbit worker\\00"

$declare_pause
declare i32 @clock_gettime(i32, ptr)
declare i64 @syscall(i64, ...)
declare i32 @prctl(i32, ...)
declare i32 @sched_getcpu()
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i32 @sched_setaffinity(i32, i64, ptr)
declare ptr @aligned_alloc(i64, i64)
declare void @free(ptr)
declare i32 @sigfillset(ptr)
declare i32 @sigdelset(ptr, i32)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare i32 @pthread_attr_init(ptr)
declare i32 @pthread_attr_setdetachstate(ptr, i32)
declare i32 @pthread_attr_setstacksize(ptr, i64)
declare i32 @pthread_attr_destroy(ptr)
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

define internal i64 @now() {
  %time = alloca [2 x i64]
  %failed = call i32 @clock_gettime(i32 1, ptr %time)
  %seconds = load i64, ptr %time
  %rest_at = getelementptr i64, ptr %time, i64 1
  %rest = load i64, ptr %rest_at
  %whole = mul i64 %seconds, 1000000000
  %sum = add i64 %whole, %rest
  ret i64 %sum
}

define internal void @futex_wait(ptr %word, i32 %seen) {
  %wide = zext i32 %seen to i64
  %result = call i64 (i64, ...) @syscall(i64 $futex, ptr %word, i64 128, i64 %wide, ptr null)
  ret void
}

define internal void @futex_wake(ptr %word, i32 %threads) {
  %wide = sext i32 %threads to i64
  %result = call i64 (i64, ...) @syscall(i64 $futex, ptr %word, i64 129, i64 %wide)
  ret void
}

; A worker that woke up on the owner's processor moves away, else one of the two waits. Linux wakes
; it there again and again in a virtual machine, where it takes a halted processor for a busy one
; (on two of them, 2 tiles of 80 us took 165 us). One move lasts: the next wake starts from there.
define internal void @make_room(ptr %state) {
entry:
  %mask = alloca [128 x i64]
  %owner_at = getelementptr %State, ptr %state, i64 0, i32 11, i32 5
  %owner = load atomic i32, ptr %owner_at monotonic, align 8
  %here = call i32 @sched_getcpu()
  %same = icmp eq i32 %owner, %here
  %known = icmp ult i32 %here, 8192
  %move = and i1 %same, %known
  br i1 %move, label %ask, label %out
ask:
  %failed = call i32 @sched_getaffinity(i32 0, i64 1024, ptr %mask)
  %got = icmp eq i32 %failed, 0
  br i1 %got, label %change, label %out
change:
  %byte = lshr i32 %here, 3
  %low = and i32 %here, 7
  %byte_at = getelementptr i8, ptr %mask, i32 %byte
  %narrow = trunc i32 %low to i8
  %bit = shl i8 1, %narrow
  %allowed = load i8, ptr %byte_at
  %others = xor i8 %allowed, %bit
  store i8 %others, ptr %byte_at
  ; Refused where this is the only processor.
  %r0 = call i32 @sched_setaffinity(i32 0, i64 1024, ptr %mask)
  store i8 %allowed, ptr %byte_at
  %r1 = call i32 @sched_setaffinity(i32 0, i64 1024, ptr %mask)
  br label %out
out:
  ret void
}

; Zeroed memory that is never given back: workers look at it until the process ends.
define ptr @lowbit_pool_create() {
  %state = call ptr @aligned_alloc(i64 64, i64 $state_bytes)
  %none = icmp eq ptr %state, null
  br i1 %none, label %out, label %clear
clear:
  call void @llvm.memset.p0.i64(ptr %state, i8 0, i64 $state_bytes, i1 false)
  br label %out
out:
  ret ptr %state
}

; Start up to `wanted` more workers; returns how many there are now.
define i64 @lowbit_pool_spawn(ptr %state, i64 %wanted) {
entry:
  %all = alloca [32 x i64]
  %before = alloca [32 x i64]
  %attributes = alloca [32 x i64]
  %thread = alloca i64
  %workers_at = getelementptr %State, ptr %state, i64 0, i32 8
  %r0 = call i32 @sigfillset(ptr %all)
  ; A fault of the thread itself (ILL, TRAP, BUS, FPE, SEGV) must still reach its handler.
  %r1 = call i32 @sigdelset(ptr %all, i32 4)
  %r2 = call i32 @sigdelset(ptr %all, i32 5)
  %r3 = call i32 @sigdelset(ptr %all, i32 7)
  %r4 = call i32 @sigdelset(ptr %all, i32 8)
  %r5 = call i32 @sigdelset(ptr %all, i32 11)
  %r6 = call i32 @pthread_sigmask(i32 2, ptr %all, ptr %before)
  %r7 = call i32 @pthread_attr_init(ptr %attributes)
  %r8 = call i32 @pthread_attr_setdetachstate(ptr %attributes, i32 1)
  %r9 = call i32 @pthread_attr_setstacksize(ptr %attributes, i64 $stack_bytes)
  br label %test
test:
  %made = phi i64 [0, %entry], [%made1, %count]
  %more = icmp slt i64 %made, %wanted
  br i1 %more, label %create, label %finish
create:
  %failed = call i32 @pthread_create(ptr %thread, ptr %attributes, ptr @worker, ptr %state)
  %good = icmp eq i32 %failed, 0
  br i1 %good, label %count, label %finish
count:
  %made1 = add i64 %made, 1
  %was = atomicrmw add ptr %workers_at, i64 1 seq_cst
  br label %test
finish:
  %r10 = call i32 @pthread_attr_destroy(ptr %attributes)
  %r11 = call i32 @pthread_sigmask(i32 2, ptr %before, ptr null)
  %workers = load atomic i64, ptr %workers_at seq_cst, align 8
  ret i64 %workers
}

define internal ptr @worker(ptr %state) {
entry:
  %named = call i32 (i32, ...) @prctl(i32 15, ptr @worker_name)
  %mode = call i64 @standard_mode()
  %number_at = getelementptr i8, ptr %state, i64 4
  %job_at = getelementptr %State, ptr %state, i64 0, i32 11
  %next_at = getelementptr %State, ptr %state, i64 0, i32 2
  %sleepers_at = getelementptr %State, ptr %state, i64 0, i32 6
  br label %idle
idle:
  %memory = phi ptr [null, %entry], [%memory, %sleep], [%memory2, %leave], [%memory2, %wake]
  %size = phi i64 [0, %entry], [%size, %sleep], [%size2, %leave], [%size2, %wake]
  %since = call i64 @now()
  br label %look
look:
  %polls = phi i64 [0, %idle], [%polls, %enter], [%polls1, %spin], [%polls1, %clock]
  %gate = load atomic i64, ptr %state acquire, align 64
  %seats = and i64 %gate, $seats
  %closed = icmp eq i64 %seats, 0
  br i1 %closed, label %spin, label %enter
spin:
  $pause
  %polls1 = add i64 %polls, 1
  %low = and i64 %polls1, 31
  %ask = icmp eq i64 %low, 0
  br i1 %ask, label %clock, label %look
clock:
  %time = call i64 @now()
  %spun = sub i64 %time, %since
  %tired = icmp sgt i64 %spun, $spin_ns
  br i1 %tired, label %sleep, label %look
sleep:
  %shifted = lshr i64 %gate, 32
  %number = trunc i64 %shifted to i32
  %s0 = atomicrmw add ptr %sleepers_at, i64 1 seq_cst
  call void @futex_wait(ptr %number_at, i32 %number)
  %s1 = atomicrmw sub ptr %sleepers_at, i64 1 seq_cst
  call void @make_room(ptr %state)
  br label %idle
enter:
  %taken = sub i64 %gate, ${one_seat_less_one}
  %swap = cmpxchg ptr %state, i64 %gate, i64 %taken seq_cst acquire
  %inside = extractvalue { i64, i1 } %swap, 1
  br i1 %inside, label %fit, label %look
fit:
  %job = load %Job, ptr %job_at
  %function = extractvalue %Job %job, 0
  %argument = extractvalue %Job %job, 1
  %tiles = extractvalue %Job %job, 2
  %wanted = extractvalue %Job %job, 3
  %fits = icmp sle i64 %wanted, %size
  br i1 %fits, label %work, label %grow
grow:
  call void @free(ptr %memory)
  %padded = add i64 %wanted, 63
  %rounded = and i64 %padded, -64
  %grown = call ptr @aligned_alloc(i64 64, i64 %rounded)
  %none = icmp eq ptr %grown, null
  ; Without memory it leaves at once: the others do the tiles.
  br i1 %none, label %leave, label %work
work:
  %memory1 = phi ptr [%memory, %fit], [%grown, %grow], [%memory1, %tile]
  %size1 = phi i64 [%size, %fit], [%rounded, %grow], [%size1, %tile]
  %index = atomicrmw add ptr %next_at, i64 1 monotonic
  %todo = icmp slt i64 %index, %tiles
  br i1 %todo, label %tile, label %leave
tile:
  call void %function(ptr %argument, i64 %index, ptr %memory1)
  br label %work
leave:
  %memory2 = phi ptr [null, %grow], [%memory1, %work]
  %size2 = phi i64 [0, %grow], [%size1, %work]
  %old = atomicrmw sub ptr %state, i64 1 seq_cst
  %others = and i64 %old, $active_and_dozing
  %wanted_awake = icmp eq i64 %others, ${last_and_dozing}
  br i1 %wanted_awake, label %wake, label %idle
wake:
  call void @futex_wake(ptr %state, i32 1)
  br label %idle
}

; Run the job of this call: with helpers where the pool is free, else alone.
define internal i64 @enter(ptr %call) {
entry:
  %fields = load %Call, ptr %call
  %state = extractvalue %Call %fields, 0
  %ticket = extractvalue %Call %fields, 1
  %function = extractvalue %Call %fields, 2
  %argument = extractvalue %Call %fields, 3
  %first = extractvalue %Call %fields, 4
  %tiles = extractvalue %Call %fields, 5
  %wanted = extractvalue %Call %fields, 6
  %scratch = extractvalue %Call %fields, 7
  %helpers = extractvalue %Call %fields, 8
  %alone = icmp sle i64 %helpers, 0
  br i1 %alone, label %serial, label %acquire
acquire:
  %owner_at = getelementptr %State, ptr %state, i64 0, i32 4
  %swap = cmpxchg ptr %owner_at, i64 0, i64 %ticket seq_cst seq_cst
  %mine = extractvalue { i64, i1 } %swap, 1
  br i1 %mine, label %publish, label %serial
publish:
  %job_function = getelementptr %State, ptr %state, i64 0, i32 11, i32 0
  %job_argument = getelementptr %State, ptr %state, i64 0, i32 11, i32 1
  %job_tiles = getelementptr %State, ptr %state, i64 0, i32 11, i32 2
  %job_wanted = getelementptr %State, ptr %state, i64 0, i32 11, i32 3
  %job_scratch = getelementptr %State, ptr %state, i64 0, i32 11, i32 4
  %job_processor = getelementptr %State, ptr %state, i64 0, i32 11, i32 5
  %next_at = getelementptr %State, ptr %state, i64 0, i32 2
  %number_at = getelementptr i8, ptr %state, i64 4
  %sleepers_at = getelementptr %State, ptr %state, i64 0, i32 6
  %workers_at = getelementptr %State, ptr %state, i64 0, i32 8
  store ptr %function, ptr %job_function
  store ptr %argument, ptr %job_argument
  store i64 %tiles, ptr %job_tiles
  store i64 %wanted, ptr %job_wanted
  store ptr %scratch, ptr %job_scratch
  %processor = call i32 @sched_getcpu()
  store atomic i32 %processor, ptr %job_processor monotonic, align 8
  store atomic i64 0, ptr %next_at monotonic, align 64
  %gate = load atomic i64, ptr %state monotonic, align 64
  %number = and i64 %gate, -4294967296
  %number1 = add i64 %number, 4294967296
  %seats = shl i64 %helpers, 16
  %open = or i64 %number1, %seats
  store atomic i64 %open, ptr %state seq_cst, align 64
  %sleepers = load atomic i64, ptr %sleepers_at seq_cst, align 64
  %workers = load atomic i64, ptr %workers_at monotonic, align 64
  %awake = sub i64 %workers, %sleepers
  %missing = sub i64 %helpers, %awake
  %short = icmp sgt i64 %missing, 0
  br i1 %short, label %wake, label %drive
wake:
  %count = trunc i64 %missing to i32
  call void @futex_wake(ptr %number_at, i32 %count)
  br label %drive
drive:
  %shared = call i64 @resume(ptr %state)
  ret i64 %shared
serial:
  %any = icmp slt i64 %first, %tiles
  br i1 %any, label %begin, label %done
begin:
  %left = sub i64 %tiles, %first
  %one = icmp eq i64 %left, 1
  br i1 %one, label %single, label %several
single:
  call void %function(ptr %argument, i64 %first, ptr %scratch)
  ret i64 $done
several:
  %since = call i64 @now()
  br label %tile
tile:
  %index = phi i64 [%first, %several], [%index1, %clock]
  call void %function(ptr %argument, i64 %index, ptr %scratch)
  %index1 = add i64 %index, 1
  %more = icmp slt i64 %index1, %tiles
  br i1 %more, label %clock, label %done
clock:
  %time = call i64 @now()
  %spent = sub i64 %time, %since
  %late = icmp sgt i64 %spent, $slice_ns
  br i1 %late, label %pass, label %tile
pass:
  ret i64 %index1
done:
  ret i64 $done
}

; The owner's share of the tiles. Returns "open" now and then, so that Python can see a signal.
define internal i64 @resume(ptr %state) {
entry:
  %next_at = getelementptr %State, ptr %state, i64 0, i32 2
  %job_at = getelementptr %State, ptr %state, i64 0, i32 11
  %job = load %Job, ptr %job_at
  %function = extractvalue %Job %job, 0
  %argument = extractvalue %Job %job, 1
  %tiles = extractvalue %Job %job, 2
  %scratch = extractvalue %Job %job, 4
  %since = call i64 @now()
  br label %look
look:
  %index = atomicrmw add ptr %next_at, i64 1 monotonic
  %todo = icmp slt i64 %index, %tiles
  br i1 %todo, label %tile, label %finish
tile:
  call void %function(ptr %argument, i64 %index, ptr %scratch)
  %time = call i64 @now()
  %spent = sub i64 %time, %since
  %late = icmp sgt i64 %spent, $slice_ns
  br i1 %late, label %pass, label %look
pass:
  ret i64 $open
finish:
  %result = call i64 @close(ptr %state)
  ret i64 %result
}

define i64 @lowbit_pool_enter(ptr %call) {
  %mode = call i64 @standard_mode()
  %result = call i64 @enter(ptr %call)
  call void @restore_mode(i64 %mode)
  ret i64 %result
}

define i64 @lowbit_pool_resume(ptr %state) {
  %mode = call i64 @standard_mode()
  %result = call i64 @resume(ptr %state)
  call void @restore_mode(i64 %mode)
  ret i64 %result
}

; Drop the tiles not yet begun and wait for the others. Nothing happens if the job is over.
define void @lowbit_pool_abandon(ptr %state, i64 %ticket) {
  %next_at = getelementptr %State, ptr %state, i64 0, i32 2
  %owner_at = getelementptr %State, ptr %state, i64 0, i32 4
  %owner = load atomic i64, ptr %owner_at acquire, align 64
  %mine = icmp eq i64 %owner, %ticket
  br i1 %mine, label %stop, label %out
stop:
  store atomic i64 $past_every_tile, ptr %next_at seq_cst, align 64
  %result = call i64 @close(ptr %state)
  br label %out
out:
  ret void
}

define internal i64 @close(ptr %state) {
entry:
  %owner_at = getelementptr %State, ptr %state, i64 0, i32 4
  %orphaned_at = getelementptr %State, ptr %state, i64 0, i32 9
  %open = atomicrmw and ptr %state, i64 $all_but_seats seq_cst
  %since = call i64 @now()
  br label %look
look:
  %polls = phi i64 [0, %entry], [%polls1, %spin], [%polls1, %clock],
                   [%polls, %doze], [%polls, %sleep]
  %patient = phi i1 [true, %entry], [%patient, %spin], [%awake, %clock],
                    [false, %doze], [false, %sleep]
  %gate = load atomic i64, ptr %state seq_cst, align 64
  %active = and i64 %gate, $active
  %empty = icmp eq i64 %active, 0
  br i1 %empty, label %left, label %wait
wait:
  br i1 %patient, label %spin, label %doze
spin:
  $pause
  %polls1 = add i64 %polls, 1
  %low = and i64 %polls1, 31
  %ask = icmp eq i64 %low, 0
  br i1 %ask, label %clock, label %look
clock:
  %time = call i64 @now()
  %spun = sub i64 %time, %since
  %awake = icmp sle i64 %spun, $spin_ns
  br label %look
doze:
  %dozing = or i64 %gate, $dozing
  %swap = cmpxchg ptr %state, i64 %gate, i64 %dozing seq_cst seq_cst
  %same = extractvalue { i64, i1 } %swap, 1
  br i1 %same, label %sleep, label %look
sleep:
  %seen = trunc i64 %dozing to i32
  call void @futex_wait(ptr %state, i32 %seen)
  br label %look
left:
  %orphaned = load i64, ptr %orphaned_at
  %whole = icmp eq i64 %orphaned, 0
  %result = select i1 %whole, i64 $done, i64 $lost
  store atomic i64 0, ptr %owner_at seq_cst, align 64
  ret i64 %result
}

; In a forked child there are no workers, so none will leave: a job under way here is lost.
define void @lowbit_pool_orphan(ptr %state) {
  %next_at = getelementptr %State, ptr %state, i64 0, i32 2
  %orphaned_at = getelementptr %State, ptr %state, i64 0, i32 9
  store i64 1, ptr %orphaned_at
  store atomic i64 $past_every_tile, ptr %next_at seq_cst, align 64
  store atomic i64 0, ptr %state seq_cst, align 64
  ret void
}
""")


def text(machine: str) -> str:
    """Return the module for this platform.machine(), one of FUTEX_SYSCALL."""
    declare_pause, pause = _PAUSE.get(machine, ("", ""))
    active, dozing, seats = 0x7FFF, 0x8000, 0xFFFF << 16
    return float_mode.text(machine) + _TEXT.substitute(
        declare_pause=declare_pause,
        pause=pause,
        futex=FUTEX_SYSCALL[machine],
        active=active,
        dozing=dozing,
        seats=seats,
        all_but_seats=~seats,
        active_and_dozing=active | dozing,
        last_and_dozing=1 | dozing,
        one_seat_less_one=(1 << 16) - 1,
        past_every_tile=1 << 62,
        state_bytes=384,
        stack_bytes=2 << 20,
        # Long enough to stay awake between two matmuls called from a Python loop.
        spin_ns=50_000,
        # Ctrl-C is seen after this plus one tile.
        slice_ns=50_000_000,
        done=DONE,
        open=OPEN,
        lost=LOST,
    )

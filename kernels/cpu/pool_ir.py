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

Tiles are taken several at a time, an eighth of what is left with two threads: threads rarely want
the same line of memory, each reads weights that lie together, and the last tiles go one by one.

Idle workers sleep on the job number (upper half of the gate), a waiting owner on the lower half.
A worker counts itself as sleeping before the kernel compares the number, and the owner publishes
before it reads that count, both sequentially consistent: one of them sees the other.
"""

from __future__ import annotations

from string import Template

from lowbit.kernels.cpu import float_mode, pool_system

FUTEX_SYSCALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
"""Number of futex(2) by platform.machine()."""

DONE, OPEN, LOST = -1, -2, -3
"""What the entry points return; a number from 0 up is the tile at which to go on serially."""

MOST_WORKERS = 1023
_MOST_TILES = 8  # taken at a time, a power of two: all of them pass before a signal is seen

# pause takes 40 to 140 cycles on x86-64; elsewhere "yield" is a hint of one cycle.
_PAUSE = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}

_TYPES = """
%State = type { i64, [56 x i8], i64, [56 x i8], i64, [56 x i8], i64, [56 x i8],
                i64, i64, [48 x i8], %Job }
;          gate 0, next tile 2, owner's ticket 4, sleepers 6, workers 8, orphaned 9, job 11
%Job = type { ptr, ptr, i64, i64, ptr, i32, i64 }
;          function, argument, tiles, scratch bytes, the owner's scratch, the owner's processor,
;          parts: of what is left, one is taken at a time
%Call = type { ptr, i64, ptr, ptr, i64, i64, i64, ptr, i64 }
;          state, ticket, function, argument, first tile, tiles, scratch bytes, scratch, helpers

@worker_name = private constant [14 x i8] c"lowbit worker\\00"

$declare_pause
"""

_TEXT = """
; The tiles to do next: the first of them, and the one after the last. Others may have taken some
; since `seen`, so fewer may be left.
define internal { i64, i64 } @take(ptr %next_at, i64 %tiles, i64 %parts) {
  %seen = load atomic i64, ptr %next_at monotonic, align 64
  %left = sub i64 %tiles, %seen
  %part = sdiv i64 %left, %parts
  %few = icmp slt i64 %part, 1
  %some = select i1 %few, i64 1, i64 %part
  %many = icmp sgt i64 %some, $most_tiles
  %chunk = select i1 %many, i64 $most_tiles, i64 %some
  %first = atomicrmw add ptr %next_at, i64 %chunk monotonic
  %after = add i64 %first, %chunk
  %beyond = icmp sgt i64 %after, %tiles
  %end = select i1 %beyond, i64 %tiles, i64 %after
  %pair = insertvalue { i64, i64 } poison, i64 %first, 0
  %both = insertvalue { i64, i64 } %pair, i64 %end, 1
  ret { i64, i64 } %both
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
  %polls = phi i64 [0, %idle], [%polls, %enter], [%polls1, %spin], [%polls1, %stay],
                   [%polls1, %offer]
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
  %tired = icmp sgt i64 %spun, $awake_ns
  br i1 %tired, label %sleep, label %stay
stay:
  %generous = icmp sgt i64 %spun, $spin_ns
  br i1 %generous, label %offer, label %look
offer:
  %offered = call i32 @sched_yield()
  br label %look
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
  %parts = extractvalue %Job %job, 6
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
  %taken_tiles = call { i64, i64 } @take(ptr %next_at, i64 %tiles, i64 %parts)
  %first = extractvalue { i64, i64 } %taken_tiles, 0
  %end = extractvalue { i64, i64 } %taken_tiles, 1
  %todo = icmp slt i64 %first, %tiles
  br i1 %todo, label %tile, label %leave
tile:
  %index = phi i64 [%first, %work], [%index1, %tile]
  call void %function(ptr %argument, i64 %index, ptr %memory1)
  %index1 = add i64 %index, 1
  %more = icmp slt i64 %index1, %end
  br i1 %more, label %tile, label %work
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
  %job_parts = getelementptr %State, ptr %state, i64 0, i32 11, i32 6
  %next_at = getelementptr %State, ptr %state, i64 0, i32 2
  %number_at = getelementptr i8, ptr %state, i64 4
  %sleepers_at = getelementptr %State, ptr %state, i64 0, i32 6
  %workers_at = getelementptr %State, ptr %state, i64 0, i32 8
  store ptr %function, ptr %job_function
  store ptr %argument, ptr %job_argument
  store i64 %tiles, ptr %job_tiles
  store i64 %wanted, ptr %job_wanted
  store ptr %scratch, ptr %job_scratch
  %threads = add i64 %helpers, 1
  %parts = mul i64 %threads, $parts_each
  store i64 %parts, ptr %job_parts
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
  %index = phi i64 [%first, %several], [%index1, %next], [%index1, %clock]
  call void %function(ptr %argument, i64 %index, ptr %scratch)
  %index1 = add i64 %index, 1
  %more = icmp slt i64 %index1, %tiles
  br i1 %more, label %next, label %done
next:
  %low = and i64 %index1, ${most_tiles_less_one}
  %ask = icmp eq i64 %low, 0
  br i1 %ask, label %clock, label %tile
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
  %parts = extractvalue %Job %job, 6
  %since = call i64 @now()
  br label %look
look:
  %taken = call { i64, i64 } @take(ptr %next_at, i64 %tiles, i64 %parts)
  %first = extractvalue { i64, i64 } %taken, 0
  %end = extractvalue { i64, i64 } %taken, 1
  %todo = icmp slt i64 %first, %tiles
  br i1 %todo, label %tile, label %finish
tile:
  %index = phi i64 [%first, %look], [%index1, %tile]
  call void %function(ptr %argument, i64 %index, ptr %scratch)
  %index1 = add i64 %index, 1
  %more = icmp slt i64 %index1, %end
  br i1 %more, label %tile, label %clock
clock:
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
"""


def text(machine: str) -> str:
    """Return the module for this platform.machine(), one of FUTEX_SYSCALL."""
    declare_pause, pause = _PAUSE.get(machine, ("", ""))
    active, dozing, seats = 0x7FFF, 0x8000, 0xFFFF << 16
    return float_mode.text(machine) + Template(_TYPES + pool_system.TEXT + _TEXT).substitute(
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
        # A worker keeps its processor for a moment, then offers it to others and still looks: two
        # products of a Python loop are 10 to 200 us apart, and waking up takes 25 to 60 us.
        spin_ns=50_000,
        awake_ns=200_000,
        # Ctrl-C is seen after this plus the tiles of one taking.
        slice_ns=50_000_000,
        parts_each=4,
        most_tiles=_MOST_TILES,
        most_tiles_less_one=_MOST_TILES - 1,
        done=DONE,
        open=OPEN,
        lost=LOST,
    )

"""What the thread pool asks of the operating system, as LLVM IR: clock, futex, threads, memory.

A template, as the rest of the pool is; `pool_ir` declares the types and fills in the numbers.
"""

TEXT = """
declare i32 @clock_gettime(i32, ptr)
declare i64 @syscall(i64, ...)
declare i32 @prctl(i32, ...)
declare i32 @sched_getcpu()
declare i32 @sched_yield()
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
"""

"""Every tile once, on any number of threads; safe under fork, nesting, signals and at exit."""

import ctypes
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lowbit.kernels.cpu import isa, native, pool, pool_ir

linux_only = pytest.mark.skipif(not pool.SUPPORTED, reason="the native pool is for Linux")

TILES = (Path(__file__).parent / "fixtures/tiles.ll").read_text()
TILE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


def pointer(callback):
    return ctypes.cast(callback, ctypes.c_void_p).value or 0


def crew():
    assert pool._crew is not None
    return pool._crew


def address(name):
    return native.load(TILES, isa.host()).address(name)


def job(tiles, rounds=0):
    """The memory of a job, and its results."""
    memory = np.zeros(tiles + 1, np.int64)
    memory[0] = rounds
    return memory, memory[1:]


def run(name, memory, **options):
    pool.run(address(name), memory.ctypes.data, len(memory) - 1, **options)


@pytest.fixture(autouse=True)
def automatic_threads():
    yield
    pool.set_num_threads(None)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 7, 100, 1001])
def test_every_tile_runs_exactly_once(threads, tiles):
    for _ in range(20):
        memory, results = job(tiles)
        run("count", memory, threads=threads)
        assert (results == 1).all()


def test_set_num_threads_is_the_default():
    pool.set_num_threads(3)
    assert pool.get_num_threads() == 3
    memory, results = job(64, rounds=20_000)
    run("scratch", memory, scratch=256)
    assert 1 <= len(set(results.tolist())) <= 3
    pool.set_num_threads(1)
    run("scratch", memory, scratch=256)
    assert len(set(results.tolist())) == 1


@linux_only
def test_workers_take_their_share():
    """Tiles of about 1 ms: with 3 threads, the caller is never left to do all of 300 alone."""
    memory, results = job(300, rounds=1_000_000)
    run("scratch", memory, scratch=256, threads=3)
    assert len(set(results.tolist())) > 1


def test_a_late_worker_never_runs_an_old_job():
    """Each job has its own memory, emptied when the job is over: it must stay empty."""
    jobs = [job(2 + number % 5) for number in range(2000)]
    for memory, results in jobs:
        run("count", memory, threads=3)
        assert (results == 1).all()
        results[:] = 0
    assert not any(results.any() for _, results in jobs)


@linux_only
def test_the_gate_is_shut_after_every_job():
    """Of 7 seats some stay empty; one left over would let a worker into the next job's fields."""
    for _ in range(100):
        run("count", job(8)[0], threads=8)
        gate = ctypes.c_uint64.from_address(crew().state).value
        assert gate & 0xFFFF7FFF == 0, "no seats and nobody inside"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_longer_than_a_slice_goes_on_where_it_was(threads):
    # 6e8 rounds of one load or more each: 0.2 s at 3 GHz, four slices of one thread.
    memory, results = job(150, rounds=4_000_000)
    run("slow", memory, threads=threads)
    assert (results == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_scratch_is_private_aligned_and_kept(threads):
    memory, results = job(200, rounds=2_000)
    before = None
    for size in (256, 300, 100_000, 256):
        run("scratch", memory, scratch=size, threads=threads)
        assert (results % 64 == 0).all(), "1: somebody wrote into another thread's scratch"
        assert len(set(results.tolist())) <= threads
    if threads == 1:
        run("scratch", memory, scratch=256, threads=threads)
        before = results[0]
        run("scratch", memory, scratch=99_000, threads=threads)
        assert results[0] == before


def test_concurrent_callers_each_get_their_own_answer():
    wrong = []

    def caller(size):
        for _ in range(100):
            memory, results = job(size, rounds=500)
            run("slow", memory, threads=3)
            if not (results == 1).all():
                wrong.append(size)
            memory, results = job(size, rounds=100)
            run("scratch", memory, scratch=256, threads=3)
            if not (results % 64 == 0).all():
                wrong.append(size)

    callers = [threading.Thread(target=caller, args=(size,)) for size in (5, 17, 40, 64)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_tile_may_run_a_job_of_its_own(threads):
    inner = [job(20, rounds=100) for _ in range(12)]

    @TILE
    def outer(argument, tile, scratch):
        mine = ctypes.c_int64.from_address(scratch)
        mine.value = tile
        run("scratch", inner[tile][0], scratch=256, threads=threads)
        if mine.value != tile:
            inner[tile][1][:] = 1

    pool.run(pointer(outer), 0, 12, scratch=256, threads=threads)
    for _, results in inner:
        assert (results % 64 == 0).all(), "0: not run; 1: nested jobs share scratch"
        assert results.all()


def answer(queue=None):
    memory, results = job(50, rounds=100)
    run("slow", memory, threads=3)
    good = bool((results == 1).all())
    if queue is not None:
        queue.put(good)
    return good


def forked(child):
    """Exit status of a forked child that runs this; a deadlock ends by a signal."""
    number = os.fork()
    if number == 0:
        status = 99
        try:
            signal.alarm(60)
            status = child()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


no_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@no_fork
@may_fork
def test_a_forked_child_has_its_own_pool():
    assert answer()
    assert forked(lambda: 0 if answer() and crew().workers == 2 else 1) == 0
    assert forked(lambda: forked(lambda: 0 if answer() else 1)) == 0
    assert answer()


@no_fork
@may_fork
def test_multiprocessing_fork():
    assert answer()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=answer, args=(queue,))
    child.start()
    assert queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0


@no_fork
@may_fork
def test_a_fork_during_another_threads_job_gives_a_working_child():
    memory, results = job(200, rounds=300_000)
    busy = threading.Thread(target=run, args=("slow", memory), kwargs={"threads": 3})
    busy.start()
    while not results.any():
        time.sleep(0.001)
    assert forked(lambda: 0 if answer() else 1) == 0
    busy.join()
    assert (results == 1).all()


@linux_only
@may_fork
def test_a_fork_while_workers_are_being_hired_gives_a_working_child():
    with pool._lock:  # as another thread would hold it
        assert forked(lambda: 0 if answer() else 1) == 0


@linux_only
@may_fork
def test_a_fork_inside_a_tile_is_an_error_in_the_child_and_nothing_in_the_parent():
    parent = os.getpid()
    outcome: list[int] = []

    def body():
        try:
            pool.run(pointer(tile), 0, 2, threads=2)
        except RuntimeError as error:
            os._exit(0 if "forked inside a tile" in str(error) and answer() else 3)
        if os.getpid() != parent:
            os._exit(4)

    @TILE
    def tile(argument, number, scratch):
        # Only the caller's own tile: a worker has no Python frame to return to.
        if threading.get_ident() == caller:
            child = os.fork()
            if child == 0:
                signal.alarm(60)
            else:
                outcome.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    caller = threading.get_ident()
    assert answer()
    while not outcome:  # a quick worker may have taken both tiles
        body()
    assert set(outcome) == {0}


def run_python(code, **options):
    return subprocess.run(
        [sys.executable, "-P", "-c", f"TILES = {TILES!r}\n{PRELUDE}\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
from lowbit.kernels.cpu import isa, native, pool
module = native.load(TILES, isa.host())
def run(name, memory, **options):
    pool.run(module.address(name), memory.ctypes.data, len(memory) - 1, **options)
"""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_interrupt_ends_a_job_of_hours_and_nobody_touches_its_memory_again(threads):
    # 2^20 tiles of about 10 ms; run_python's limit is far below that.
    done = run_python(f"""
memory = np.zeros(2**20 + 1, np.int64)
memory[0] = 10_000_000
def interrupt():
    while not memory[1:].any():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    run("slow", memory, threads={threads})
    print("not interrupted")
except KeyboardInterrupt:
    after = memory.copy()
    time.sleep(0.2)
    assert (memory == after).all(), "somebody still works"
    print("interrupted")
memory = np.zeros(101, np.int64)
run("count", memory, threads={threads})
assert (memory[1:] == 1).all()
memory[0] = 2000
run("scratch", memory, threads={threads}, scratch=256)
if {threads} > 1 and pool.SUPPORTED:  # given back: it can be had again
    token = object()
    call = pool._pack(pool._crew.state, id(token), module.address("count"),
                      memory.ctypes.data, 0, 1, 0, 0, 1)
    memory[1] = 0
    assert pool._native().enter(call) == -1 and memory[1] == 1
    assert pool._native().orphan(pool._crew.state) is None
    assert pool._native().enter(call) == -3, "the pool was not free"
print("usable")
""")
    assert done.stdout.split() == ["interrupted", "usable"], done.stderr
    assert done.returncode == 0


def test_an_interrupt_that_is_handled_does_not_stop_the_job():
    done = run_python("""
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
memory = np.zeros(201, np.int64)
memory[0] = 1_000_000
def interrupt():
    while not memory[1:].any():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
thread = threading.Thread(target=interrupt)
thread.start()
run("slow", memory, threads=3)
thread.join()
assert (memory[1:] == 1).all()
assert seen == [1]
""")
    assert done.returncode == 0, done.stderr


@linux_only
def test_workers_leave_signals_to_python():
    for _ in range(20):
        assert answer()
        time.sleep(0.001)
    blocked = []
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text() == "lowbit worker\n":
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            blocked.append(int(status["SigBlk"], 16))
            # One that makes room for its caller may be seen between narrow and wide again.
            deadline = time.monotonic() + 10
            while os.sched_getaffinity(int(task.name)) != os.sched_getaffinity(0):
                assert time.monotonic() < deadline
                time.sleep(0.001)
    assert len(blocked) >= 2
    for mask in blocked:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
            assert mask >> (number - 1) & 1
        # faulthandler still gets the thread's own faults.
        assert not mask >> (signal.SIGSEGV - 1) & 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("pause", [0, 0.01], ids=["spinning", "asleep"])
def test_the_interpreter_ends_with_idle_workers(pause):
    done = run_python(f"""
memory = np.zeros(101, np.int64)
for _ in range(10):
    run("count", memory, threads=8)
time.sleep({pause})
print(memory[1:].sum())
""")
    assert (done.returncode, done.stdout) == (0, "1000\n"), done.stderr


def test_the_interpreter_ends_while_a_daemon_thread_is_in_a_job():
    done = run_python("""
memory = np.zeros(2**20 + 1, np.int64)
memory[0] = 1_000_000
threading.Thread(target=run, args=("slow", memory), kwargs={"threads": 3}, daemon=True).start()
while not memory[1:].any():
    time.sleep(0.001)
""")
    assert done.returncode == 0, done.stderr


@linux_only
def test_no_more_workers_than_the_system_gives():
    done = run_python("""
pool.pool_ir.MOST_WORKERS = 1
pool.set_num_threads(4)
memory = np.zeros(101, np.int64)
for _ in range(10):
    run("count", memory)
assert (memory[1:] == 10).all()
print(pool.describe())
""")
    assert done.stdout == (
        "4 threads (futex pool, 1 workers started); no more could be started\n"
    ), done.stderr


X86_MODE = """
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define void @get(ptr %word) {
  call void @llvm.x86.sse.stmxcsr(ptr %word)
  ret void
}
define void @set(ptr %word) {
  call void @llvm.x86.sse.ldmxcsr(ptr %word)
  ret void
}
"""


@linux_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets the mode by an x86 instruction")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_subnormals_survive_a_caller_that_flushes_them(threads):
    module = native.load(X86_MODE, isa.host())
    get, put = (
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(module.address(name)) for name in ("get", "set")
    )
    memory, results = job(64)
    memory[:1].view(np.float32)[0] = np.finfo(np.float32).smallest_normal
    old, word = ctypes.c_uint32(), ctypes.c_uint32()
    get(ctypes.byref(old))
    flush = ctypes.c_uint32(old.value | 0x8040)
    put(ctypes.byref(flush))
    try:
        run("subnormal", memory, threads=threads)
        single = job(1)[0]
        single[0] = memory[0]
        run("subnormal", single)
        get(ctypes.byref(word))
    finally:
        put(ctypes.byref(old))
    assert word.value & 0x8040 == 0x8040, "the caller's own mode is back"
    half = np.float32(2**-127).view(np.int32)
    assert (results.view(np.int32)[::2] == half).all()
    assert single.view(np.int32)[2] == half


def test_elsewhere_tiles_run_one_after_the_other(monkeypatch):
    monkeypatch.setattr(pool, "SUPPORTED", False)
    memory, results = job(50, rounds=10)
    run("scratch", memory, scratch=256, threads=4)
    assert (results % 64 == 0).all()
    assert len(set(results.tolist())) == 1
    memory, results = job(50)
    run("count", memory)
    assert (results == 1).all()
    assert pool.describe().startswith("serial: the native pool needs 64-bit Linux, this is ")


def test_addresses_are_those_of_numpy(monkeypatch):
    memory = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for array in (
        memory,
        memory[1:, ::-2],
        memory.T,
        memory[:0],
        np.ones(1, np.float32),
        np.empty(0),
    ):
        assert pool.address(array) == array.__array_interface__["data"][0]
    assert pool.address is pool._choose_address()
    monkeypatch.setattr(pool, "_address", lambda array: 8)
    assert pool._choose_address() is pool._slow_address
    assert pool._slow_address(memory[1:]) == memory[1:].ctypes.data


def test_describe_counts():
    pool.set_num_threads(2)
    assert answer()
    if pool.SUPPORTED:
        assert pool.describe().startswith("2 threads (futex pool, ")


def test_the_pool_compiles_for_every_processor_that_it_names():
    record = next(record for record in isa.RECORDS if record.name == "neon")
    text = native.assembly(pool_ir.text("aarch64"), record)
    assert "yield" in text
    assert "fpcr" in text.lower()
    assert set(pool_ir.FUTEX_SYSCALL) >= {"x86_64", "aarch64"}

"""The same bits for any number of threads, in forked children, and after an interrupt."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import lowbit as lb
from lowbit.testing import conformance, exact_operands, random_qarray

SRC = Path(lb.__file__).parent.parent
PAIRS = [
    ("float32", "int4_g32_asym"),
    ("bfloat16", "float8_e4m3fn_row"),
    ("float32", "int3_g32"),
    ("int8_row", "int4_g32"),
    ("int8_g32", "int8_row"),
    ("float64", "int4_g32"),
]


@pytest.fixture(autouse=True)
def threads_as_before():
    yield
    lb.set_num_threads(None)


@pytest.mark.parametrize(("x", "w"), PAIRS)
@pytest.mark.parametrize("m", [1, 3, 150])
def test_the_number_of_threads_changes_no_bit(x, w, m):
    """More tiles than threads, along both axes; twice, since a race need not show at once."""
    left, right = conformance.dense_or_quantized(x, m, 200), random_qarray(w, 300, 200)
    bias = np.arange(300, dtype=np.float32)
    for held in (right, right.prepare()):
        wanted = None
        for threads in (1, 2, 3, os.cpu_count() or 4, 2, 1):
            lb.set_num_threads(threads)
            got = lb.matmul(left, held.T, bias=bias, activation="relu")
            wanted = got if wanted is None else wanted
            conformance.same_bits(got, wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_callers_each_get_their_own_answer(threads):
    """Eight callers with weights in common and of their own, all compiled kernels among them."""
    lb.set_num_threads(threads)
    cases = [
        exact_operands(1 + 40 * (seed % 3), 130, 200, w, x, seed=seed)
        for seed, (x, w) in enumerate(PAIRS * 2)
    ]
    started = threading.Barrier(8)

    def work(first):
        started.wait()
        for step in range(3 * len(cases)):
            case = cases[(first + step) % len(cases)]
            case.check(lb.matmul(case.x, case.w.T))
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_one_weight_is_shared_by_calls_of_different_kinds():
    """Plans remembered with a weight belong to one problem each."""
    case = exact_operands(40, 130, 200, "int4_g32", bias=True, seed=1)

    def work(step):
        for rows in (1, 40, 7, step % 40 + 1):
            options = case.options if step % 2 else {}
            got = lb.matmul(case.x[:rows], case.w.T, **options)
            wanted = case.expected[:rows] - (0 if step % 2 else case.options["bias"])
            assert (got == wanted).all()
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


def answer():
    """Multiply on all kernels; 0 if exact."""
    for x, w in (("float32", "int4_g32"), ("int8_row", "int8_row")):
        case = exact_operands(40, 130, 200, w, x)
        case.check(lb.matmul(case.x, case.w.T))
    return 0


may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@may_fork
def test_a_forked_child_multiplies():
    lb.set_num_threads(3)
    answer()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=answer) for _ in range(2)]
    for child in children:
        child.start()
    answer()
    for child in children:
        child.join(60)
        assert child.exitcode == 0


INTERRUPTED = """
import sys, time
import numpy as np
import lowbit as lb
from lowbit.testing import exact_operands

lb.set_num_threads(int(sys.argv[1]))
case = exact_operands(1, 130, 200, "int4_g32")
case.check(lb.matmul(case.x, case.w.T))
w = lb.from_parts("int4_row", np.full((4096, 2048), 0x11, np.uint8), np.ones((4096, 1), np.float32))
x = np.ones((1024, 4096), np.float32)
print("started", flush=True)
try:
    while True:
        lb.matmul(x, w.T)
except KeyboardInterrupt:
    case.check(lb.matmul(case.x, case.w.T))
    assert (lb.matmul(x[:3], w.T) == 4096).all()
    print("usable", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals are those of POSIX")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_leaves_the_process_usable(threads):
    with subprocess.Popen(
        [sys.executable, "-P", "-c", INTERRUPTED, str(threads)],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == "started\n", child.stderr.read()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)  # now it is within a product, or between two of a loop without end
        child.send_signal(signal.SIGINT)
        said, complained = child.communicate(timeout=60)
    assert said == "usable\n", complained
    assert child.returncode == 0

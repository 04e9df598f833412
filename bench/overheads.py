"""What lowbit costs besides the arithmetic: imports, first calls, dispatch, peak memory.

    python -P bench/overheads.py [--json FILE]

Every figure is the median of several fresh processes (imports, first calls) or hand-offs, or the
quickest of many short runs of calls. The limits are those that the project set itself; a figure
beyond its limit is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import tracemalloc
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import lowbit as lb
from lowbit.kernels.cpu import isa, native, pool

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import machine

IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
FIRST = """
import time
import numpy as np
import lowbit as lb
w = lb.quantize(np.ones((256, 256), np.float32), "int4_g128")
x = np.ones((4, 256), np.float32)
t = time.perf_counter()
x @ w.T
print(time.perf_counter() - t)
"""


@dataclass
class Figure:
    """One measured number and its limit."""

    name: str
    value: float
    unit: str
    limit: float


def in_fresh_process(code: str, runs: int, **environment: str) -> float:
    """Median of what `code` prints in processes of its own."""
    found = []
    for _ in range(runs):
        run = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(float(run.stdout))
    return statistics.median(found)


def import_ratio() -> Figure:
    """`import lowbit` over `import numpy`, taken in turn."""
    pairs = [
        in_fresh_process(IMPORT.format("lowbit"), 1) / in_fresh_process(IMPORT.format("numpy"), 1)
        for _ in range(15)
    ]
    return Figure("import lowbit / import numpy", statistics.median(pairs), "x", 1.3)


NUMBA = FIRST + "import sys; print(float('numba' in sys.modules))"


def numba_imports() -> Figure:
    """Whether quantize and matmul have loaded numba."""
    with tempfile.TemporaryDirectory() as folder:
        code = NUMBA.replace("print(time.perf_counter() - t)", "")
        loaded = in_fresh_process(code, 1, LOWBIT_CACHE_DIR=folder)
    return Figure("numba imports of quantize and matmul", loaded, "", 0)


def first_calls() -> list[Figure]:
    """First matmul of a process, with and without a filled object cache."""
    with tempfile.TemporaryDirectory() as folder:
        cold = []
        for i in range(3):
            cold.append(in_fresh_process(FIRST, 1, LOWBIT_CACHE_DIR=str(Path(folder) / str(i))))
        warm = in_fresh_process(FIRST, 5, LOWBIT_CACHE_DIR=str(Path(folder) / "0"))
    return [
        Figure("first matmul, warm cache", warm, "s", 0.4),
        Figure("first matmul, cold cache", statistics.median(cold), "s", 1.5),
    ]


def calls() -> list[Figure]:
    """Whole calls on a problem too small to matter, each the quickest of many short runs.

    What other work on the machine adds is no cost of ours, and a run of 100 calls is over before
    much can come between.
    """
    weight = lb.quantize(np.ones((64, 64), np.float32), "int4_g32")
    x, bias, out = np.ones((1, 64), np.float32), np.ones(64, np.float32), np.empty((1, 64), "f4")
    w = weight.T
    plan, finished = lb.plan(x, w), lb.plan(x, w, bias=bias, activation="gelu")
    product = plan._product
    bare = product.execute, out, plan._after
    experts = lb.quantize(np.ones((8, 64, 64), np.float32), "int4_g32")
    tokens, ends = np.ones((8, 64), np.float32), np.arange(1, 9)
    measured = (
        ("the kernel's own part of 1x64x64", lambda: bare[0](x, bare[2], bare[1]), 4.0),
        ("plan 1x64x64", lambda: plan(x), 5.0),
        ("plan 1x64x64, bias and gelu", lambda: finished(x), 6.0),
        ("matmul 1x64x64", lambda: lb.matmul(x, w), 10.0),
        ("x @ w.T 1x64x64", lambda: x @ weight.T, 10.0),
        ("linear 1x64x64, bias", lambda: lb.linear(x, weight, bias=bias), 15.0),
        ("matmul 1x64x64, out", lambda: lb.matmul(x, w, out=out), 15.0),
        (
            "grouped_matmul, each of 8 experts 1x64x64",
            lambda: lb.grouped_matmul(tokens, experts, ends),
            80.0,
        ),
    )
    figures = []
    for name, call, limit in measured:
        call()
        seconds = min(timeit.repeat(call, number=100, repeat=200)) / 100
        shared = 8 if name.startswith("grouped") else 1
        figures.append(Figure(name, seconds * 1e6 / shared, "us", limit / shared))
    return figures


# CuPy's own arrays on host memory, and launches that do nothing, take no GPU and no driver.
DEVICE_CALLS = """
import itertools, timeit, types
import cupy
import numpy as np
import lowbit as lb
from lowbit import device
from lowbit.kernels.cuda import gpu, launch

memory = np.zeros(1 << 20, np.uint8)
owner = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0)
places = itertools.cycle([cupy.cuda.MemoryPointer(owner, i << 14) for i in range(64)])
cupy.cuda.set_allocator(lambda size: next(places))
cupy.cuda.runtime.getDevice = lambda: 0

class Idle:
    device = launch.Device(90, 132)
    def function(self, source):
        return lambda grid, block, args, *, shared_mem=0: None
    def empty(self, shape, dtype):
        return cupy.empty(shape, dtype)
    zeros = empty
    def counters(self, count):
        return cupy.empty((count,), np.int32)
    scratch = counters
    number = staticmethod(gpu.number)
    def encode(self, wanted):
        return bytes(128)
    def by_value(self, data):
        return data
    def settle(self):
        pass
    def address(self, array):
        return array.data.ptr

idle = Idle()
launch.machine_of = lambda array: idle

def there(rows, name):
    held = lb.quantize(np.ones((rows, 64), np.float32), name)
    return held._with(device.changed(held._rows(), lambda a: cupy.empty(a.shape, a.dtype)))

weight = there(64, "int4_g32")
device._gpu(0, cupy)
x, out = cupy.empty((1, 64), np.float16), cupy.empty((1, 64), np.float32)
w = weight.T

# CuPy reads the arguments before it finds that there is no kernel, or no driver.
launched = []
idle.function = lambda source: lambda grid, block, args, *, shared_mem=0: launched.append(args)
lb.plan(x, w)(x)
del idle.function
nothing = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
errors = cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError
stream = types.SimpleNamespace(ptr=0)

def read(arguments):
    try:
        nothing((1,), (1,), arguments, 0, stream)
    except errors:
        return
    raise AssertionError("launched")

arguments = launched[0]
many, none = (
    min(timeit.repeat(lambda: read(args), number=10, repeat=200)) for args in (arguments * 100, ())
)
print((many - none) * 1e3)

plan, bound = lb.plan(x, w), lb.plan(x, w, out=out)
product = plan._product
codes = there(1, "int8_row")
large = lb.plan(codes, there(64, "int8_row").T, kernel="matmul.cutlass.int8")
calls = (
    lambda: product.execute(x, plan._after, out),
    lambda: large._product.execute(codes, large._after, out),
    lambda: plan(x), lambda: bound(x),
    lambda: lb.matmul(x, w), lambda: x @ weight.T,
)
for call in calls:
    call()
    print(min(timeit.repeat(call, number=100, repeat=200)) * 1e4)
"""


def device_calls() -> list[Figure]:
    """Host time of a product on a GPU, to the launch and back; none where CuPy is missing."""
    if find_spec("cupy") is None:
        return []
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", DEVICE_CALLS],
        capture_output=True,
        text=True,
        check=True,
    )
    names = (
        ("GPU: CuPy's reading of the arguments of 1x64x64", 1.0),
        ("GPU: the kernel's own part of 1x64x64", 2.0),
        ("GPU: the part of 1x64x64 on CUTLASS, x quantized", 3.0),
        ("GPU: plan 1x64x64", 3.0),
        ("GPU: plan 1x64x64, out", 3.0),
        ("GPU: matmul 1x64x64", 8.0),
        ("GPU: x @ w.T 1x64x64", 10.0),
    )
    values = map(float, run.stdout.split())
    return [Figure(n, v, "us", limit) for (n, limit), v in zip(names, values, strict=True)]


# Both tiles wait until the other one has begun, so both threads are there when the job is over.
MEET = """
define void @meet(ptr %count, i64 %tile, ptr %scratch) {
entry:
  %before = atomicrmw add ptr %count, i64 1 seq_cst
  br label %look
look:
  %seen = load atomic i64, ptr %count seq_cst, align 8
  %both = icmp sge i64 %seen, 2
  br i1 %both, label %out, label %look
out:
  ret void
}
"""


def hand_off() -> list[Figure]:
    """From Python to two threads and back: a worker that spins, and one that fell asleep."""
    if pool.get_num_threads() < 2 or not pool.SUPPORTED:
        return []
    meet = native.load(MEET, isa.host()).address("meet")
    count = np.zeros(1, np.int64)
    address = pool.address(count)

    def once(idle: float, asleep: bool = False) -> float:
        count[0] = 0
        until = time.perf_counter() + idle
        if asleep:
            time.sleep(idle)
        while time.perf_counter() < until:
            pass
        start = time.perf_counter()
        pool.run(meet, address, 2, 0, 2)
        return time.perf_counter() - start

    once(0)
    figures = []
    for name, limit, idle, asleep in (
        ("hand-off to a thread at once", 5.0, 0.0, False),
        ("hand-off to a thread after 100 us of other work", 5.0, 1e-4, False),
        ("hand-off to a thread that is asleep", 100.0, 1e-3, True),
    ):
        seconds = statistics.median(once(idle, asleep) for _ in range(1000))
        figures.append(Figure(name, seconds * 1e6, "us", limit))
    return figures


def peak_memory(name: str) -> Figure:
    """Largest memory of quantize over input plus output; the input is held by the caller."""
    x = np.random.default_rng(0).standard_normal((2048, 4096), np.float32)
    tracemalloc.start()
    w = lb.quantize(x, name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Figure(f"peak of quantize {name}", (x.nbytes + peak) / (x.nbytes + w.nbytes), "x", 1.2)


def against_numpy() -> Figure:
    """One row times int4 weights, over what dequantizing and numpy.matmul take."""
    rng = np.random.default_rng(0)
    w = lb.quantize(rng.standard_normal((4096, 4096), np.float32), "int4_g128")
    x = rng.standard_normal((1, 4096), np.float32)
    ratios = []
    for _ in range(5):
        ours = min(timeit.repeat(lambda: x @ w.T, number=3, repeat=3)) / 3
        theirs = min(timeit.repeat(lambda: x @ w.dequantize().T, number=1, repeat=2))
        ratios.append(ours / theirs)
    name = "int4_g128 4096^2, M = 1, over dequantize + numpy.matmul"
    return Figure(name, statistics.median(ratios), "x", 1.0)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = [import_ratio(), *first_calls(), numba_imports(), *calls(), *device_calls()]
    figures += hand_off()
    figures.append(against_numpy())
    figures += [peak_memory(f) for f in ("int4_g128", "int8_row", "fp8", "nvfp4", "int8_tensor")]
    for figure in figures:
        mark = "" if figure.value <= figure.limit else "   beyond its limit"
        print(f"{figure.name:<56}{figure.value:9.3g} {figure.unit:<2} <= {figure.limit:g}{mark}")
    if options.json:
        record = {"machine": machine.describe(), "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

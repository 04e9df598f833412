"""What lowbit costs besides the arithmetic: imports, first calls, dispatch, peak memory.

    python -P bench/overheads.py [--json FILE]

Every figure is the median of several fresh processes (imports, first calls) or of many calls
(dispatch). The limits are those that the project set itself; a figure beyond its limit is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import lowbit as lb

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


def dispatch() -> Figure:
    """One whole `matmul` call on a problem too small to matter."""
    w = lb.quantize(np.ones((64, 64), np.float32), "int4_g32").T
    x = np.ones((1, 64), np.float32)
    lb.matmul(x, w)
    times = timeit.repeat(lambda: lb.matmul(x, w), number=1000, repeat=15)
    return Figure("matmul 1x64x64", statistics.median(times) / 1000 * 1e6, "us", 20.0)


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
    figures = [import_ratio(), *first_calls(), numba_imports(), dispatch(), against_numpy()]
    figures += [peak_memory(f) for f in ("int4_g128", "int8_row", "fp8", "nvfp4", "int8_tensor")]
    for figure in figures:
        mark = "" if figure.value <= figure.limit else "   beyond its limit"
        print(f"{figure.name:<56}{figure.value:9.3g} {figure.unit:<2} <= {figure.limit:g}{mark}")
    if options.json:
        record = {"machine": machine.describe(), "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Every family of CUDA kernels once or twice on small ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -P bench/gpu_small.py

Arrays come from cudaMalloc one by one: in CuPy's pool a neighbour's memory would hide an access
beyond an array's end. Answers are checked as those of bench/gpu.py are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import peers.gpu
from harness import gpu_device, gpu_sources
from harness.gpu_work import Operands
from harness.work import Work

WEIGHTS = (
    *("int1_g32_asym", "int2_g64", "int3_g32", "int4_g128", "int4_row", "int5_g32", "int6_g64"),
    *("int7_g32", "int8_g128", "int8_row", "nf4_g64", "fp4_g32", "mxfp4", "mxfp6", "mxfp8"),
    *("nvfp4", "fp8_row", "fp8_tensor", "fp8_128x128", "int4_g48", "int4_g32_asym"),
)
PAIRS = (
    ("int8_row", "int8_row"),
    ("int4_g128", "int8_row"),
    ("int8_g64", "int8_g64"),
    ("fp8_row", "fp8_row"),
    ("fp8_tensor", "fp8_tensor"),
    ("fp8_128x128", "fp8_g128"),
    ("int4_g128", "fp8_row"),
)
ROWS = (1, 9, 17, 70)
"""One tile of each height."""
SHAPES = ((97, 200), (64, 1024))
"""(n, k): ragged in both, and long enough that several blocks share the columns."""
STEPS = ("quantize", "dequantize", "silu_mul", "rmsnorm")


def cases() -> Iterator[tuple[str, Work, int]]:
    """Contender, work and rows of x."""
    for n, k in SHAPES:
        for m in ROWS:
            for weight in WEIGHTS:
                yield "lowbit", Work(n, k, weight, "bfloat16"), m
            for weight, x in PAIRS:
                yield "lowbit", Work(n, k, weight, x), m
        for weight in ("int4_g128", "int8_row", "fp8_row"):
            for x in ("float16", "float32"):
                yield "lowbit", Work(n, k, weight, x), 3
        for step in STEPS:
            for weight in ("int4_g32", "int8_row", "fp8_row", "fp8_128x128", "mxfp4", "nvfp4"):
                yield f"lowbit.{step}", Work(n, k, weight, "bfloat16"), n


def run(xp: Any, wanted: Iterable[tuple[str, Work, int]]) -> int:
    """Compute and check all cases; the number of those that were."""
    done = 0
    for name, work, m in wanted:
        if peers.gpu.refusal(name, work):
            continue
        built = peers.gpu.build(name, Operands(work, m, xp))
        try:
            built.check(built.call(built.take(m), 0), m)
        except Exception as error:
            raise SystemExit(f"{name} {work}, M = {m}: {type(error).__name__}: {error}") from error
        done += 1
    return done


def main(arguments: list[str] | None = None) -> None:
    """All cases on the GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="of so many cases, the first")
    every = parser.parse_args(arguments).every
    why = gpu_device.absence()
    if why is not None:
        raise SystemExit(f"bench/gpu_small.py runs on a GPU, and there is none: {why}")
    import cupy

    wanted = list(islice(cases(), 0, None, every))
    print(gpu_sources.compiled(wanted, gpu_device.kind(gpu_device.describe(cupy))))
    cupy.cuda.set_allocator(None)
    print(f"{run(cupy, wanted)} products and conversions are right")


if __name__ == "__main__":
    main()

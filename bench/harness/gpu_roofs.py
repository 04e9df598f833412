"""What this GPU can do at best, measured: reading, copying, and the libraries' dense products."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.gpu_clock import Clock
from harness.gpu_measuring import Pace, Running
from harness.records import Entrant, Group, Row
from harness.targets import Roofs
from harness.work import Work

BYTES = 1 << 30
"""That are read, and copied."""
REPEATS = 20
SIDE = 8192
"""Of the dense products."""
DENSE = {
    "bf16": (
        Entrant("torch.dense", Work(SIDE, SIDE, "bfloat16", "bfloat16")),
        Entrant("cupy.dense", Work(SIDE, SIDE, "bfloat16", "bfloat16")),
    ),
    "fp8": (Entrant("torch.scaled_mm", Work(SIDE, SIDE, "fp8_tensor", "fp8_tensor")),),
    "int8": (Entrant("torch.int_mm", Work(SIDE, SIDE, "int8_row", "int8_row")),),
}
THREADS = 512

KERNELS = """
__device__ __forceinline__ uint4 load(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// Four loads of a thread are under way at once. `out` is hardly ever written: nobody can know that.
extern "C" __global__ void read(const uint4* from, long long count, unsigned* out) {
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned seen = 0;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = load(from + min(i + j * step, count - 1));
#pragma unroll
        for (int j = 0; j < 4; ++j) seen += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (seen == 0x51ed270bu) *out = seen;
}
extern "C" __global__ void copy(const uint4* from, long long count, uint4* to) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = load(from + min(i + j * step, count - 1));
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (i + j * step < count) to[i + j * step] = v[j];
    }
}
"""


def measure(cupy: Any, clock: Clock, pace: Pace, processors: int) -> tuple[Roofs, list[Row]]:
    """All roofs, each the best of several runs, and the rows of the dense products."""
    read, copy = memory(cupy, clock, processors)
    entrants = tuple(dict.fromkeys(e for each in DENSE.values() for e in each))
    group = Group("roofs", (tuple((e, SIDE) for e in entrants),))
    rows = Running(group, pace, clock, cupy).turn(group.turns[0])
    return Roofs(1, read, copy, rates(rows)), rows


def rates(rows: list[Row]) -> dict[str, float]:
    """Operations a second of the fastest library of each kind; kinds without one are left out."""
    found = {}
    for kind, entrants in DENSE.items():
        wanted = {(e.name, e.work) for e in entrants}
        timed = [r for r in rows if r.times and (r.name, r.work) in wanted]
        if timed:
            found[kind] = max(row.operations / row.best for row in timed)
    return found


def memory(cupy: Any, clock: Clock, processors: int) -> tuple[float, float]:
    """Bytes a second that are read; bytes read plus written a second of a copy."""
    # Numbers that differ: bits that never change take less power, and clocks rise.
    source = cupy.arange(BYTES // 4, dtype=np.uint32) * np.uint32(2654435761)
    target, out = cupy.empty((BYTES // 4,), np.uint32), cupy.zeros((1,), np.uint32)
    module = cupy.RawModule(code=KERNELS)
    count = np.int64(BYTES // 16)
    reader, copier = module.get_function("read"), module.get_function("copy")
    best_read = best_copy = 0.0
    for blocks in (1, 2, 4):
        grid = (blocks * processors,)

        def reading(_: int, grid: tuple[int] = grid) -> None:
            reader(grid, (THREADS,), (source, count, out))

        def copying(_: int, grid: tuple[int] = grid) -> None:
            copier(grid, (THREADS,), (source, count, target))

        best_read = max(best_read, BYTES / best(clock, reading))
        best_copy = max(best_copy, 2 * BYTES / best(clock, copying))

    def library(_: int) -> None:
        cupy.copyto(target, source)

    return best_read, max(best_copy, 2 * BYTES / best(clock, library))


def best(clock: Clock, call: Any) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    call(0)
    return min(clock.batch(call, 1) for _ in range(REPEATS))

"""Races that only ThreadSanitizer sees, as no order of lanes on a CPU shows them; see races.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulator import Emulator, RaceError
from planted import Planted, flattened, mutate

from lowbit.kernels.cuda.launch import Source

Run = Callable[[Emulator, str], None]
KERNELS = Path(__file__).parent / "kernels"
ROWS = flattened((KERNELS / "rows.cu").read_text())
EXCHANGE = """
#include "primitives.cuh"
// Each lane hands a number to its neighbour, twice; warp 1 reads what warp 0 says is there.
__global__ void exchange(const int* in, int* data, unsigned* flag, int* out) {
    auto& words = lb::static_shared<int[64]>();
    words[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    const int first = words[threadIdx.x ^ 1];
    __syncthreads();
    words[threadIdx.x] = first + 1;
    __syncwarp();
    const int second = words[threadIdx.x ^ 1];
    if (threadIdx.x == 0) {
        data[0] = second;
        lb::store_release(flag, 1);
    }
    if (threadIdx.x == 32) {
        while (lb::load_acquire(flag) != 1) {}
        data[1] = data[0];
    }
    out[threadIdx.x] = second;
}
"""


def rows(emulator: Emulator, text: str) -> None:
    x = np.random.default_rng(0).integers(-99, 100, (3, 300)).astype(np.float32)
    largest, sums = emulator.empty((3,), np.float32), emulator.empty((3,), np.float32)
    arrived, total = emulator.zeros((1,), np.int32), emulator.empty((1,), np.float32)
    f = emulator.function(Source(text, "rows", 128))
    f((3,), (128,), (x, largest, sums, arrived, total, np.int32(300)))
    assert total == x.sum()


def exchange(emulator: Emulator, text: str) -> None:
    given, out = np.arange(64, dtype=np.int32), emulator.empty((64,), np.int32)
    data, flag = emulator.zeros((2,), np.int32), emulator.zeros((1,), np.uint32)
    emulator.function(Source(text, "exchange", 64))((1,), (64,), (given, data, flag, out))
    assert np.array_equal(out, given + 1)
    assert np.array_equal(data, [1, 1])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("run", "text"), [(rows, ROWS), (exchange, EXCHANGE)])
def test_what_is_ordered_is_no_race(emulator: Emulator, run: Run, text: str, seed: int) -> None:
    emulator.seed = seed
    run(emulator, text)


FENCE = "        __threadfence();\n        ticket"
IN_ROWS = (
    Planted("no fence before the ticket", FENCE, "        ticket"),
    Planted("no ticket", "ticket != int(gridDim.x) - 1", "blockIdx.x != gridDim.x - 1"),
    Planted("ticket drawn without an atomic", "atomicAdd(arrived, 1)", "(*arrived)++"),
)
READ = "    const int first = words[threadIdx.x ^ 1];\n    __syncthreads();"
IN_EXCHANGE = (
    Planted("written while others read", READ, READ.replace("\n    __syncthreads();", "")),
    Planted("no __syncwarp", "    __syncwarp();\n", ""),
    Planted("the flag is a plain store", "lb::store_release(flag, 1);", "*flag = 1;"),
)


@pytest.mark.parametrize("bug", [*IN_ROWS, *IN_EXCHANGE], ids=str)
def test_races_are_found(emulator: Emulator, bug: Planted) -> None:
    run, text = (rows, ROWS) if bug in IN_ROWS else (exchange, EXCHANGE)
    broken = mutate(text, bug.old, bug.new)
    for emulator.seed in range(bug.seeds):
        try:
            run(emulator, broken)
        except RaceError:
            return
        except AssertionError:
            continue  # it shows in the result too
    raise AssertionError("no race was reported")

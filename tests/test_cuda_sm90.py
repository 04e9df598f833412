"""Hopper's primitives: wgmma against CUTLASS's layouts, and a GEMM that TMA feeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorError, TensorMap
from launchers import Launcher
from planted import Planted, mutate

from lowbit.kernels.cuda import wgmma
from lowbit.kernels.cuda.launch import Source

TEXT = (Path(__file__).parent / "emulator/kernels/sm90.cu").read_text()
DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture
def hopper(launcher: Launcher) -> Launcher:
    if launcher.device.capability != 90:
        pytest.skip(f"wgmma is Hopper's, this is {launcher.device.name}")
    return launcher


def with_wgmma(text: str, columns: int, element: str) -> str:
    """The text, with `lb::wgmma` declared."""
    include = '#include "sm90.cuh"\n'
    return mutate(text, include, include + wgmma.declare(columns, element))


def small(rng: np.random.Generator, shape: tuple[int, int], dtype: Any) -> Any:
    """Whole numbers so small that all sums are exact."""
    return rng.integers(-4, 4, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("form", ["from shared memory", "from registers"])
@pytest.mark.parametrize(("columns", "element"), [(8, "f16"), (136, "bf16"), (256, "f16")])
def test_wgmma_multiplies(hopper: Launcher, columns, form, element):
    rng, dtype = np.random.default_rng(columns), DTYPES[element]
    a, b = small(rng, (64, 64), dtype), small(rng, (columns, 64), dtype)
    c = rng.integers(-100, 100, (64, columns)).astype(np.float32)
    thread, value = np.arange(128)[:, None], np.arange(8)[None, :]
    # ALayout_64x16 and CLayout_64xN, as row and column.
    quad, eighth, warp = thread % 4, thread // 4 % 8, thread // 32
    row, k = eighth + 16 * warp + 8 * (value // 2 % 2), 2 * quad + value % 2 + 8 * (value // 4)
    fragments = np.stack([a[row, 16 * step + k] for step in range(4)])
    value = np.arange(columns // 2)[None, :]
    rows, at = eighth + 16 * warp + 8 * (value // 2 % 2), 2 * quad + value % 2 + 8 * (value // 4)
    d = np.ascontiguousarray(c[rows, at])
    registers = "true" if form == "from registers" else "false"
    name = f"multiply<{wgmma.TYPES[element]}, {columns}, {registers}>"
    source = Source(with_wgmma(TEXT, columns, element), name, 128, (64 + columns) * 128)
    args = a.view(np.uint32), fragments.view(np.uint32), b.view(np.uint32), d
    hopper.launch(source, (1,), (128,), args)
    got = np.empty_like(c)
    got[rows, at] = d
    assert np.array_equal(got, a.astype(np.float64) @ b.astype(np.float64).T + c)


@pytest.mark.parametrize("columns", [0, 12, 264])
def test_wgmma_has_multiples_of_8_columns(columns):
    with pytest.raises(ValueError, match="want a multiple of 8 in"):
        wgmma.declare(columns, "f16")


def gemm(launcher: Launcher, m: int, n: int, k: int, stages: int, text: str = TEXT) -> None:
    rng = np.random.default_rng(0)
    a, b = small(rng, (m, k), np.float16), small(rng, (n, k), np.float16)
    c = np.full((m, n), np.nan, np.float16)
    shared = -(-stages * (2 * 64 * 128 + 16) // 1024) * 1024
    source = Source(with_wgmma(text, 64, "f16"), f"gemm_sm90<{stages}>", 160, shared)
    maps = TensorMap(a, (64, 64), 128), TensorMap(b, (64, 64), 128)
    args = *maps, c, np.int32(m), np.int32(n), np.int32(k)
    launcher.launch(source, (-(-m // 64), -(-n // 64)), (160,), args)
    assert np.array_equal(c, (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float16))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (100, 72, 520), (1, 1, 1024)])
def test_tma_feeds_wgmma(hopper: Launcher, m, n, k, seed):
    hopper.seed(seed)
    gemm(hopper, m, n, k, stages=3)


PLANTED = (
    Planted("no wait for a full stage", "        lb::mbarrier_wait(&shared.full[s], phase);\n", ""),
    Planted("no wait for an empty stage", "lb::mbarrier_wait(&shared.empty[s], phase ^ 1);", ""),
    Planted("wrong parity of empty", "&shared.empty[s], phase ^ 1", "&shared.empty[s], phase"),
    Planted("wrong parity of full", "&shared.full[s], phase)", "&shared.full[s], phase ^ 1)"),
    Planted("half of the bytes expected", "2 * 64 * 128);", "64 * 128);"),
    Planted(
        "no wait for wgmma",
        "lb::wgmma_wait<0>(acc);\n        lb::mbarrier",
        "lb::mbarrier",
    ),
    Planted(
        "stage handed back before the wait",
        "        lb::wgmma_wait<0>(acc);\n        lb::mbarrier_arrive(&shared.empty[s]);",
        "        lb::mbarrier_arrive(&shared.empty[s]);\n        lb::wgmma_wait<0>(acc);",
    ),
    Planted(
        "no commit",
        "        lb::wgmma_commit();\n        lb::wgmma_wait<0>(acc);",
        "        lb::wgmma_wait<0>(acc);",
    ),
    Planted(
        "no fence",
        "        lb::wgmma_fence();\n#pragma unroll\n        for (int k",
        "#pragma unroll\n        for (int k",
    ),
    Planted(
        "barriers used before they are initialised",
        "        lb::mbarrier_fence_init();\n    }\n    __syncthreads();",
        "        lb::mbarrier_fence_init();\n    }",
    ),
    Planted("empty counts half of the threads", "&shared.empty[s], 128", "&shared.empty[s], 64"),
    Planted("wrong step along k", "&shared.b[s]) + 2 * k", "&shared.b[s]) + 4 * k"),
    Planted("coordinates swapped", "&a, tile * 64, m0,", "&a, m0, tile * 64,"),
    Planted("rows of c not bounded", "if (m < M && n + i < N)", "if (n + i < N)"),
)


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_planted_bugs_are_caught(emulator, bug: Planted):
    def run(text: str, seed: int) -> None:
        emulator.seed = seed
        gemm(Launcher(emulator), 100, 64, 1024, 3, text)

    bug.must_be_caught(TEXT, run)


def test_a_tensor_map_is_what_the_driver_takes(emulator):
    a = np.zeros((8, 72), np.float16)
    with pytest.raises(EmulatorError, match="box of 128 columns"):
        emulator.tensor_map(a, (8, 128))
    with pytest.raises(EmulatorError, match="rows 142 bytes apart"):
        emulator.tensor_map(np.zeros((8, 71), np.float16), (8, 64))

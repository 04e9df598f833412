"""Operands and results beyond 4 GiB: only the last block of a launch runs, on sparse memory."""

from dataclasses import replace

import numpy as np
import pytest
from emulator import Emulator

from lowbit.formats import Format, names
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue, Kernel, Problem
from lowbit.kernels.cuda import gemm, hopper, integer, launch

FAR = 2**22 + 1  # rows of 1024 halves: 8 GiB
K = 1024


def last_tile(emulator: Emulator, kernel: Kernel, m: int, n: int, last: int) -> None:
    """The last entry of a product, computed by its last tile alone."""
    rng = np.random.default_rng(0)
    fmt = names.get("int8_row")
    near = 130
    codes, scales = emulator.sparse((n, K), np.uint8), emulator.sparse((n, 1), np.float32)
    x = emulator.sparse((m, K), np.float16)
    residual, out = (emulator.sparse((m, n), np.float16) for _ in range(2))
    codes[-near:] = rng.integers(0, 256, codes[-near:].shape)
    scales[-near:] = 0.25
    x[-near:] = rng.integers(-3, 4, x[-near:].shape)
    residual[-1, -1] = 64
    p = Problem(m, n, K, "float16", fmt, "float16", residual="float16", device=emulator.device.name)
    assert kernel.accepts(p) is None
    emulator.blocks = [last]
    with launch.pretending(emulator):
        run = kernel.build(p)(Packed(fmt, (n, K), codes, scales))
        run(x, Epilogue(1 / 64, residual=residual), out)
    assert len(emulator.launches) == 1
    product = x[-1].astype(np.float64) @ (codes[-1].view(np.int8) * 0.25) / 64
    assert out[-1, -1] == np.float16(product + 64)
    assert abs(product) > 1


FEW = 64
TILES = {
    "matmul.cuda.mma": (gemm.KERNELS[0], 128, 128),
    "matmul.cuda.wgmma": (hopper.KERNELS[0], 128, 256),
}


@pytest.mark.parametrize("name", TILES)
def test_rows_of_x_and_results_beyond_4_gib(emulator, name):
    kernel, rows, columns = TILES[name]
    across, down = -(-FEW * 10 // rows), -(-FAR // columns)
    last_tile(emulator, kernel, FAR, FEW * 10, across * down - 1)


@pytest.mark.parametrize("name", TILES)
def test_rows_of_w_beyond_4_gib(emulator, name):
    kernel, rows, columns = TILES[name]
    last_tile(emulator, kernel, FEW * 4, FAR, -(-FAR // rows) * -(-FEW * 4 // columns) - 1)


@pytest.mark.parametrize(("m", "n", "k"), [(2**23, 8, K), (8, 2**23, K), (8, 8, 2**28 + 32)])
def test_what_is_too_large_for_one_launch_is_refused(m, n, k):
    whole = names.get("int8_row")
    cases: list[tuple[Kernel, Format | str]] = [
        (gemm.KERNELS[0], "float16"),
        (hopper.KERNELS[0], "float16"),
        (integer.KERNELS[0], whole),
    ]
    for kernel, x in cases:
        p = Problem(m, n, k, x, whole, "float32", device="cuda:90:4")
        refusal = kernel.accepts(p)
        assert refusal is not None
        assert "got" in refusal
        assert kernel.accepts(replace(p, m=8, n=8, k=K)) is None

"""What the CUDA quantizers ask of memory: no more than the result, and offsets of 64 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from emulator import Emulator

import lowbit as lb
from lowbit.formats import reference
from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda import quantize as compiled

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def compiler(emulator: Emulator) -> None:
    """Says where there is none."""


def drawn(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(1).standard_t(4, shape).astype(ml_dtypes.bfloat16)


class Counted(Emulator):
    """Adds up what is asked for."""

    asked = 0

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Count, and give memory."""
        self.asked += math.prod(shape) * np.dtype(dtype).itemsize
        return super().empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Count, and give memory."""
        self.asked += math.prod(shape) * np.dtype(dtype).itemsize
        return super().zeros(shape, dtype)


@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "int8_tensor", "fp8_g4", "int4_3x5"])
def test_memory_is_that_of_the_result(name: str) -> None:
    """Nothing is allocated beside the parts but the extremes of some blocks."""
    machine, fmt = Counted(), lb.format(name)
    x = drawn((512, 1024))
    with launch.pretending(machine):
        w = compiled.quantize(fmt, x)
    assert w is not None
    kept = sum(p.nbytes for p in (w.codes, w.scales, w.tensor_scale) if p is not None)
    assert machine.asked <= 1.1 * kept + 8 * compiled._BLOCKS


class Vast(Emulator):
    """Gives memory of many GiB, of which little is written."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Memory that takes room where it is written."""
        return self.sparse(shape, dtype)


def last_block(operation: Callable[[Vast], Any]) -> Any:
    """Run the last block of each launch alone."""
    machine = Vast()
    make = machine.function

    def function(source: Any) -> Any:
        made = make(source)

        def call(grid: tuple[int, ...], block: tuple[int, ...], args: Any, **more: Any) -> None:
            machine.blocks = [math.prod(grid) - 1]
            made(grid, block, args, **more)

        return call

    machine.function = function  # type: ignore[method-assign]
    with launch.pretending(machine):
        return operation(machine)


@pytest.mark.parametrize(
    ("name", "columns"), [("int8_g128", 256), ("fp8", 1 << 14), ("int4_2x24", 24 * 700)]
)
def test_offsets_beyond_32_bits(name: str, columns: int) -> None:
    """x of 8 GiB, codes of 2 to 4: only the last rows are there."""
    fmt = lb.format(name)
    rows = (1 << 32) // columns + 64
    tail = drawn((64, columns))

    def run(machine: Vast) -> reference.Packed:
        x = machine.sparse((rows, columns), ml_dtypes.bfloat16)
        x[-64:] = tail
        return compiled.enqueue(fmt, x).parts

    w, expected = last_block(run), reference.quantize(fmt, tail)
    written = w.codes[-64:] != 0
    assert written[-1].any()
    assert (w.codes[-64:][written] == expected.codes[written]).all()
    assert w.scales[-1, -1].tobytes() == expected.scales[-1, -1].tobytes()

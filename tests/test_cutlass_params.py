"""Arguments of CUTLASS's kernels, byte by byte those that its own C++ makes."""

from __future__ import annotations

import host
import pytest
from calls import PROCESSORS, calls, same, swizzled, theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels.cutlass import dense
from lowbit.kernels.cutlass.dense import Spec
from lowbit.kernels.cutlass.schedulers import grid

TILE, TALL = (128, 128, 128), (128, 256, 128)
INT8 = "int8_t", "int8_t"
FLOAT8 = "cutlass::float_e4m3_t", "cutlass::float_e4m3_t"
SPECS = {
    "int8": Spec(*INT8, "bfloat16", TALL, (2, 1), "Cooperative"),
    "int8 turned": Spec(*INT8, "float16", (64, 32, 128), (1, 1), "Pingpong", turned=True),
    "int8 silu": Spec(*INT8, "bfloat16", TILE, (1, 1), "Pingpong", activation="silu"),
    "int8 zero points": Spec(*INT8, "bfloat16", TILE, (2, 1), "Pingpong", x_zero="uint8"),
    "int8 sums": Spec(*INT8, "int32", TILE, (2, 1), "Cooperative", x_zero="int8", turned=True),
    "float8 out": Spec(*FLOAT8, "float8_e4m3fn", TILE, (2, 1), "Pingpong", fast=True),
    "float8": Spec(*FLOAT8, "bfloat16", TILE, (1, 2), "Pingpong", residual="bfloat16"),
    "float8 fast": Spec(*FLOAT8, "float32", TILE, (2, 1), "Pingpong", fast=True),
}


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data(), st.sampled_from(PROCESSORS))
def test_arguments(name: str, data: st.DataObject, processors: int) -> None:
    spec = data.draw(swizzled(SPECS[name]))
    call = data.draw(calls(dense, spec))
    wanted, blocks = theirs(dense, spec, call, processors)
    same(dense.layout(spec), dense.arguments(spec, call, processors, host.recorded), wanted)
    assert grid(dense.tiling(spec, call), processors) == blocks

"""Block-scaled float8 on CUTLASS: arguments byte by byte, and what they compute."""

from __future__ import annotations

import ctypes

import host
import numpy as np
import pytest
from calls import PROCESSORS, built, calls, matrices, same, theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels.cutlass import blocks, dense
from lowbit.kernels.cutlass.blocks import Call, Spec
from lowbit.kernels.cutlass.dense import Matrices
from lowbit.kernels.cutlass.schedulers import grid

FLOAT8 = "cutlass::float_e4m3_t", "cutlass::float_e4m3_t"
SPECS = {
    "rows": Spec(*FLOAT8, "bfloat16", (128, 128, 128), (2, 1), "Cooperative", residual="float32"),
    "turned": Spec(
        *FLOAT8, "float16", (64, 16, 128), (1, 1), "Pingpong", turned=True, w_rows=64
    ),
}  # fmt: skip


@st.composite
def scaled(draw: st.DrawFn, spec: Spec) -> Call:
    call = draw(calls(blocks, spec))
    columns = -(-call.k // 128)

    def scales(rows: int, shared: int) -> Matrices:
        return draw(matrices(-(-rows // shared), 4 * columns, call.batches, 4))

    fields = {name: getattr(call, name) for name in dense.Call.__dataclass_fields__}
    return Call(
        **fields, x_scales=scales(call.m, spec.x_rows), w_scales=scales(call.n, spec.w_rows)
    )


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data(), st.sampled_from(PROCESSORS))
def test_arguments(name: str, data: st.DataObject, processors: int) -> None:
    spec = SPECS[name]
    call = data.draw(scaled(spec))

    def scales(of_x: bool) -> tuple[int, ...]:
        found, rows, shared = (
            (call.x_scales, call.m, spec.x_rows) if of_x else (call.w_scales, call.n, spec.w_rows)
        )
        columns = -(-call.k // 128)
        return (
            found.address, -(-rows // shared), columns, call.batches, found.pitch // 4,
            found.batch // 4,
        )  # fmt: skip

    wanted, grid_ = theirs(blocks, spec, call, processors, "blocks.hpp", scales)
    same(blocks.layout(spec), blocks.arguments(spec, call, processors, host.recorded), wanted)
    assert grid(dense.tiling(spec, call), processors) == grid_


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_scales_of_a_tile_are_those_of_its_rows(name: str, data: st.DataObject) -> None:
    """CUTLASS's own loads, run on the host's memory: -1 stands where nothing was brought."""
    spec = SPECS[name]
    (first_rows, second_rows, _), turned = spec.tile, spec.turned
    m, batches = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 2))
    n, k = 8 * data.draw(st.integers(1, 60)), 16 * data.draw(st.integers(1, 80))
    columns, gap = -(-k // 128), data.draw(st.integers(0, 3))
    shared = {"x": (m, spec.x_rows), "w": (n, spec.w_rows)}
    held = {
        side: np.random.default_rng(len(side) + rows).random(
            (batches, -(-rows // each), columns + gap), np.float32
        )
        for side, (rows, each) in shared.items()
    }
    described = {
        side: Matrices(array.ctypes.data, 4 * (columns + gap), array.strides[0])
        for side, array in held.items()
    }
    unread = Matrices(1 << 40, 1 << 20, 1 << 40)
    finish = blocks.operands(1.0, 0)
    call = Call(
        m, n, k, unread, unread, unread, finish, None if spec.residual is None else unread,
        batches, x_scales=described["x"], w_scales=described["w"],
    )  # fmt: skip
    made = blocks.arguments(spec, call, 132, host.recorded)
    place = ctypes.create_string_buffer(len(made) + 64)
    at = (ctypes.addressof(place) + 63) // 64 * 64
    ctypes.memmove(at, bytes(made), len(made))
    order = ("w", "x") if turned else ("x", "w")
    tiles = [-(-shared[side][0] // rows) for side, rows in zip(order, spec.tile, strict=False)]
    i, j = (data.draw(st.integers(0, count - 1)) for count in tiles)
    depth, batch = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, batches - 1))
    found = (np.zeros(first_rows, np.float32), np.zeros(second_rows, np.float32))
    built(blocks, spec, "blocks.hpp").brought(
        ctypes.c_void_p(at), i, j, depth, batch,
        *(ctypes.c_void_p(each.ctypes.data) for each in found),
    )  # fmt: skip
    for side, tile, rows, seen in zip(order, (i, j), spec.tile, found, strict=False):
        each = shared[side][1]
        wanted = held[side][batch, tile * rows // each :, depth][: rows // each]
        assert seen[: len(wanted)].tolist() == wanted.tolist()
        assert (seen[len(wanted) : rows // each] == -1).all()

"""Kernels on CUTLASS for Blackwell: arguments byte by byte, the order of scales, machine code."""

from __future__ import annotations

import host
import numpy as np
import pytest
from calls import PROCESSORS, built, calls, matrices, same, swizzled, theirs
from computed import interleaved
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels.cutlass import blackwell, dense
from lowbit.kernels.cutlass.blackwell import KINDS, Call, Spec

NVFP4 = ("cutlass::nv_float4_t<cutlass::float_e2m1_t>",) * 2
MXFP4 = ("cutlass::mx_float4_t<cutlass::float_e2m1_t>",) * 2
MXFP8 = ("cutlass::mx_float8_t<cutlass::float_e4m3_t>",) * 2
ROWS = ("cutlass::float_e4m3_t",) * 2
ONE, PAIR = (1, 1), (2, 1)
SPECS = {
    "nvfp4": Spec(*NVFP4, "bfloat16", (128, 128, 256), ONE, "Sm100"),
    "nvfp4, pair": Spec(*NVFP4, "bfloat16", (256, 192, 256), PAIR, "Sm100"),
    "mxfp4, pair": Spec(*MXFP4, "float32", (256, 128, 256), PAIR, "Sm100", residual="bfloat16"),
    "mxfp8, few rows": Spec(
        *MXFP8, "float16", (128, 64, 128), ONE, "Sm100", turned=True, activation="silu",
        residual="float32",
    ),
    "rows, few rows": Spec(*ROWS, "float32", (128, 32, 128), ONE, "Sm100", turned=True),
    "rows, pair": Spec(*ROWS, "bfloat16", (256, 256, 128), PAIR, "Sm100", residual="bfloat16"),
    "nvfp4, 12.0": Spec(*NVFP4, "bfloat16", (128, 128, 128), ONE, "Sm120", residual="bfloat16"),
    "mxfp8, 12.0": Spec(*MXFP8, "float32", (128, 128, 128), ONE, "Sm120", turned=True),
}  # fmt: skip


@st.composite
def scaled(draw: st.DrawFn, spec: Spec) -> Call:
    drawn = draw(calls(blackwell, spec))
    k, bits = 32 * -(-drawn.k // 32), KINDS[spec.x].bits
    fields = {name: getattr(drawn, name) for name in dense.Call.__dataclass_fields__}
    x, w = (draw(matrices(rows, k * bits // 8, drawn.batches)) for rows in (drawn.m, drawn.n))
    scales = {name: 16 * draw(st.integers(1, 1 << 40)) for name in ("x_scales", "w_scales")}
    return Call(**{**fields, "k": k, "x": x, "w": w, **scales})


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data(), st.sampled_from(PROCESSORS))
def test_arguments(name: str, data: st.DataObject, processors: int) -> None:
    spec = data.draw(swizzled(SPECS[name]))
    call = data.draw(scaled(spec))
    codes = 8 // KINDS[spec.x].bits  # in a byte

    def beside(of_x: bool) -> tuple[int, ...]:
        side, scales = (call.x, call.x_scales) if of_x else (call.w, call.w_scales)
        return side.pitch * codes, side.batch * codes, scales

    wanted, blocks = theirs(
        blackwell, spec, call, processors, "blackwell.hpp", beside, spec.threads
    )
    made = blackwell.arguments(spec, call, processors, host.recorded)
    same(blackwell.layout(spec), made, wanted)
    assert blackwell.grid(spec, call) == blocks


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 20), st.sampled_from(["nvfp4", "mxfp8, few rows"]))
def test_scales_lie_where_cutlass_looks_for_them(rows: int, columns: int, name: str) -> None:
    spec = SPECS[name]
    code = built(blackwell, spec, "blackwell.hpp")
    scales = np.arange(1, rows * columns + 1, dtype=np.uint32).reshape(rows, columns)
    held = interleaved(scales)
    group = spec.group
    at = [
        code.place(rows, columns * group, row, column * group)
        for row in range(rows)
        for column in range(columns)
    ]
    np.testing.assert_array_equal(held[at], scales.ravel())
    assert held.size == -(-rows // 128) * -(-columns // 4) * 512
    assert np.count_nonzero(held) == scales.size

"""Weights of fewer bits than x on CUTLASS: arguments byte by byte, and what they compute."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import host
import numpy as np
import pytest
from calls import PROCESSORS, built, calls, matrices, same, swizzled, theirs
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit.formats import codes
from lowbit.kernels.cutlass import dense, mixed, streamk
from lowbit.kernels.cutlass.mixed import BITS, Call, Spec

INT4, UINT4, FLOAT8 = "cutlass::int4b_t", "cutlass::uint4b_t", "cutlass::float_e4m3_t"
BFLOAT, HALF = "cutlass::bfloat16_t", "cutlass::half_t"
BIG, SMALL = (128, 128, 64), (64, 16, 64)


def spec(x: str, w: str, tile: tuple[int, int, int], schedule: str, **more) -> Spec:
    given = {"out": "bfloat16", "cluster": (1, 1), "turned": True}
    return Spec(x, w, tile=tile, schedule=schedule, **{**given, **more})


SPECS = {
    "groups": spec(
        BFLOAT, INT4, BIG, "Cooperative", scale="float", cluster=(2, 1), residual="bfloat16"
    ),
    "zeros": spec(BFLOAT, UINT4, SMALL, "Pingpong", scale="float", zero=True, out="float32"),
    "narrow": spec(BFLOAT, "int8_t", BIG, "Pingpong", scale=BFLOAT, zero=True, cluster=(1, 2)),
    "rows": spec(HALF, FLOAT8, (64, 64, 64), "Pingpong", out="float16"),
    "int8": spec("int8_t", INT4, (128, 64, 128), "Cooperative", cluster=(2, 1)),
    "shared": spec(
        BFLOAT, UINT4, (128, 16, 64), "Cooperative", scale="float", zero=True, shared=True
    ),
    "scaled": spec(FLOAT8, INT4, (64, 64, 128), "Pingpong", scale=BFLOAT),
    "table": spec(FLOAT8, INT4, (128, 128, 128), "Cooperative", scale=mixed.TABLE),
}


@st.composite
def grouped(draw: st.DrawFn, spec: Spec) -> Call:
    call = draw(calls(mixed, spec))
    k = 128 * -(-call.k // 128) if draw(st.booleans()) else 32 * -(-call.k // 32)
    group = draw(st.sampled_from([k, spec.tile[2], 2 * spec.tile[2], 7 * spec.tile[2]]))
    fields = {name: getattr(call, name) for name in dense.Call.__dataclass_fields__}
    found = Call(**{
        **fields, "k": k, "x": draw(matrices(call.m, k * BITS[spec.x] // 8, call.batches)),
        "w": draw(matrices(call.n, k * BITS[spec.w] // 8, call.batches)),
    })  # fmt: skip
    if spec.scale is None:
        return found
    groups, wide = -(-k // group), call.n * BITS[spec.scale] // 8
    scales = draw(matrices(groups, wide, call.batches))
    zeros = replace(scales, address=draw(st.integers(1, 1 << 40)) * 16 * spec.zero)
    return replace(found, group=group, scales=scales, zeros=zeros)


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data(), st.sampled_from(PROCESSORS))
def test_arguments(name: str, data: st.DataObject, processors: int) -> None:
    spec = data.draw(swizzled(SPECS[name]))
    call = data.draw(grouped(spec))
    if spec.shared:
        asked = dense.tiling(spec, call), dense.steps(spec, call), processors
        sharing = streamk.shared(*asked, streamk.HEURISTIC)
        call = replace(call, sharing=sharing, partial=1 << 41, locks=1 << 42)

    def beside(of_x: bool) -> tuple[int, ...]:
        codes, bits = (call.x, BITS[spec.x]) if of_x else (call.w, BITS[spec.w])
        pitches = codes.pitch * 8 // bits, codes.batch * 8 // bits
        if of_x:
            return (*pitches, call.locks, call.partial)
        if spec.scale is None:
            return (*pitches, *[0] * 5)
        size = BITS[spec.scale] // 8
        return (
            *pitches, call.group, call.scales.address, call.zeros.address,
            call.scales.pitch // size, call.scales.batch // size,
        )  # fmt: skip

    wanted, blocks = theirs(mixed, spec, call, processors, "mixed.hpp", beside)
    same(mixed.layout(spec), mixed.arguments(spec, call, processors, host.recorded), wanted)
    assert dense.grid(spec, call, processors) == blocks


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("groups", "int4"), ("zeros", "uint4"), ("narrow", "int8"), ("rows", "float8_e4m3fn")],
)
def test_codes_lie_in_memory_as_cutlass_counts_them(name: str, fmt: str) -> None:
    element = lb.format(fmt).element
    held = np.random.default_rng(1).integers(0, 256, 96, np.uint8)
    count = len(held) * 8 // element.bits
    found = np.empty(count, np.float32)
    built(mixed, SPECS[name], "mixed.hpp").numbers(
        ctypes.c_void_p(held.ctypes.data), count, ctypes.c_void_p(found.ctypes.data)
    )
    values = np.array(element.values, np.float32)
    np.testing.assert_array_equal(found, values[codes.unpack(held, element.bits, count)])


def test_texts_name_what_codes_meet() -> None:
    text = mixed.text(SPECS["zeros"])
    assert "cute::tuple<cutlass::uint4b_t, float, float>" in text
    assert "Weights, cutlass::layout::RowMajor, 32, cutlass::bfloat16_t" in text
    assert text == mixed.text.__wrapped__(SPECS["zeros"])
    assert len({mixed.text(spec) for spec in SPECS.values()}) == len(SPECS)

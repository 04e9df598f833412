"""How a row of codes is cut into tiles of AMX, and that their bits depend on nothing else."""

from __future__ import annotations

import struct
from typing import Any

import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit import dispatch
from lowbit.formats.declare import integer
from lowbit.kernels.cpu import gemm, pool
from lowbit.kernels.cpu.gemm import Units
from lowbit.kernels.cpu.isa import RECORDS, runnable
from lowbit.kernels.cpu.spec import LAYOUTS, METHODS, Spec
from lowbit.kernels.cpu.steps import Steps
from lowbit.kernels.cpu.tiles import TALL, configuration
from lowbit.testing import conformance, random_qarray

Array = npt.NDArray[Any]
AMX = RECORDS[0]
ELEMENTS = [integer(bits) for bits in range(1, 9)]
here = pytest.mark.skipif(AMX not in runnable(), reason="this machine has no tiles")


@pytest.mark.parametrize("steps", [1, 8, 15, 16])
@pytest.mark.parametrize("tall", [1, 5, 16])
def test_the_configuration_is_what_ldtilecfg_reads(steps: int, tall: int) -> None:
    """Palette 1; bytes of a row of each tile from byte 16 on, rows from byte 48 on (Intel, SDM)."""
    block = configuration(steps, tall)
    assert len(block) == 64
    assert block[:16] == b"\1" + bytes(15)
    columns, rows = struct.unpack("<16H", block[16:48]), block[48:]
    sums, x, w = slice(0, 4), slice(4, 6), slice(6, 8)
    assert set(columns[sums]) == {64}
    assert set(rows[sums]) == {tall}
    assert set(columns[x]) == {4 * steps}
    assert set(rows[x]) == {tall}
    assert set(columns[w]) == {64}
    assert set(rows[w]) == {steps}
    assert not any(columns[8:])
    assert not any(rows[8:])


@given(
    element=st.sampled_from(ELEMENTS),
    inner=st.sampled_from(["bf16", "dot"]),
    method=st.sampled_from(METHODS),
    layout=st.sampled_from(LAYOUTS),
    k=st.integers(0, 50_000),
    granules=st.integers(1, 300),
    m=st.integers(1, 200),
)
def test_units_cover_every_granule_once(
    element: Any, inner: str, method: str, layout: str, k: int, granules: int, m: int
) -> None:
    spec = Spec(inner, element, method, layout=layout)
    steps = Steps(spec, AMX)
    segment = granules * steps.codes
    units = Units.of(spec, steps, segment, k, m)
    assert units.granules == -(-k // steps.codes)
    if spec.tiled:
        assert units.each * steps.count <= 16, "steps that a tile has"
    else:
        assert units.each == 1
    # What each unit holds, as the kernels find it.
    held, full = [], True
    for s in range(-(-units.granules // units.segment_granules)):
        left = min(units.segment_granules, units.granules - s * units.segment_granules)
        for first in range(0, left, units.each):
            held.append(min(units.each, left - first))
            full &= held[-1] == units.each
    assert len(held) == units.total
    assert sum(held) == units.granules
    assert units.padded or full
    if not units.padded:
        assert units.total * units.each == units.granules
    # A stretch ends with a segment, or a segment is cut into stretches that it alone has.
    assert 1 <= units.stretch <= units.span
    if units.segment <= units.stretch:
        assert units.stretch % units.segment == 0
        assert units.span == units.stretch
    else:
        assert units.span == units.segment
    if method in ("decoded", "tiles") and not (steps.plain and m <= TALL):
        assert units.stretch * units.each * steps.count <= max(128, units.each * steps.count)


@pytest.mark.parametrize("inner", ["bf16", "dot"])
def test_few_rows_decode_just_before_they_multiply(inner: str) -> None:
    """Where no tile but a row's last is padded, and the words are not tiles already."""
    for element, k, segment, m, single in (
        (integer(4), 256, 64, 16, True),
        (integer(4), 256, 64, 17, False),
        (integer(4), 256, 64, 1, True),
        (integer(3), 256, 96, 5, inner == "bf16"),
        (integer(4), 250, 64, 5, True),  # whole granules
        (integer(4), 260, 64, 5, True),  # the last one of a row may lack granules
        (integer(4), 250, 40, 5, inner == "dot"),  # others may not
        (integer(8), 256, 64, 5, inner == "bf16"),
    ):
        spec = Spec(inner, element, layout="words16")
        found = gemm.for_tiles(spec, AMX, m=m, segment=segment, k=k)
        units = Units.of(found, Steps(found, AMX), segment, k)
        if found.method == "single":
            assert found.tile == units.each * Steps(found, AMX).count
            whole = units.segment * units.each == units.segment_granules
            assert whole or units.total <= units.segment
        else:
            assert found.method == "tiles"
        assert (found.method == "single") == single, (element.name, k, m)


# Through `lowbit.matmul`.


def product(x: Any, w: Any, kernel: str) -> Array:
    found: Array = lb.matmul(x, w.T, kernel=kernel)
    return found


@here
@pytest.mark.parametrize(
    ("kernel", "x"),
    [("matmul.cpu.bf16", "bfloat16"), ("matmul.cpu.bf16", "mxfp8"), ("matmul.cpu.dot", "int8_row")],
)
@pytest.mark.parametrize(
    "w", ["int4_g32", "nf4", "int3_g96", "uint4_g64_asym", "int8_row", "mxfp4"]
)
def test_a_row_has_the_same_bits_among_any_others(
    kernel: str, x: str, w: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tile of rows, two, several, a last one that is not full; prepared or not; once more."""
    monkeypatch.setattr(dispatch, "device", lambda: "cpu:amx")
    left, right = conformance.dense_or_quantized(x, 300, 200), random_qarray(w, 70, 200)
    if conformance.refusal(kernel, left, right) is not None:
        return
    whole = product(left, right, kernel)
    prepared = right.prepare()
    for m in (1, 2, 5, 15, 16, 17, 31, 32, 33, 65, 130, 300):
        for each in (right, prepared):
            conformance.same_bits(product(left[:m], each, kernel), whole[:m])
        conformance.same_bits(product(left[300 - m :], right, kernel), whole[300 - m :])


@here
@pytest.mark.parametrize("element", ["int4_row", "nf4_g512", "uint3_row_asym"])
def test_threads_share_tiles(element: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "device", lambda: "cpu:amx")
    for kernel, x in (("matmul.cpu.bf16", "bfloat16"), ("matmul.cpu.dot", "int8_row")):
        left, right = (
            conformance.dense_or_quantized(x, 300, 2000),
            random_qarray(element, 200, 2000),
        )
        if conformance.refusal(kernel, left, right) is not None:
            continue
        found = []
        for threads in (1, 2, 5):
            pool.set_num_threads(threads)
            try:
                found.append(product(left, right, kernel))
            finally:
                pool.set_num_threads(None)
        for other in found[1:]:
            conformance.same_bits(other, found[0])

"""Compiled products equal their arithmetic in NumPy bit for bit, on every instruction set."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats.codebook import NF4
from lowbit.formats.declare import Element, codebook, floating, integer, power_of_two
from lowbit.kernels.cpu import gemm, pool
from lowbit.kernels.cpu.cases import Case, address, records, same_bits
from lowbit.kernels.cpu.gemm import Units
from lowbit.kernels.cpu.isa import runnable
from lowbit.kernels.cpu.spec import LAYOUTS, METHODS, Spec
from lowbit.kernels.cpu.steps import Steps

INTEGERS = [integer(b, signed=s) for s in (True, False) for b in range(1, 9)]
FLOATS = [
    floating(4, 3, specials="fn"),
    floating(5, 2, specials="ieee"),
    floating(4, 3, specials="fnuz"),
    floating(5, 2, specials="fnuz"),
    floating(3, 2, specials="none"),
    floating(2, 3, specials="none"),
    floating(2, 1, specials="none"),
]
FIXED = Element("fixed8", 8, tuple(v / 64 for v in integer(8).values))
ODD = [
    codebook("odd5", (np.arange(32) - 7.25) ** 3),
    codebook("odd6", np.sqrt(np.arange(64)) - 2),
    codebook("odd7", np.cbrt(np.arange(128) - 60.0)),
    codebook("odd8", np.sin(np.arange(256))),
    codebook("odd3", (0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8)),
]
ELEMENTS = [*INTEGERS, *FLOATS, NF4, FIXED, *ODD]
SCALES = [power_of_two(), floating(4, 3, specials="fn"), integer(8)]


# What hypothesis draws.

sizes = st.one_of(st.integers(1, 40), st.sampled_from([16, 17, 33, 63, 64, 65, 130]))
TALL = 16  # rows that "single" takes at most


@cache
def cuts(spec: Spec) -> list[tuple[int, int]]:
    """k and the columns of a segment: whole granules, the last one short, or all of k."""
    step, steps = gemm.granule(spec), Steps(spec, runnable()[0])
    found = []
    for k in range(1, 301):
        for segment in (step, 2 * step, 3 * step, 5 * step, -(-96 // step) * step, k):
            if spec.folded and segment < k:
                continue
            if spec.method != "single" or not Units.of(spec, steps, segment, k).padded:
                found.append((k, segment))
    return found


@st.composite
def shapes(draw: st.DrawFn, spec: Spec) -> dict[str, Any]:
    k, segment = draw(st.sampled_from(cuts(spec)))
    seed = draw(st.integers(0, 2**32 - 1))
    m = draw(st.integers(1, TALL) if spec.method == "single" else sizes)
    return {"m": m, "n": draw(sizes), "k": k, "segment": segment, "seed": seed}


WAYS = [("fma", "direct"), ("fma", "decoded"), *product(("bf16", "dot"), METHODS)]


def swept() -> Iterator[Spec]:
    """Integers every way, other elements in turn; from rows and from words16 in turn."""
    for inner, method in WAYS:
        ways = [way for each, way in WAYS if each == inner]
        for i, element in enumerate(INTEGERS if inner == "dot" else ELEMENTS):
            turn = i + i // 8 + ways.index(method)
            if inner == "dot" or turn % 2:
                layout = LAYOUTS[(turn // 2 if inner == "dot" else i // 2 + i // 8) % 2]
                yield Spec(inner, element, method, layout=layout)


def label(spec: Spec) -> str:
    return f"{spec.inner}-{spec.method}-{spec.element.name}-{spec.layout}"


@pytest.mark.parametrize("spec", list(swept()), ids=label)
@settings(max_examples=4)
@given(st.data())
def test_products_of_every_element(spec: Spec, data: st.DataObject) -> None:
    wild = spec.inner == "fma" and data.draw(st.booleans())
    # Where vectors are plain, looking up many numbers takes a second to compile.
    some = [i for i in records(spec, every=False) if i.lanes > 4 or spec.element.bits < 5]
    Case(spec, **data.draw(shapes(spec)), wild=wild).check(some)


INT3, INT4, UINT4, INT8, E4M3 = (
    integer(3),
    integer(4),
    integer(4, signed=False),
    INTEGERS[7],
    FLOATS[0],
)
WORDS: dict[str, Any] = {"layout": "words16", "scale_layout": "panels16"}
VARIANTS = [
    Spec("fma", INT4, **WORDS),
    Spec("fma", integer(1), layout="words16"),
    Spec("fma", integer(2), "decoded", **WORDS, scale="float16", out="float16"),
    Spec("fma", UINT4, zero="uint8", scale="bfloat16", out="bfloat16"),
    Spec("fma", UINT4, "decoded", **WORDS, zero="uint8", x_scale=True, residual="float32"),
    Spec("fma", UINT4, zero="float16", scale="float16", residual="float16", out="float16"),
    Spec("fma", UINT4, "decoded", **WORDS, zero="float32", scale="float32"),
    Spec("fma", INT4, "decoded", biases=True, scale="bfloat16", x_scale=True),
    Spec("fma", INT4, **WORDS, biases=True, scale="float16", residual="bfloat16"),
    Spec("fma", FLOATS[6], scale=SCALES[0]),
    Spec("fma", FLOATS[6], "decoded", **WORDS, scale=SCALES[0]),
    Spec("fma", FLOATS[6], "decoded", scale=SCALES[1], x_scale=True),
    Spec("fma", E4M3, **WORDS, scale=SCALES[1]),
    Spec("fma", E4M3, "decoded", scale=SCALES[2], out="bfloat16", residual="bfloat16"),
    Spec("bf16", UINT4, "direct", **WORDS, zero="uint8", x_scale=True, out="float16"),
    Spec("bf16", UINT4, "decoded", zero="int8", scale=SCALES[0]),
    Spec("bf16", UINT4, "tiles", **WORDS, zero="uint8", x_scale=True),
    Spec("bf16", UINT4, "single", zero="uint8", scale="float16"),
    Spec("bf16", NF4, "decoded", **WORDS, biases=True, residual="float32"),
    Spec("bf16", NF4, "tiles", biases=True, scale=SCALES[1]),
    Spec("bf16", INT3, "single", **WORDS, biases=True, x_scale=True),
    Spec("bf16", FLOATS[6], "tiles", folded=4, **WORDS, scale=SCALES[0]),
    Spec("bf16", FLOATS[6], "single", folded=2, scale=SCALES[1], x_scale=True),
    Spec("bf16", INT3, "tiles", folded=1, scale=SCALES[0], x_scale=True),
    Spec("bf16", INT4, "single", folded=3, **WORDS, scale=SCALES[1]),
    Spec("dot", INT8, **WORDS, x_scale=True, scale="float16"),
    Spec("dot", INT4, "decoded", layout="words16", x_scale=True, residual="float32"),
    Spec("dot", UINT4, **WORDS, zero="uint8", x_scale=True, out="float16"),
    Spec("dot", UINT4, "decoded", zero="int8", scale="bfloat16"),
    Spec("dot", integer(3, signed=False), zero="uint8", scale=SCALES[0], x_scale=True),
    Spec("dot", INTEGERS[15], "decoded", zero="uint8", x_scale=True, scale=SCALES[1]),
    Spec("dot", INT8, "tiles", **WORDS, x_scale=True),
    Spec("dot", INT8, "tiles", zero="int8", x_scale=True),
    Spec("dot", UINT4, "tiles", **WORDS, zero="uint8", residual="bfloat16", out="bfloat16"),
    Spec("dot", UINT4, "single", zero="uint8", scale=SCALES[0], x_scale=True),
    Spec("dot", INT4, "single", **WORDS, x_scale=True),
]  # fmt: skip


@pytest.mark.parametrize("spec", VARIANTS, ids=label)
@settings(max_examples=8)
@given(st.data())
def test_products_of_every_storage(spec: Spec, data: st.DataObject) -> None:
    rows = [1] if spec.scale_layout == "panels16" else [1, 5, 16, 128, 2**40]
    Case(
        spec,
        **data.draw(shapes(spec)),
        every=data.draw(st.sampled_from([1, 2, 3, 2**40])),
        x_every=data.draw(st.sampled_from([1, 2, 2**40])),
        block_rows=data.draw(st.sampled_from(rows)),
        alpha=data.draw(st.sampled_from([1.0, -0.37, 3e-20])),
        bias=data.draw(st.booleans()),
    ).check(records(spec, every=False))


def some(inner: str, method: str) -> list[Spec]:
    """A plain width and one of planes, of the variants' kinds."""
    return [
        Spec(inner, INT4, method, **WORDS, x_scale=True),
        Spec(inner, integer(7), method, x_scale=True),
    ]


ROWS = (1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 32, 33, 65, 130, 300)
COLUMNS = (1, 15, 16, 17, 63, 64, 65, 130)


@pytest.mark.parametrize(("inner", "method"), WAYS)
def test_edges_of_register_tiles_and_of_panels(inner: str, method: str) -> None:
    for spec in some(inner, method):
        for i, m in enumerate(ROWS):
            k, segment = cuts(spec)[i * 37 % len(cuts(spec))]
            if spec.method == "single" and m > TALL:
                break
            Case(spec, m=m, n=COLUMNS[i * 3 % 8], k=k, segment=segment, seed=i).check()


@pytest.mark.parametrize(("inner", "method"), WAYS)
def test_a_segment_may_be_longer_than_a_stretch(inner: str, method: str) -> None:
    """Its sums are carried, and segments that are cut do not lose their scales."""
    for spec in some(inner, method):
        step = 256  # columns of one tile in every way, or of several
        for k, segment in ((20 * step, 20 * step), (17 * step, 8 * step), (17 * step, step)):
            for m in (3, 14 if method == "single" else 18):
                Case(spec, m=m, n=20, k=k, segment=segment).check(records(spec, every=False))


@pytest.mark.parametrize("inner", ["fma", "bf16", "dot"])
def test_more_granules_than_a_tile_goes_through(inner: str) -> None:
    spec = Spec(inner, INT8, **WORDS)
    for segment in (4 * gemm._LONGEST + 12, 4 * 3000):
        Case(spec, m=2, n=17, k=4 * gemm._LONGEST + 9, segment=segment).check(records(spec)[:1])


@pytest.mark.parametrize(("inner", "method"), WAYS)
def test_empty_axes(inner: str, method: str) -> None:
    for m, n, k in ((0, 5, 8), (3, 0, 8), (3, 5, 0)):
        Case(Spec(inner, INT4, method), m=m, n=n, k=k, segment=8, bias=True, alpha=2.0).check()


# Bits depend on nothing but the operands.


@pytest.mark.parametrize("spec", VARIANTS, ids=label)
@settings(max_examples=4)
@given(st.data())
def test_bits_do_not_depend_on_threads(spec: Spec, data: st.DataObject) -> None:
    m = TALL if spec.method == "single" else 70
    case = Case(spec, **data.draw(shapes(spec)) | {"m": m, "n": 200})
    for isa in records(spec)[:1]:
        first = case.run(isa, threads=1)
        for threads in (2, 3):
            same_bits(case.run(isa, threads=threads), first)


@pytest.mark.parametrize("spec", VARIANTS, ids=label)
def test_bits_of_a_row_do_not_depend_on_the_others(spec: Spec) -> None:
    k, segment = [(k, s) for k, s in cuts(spec) if s < k or spec.folded][-1]
    m, some = (TALL, (0, 7, 15)) if spec.method == "single" else (37, (0, 17, 36))
    for isa in records(spec, every=False):
        case = Case(spec, m=m, n=70, k=k, segment=segment)
        whole = case.run(isa)
        for row in some:
            names = ("x", "x_sums", "x_scales", "residual")
            rows = {name: getattr(case, name) for name in names}
            for name, each in rows.items():
                setattr(case, name, None if each is None else each[row : row + 1].copy())
            case.m = 1
            same_bits(case.run(isa), whole[row : row + 1], isa.name)
            case.m = m
            for name, each in rows.items():
                setattr(case, name, each)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("element", [INT4, INT3, NF4], ids=["int4", "int3", "nf4"])
def test_pairs_of_bfloat16_have_the_same_bits_in_every_layout(
    element: Element, method: str
) -> None:
    """And in tiles whenever they are decoded; the other families are held to the oracle."""
    rows, words = Spec("bf16", element, method), Spec("bf16", element, method, **WORDS)
    other = replace(rows, method="tiles" if method == "single" else method)
    for k, segment in ((256, 256), (300, 64)) if method != "single" else ((256, 256), (256, 64)):
        for isa in records(rows):
            wanted = Case(rows, m=13, n=40, k=k, segment=segment).run(isa)
            for spec in (words, other):
                same_bits(Case(spec, m=13, n=40, k=k, segment=segment).run(isa), wanted, isa.name)


@pytest.mark.parametrize("spec", VARIANTS, ids=label)
def test_what_scratch_held_before_does_not_matter(
    spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile finds NaN and -1 everywhere, and leaves alone what lies behind its scratch."""

    def run(entry: int, argument: int, tiles: int, scratch: int, threads: int | None) -> None:
        kinds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
        tile = ctypes.CFUNCTYPE(None, *kinds)(entry)
        for number in range(tiles):
            memory = np.full(scratch + 128, 0xFF, np.uint8)
            start = -address(memory) % 64
            tile(argument, number, address(memory) + start)
            assert (memory[start + scratch :] == 0xFF).all(), "written behind the scratch memory"
            assert (memory[:start] == 0xFF).all(), "written before the scratch memory"

    monkeypatch.setattr(pool, "run", run)
    for k, segment in cuts(spec)[-7:]:
        m = 13 if spec.method == "single" else 19
        Case(spec, m=m, n=70, k=k, segment=segment).check(records(spec, every=False))


# The two tiers.


@pytest.mark.parametrize(("inner", "method"), WAYS)
@settings(max_examples=15)
@given(st.data())
def test_exact_tier(inner: str, method: str, data: st.DataObject) -> None:
    """Every partial sum is representable, so any order gives the one right result."""
    spec = Spec(inner, INT4, method, **WORDS, x_scale=True)
    # |x| <= 4: the sum of 300 products with |w| <= 8 and scales in a window of 2**8 stays below
    # 2**24 units.
    case = Case(spec, **data.draw(shapes(spec)), exact=True)
    exact, size, _ = case.exactly()
    assert size.max(initial=0) < 2**24 / 16, "the operands are too dense to be exact"
    for isa in records(spec):
        same_bits(case.run(isa), exact.astype(np.float32) + np.float32(0), isa.name)


@pytest.mark.parametrize(("inner", "method"), WAYS)
def test_gamma_tier(inner: str, method: str) -> None:
    for spec in some(inner, method):
        for k, segment in cuts(spec)[-2:]:
            Case(spec, m=9, n=33, k=k, segment=segment).check_bound()

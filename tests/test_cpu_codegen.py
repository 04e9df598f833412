"""Compiled products equal their arithmetic in NumPy bit for bit, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats import codes as bitstream
from lowbit.formats.codebook import NF4
from lowbit.formats.declare import Element, codebook, floating, integer, power_of_two
from lowbit.kernels import layouts
from lowbit.kernels.cpu import gemm, oracle
from lowbit.kernels.cpu.isa import Isa, runnable

Array = npt.NDArray[Any]

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
SCALES = [power_of_two(), floating(4, 3, specials="fn"), *INTEGERS[7:8]]


def names(elements: list[Element]) -> list[str]:
    return [each.name for each in elements]


def address(a: Array) -> int:
    pointer: int = a.__array_interface__["data"][0]
    return pointer


def guarded(rows: int, columns: int, dtype: Any, spare: int = 5) -> tuple[Array, Array]:
    """A view with `spare` columns behind each row, and the whole; both full of a pattern."""
    whole = np.zeros((rows + 2, columns + spare), dtype)
    whole.view(np.uint8)[...] = 0xA5
    return whole[1 : rows + 1, :columns], whole


def spaced(a: Array) -> Array:
    """A copy whose rows lie apart."""
    view, _ = guarded(len(a), a.shape[1], a.dtype, 2)
    view[...] = a
    return view


@dataclass
class Case:
    """One product: random operands, what the oracle makes of them, and how to call a kernel."""

    spec: gemm.Spec
    m: int
    n: int
    k: int
    segment: int
    seed: int = 0
    every: int = 1  # segments of a scale of w
    x_every: int = 1
    block_rows: int = 1
    alpha: float = 1.0
    bias: bool = False
    exact: bool = False
    """Operands whose every partial sum is representable."""
    wild: bool = False
    """x has infinities, NaN, subnormal and huge numbers."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        element, m, n, k = self.spec.element, self.m, self.n, self.k
        self.segments = -(-k // self.segment)
        self.blocks = -(-self.segments // self.every)
        finite = [c for c, v in enumerate(element.values) if np.isfinite(v)]
        self.codes = rng.choice(np.array(finite, np.uint8), (n, k))
        grid = (-(-n // self.block_rows), self.blocks)
        self.scales = self._stored(rng, self.spec.scale, grid)
        self.zeros = self._zeros(rng, grid)
        self.biases = self._stored(rng, self.spec.scale, grid) if self.spec.biases else None
        self.x_scales = self._x_scales(rng)
        if self.spec.inner == "dot":
            self.x = rng.integers(-128, 128, (m, k)).astype(np.int8)
        elif self.exact:
            self.x = rng.integers(-4, 5, (m, k)).astype(np.float32)
        else:
            self.x = (rng.standard_normal((m, k)) * 2.0 ** rng.integers(-9, 9, k)).astype("f4")
        if self.wild:
            strange = np.array([np.inf, -np.inf, np.nan, 1e-40, -3e38, -0.0, 2.0**-149], np.float32)
            place = rng.random((m, k)) < 0.1
            self.x = np.where(place, rng.choice(strange, (m, k)), self.x).astype(np.float32)
        self.addend = rng.standard_normal(n).astype(np.float32) if self.bias else None
        self.residual: Array | None = None
        if self.spec.residual is not None:
            self.residual = rng.standard_normal((m, n)).astype(self.spec.residual)
        self.x_sums = np.zeros((m, self.segments), np.float32)
        if k and self.spec.inner == "fma":
            starts = np.arange(0, k, self.segment)
            with np.errstate(invalid="ignore", over="ignore"):
                self.x_sums = np.add.reduceat(self.x, starts, axis=1)

    def _stored(self, rng: np.random.Generator, kind: Element | str, grid: Any) -> Array:
        if isinstance(kind, Element):
            finite = [c for c, v in enumerate(kind.values) if 2.0**-30 < abs(v) < 2.0**30]
            return np.asarray(rng.choice(np.array(finite, np.uint8), grid))
        if self.exact:
            return np.asarray(2.0 ** rng.integers(-2, 3, grid), kind)
        return np.asarray(rng.standard_normal(grid) * 2.0 ** rng.integers(-6, 6, grid), kind)

    def _zeros(self, rng: np.random.Generator, grid: Any) -> Array | None:
        if self.spec.zero is None:
            return None
        if self.spec.zero in ("int8", "uint8"):
            low = -8 if self.spec.zero == "int8" else 0
            return np.asarray(rng.integers(low, low + 16, grid), self.spec.zero)
        return np.asarray(rng.standard_normal(grid) * 3, self.spec.zero)

    def _x_scales(self, rng: np.random.Generator) -> Array | None:
        if not self.spec.x_scale:
            return None
        grid = (self.m, -(-self.segments // self.x_every))
        return self._stored(rng, "float32", grid)

    def spread(self, blocks: Array, kind: Element | str) -> Array:
        """float32 [n, segments]."""
        if isinstance(kind, Element):
            blocks = np.array(kind.values, np.float32)[blocks]
        rows, columns = np.arange(self.n) // self.block_rows, np.arange(self.segments) // self.every
        return np.asarray(blocks, np.float32)[rows][:, columns]

    def values(self) -> Array:
        """float32 [n, k], without the zero points."""
        values = np.array(self.spec.element.values, np.float32)[self.codes]
        if self.zeros is not None:
            wide = self.spread(self.zeros, self.spec.zero or "").repeat(self.segment, 1)
            values = values - wide[:, : self.k]
        return np.asarray(values)

    def sums(self) -> Array:
        """float32 [m, n] before the epilogue."""
        scales = self.spread(self.scales, self.spec.scale)
        x_scales = None
        if self.x_scales is not None:
            x_scales = self.x_scales[:, np.arange(self.segments) // self.x_every]
        if self.spec.inner == "dot":
            return oracle.integer_products(
                self.x, self.values(), scales, self.segment, x_scales=x_scales
            )
        biases = None if self.biases is None else self.spread(self.biases, self.spec.scale)
        return oracle.products(
            self.x,
            self.values(),
            scales,
            self.segment,
            x_scales=x_scales,
            biases=biases,
            x_sums=self.x_sums,
        )

    def expected(self) -> Array:
        """The result, for specs without activation."""
        v = oracle.finish(self.sums(), self.alpha, self.addend)
        if self.residual is not None:
            v = v + self.residual.astype(np.float32)
        with np.errstate(over="ignore"):
            return v.astype(self.spec.out)

    def run(self, isa: Isa, threads: int | None = None) -> Array:
        """The kernel's result; everything around it must stay as it was."""
        spec, element = self.spec, self.spec.element
        packed, _ = guarded(self.n, -(-self.k * element.bits // 8), np.uint8, 3)
        packed[...] = bitstream.pack(self.codes, element.bits)
        blocks = {"scales": self.scales, "zeros": self.zeros, "biases": self.biases}
        held = {name: a for name, a in blocks.items() if a is not None}
        codes, stride = packed, self.blocks + 2
        if spec.layout == "words16":
            codes = layouts.words16(packed, element.bits)
        if spec.scale_layout == "panels16":
            held = {name: layouts.panels16(a) for name, a in held.items()}
        else:
            held = {name: spaced(a) for name, a in held.items()}
        extra: dict[str, Any] = {name: address(a) for name, a in held.items()}
        if spec.inner == "dot":
            arranged = gemm.arrange(self.x, element, isa, self.segment)
            x, sums = arranged
        else:
            x, _ = guarded(self.m, gemm.word_columns(element, self.k), np.float32)
            x[...] = 0
            x[:, : self.k] = self.x
            sums = self.x_sums
        extra |= {"x_sums": address(sums), "x_sums_stride": self.segments}
        if self.x_scales is not None:
            extra |= {
                "x_scales": address(self.x_scales),
                "x_scales_stride": self.x_scales.shape[1],
                "x_block_segments": self.x_every,
            }
        if self.addend is not None:
            extra["bias"] = address(self.addend)
        if self.residual is not None:
            extra |= {"residual": address(self.residual), "residual_stride": self.n}
        out, whole = guarded(self.m, self.n, spec.out)
        gemm.build(spec, isa)(
            m=self.m,
            n=self.n,
            k=self.k,
            segment=self.segment,
            x=address(x),
            x_stride=x.strides[0] // x.itemsize,
            codes=address(codes),
            codes_stride=packed.strides[0],
            scales_stride=stride,
            block_rows=self.block_rows,
            block_segments=self.every,
            out=address(out),
            out_stride=out.strides[0] // out.itemsize,
            alpha=self.alpha,
            threads=threads,
            **extra,
        )
        result = out.copy()
        out.view(np.uint8)[...] = 0xA5
        assert (whole.view(np.uint8) == 0xA5).all(), "written outside of the result"
        return result

    def check(self) -> None:
        expected = self.expected()
        for isa in runnable():
            same_bits(self.run(isa), expected, isa.name)


def same_bits(got: Array, expected: Array, note: str = "") -> None:
    __tracebackhide__ = True
    kind = f"u{got.itemsize}"
    same = (got.view(kind) == expected.view(kind)) | (np.isnan(got) & np.isnan(expected))
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        count = int((~same).sum())
        raise AssertionError(f"{note}: {count} differ, first {at}: {got[at]} for {expected[at]}")


sizes = st.one_of(st.integers(1, 40), st.sampled_from([16, 17, 33, 63, 64, 65, 130]))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def shapes(draw: st.DrawFn, element: Element) -> dict[str, Any]:
    """m, n, k and a segment: whole words, the last one short, or all of k."""
    step = gemm.codes_per_word(element)
    k = draw(st.integers(1, 300))
    segment = draw(st.sampled_from([step, 2 * step, 3 * step, 4 * step, 32 * step // 8 * 8, k]))
    if segment % step and segment < k:
        segment = k
    return {"m": draw(sizes), "n": draw(sizes), "k": k, "segment": segment, "seed": draw(seeds)}


@pytest.mark.parametrize("element", ELEMENTS, ids=names(ELEMENTS))
@settings(max_examples=12)
@given(st.data())
def test_products_of_every_element(element: Element, data: st.DataObject) -> None:
    wild = data.draw(st.booleans())
    Case(gemm.Spec("fma", element), **data.draw(shapes(element)), wild=wild).check()


@pytest.mark.parametrize("element", INTEGERS, ids=names(INTEGERS))
@settings(max_examples=12)
@given(st.data())
def test_integer_products_of_every_element(element: Element, data: st.DataObject) -> None:
    spec = gemm.Spec("dot", element, x_scale=True)
    Case(spec, **data.draw(shapes(element)), x_every=data.draw(st.integers(1, 3))).check()


INT4, UINT4, INT8, E4M3 = integer(4), integer(4, signed=False), integer(8), FLOATS[0]
WORDS: dict[str, Any] = {"layout": "words16", "scale_layout": "panels16"}
VARIANTS = [
    gemm.Spec("fma", INT4, **WORDS),
    gemm.Spec("fma", integer(1), "words16"),
    gemm.Spec("fma", integer(2), **WORDS, scale="float16", out="float16"),
    gemm.Spec("fma", UINT4, zero="uint8", scale="bfloat16", out="bfloat16"),
    gemm.Spec("fma", UINT4, **WORDS, zero="uint8", x_scale=True, residual="float32"),
    gemm.Spec("fma", UINT4, zero="float16", scale="float16", residual="float16", out="float16"),
    gemm.Spec("fma", UINT4, **WORDS, zero="float32", scale="float32"),
    gemm.Spec("fma", INT4, biases=True, scale="bfloat16", x_scale=True),
    gemm.Spec("fma", INT4, **WORDS, biases=True, scale="float16", residual="bfloat16"),
    gemm.Spec("fma", FLOATS[6], scale=SCALES[0]),
    gemm.Spec("fma", FLOATS[6], **WORDS, scale=SCALES[0]),
    gemm.Spec("fma", FLOATS[6], scale=SCALES[1], x_scale=True),
    gemm.Spec("fma", E4M3, **WORDS, scale=SCALES[1]),
    gemm.Spec("fma", E4M3, scale=SCALES[2], out="bfloat16", residual="bfloat16"),
    gemm.Spec("dot", INT8, **WORDS, x_scale=True, scale="float16"),
    gemm.Spec("dot", INT4, "words16", x_scale=True, residual="float32"),
    gemm.Spec("dot", UINT4, **WORDS, zero="uint8", x_scale=True, out="float16"),
    gemm.Spec("dot", UINT4, zero="int8", scale="bfloat16"),
    gemm.Spec("dot", integer(3, signed=False), zero="uint8", scale=SCALES[0], x_scale=True),
    gemm.Spec("dot", integer(8, signed=False), zero="uint8", x_scale=True, scale=SCALES[1]),
]


@pytest.mark.parametrize("spec", VARIANTS, ids=[str(i) for i in range(len(VARIANTS))])
@settings(max_examples=12)
@given(st.data())
def test_products_of_every_storage(spec: gemm.Spec, data: st.DataObject) -> None:
    rows = [1] if spec.scale_layout == "panels16" else [1, 5, 16, 128, 2**40]
    Case(
        spec,
        **data.draw(shapes(spec.element)),
        every=data.draw(st.sampled_from([1, 2, 3, 2**40])),
        x_every=data.draw(st.sampled_from([1, 2, 2**40])),
        block_rows=data.draw(st.sampled_from(rows)),
        alpha=data.draw(st.sampled_from([1.0, -0.37, 3e-20])),
        bias=data.draw(st.booleans()),
    ).check()


@pytest.mark.parametrize("inner", ["fma", "dot"])
@pytest.mark.parametrize("segment", [5000, 2048, 40])
def test_a_segment_may_be_longer_than_what_a_tile_packs(inner: str, segment: int) -> None:
    for element in (INT8, integer(3)):
        spec = gemm.Spec(inner, element, x_scale=inner == "dot")
        Case(spec, m=18, n=20, k=5000, segment=segment).check()


@pytest.mark.parametrize("inner", ["fma", "dot"])
def test_empty_axes(inner: str) -> None:
    for m, n, k in ((0, 5, 8), (3, 0, 8), (3, 5, 0)):
        case = Case(gemm.Spec(inner, INT4), m=m, n=n, k=k, segment=8, bias=True, alpha=2.0)
        case.check()


@settings(max_examples=25)
@given(st.data())
def test_bits_do_not_depend_on_threads(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(VARIANTS))
    case = Case(spec, **data.draw(shapes(spec.element)))
    first = case.run(runnable()[0], threads=1)
    for threads in (2, 3):
        same_bits(case.run(runnable()[0], threads=threads), first)


@pytest.mark.parametrize("spec", [VARIANTS[0], VARIANTS[3], VARIANTS[14]], ids=["0", "3", "14"])
def test_bits_of_a_row_do_not_depend_on_the_others(spec: gemm.Spec) -> None:
    for isa in runnable():
        case = Case(spec, m=37, n=70, k=200, segment=40)
        whole = case.run(isa)
        for row in (0, 17, 36):
            case.m = 1
            rows = {name: getattr(case, name) for name in ("x", "x_sums", "x_scales", "residual")}
            for name, each in rows.items():
                setattr(case, name, None if each is None else each[row : row + 1].copy())
            same_bits(case.run(isa), whole[row : row + 1], isa.name)
            for name, each in rows.items():
                setattr(case, name, each)
            case.m = 37


@pytest.mark.parametrize("inner", ["fma", "dot"])
@settings(max_examples=40)
@given(st.data())
def test_exact_tier(inner: str, data: st.DataObject) -> None:
    """Every partial sum is representable, so any order gives the one right result."""
    element = data.draw(st.sampled_from([INT4, INT8, integer(3), integer(1)]))
    spec = gemm.Spec(inner, element, x_scale=True)
    shape = data.draw(shapes(element))
    case = Case(spec, **shape, exact=True)
    if inner == "dot":
        # |x| <= 4 as for floats: the sum of 300 products with |w| <= 128 and scales in a window
        # of 2**8 stays below 2**24 units.
        case.x = (case.x % 9 - 4).astype(np.int8)
    else:
        case.x[:, np.random.default_rng(shape["seed"]).random(case.k) < 0.2] = 0
    width = case.segment
    scales = case.spread(case.scales, "float32").repeat(width, 1)[:, : case.k]
    assert case.x_scales is not None
    x_scales = case.x_scales.repeat(width, 1)[:, : case.k]
    exact = (case.x * x_scales.astype(float)) @ (case.values() * scales.astype(float)).T
    thin = np.abs(case.x * x_scales.astype(float)) @ np.abs(case.values() * scales).T
    assert thin.max(initial=0) < 2**24 / 16, "the operands are too dense to be exact"
    for isa in runnable():
        same_bits(case.run(isa), exact.astype(np.float32) + np.float32(0), isa.name)


@settings(max_examples=40)
@given(st.data())
def test_gamma_tier(data: st.DataObject) -> None:
    """|C - exact| <= gamma(n) sum |x| |w|, Higham (2nd ed.) 3.1 to 3.5.

    A product enters its group's sum by one of at most `segment` fma, the group enters the result
    by one of `segments` fma after the product of two scales, then alpha: no other rounding.
    """
    spec = data.draw(st.sampled_from([s for s in VARIANTS if not s.biases and s.out == "float32"]))
    case = Case(spec, **data.draw(shapes(spec.element)))
    case.residual = np.zeros((case.m, case.n), spec.residual) if spec.residual else None
    width = case.segment
    w = case.values().astype(float)
    w *= case.spread(case.scales, spec.scale).repeat(width, 1)[:, : case.k]
    x = case.x.astype(float)
    if case.x_scales is not None:
        x *= case.x_scales.repeat(case.segment, 1)[:, : case.k]
    count = case.segment + case.segments + 3
    gamma = count * 2.0**-24 / (1 - count * 2.0**-24)
    # 2**-149: each of the roundings may meet a subnormal number. The reference has its own error.
    own = 2 * case.k * 2.0**-53
    bound = (gamma + own) * (np.abs(x) @ np.abs(w).T) + count * (case.k + 1) * 2.0**-149
    assert (np.abs(case.run(runnable()[0]).astype(float) - x @ w.T) <= bound).all()

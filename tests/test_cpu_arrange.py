"""x is converted, ordered, padded, quantized and summed as the micro-kernels expect it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import lowbit as lb
from lowbit import dispatch, kernels
from lowbit.formats import codes as bitstream
from lowbit.formats import reference
from lowbit.formats.declare import Element, floating, integer
from lowbit.kernels.cpu import arrange, product
from lowbit.kernels.cpu.arrange import Arguments, Arrangement
from lowbit.kernels.cpu.cases import address, arranged, records
from lowbit.kernels.cpu.gemm import Units
from lowbit.kernels.cpu.isa import Isa, runnable
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.steps import Steps
from lowbit.testing import conformance, random_qarray

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INT3, INT4, INT7, INT8 = (integer(bits) for bits in (3, 4, 7, 8))
E2M1, E4M3 = floating(2, 1, specials="none"), floating(4, 3, specials="fn")
SPECS = {
    "fma": Spec("fma", INT4),
    "pairs": Spec("bf16", INT3, layout="words16"),
    "tiles of pairs": Spec("bf16", INT4, "tiles"),
    "dot8": Spec("dot", INT8),
    "dot7": Spec("dot", INT7, layout="words16"),
    "tiles": Spec("dot", INT4, "tiles"),
    "tiles7": Spec("dot", INT7, "tiles", layout="words16"),
}
FLOATS = ("float32", "float16", "bfloat16")
# k and the columns of a segment, in multiples of 32 codes but for the last one.
CUTS = ((1, 1), (33, 33), (130, 32), (200, 96), (300, 300), (640, 64), (1000, 160), (2048, 2048))


def sources(spec: Spec) -> list[Element | str]:
    if spec.inner == "dot":
        return ["int8", INT4, INT3]
    return [*FLOATS, INT4, E2M1, E4M3]


@dataclass
class Rows:
    """Some rows in memory, and the operands that they are."""

    stored: Array
    values: Array

    @classmethod
    def of(cls, source: Element | str, m: int, k: int) -> Rows:
        rng = np.random.default_rng(m + k)
        if isinstance(source, Element):
            finite = [c for c, v in enumerate(source.values) if np.isfinite(v)]
            codes = rng.choice(np.array(finite, np.uint8), (m, k))
            values = np.array(source.values, np.float32)[codes]
            return cls(bitstream.pack(codes, source.bits), values)
        if source == "int8":
            numbers = rng.integers(-128, 128, (m, k)).astype(np.int8)
        else:
            numbers = rng.standard_normal((m, k)).astype(source)
            numbers.ravel()[:: max(1, k // 3)] = 0
        return cls(numbers, numbers)


def run(
    spec: Spec, isa: Isa, source: Element | str, rows: Rows, k: int, segment: int, **more: Any
) -> tuple[Array, Array, Array]:
    """Operands, sums and everything that was written, by the compiled arrangement."""
    steps = Steps(spec, isa)
    units = Units.of(spec, steps, segment, k)
    m, tiled = len(rows.stored), spec.tiled
    chunks = units.total if tiled else -(-units.columns(steps) * arrange.SIZES[steps.x_type] // 64)
    tall = -(-m // 16) * 16 if tiled else m
    stride = 64 * chunks + (0 if tiled else 64)
    whole = np.full(tall * stride + 256, 0xA5, np.uint8)
    start = 64 + -address(whole) % 64
    sums = np.full((m, -(-k // segment)), -7, np.int32)
    quantized = "scales" in more
    each = Arrangement(source, steps.x_type, steps.order, quantized, tiled, spec.inner == "dot")
    fields = dict.fromkeys(Arguments._fields, 0) | {
        "x": address(rows.stored),
        "x_stride": rows.stored.strides[0],
        "k": k,
        "out": address(whole) + start,
        "out_stride": stride,
        "chunks": chunks,
        "tile": units.each * steps.count * 4,
        "segment": segment,
        "segments": sums.shape[1],
        "segment_tiles": units.segment,
        "padded": int(units.padded),
        "sums": address(sums),
        "sums_stride": sums.shape[1],
        "factor": 5,
        "largest": 0.0,
    }
    arrange.build(each, isa)(m, Arguments(**fields | more))
    out = whole[start : start + tall * stride].reshape(tall, stride).copy()
    whole[start : start + tall * stride] = 0xA5
    assert (whole == 0xA5).all(), "written outside of the operands"
    return out, sums, whole


def check(spec: Spec, isa: Isa, values: Array, out: Array, k: int, segment: int) -> None:
    """Operands where they belong, and zeros behind them; nothing else is written."""
    steps = Steps(spec, isa)
    units = Units.of(spec, steps, segment, k)
    m = len(values)
    wanted = arranged(values, steps, units, segment, len(out))
    if spec.tiled:
        width = 4 * units.each * steps.count
        pair = [a.reshape(-1, units.total, 16, 64)[..., :width] for a in (out, wanted)]
        got, wanted = (a.swapaxes(1, 2).reshape(len(out), -1) for a in pair)
        untouched = out.reshape(-1, units.total, 16, 64).swapaxes(1, 2).reshape(len(out), -1)[m:]
        assert (untouched == 0xA5).all(), "written into rows that x does not have"
    else:
        got = out[:, : wanted.shape[1]]
        rest = out[:, wanted.shape[1] :]
        chunks = -(-wanted.shape[1] // 64) * 64 - wanted.shape[1]
        assert (rest[:, :chunks] == 0).all(), "the last chunk is filled up with zeros"
        assert (rest[:, chunks:] == 0xA5).all(), "written behind a row"
    assert (got[:m] == wanted[:m]).all(), f"first at {np.argwhere(got[:m] != wanted[:m])[:1]}"


@pytest.mark.parametrize("spec", SPECS)
def test_operands_and_sums_stand_where_the_steps_want_them(spec: str) -> None:
    chosen = SPECS[spec]
    for source in sources(chosen):
        for k, segment in CUTS:
            rows = Rows.of(source, 21 if chosen.tiled else 3, k)
            for isa in records(chosen, every=False):
                out, sums, _ = run(chosen, isa, source, rows, k, segment)
                values = rows.values.astype(np.int8) if chosen.inner == "dot" else rows.values
                check(chosen, isa, values, out, k, segment)
                if chosen.inner == "dot":
                    starts = np.arange(0, k, segment)
                    exact = np.add.reduceat(rows.values.astype(np.int64), starts, axis=1)
                    assert (sums == 5 * exact).all()


@pytest.mark.parametrize("x_format", ["int8_row", "int8_g32", "int8_g96", "int4_row", "int3_g64"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_are_quantized_on_the_way(dtype: str, x_format: str) -> None:
    """Codes and scales are those of the reference, in every arrangement."""
    fmt = lb.format(x_format)
    block = fmt.scale.block[1]
    for spec in ("dot8", "tiles"):
        chosen = SPECS[spec]
        for k in (1, 96, 250):
            rows = Rows.of(dtype, 5, k)
            wanted = reference.quantize(fmt, rows.stored)
            codes = bitstream.decode(fmt.element, reference.element_codes(wanted))
            segment = block if block is not None and block < k else k
            for isa in records(chosen, every=False):
                blocks = -(-k // (block or k))
                scales, flag = np.zeros((5, blocks), np.float32), np.zeros(1, np.int64)
                more = {
                    "scales": address(scales),
                    "scales_stride": blocks,
                    "block": block or k,
                    "blocks": blocks,
                    "flag": address(flag),
                    "largest": fmt.element.max,
                }
                out, sums, _ = run(chosen, isa, dtype, rows, k, segment, **more)
                check(chosen, isa, codes.astype(np.int8), out, k, segment)
                conformance.same_bits(scales, wanted.scales)
                exact = np.add.reduceat(codes.astype(np.int64), np.arange(0, k, segment), axis=1)
                assert (sums == 5 * exact).all()
                assert not flag[0]


# The same through `lowbit.matmul`.

DOT = "matmul.cpu.dot"
W_FORMATS = ("int8_row", "int4_g32", "uint4_g64_asym", "int3_g32")
X_FORMATS = ("int8_row", "int8_g32", "int8_g96", "int4_row", "int4_g64")


def numbers(m: int, k: int, dtype: str) -> Array:
    x = np.random.default_rng(m + k).standard_normal((m, k))
    x[0] = 0  # a row of zeros has scale 1
    return x.astype(dtype)


WHERE = [(isa, dtype) for isa in runnable() for dtype in FLOATS if isa is runnable()[0]]
WHERE += [(isa, "float32") for isa in runnable()[1:]]


@pytest.mark.parametrize(("isa", "dtype"), WHERE, ids=[f"{isa.name}-{d}" for isa, d in WHERE])
def test_quantizing_inside_gives_the_bits_of_quantizing_first(
    isa: Isa, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "device", lambda: f"cpu:{isa.name}")
    for i, x_format in enumerate(X_FORMATS):
        w = random_qarray(W_FORMATS[i % 4], 33, 250)
        for m, each in ((1, w), (5, w.prepare()), (37, w)):
            x = numbers(m, 250, dtype)
            wanted = lb.matmul(lb.quantize(x, x_format), each.T, kernel=DOT, out_dtype="float32")
            got = lb.matmul(x, each.T, x_format=x_format, kernel=DOT, out_dtype="float32")
            conformance.same_bits(got, wanted)


@pytest.mark.parametrize(
    ("x_format", "fuses"),
    [("int8_row", True), ("int4_g32", True), ("int8_tensor", False), ("uint8_row_asym", False)],
)
def test_which_formats_are_quantized_inside(x_format: str, fuses: bool) -> None:
    assert product.fuses(lb.format(x_format)) == fuses
    x, w = numbers(3, 64, "float32"), random_qarray("int8_row", 5, 64)
    problem = lb.explain(x, w.T, x_format=x_format).problem
    (kernel,) = (each for each in kernels.registered() if each.name == DOT)
    assert kernel.fused is not None
    if fuses:
        assert kernel.fused(problem, "float32") is not None
        assert kernel.fused(problem, "float64") is None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (3, 129), (4, 77)])
def test_numbers_that_are_not_finite_are_named(dtype: str, number: float, at: Any) -> None:
    x, w = numbers(5, 130, dtype), random_qarray("int8_row", 17, 130)
    x[at] = number
    with pytest.raises(ValueError, match=r"not finite|NaN|infinit") as wanted:
        lb.quantize(x, "int8_row")
    with pytest.raises(ValueError, match=re.escape(str(wanted.value))):
        lb.matmul(x, w.T, x_format="int8_row", kernel=DOT)

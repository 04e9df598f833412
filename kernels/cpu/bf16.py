"""bfloat16 x times weights of any element: pairs multiplied and summed in float32.

Elements of up to 8 significant bits, integer zero points taken off, are bfloat16 numbers. Values of
other tables are rounded to bfloat16 first, which the error bound counts.

vdpbf16ps and tdpbf16ps round to nearest, and take subnormal numbers, in and out, for zero (Intel,
Architecture Instruction Set Extensions Programming Reference).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from lowbit.formats import Element, Format
from lowbit.formats.reference import Packed
from lowbit.kernels import layouts
from lowbit.kernels.cpu import costs, gemm, operands, product
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.steps import narrowed
from lowbit.kernels.declare import ACTIVATION_ERROR, Array, Bind, Kernel, Problem, Roundings, Run
from lowbit.kernels.segments import FINAL_ROUNDINGS, refuse_common, segment_of
from lowbit.kernels.words16 import Words16

_SMALLEST = 2.0**-126  # below it the instructions see zero
_LARGEST = float.fromhex("0x1.fep127")
_FOLDED = 64  # columns: scales of shorter groups are multiplied into w's numbers


def _spec(p: Problem) -> Spec:
    spec = operands.spec_of(p, "bf16")
    isa = operands.isa_of(p)
    # Tiles decode as fast for few rows, and have an order of their own: every m takes them.
    if isa.amx:
        return gemm.for_tiles(spec, isa, m=p.m, segment=segment_of(p), k=p.k)
    return spec


def _accepts(p: Problem) -> str | None:
    if not operands.isa_of(p).bf16:
        return "this machine does not multiply bfloat16"
    refusal = _refuse_x(p)
    if refusal is not None:
        return refusal
    if p.w.bias and p.w.tensor_scale:
        return f"multiplies block biases by the tensor scale, {p.w.name} does not mean that"
    if isinstance(p.w.zero, str):
        return f"float zero points do not leave bfloat16 numbers, {p.w.name} has them"
    if p.w.zero is not None and not p.w.element.integral:
        return f"zero points are taken off whole numbers only, got {p.w.name}"
    refusal = _refuse_differences(p.w)
    if refusal is not None:
        return refusal
    for value in p.w.element.values:
        if 0 < abs(value) < _SMALLEST or _LARGEST < abs(value) < math.inf:
            return f"{p.w.element.name} has {value:g}, which bfloat16 would lose"
    return refuse_common(p) or gemm.refuse(_spec(p), segment=segment_of(p), k=p.k)


def _refuse_x(p: Problem) -> str | None:
    if isinstance(p.x, str):
        return None if p.x == "bfloat16" else f"wants bfloat16 for x, got {p.x}"
    if p.x.bias:
        return f"reads x without block biases, {p.x.name} has them"
    if p.x.element.integral and p.w.element.integral:
        return "sums of whole numbers have to be exact, float32 sums are not"
    if isinstance(p.x.zero, str) or narrowed(p.x.element) is not p.x.element:
        return f"the values of {p.x.name} are no bfloat16 numbers"
    if any(0 < abs(v) < _SMALLEST for v in p.x.element.values):
        return f"{p.x.element.name} has values which the instruction would lose"
    return _refuse_differences(p.x)


def _refuse_differences(fmt: Format) -> str | None:
    if not isinstance(fmt.zero, Element):
        return None
    farthest = max(fmt.element.max - fmt.zero.min, fmt.zero.max - fmt.element.min)
    if farthest <= 256:
        return None
    return f"{fmt.name} has differences up to {farthest:g}, bfloat16 whole numbers to 256"


def _cost(p: Problem) -> float:
    spec, folded = _spec(p), _folded(p)
    if folded is not None:
        return costs.seconds(p, folded.inner, folded.method, p.k, folded=True)
    return costs.seconds(p, spec.inner, spec.method, segment_of(p))


def _build(p: Problem) -> Bind:
    scaled = product.bind(p, _spec(p), segment_of(p))
    spec = _folded(p)
    if spec is None:
        return scaled
    folded = product.bind(p, spec, p.k)
    lowest, highest = _range(p.w)

    def bind(w: Any) -> Run:
        scales = _scales(w)
        inside = lowest <= scales.min() and scales.max() <= highest
        return (folded if inside else scaled)(w)

    return bind


def _scales(w: Packed | Words16) -> Array:
    """Those of rows that there are; of missing rows a panel holds zero bytes."""
    if isinstance(w, Words16) and w.format.scale.block[0] == 1:
        return layouts.unpanel16(w.scales, w.shape[-2])
    return w.scales


def _folded(p: Problem) -> Spec | None:
    """Scales multiplied into w's numbers, where the products are bfloat16 numbers still.

    Groups shorter than a tile would else have their sums scaled after every other instruction.
    """
    isa, block = operands.isa_of(p), p.w.scale.block[1]
    short = block is not None and block < min(p.k, _FOLDED)
    whole = isinstance(p.x, str) or p.x.scale.block[1] is None
    if not isa.amx or not short or not whole or p.w.zero is not None or p.w.bias:
        return None
    lowest, highest = _range(p.w)
    if lowest > highest:
        return None
    assert block is not None
    spec = replace(_spec(p), method="direct", tile=0)
    spec = replace(spec, folded=block // gemm.granule(spec))
    return gemm.for_tiles(spec, isa, m=p.m, segment=p.k, k=p.k)


@lru_cache(maxsize=256)
def _range(fmt: Format) -> tuple[int, int]:
    """Lowest and highest code of a scale that keeps every value a normal bfloat16 number."""
    scale = fmt.scale.element
    if isinstance(scale, str):
        return 0, -1
    values = np.array([v for v in fmt.element.values if math.isfinite(v)], np.float32)
    finite = [c for c, v in enumerate(scale.values) if math.isfinite(v)]
    with np.errstate(over="ignore", under="ignore"):
        products = np.array(scale.values, np.float64)[finite, None] * values.astype(np.float64)
        narrow = products.astype(np.float32)
        exact = (narrow == products) & (narrow.view(np.uint32) & 0xFFFF == 0)
        normal = (products == 0) | (np.abs(products) >= _SMALLEST)
    good = [c for c, ok in zip(finite, (exact & normal).all(axis=1), strict=True) if ok]
    # Codes of magnitudes in between are good as well where the good ones have no gap.
    if not good or good != list(range(good[0], good[-1] + 1)):
        signed = [c for c in finite if c in set(good)]
        return (0, 255) if signed == finite else (0, -1)
    return good[0], good[-1]


def _roundings(p: Problem) -> Roundings:
    segment = segment_of(p)
    segments = -(-p.k // segment)
    # One rounding each column, and in a tile two more for joining its even and odd columns; then
    # one fma each segment, and as for fma.
    count = segment + 2 + segments * (1 + p.w.bias) + 1 + p.w.bias
    if _folded(p) is not None:
        count = max(count, p.k + 4)
    exact = narrowed(p.w.element) is p.w.element
    largest = max(abs(p.w.element.max), abs(p.w.element.min), 1.0)
    if p.w.zero is not None:
        largest += 256
    order = "pairs of bfloat16 in the instruction's order, then segments ascending by fma"
    return Roundings(
        "float32",
        count + FINAL_ROUNDINGS,
        order if exact else f"values rounded to bfloat16, then {order}",
        ACTIVATION_ERROR[p.activation],
        weight=0.0 if exact else 2.0**-8,
        flushed=_SMALLEST * largest,
    )


KERNELS = (
    Kernel(
        "matmul.cpu.bf16",
        "cpu",
        accepts=_accepts,
        cost=_cost,
        build=_build,
        roundings=_roundings,
        layouts=("rows", "words16"),
    ),
)

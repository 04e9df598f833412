"""Whole numbers times whole numbers on tensor cores: exact int32 sums, the bits of the CPU kernels.

sum = fma(x_scale, w_scale * float(segment), sum), segments ascending. Zero points of w are taken
off a segment as zero * (sum of x), exactly.
"""

from __future__ import annotations

from lowbit.formats import Element, Format
from lowbit.kernels.cuda import costs, emit, product
from lowbit.kernels.cuda.product import Spec
from lowbit.kernels.cuda.tiles import tile_for
from lowbit.kernels.declare import Bind, Kernel, Problem, Roundings
from lowbit.kernels.segments import integer_roundings, refuse_common, segment_of

_BLOCK = 32  # columns that lanes take together


def _segment(p: Problem) -> int | None:
    """Columns whose sum stays in int32 and meets one pair of scales; None where none do."""
    segment, most = segment_of(p), longest(p)
    if segment <= most:
        return segment if segment == p.k or segment % _BLOCK == 0 else None
    if segment == p.k:
        return most // (2 * _BLOCK) * (2 * _BLOCK)
    fitting = (
        segment // parts for parts in range(2, segment // _BLOCK + 1) if segment % parts == 0
    )
    return next((s for s in fitting if s <= most and s % _BLOCK == 0), None)


def longest(p: Problem) -> int:
    """Columns whose sums of x * w, of zero * x and of their difference surely fit in int32."""
    assert isinstance(p.x, Format)
    largest = max(abs(p.w.element.min), abs(p.w.element.max))
    if isinstance(p.w.zero, Element):
        largest += max(abs(p.w.zero.min), abs(p.w.zero.max))
    return int((2**31 - 1) // (largest * max(abs(p.x.element.min), abs(p.x.element.max))))


def _spec(p: Problem) -> Spec:
    assert isinstance(p.x, Format)
    segment = _segment(p)
    assert segment is not None
    return Spec(
        "integer",
        "Byte",
        p.x,
        p.w,
        tile_for(product.rows_of(p), p.w.element.bits, p.x.element.bits),
        product.run_of(segment, p.k),
        p.out,
        p.bias,
        p.activation,
        p.residual,
        partial_sums=segment >= p.k and p.w.zero is None,
    )


def _accepts(p: Problem) -> str | None:
    refusal = refuse_common(p) or product.refuse_sizes(p)
    if refusal is not None:
        return refusal
    if isinstance(p.x, str):
        return f"wants integer codes on both sides, x is {p.x}"
    if emit.whole(p.x.element) is not True or p.x.zero is not None or p.x.bias:
        return f"wants signed integers without zero point for x, got {p.x.name}"
    if emit.whole(p.w.element) is None or isinstance(p.w.zero, str) or p.w.bias:
        return f"wants integers with integer zero points for w, got {p.w.name}"
    if _segment(p) is None:
        return (
            f"scales must change at multiples of {_BLOCK} columns, they change every "
            f"{segment_of(p)}"
        )
    return None


def _cost(p: Problem) -> float:
    spec = _spec(p)
    return costs.seconds(p, spec, product.shares_of(p, spec))


def build(p: Problem) -> Bind:
    """Bind a product to weights."""
    segment = _segment(p)
    assert segment is not None
    return product.bind(p, _spec(p), segment)


def _roundings(p: Problem) -> Roundings:
    segment = _segment(p)
    assert segment is not None
    return integer_roundings(p, segment)


KERNELS = (
    Kernel(
        "matmul.cuda.integer",
        "cuda",
        accepts=_accepts,
        cost=_cost,
        build=build,
        roundings=_roundings,
    ),
)

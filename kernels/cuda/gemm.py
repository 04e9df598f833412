"""Float x times weights of any element on tensor cores, from one row of x to thousands.

Order of the sum: the tensor core's own over 16 columns, those ascending within a segment, segments
ascending by fma; where blocks share the columns, their sums ascending. A tensor core aligns its
products and the sum to the largest of them and cuts what lies below 2**-23 of it (Fasi, Higham,
Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021), so each of 17 terms loses at
most 2 u of the sum of their sizes.
"""

from __future__ import annotations

from lowbit.formats import Element, Format
from lowbit.kernels.cuda import costs, emit, product
from lowbit.kernels.cuda.product import Spec
from lowbit.kernels.cuda.tiles import tile_for
from lowbit.kernels.declare import ACTIVATION_ERROR, Bind, Kernel, Problem, Roundings
from lowbit.kernels.segments import FINAL_ROUNDINGS, refuse_common, segment_of

_BLOCK = 32  # columns that lanes take together
_TERMS = 16  # of one instruction
_LOST = 2.0**-125  # of a product, where three bfloat16 numbers leave a rest of x below 2**-133
_UNIT = {"Half": 2.0**-11, "Bfloat16": 2.0**-8}


def operand_of(p: Problem) -> str:
    """What tensor cores multiply: float16 where x is and w's numbers fit."""
    x_half = p.x == "float16" or (isinstance(p.x, Format) and emit.exact(p.x.element, "Half"))
    return "Half" if x_half and emit.fits(p.w.element, "Half") and not folded(p) else "Bfloat16"


def folded(p: Problem) -> bool:
    """Whether scales are multiplied into w's numbers, which are then rounded."""
    segment = segment_of(p)
    return p.w.bias or isinstance(p.w.zero, str) or (segment < p.k and segment % _BLOCK != 0)


def _rounded(p: Problem) -> bool:
    """Whether w's numbers are rounded on their way to the tensor cores."""
    if folded(p):
        return not emit.exact_scaled(p.w, "Bfloat16")
    return not emit.exact(p.w.element, operand_of(p))


def _segment(p: Problem) -> int:
    """Columns that are added up before scales meet the sum: x's alone, where w's are folded."""
    if not folded(p):
        return segment_of(p)
    width = p.x.scale.block[1] if isinstance(p.x, Format) else None
    return p.k if width is None else min(width, p.k)


def _spec(p: Problem) -> Spec:
    width = p.w.scale.block[1]
    x_octet = product.octet_bytes(p.x)
    return Spec(
        "folded" if folded(p) else "segments",
        operand_of(p),
        p.x,
        p.w,
        tile_for(product.rows_of(p), p.w.element.bits, x_octet),
        product.run_of(_segment(p), p.k),
        p.out,
        p.bias,
        p.activation,
        p.residual,
        octets=width is None or width >= p.k or width % 8 == 0,
    )


def refuse(p: Problem) -> str | None:
    """Why tensor cores do not compute a product, in words; None if they do."""
    refusal = refuse_common(p) or product.refuse_sizes(p)
    if refusal is not None:
        return refusal
    if isinstance(p.x, Format):
        refusal = _refuse_x(p)
        if refusal is not None:
            return refusal
    if p.w.bias and p.w.tensor_scale:
        return f"multiplies block biases by the tensor scale, {p.w.name} does not mean that"
    segment = _segment(p)
    if segment < p.k and segment % _BLOCK:
        return (
            f"scales of x must change at multiples of {_BLOCK} columns, they change every {segment}"
        )
    operand = operand_of(p)
    if not emit.fits(p.w.element, operand):
        return f"{p.w.element.name} has values that float16 and bfloat16 would lose"
    if p.x == "float32" and _rounded(p):
        return f"rounds the values of {p.w.name} to bfloat16, which float32 x deserves better than"
    if isinstance(p.w.zero, Element) and not folded(p):
        farthest = max(p.w.element.max - p.w.zero.min, p.w.zero.max - p.w.element.min)
        if farthest > (2048 if operand == "Half" else 256):
            return f"{p.w.name} has differences up to {farthest:g}, which {operand} numbers lose"
    return None


def _refuse_x(p: Problem) -> str | None:
    assert isinstance(p.x, Format)
    if p.x.bias or p.x.zero is not None:
        return f"reads x without zero points and block biases, {p.x.name} has them"
    if p.x.element.integral and p.w.element.integral:
        return "sums of whole numbers have to be exact, float32 sums are not"
    if not emit.exact(p.x.element, operand_of(p)):
        return f"the values of {p.x.name} are no numbers of tensor cores"
    return None


def _cost(p: Problem) -> float:
    spec = _spec(p)
    return costs.seconds(p, spec, product.shares_of(p, spec))


def build(p: Problem) -> Bind:
    """Bind a product to weights."""
    return product.bind(p, _spec(p), _segment(p))


def roundings(p: Problem, shares: int = 1) -> Roundings:
    """The arithmetic of a product whose columns at least so many blocks share."""
    spec, segment = _spec(p), min(_segment(p), p.k)
    segments, shares = -(-p.k // segment), max(shares, product.shares_of(p, spec))
    terms = 3 if p.x == "float32" else 2 if p.x == "float16" and spec.operand == "Bfloat16" else 1
    # Every instruction cuts 17 terms and their sum by 2 u of the sum of their sizes.
    count = 2 * (_TERMS + 2) * terms * (-(-segment // _TERMS) + 2)
    count += segments * 2 + shares + FINAL_ROUNDINGS
    return Roundings(
        "float32",
        count,
        "tensor cores over 16 columns, segments ascending by fma"
        + (f", {shares} shares of the columns ascending" if shares > 1 else ""),
        ACTIVATION_ERROR[p.activation],
        weight=_UNIT[spec.operand] * 1.01 if _rounded(p) else 0.0,
        flushed=_LOST if p.x == "float32" else 0.0,
    )


KERNELS = (
    Kernel(
        "matmul.cuda.mma",
        "cuda",
        accepts=refuse,
        cost=_cost,
        build=build,
        roundings=roundings,
    ),
)

"""int8 x times integer weights of up to 8 bits: exact int32 sums, scaled in float32."""

from __future__ import annotations

from lowbit.kernels.cpu import costs, gemm, operands, product
from lowbit.kernels.cpu.decode import consecutive
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.declare import Bind, FusedBind, Kernel, Problem, Roundings
from lowbit.kernels.layouts import WIDTHS, granule
from lowbit.kernels.segments import integer_roundings, refuse_common, segment_of


def _spec(p: Problem) -> Spec:
    spec = operands.spec_of(p, "dot")
    isa, segment = operands.isa_of(p), _segment(p)
    if isa.amx and p.m > operands.FEW and segment is not None:
        return gemm.for_tiles(spec, isa, m=p.m, segment=segment, k=p.k)
    return spec


def _segment(p: Problem) -> int | None:
    """Columns whose sum stays in int32 and meets one pair of scales; None where none fit.

    Longer runs between two changes of a scale are split evenly.
    """
    assert not isinstance(p.x, str)
    segment = segment_of(p)
    longest = gemm.longest_segment(p.x.element, p.w.element, operands.zero_kind(p.w))
    if segment <= longest:
        return segment
    packed = p.layout == "words16" or p.w.element.bits in WIDTHS
    step = granule(p.w.element.bits) if packed else 4
    if segment == p.k:
        return longest // step * step
    fitting = (segment // parts for parts in range(2, segment // step + 1) if segment % parts == 0)
    return next((s for s in fitting if s <= longest and s % step == 0), None)


def _accepts(p: Problem) -> str | None:
    if isinstance(p.x, str):
        return f"wants integer codes on both sides, x is {p.x}"
    if consecutive(p.x.element) != (True, 1.0) or p.x.zero is not None or p.x.bias:
        return f"wants signed integers without zero point for x, got {p.x.name}"
    if not p.w.element.integral or isinstance(p.w.zero, str) or p.w.bias:
        return f"wants integers with integer zero points for w, got {p.w.name}"
    refusal = refuse_common(p)
    if refusal is not None:
        return refusal
    segment = _segment(p)
    if segment is None:
        return f"sums of {segment_of(p)} products could overflow int32 and do not split"
    return gemm.refuse(_spec(p), segment=segment, k=p.k)


def _cost(p: Problem) -> float:
    spec, segment = _spec(p), _segment(p)
    assert segment is not None
    return costs.seconds(p, spec.inner, spec.method, segment)


def _build(p: Problem) -> Bind:
    segment = _segment(p)
    assert segment is not None
    return product.bind(p, _spec(p), segment)


def _fused(p: Problem, dtype: str) -> FusedBind | None:
    segment = _segment(p)
    assert segment is not None
    assert not isinstance(p.x, str)
    if not product.fuses(p.x) or dtype == "float64":
        return None
    return product.bind(p, _spec(p), segment, dtype)


def _roundings(p: Problem) -> Roundings:
    segment = _segment(p)
    assert segment is not None
    return integer_roundings(p, segment)


KERNELS = (
    Kernel(
        "matmul.cpu.dot",
        "cpu",
        accepts=_accepts,
        cost=_cost,
        build=_build,
        roundings=_roundings,
        layouts=("rows", "words16"),
        fused=_fused,
    ),
)

"""Float x of any kind times weights of any element: decode in registers, float32 FMA."""

from __future__ import annotations

from lowbit.formats import Format
from lowbit.kernels.cpu import costs, gemm, operands, product
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.declare import ACTIVATION_ERROR, Bind, Kernel, Problem, Roundings
from lowbit.kernels.segments import FINAL_ROUNDINGS, refuse_common, segment_of


def _spec(p: Problem) -> Spec:
    return operands.spec_of(p, "fma")


def _accepts(p: Problem) -> str | None:
    if isinstance(p.x, Format) and p.x.bias:
        return f"reads x without block biases, {p.x.name} has them"
    if p.w.bias and p.w.tensor_scale:
        return f"multiplies block biases by the tensor scale, {p.w.name} does not mean that"
    largest = _largest_integer(p)
    if largest > 2**24:
        return f"sums of whole numbers up to {largest:.3g} are not exact in float32"
    return refuse_common(p) or gemm.refuse(_spec(p), segment=segment_of(p), k=p.k)


def _largest_integer(p: Problem) -> float:
    """Magnitude that a segment's sum of whole numbers may reach; 0 where one side has fractions.

    Up to 2**24 the sum is exact in float32, and the bits are those of integer kernels.
    """
    ends = []
    for side in (p.x, p.w):
        if isinstance(side, str) or not side.element.integral or isinstance(side.zero, str):
            return 0.0
        low, high = side.element.min, side.element.max
        if side.zero is not None:
            low, high = low - side.zero.max, high - side.zero.min
        ends.append(max(abs(low), abs(high)))
    return segment_of(p) * ends[0] * ends[1]


def _cost(p: Problem) -> float:
    spec = _spec(p)
    return costs.seconds(p, spec.inner, spec.method, segment_of(p))


def _build(p: Problem) -> Bind:
    return product.bind(p, _spec(p), segment_of(p))


def _roundings(p: Problem) -> Roundings:
    segment = segment_of(p)
    segments = -(-p.k // segment)
    # One fma each column of a segment, then one each segment; a block bias takes another one.
    count = segment + segments * (1 + p.w.bias)
    # Float zero points, w_scale * g, and x_sum, which stands for x times the block bias.
    count += isinstance(p.w.zero, str) + p.w.bias
    if isinstance(p.x, Format):
        count += 1 + isinstance(p.x.zero, str)
    return Roundings(
        "float32",
        count + FINAL_ROUNDINGS,
        "k ascending by fma, then segments ascending by fma",
        ACTIVATION_ERROR[p.activation],
    )


KERNELS = (
    Kernel(
        "matmul.cpu.fma",
        "cpu",
        accepts=_accepts,
        cost=_cost,
        build=_build,
        roundings=_roundings,
        layouts=("rows", "words16"),
    ),
)

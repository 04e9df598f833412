"""int8 x times integer weights of up to 8 bits: exact int32 sums, scaled in float32."""

from __future__ import annotations

from typing import Any

from lowbit.formats import Format, codes, reference
from lowbit.kernels.cpu import gemm, operands
from lowbit.kernels.cpu.activation import ACTIVATION_ERROR
from lowbit.kernels.cpu.decode import consecutive
from lowbit.kernels.declare import Array, Bind, Epilogue, Kernel, Problem, Roundings, Run


def _spec(p: Problem) -> gemm.Spec:
    fmt = p.w
    panels = p.layout == "words16" and fmt.scale.block[0] == 1
    return gemm.Spec(
        inner="dot",
        element=fmt.element,
        layout=p.layout,
        scale=operands.scale_kind(fmt),
        scale_layout="panels16" if panels else "rows",
        zero=operands.zero_kind(fmt),
        x_scale=True,
        activation=p.activation,
        out=p.out,
        residual=p.residual,
    )


def _segment(p: Problem) -> int | None:
    """Columns whose sum stays in int32 and meets one pair of scales; None where none fit.

    Longer runs between two changes of a scale are split evenly.
    """
    assert isinstance(p.x, Format)
    segment = operands.segment_of(p)
    longest = gemm.longest_segment(p.x.element, p.w.element, operands.zero_kind(p.w))
    if segment <= longest:
        return segment
    step = gemm.codes_per_word(p.w.element)
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
    refusal = operands.refuse_common(p)
    if refusal is not None:
        return refusal
    segment = _segment(p)
    if segment is None:
        return f"sums of {operands.segment_of(p)} products could overflow int32 and do not split"
    return gemm.refuse(_spec(p), segment=segment, k=p.k)


def _cost(p: Problem) -> float:
    lanes = operands.isa_of(p).lanes
    rate = 4 * 1.5e9 * lanes * min(p.threads, 64)
    return 12e-6 + operands.packing_seconds(p) + p.m * p.n * p.k / rate + 4e-9 * p.m * p.k


def _build(p: Problem) -> Bind:
    spec, isa = _spec(p), operands.isa_of(p)
    gemm_of = gemm.build(spec, isa)
    segment = _segment(p)
    assert isinstance(p.x, Format)
    assert segment is not None
    x_blocks = operands.blocks_of(p.x.scale.block[1], segment, p.k)

    def bind(w: Any) -> Run:
        call = gemm_of.bind(
            m=p.m,
            n=p.n,
            k=p.k,
            segment=segment,
            x_block_segments=x_blocks,
            **operands.weight_arguments(w, segment),
        )

        def run(x: Any, epilogue: Epilogue, out: Array) -> None:
            arranged = gemm.arrange(_int8(x), spec.element, isa, segment)
            scales = operands.x_blocks(x)
            call(
                x=operands.address(arranged.x),
                x_stride=arranged.x.shape[-1],
                x_sums=operands.address(arranged.sums),
                x_sums_stride=arranged.sums.shape[-1],
                x_scales=operands.address(scales),
                x_scales_stride=scales.shape[1],
                **operands.output_arguments(epilogue, out, operands.second_level(x, w)),
            )

        return run

    return bind


def _int8(x: reference.Packed) -> Array:
    """Codes as int8 numbers, one a byte."""
    if x.format.element.bits == 8:
        return x.codes.view("int8")
    return codes.decode(x.format.element, reference.element_codes(x)).astype("int8")


def _roundings(p: Problem) -> Roundings:
    segment = _segment(p)
    assert segment is not None
    # int32 to float32, w_scale * that, one fma each segment.
    return Roundings(
        "float32",
        2 + -(-p.k // segment) + operands.FINAL_ROUNDINGS,
        "exact integer sums, then segments ascending by fma",
        ACTIVATION_ERROR[p.activation],
    )


KERNELS = (
    Kernel(
        "matmul.cpu.dot",
        "cpu",
        accepts=_accepts,
        cost=_cost,
        build=_build,
        roundings=_roundings,
        layouts=("rows", "words16"),
    ),
)

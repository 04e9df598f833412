"""Float x of any kind times weights of any element: decode in registers, float32 FMA."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.formats import Format
from lowbit.kernels.cpu import gemm, operands
from lowbit.kernels.declare import Array, Epilogue, Kernel, Problem, Roundings, Run


def _spec(p: Problem) -> gemm.Spec:
    fmt = p.w
    panels = p.layout == "words16" and fmt.scale.block[0] == 1
    return gemm.Spec(
        inner="fma",
        element=fmt.element,
        layout=p.layout,
        scale=operands.scale_kind(fmt),
        scale_layout="panels16" if panels else "rows",
        zero=operands.zero_kind(fmt),
        biases=fmt.bias,
        x_scale=isinstance(p.x, Format),
        activation=p.activation,
        out=p.out,
        residual=p.residual,
    )


def _accepts(p: Problem) -> str | None:
    if isinstance(p.x, Format) and p.x.bias:
        return f"reads x without block biases, {p.x.name} has them"
    return operands.refuse_common(p) or gemm.refuse(
        _spec(p), segment=operands.segment_of(p), k=p.k
    )


def _cost(p: Problem) -> float:
    # Estimated on 2 Zen 4 cores: repacking a canonical weight, then lanes per cycle.
    lanes = operands.isa_of(p).lanes
    rate = 2.5e9 * lanes * min(p.threads, 64)
    packing = 0.4e-9 * p.n * p.k / p.threads if p.layout == "rows" else 0.0
    return 8e-6 + packing + p.m * p.n * p.k / rate


def _build(p: Problem) -> Run:
    spec = _spec(p)
    call = gemm.build(spec, operands.isa_of(p))
    segment = operands.segment_of(p)
    width = gemm.word_columns(spec.element, p.k)
    quantized = isinstance(p.x, Format)
    x_blocks = operands.blocks_of(p.x.scale.block[1], segment, p.k) if quantized else 1
    m, n, k = p.m, p.n, p.k

    def run(x: Any, w: Any, epilogue: Epilogue, out: Array) -> None:
        arguments = operands.weight_arguments(w, segment)
        if quantized:
            rows, scales = operands.x_values(x, width), operands.x_blocks(x)
            arguments["x_scales"] = operands.address(scales)
            arguments["x_scales_stride"] = scales.shape[1]
            arguments["x_block_segments"] = x_blocks
        else:
            rows = operands.padded(x, width)
        if w.biases is not None:
            sums = _sums(rows, segment)
            arguments["x_sums"] = operands.address(sums)
            arguments["x_sums_stride"] = sums.shape[1]
        arguments |= operands.output_arguments(epilogue, out, operands.second_level(x, w))
        call(
            m=m, n=n, k=k, segment=segment,
            x=operands.address(rows), x_stride=rows.strides[0] // 4,
            **arguments,
        )

    return run


def _sums(rows: Array, segment: int) -> Array:
    """float32 sums of x over each segment, added up in float64."""
    starts = np.arange(0, rows.shape[1], segment)
    return np.add.reduceat(rows.astype(np.float64), starts, axis=1).astype(np.float32)


def _roundings(p: Problem) -> Roundings:
    segment = operands.segment_of(p)
    segments = -(-p.k // segment)
    # fma over the segment, fma of the scale over the segments, x's scale, alpha, tensor scales.
    extra = (p.w.zero is not None) + 2 * isinstance(p.x, Format) + 3 + 2 * p.w.bias
    return Roundings(
        "float32", segment + segments + extra, "k ascending by fma, then segments ascending by fma"
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

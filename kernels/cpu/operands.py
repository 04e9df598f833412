"""Operands as the generated code wants them: addresses, strides, padded rows of x."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowbit.formats import Element, Format, codes, reference, scaling
from lowbit.formats.reference import Packed
from lowbit.kernels.cpu import isa as isas
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.pool import address
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.declare import Array, Epilogue, Problem
from lowbit.kernels.segments import blocks_of
from lowbit.kernels.words16 import Words16

FLOAT32 = np.dtype(np.float32)
LARGEST = float(np.finfo(np.float32).max)
FEW = 4
"""Rows of x for which codes are decoded in registers, again for every such few rows."""


def isa_of(problem: Problem) -> Isa:
    """The instruction set that the problem's device names."""
    name = problem.device.partition(":")[2]
    return next(isa for isa in isas.RECORDS if isa.name == name)


def scale_kind(fmt: Format) -> Element | str:
    """How the scales are stored."""
    return fmt.scale.element


def zero_kind(fmt: Format) -> str | None:
    """How the zero points are stored."""
    return None if fmt.zero is None else reference.zero_dtype(fmt).name


def spec_of(p: Problem, inner: str) -> Spec:
    """The class of products that this one belongs to, without AMX's tiles."""
    fmt = p.w
    panels = p.layout == "words16" and fmt.scale.block[0] == 1
    return Spec(
        inner=inner,
        method="direct" if p.m <= FEW else "decoded",
        element=fmt.element,
        layout=p.layout,
        scale=scale_kind(fmt),
        scale_layout="panels16" if panels else "rows",
        zero=zero_kind(fmt),
        biases=fmt.bias,
        x_scale=isinstance(p.x, Format),
        activation=p.activation,
        out=p.out,
        residual=p.residual,
    )


def weight_arguments(w: Packed | Words16, segment: int) -> dict[str, int]:
    """Addresses and strides of w's parts."""
    rows, columns = w.format.scale.block
    k = w.shape[-1]
    found = {
        "codes": address(w.codes),
        "codes_stride": w.codes.strides[0] if isinstance(w, Packed) else 0,
        "scales": address(w.scales),
        "scales_stride": w.scales.strides[0] // w.scales.itemsize,
        "block_rows": w.shape[-2] if rows is None else rows,
        "block_segments": blocks_of(columns, segment, k),
    }
    if w.zeros is not None:
        found["zeros"] = address(w.zeros)
    if w.biases is not None:
        found["biases"] = address(w.biases)
    return found


def x_blocks(x: Packed, rows: int) -> Array:
    """float32 (rows, blocks): the scales of x, one row of them for each row, then anything."""
    scales = scaling.decode_scales(x.format, x.scales)
    m = x.shape[-2]
    spread = reference.spread(scales, (x.format.scale.block[0], 1), (m, scales.shape[-1]))
    if rows == m:
        return np.ascontiguousarray(spread, FLOAT32)
    padded = np.zeros((rows, scales.shape[-1]), FLOAT32)
    padded[:m] = spread
    return padded


def x_values(x: Packed) -> Array:
    """float32 (M, K): codes of x decoded, zero points taken off."""
    values = codes.decode(x.format.element, reference.element_codes(x))
    if x.zeros is not None:
        values -= reference.spread(x.zeros.astype(FLOAT32), x.format.scale.block, x.matrix)
    return values


def second_level(*operands: Any) -> float:
    """Product of the tensor scales."""
    factor = 1.0
    for operand in operands:
        if getattr(operand, "tensor_scale", None) is not None:
            factor *= float(operand.tensor_scale)
    return factor


def single(number: float) -> float:
    """The number, or infinity where it is beyond float32."""
    return number if abs(number) <= LARGEST else math.copysign(math.inf, number)


def output_arguments(epilogue: Epilogue, out: Array, scale: float) -> dict[str, Any]:
    """Where the result goes and what happens to it on the way."""
    found: dict[str, Any] = {
        "out": address(out),
        "out_stride": out.strides[0] // out.itemsize,
        "alpha": single(epilogue.alpha * scale),
    }
    if epilogue.bias is not None:
        found["bias"] = address(epilogue.bias)
    if epilogue.residual is not None:
        found["residual"] = address(epilogue.residual)
        found["residual_stride"] = epilogue.residual.strides[0] // epilogue.residual.itemsize
    return found

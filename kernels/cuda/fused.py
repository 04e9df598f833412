"""Layers that end in a quantization, in one pass over memory.

The results are those of `quantize` after the layer, as `kernels.layers` defines it, bit for bit, so
that fusing changes nothing. Only silu may differ, by `kernels.declare.ACTIVATION_ERROR` at most.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from lowbit.formats import reference, scaling
from lowbit.formats.declare import Format
from lowbit.formats.reference import Packed
from lowbit.kernels import layers
from lowbit.kernels.cuda import emit_quantize, launch
from lowbit.kernels.cuda.emit_quantize import NUMBERS, Spec
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cuda.quantize import (
    GROUP,
    Pending,
    Reading,
    alignment,
    log2,
    plan,
    run_once,
)

Array = Any


def refuse(fmt: Format, x: Array, kind: str = "rmsnorm") -> str | None:
    """Why `silu_mul` or `rmsnorm` is not fused with a format, in words; None if it is.

    What is refused takes two steps: the layer, then `quantize`.
    """
    columns = x.shape[-1]
    tall, wide = fmt.scale.block
    wide = min(wide or columns, columns)
    if x.dtype.name not in NUMBERS:
        return f"{x.dtype.name} data are worked on in float64"
    if fmt.tensor_scale or tall != 1:
        return f"{fmt.name} shares a scale between rows, which are read one at a time"
    if x.strides[-1] != x.itemsize:
        return "columns of x lie apart"
    if kind == "silu_mul":
        chosen = plan((1, wide), (1, columns), x.itemsize)
        if chosen is None or (chosen.threads > 256 and emit_quantize.searched(fmt.element)):
            return f"no thread block holds a group of {wide} columns"
        return None
    held = layers.tile(columns)
    if held not in layers.TILES or 8 * x.itemsize * math.prod(held) > 1 << 16:
        return f"no thread block holds a row of {columns} columns"
    if wide < columns and (wide % 8 or wide > GROUP or (wide // 8) & (wide // 8 - 1)):
        return f"groups of {wide} columns are not 8, 16, 32 ... {GROUP}"
    return None


def silu_mul_quantize(gate: Array, up: Array, fmt: Format) -> Pending:
    """Launch what quantizes silu(gate) * up; nothing waits.

    `gate` and `up` have the same shape and dtype, columns next to each other and rows a fixed
    distance apart: the halves of one array, for instance. Not finite numbers among them, or among
    the products, set the flag.
    """
    machine = launch.machine_of(gate)
    spec = emit_quantize.spec(fmt)
    parts, flat, flag = _parts(machine, fmt, gate.shape)
    if gate.size:
        x, y = rows_of(gate, "gate"), rows_of(up, "up")
        columns = gate.shape[-1]
        block = 1, min(fmt.scale.block[1] or columns, columns)
        chosen = plan(block, x.shape, x.itemsize)
        assert chosen is not None
        align = min(alignment(machine, x), alignment(machine, y))
        steps = np.int64(x.strides[0]), np.int64(y.strides[0]), np.int64(x.itemsize)
        kind = f"SiluMul<lb::quant::{NUMBERS[x.dtype.name]}>"
        reading = Reading(kind, (x, y, *steps, np.int32(align)))
        run_once(machine, spec, chosen, reading, flat, block, flag)
    return Pending(parts, flag)


def rmsnorm_quantize(
    x: Array,
    weight: Array,
    eps: float,
    fmt: Format,
    residual: Array | None = None,
    updated: Array | None = None,
) -> tuple[Pending, Array | None]:
    """Launch what normalizes rows and quantizes them; nothing waits.

    `x`, and `residual` if there is one, have columns next to each other and rows a fixed distance
    apart; `weight` is one row without gaps, of any of their dtypes. x + residual is written to
    `updated`, if that is given: C-contiguous memory of x's shape and dtype.

    Returns
    -------
    Pending, array or None
        The parts, and x + residual of x's dtype.
    """
    machine = launch.machine_of(x)
    spec = emit_quantize.spec(fmt)
    parts, flat, flag = _parts(machine, fmt, x.shape)
    if residual is not None and updated is None:
        updated = machine.empty(x.shape, x.dtype)
    if not x.size:
        return Pending(parts, flag), updated
    rows = rows_of(x, "x")
    other = rows if residual is None else rows_of(residual, "residual")
    written = rows_of(flat.codes if updated is None else updated, "residual")
    columns = x.shape[-1]
    wide = min(fmt.scale.block[1] or columns, columns)
    across = -(-columns // wide)
    absent = flat.scales
    kernel = _rmsnorm(
        spec, x.dtype.name, weight.dtype.name, columns, residual is not None, across > 1
    )
    arguments = (
        *_described(machine, rows), *_described(machine, other), *_described(machine, written),
        weight, np.int32(alignment(machine, weight[None])), np.float32(eps),
        *_described(machine, flat.codes), flat.scales,
        absent if flat.zeros is None else flat.zeros,
        absent if flat.biases is None else flat.biases, flag,
        np.int32(columns), np.int64(across), np.int32(log2(-(-wide // 8))),
    )  # fmt: skip
    machine.function(kernel)((rows.shape[0],), (kernel.threads,), arguments)
    return Pending(parts, flag), updated


@cache
def _rmsnorm(
    spec: Spec, x: str, weight: str, columns: int, residual: bool, grouped: bool
) -> Source:
    threads, held = layers.tile(columns)
    words = ["true" if word else "false" for word in (residual, grouped)]
    arguments = ", ".join(
        [spec.name, f"lb::quant::{NUMBERS[x]}", f"lb::quant::{NUMBERS[weight]}",
         str(threads), str(held), *words]
    )  # fmt: skip
    return emit_quantize.source("fused.cuh", spec, "rmsnorm_rows", arguments, threads)


def _parts(machine: Machine, fmt: Format, shape: tuple[int, ...]) -> tuple[Packed, Packed, Array]:
    """The parts, the same as one matrix, and the flag."""
    lead, columns = shape[:-1], shape[-1]
    across = fmt.grid((1, columns))[1]
    kept = scaling.scale_dtype(fmt)
    zero = None if fmt.zero is None else reference.zero_dtype(fmt)
    codes_ = machine.empty((*lead, fmt.row_bytes(columns)), np.uint8)
    scales = machine.empty((*lead, across), kept)
    zeros = None if zero is None else machine.empty((*lead, across), zero)
    biases = machine.empty((*lead, across), kept) if fmt.bias else None
    parts = Packed(fmt, shape, codes_, scales, zeros, biases)
    rows = math.prod(lead)

    def flattened(part: Array) -> Array:
        return part if part is None else part.reshape(rows, part.shape[-1])

    held = [flattened(part) for part in (codes_, scales, zeros, biases)]
    flat = Packed(fmt, (rows, columns), *held)
    return parts, flat, machine.zeros((1,), np.uint32)


def in_rows(x: Array) -> bool:
    """Whether columns lie next to each other, and all rows a fixed distance apart."""
    return x.strides[-1] == x.itemsize and _even(x)


def rows_of(x: Array, argument: str) -> Array:
    """All rows as one matrix, a view; a ValueError where they do not lie a fixed distance apart."""
    if x.ndim == 2:
        return x
    if not _even(x):
        raise ValueError(
            f"{argument}: rows of shape {x.shape} and strides {x.strides} do not lie a fixed "
            "distance apart; copy it first"
        )
    return x.reshape(-1, x.shape[-1])


def _even(x: Array) -> bool:
    steps = [(x.shape[i], x.strides[i]) for i in range(x.ndim - 1) if x.shape[i] != 1]
    return all(outer == step * length for (_, outer), (length, step) in pairwise(steps))


def _described(machine: Machine, rows: Array) -> tuple[Any, ...]:
    return rows, np.int64(rows.strides[0]), np.int32(alignment(machine, rows))

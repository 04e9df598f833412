"""Layers that end in a quantization, in one pass over memory.

The results are those of `quantize` after the layer, bit for bit, so that fusing changes nothing. A
step is rounded to x's dtype where separate layers would write it, as vLLM and Hugging Face do::

    silu_mul    y = T(T(silu(gate)) * up)
    rmsnorm     h = T(x + residual)          y = T(T(h / sqrt(mean(h^2) + eps)) * weight)

T rounds to x's dtype; everything between is float32. `silu_mul` and `rmsnorm` below are these
formulas in NumPy. silu is wrong by `kernels.declare.ACTIVATION_ERROR` at most; the sum of squares
has the order of `sum_of_squares`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from lowbit.formats import codes, reference, scaling
from lowbit.formats.declare import Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import emit_quantize, launch
from lowbit.kernels.cuda.emit_quantize import NUMBERS, Spec
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cuda.quantize import (
    GROUP,
    TILES,
    Pending,
    Reading,
    alignment,
    log2,
    plan,
    run_once,
)

Array = Any


# What they mean, in NumPy.


def silu_mul(gate: Array, up: Array) -> Array:
    """silu(gate) * up with silu in float64: the kernel's may differ by its error bound."""
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        rounded = codes.rounded(wide / (1 + np.exp(-wide)), gate.dtype)
        product = rounded.astype(np.float32) * up.astype(np.float32)
    return codes.rounded(product, gate.dtype)


def rmsnorm(
    x: Array, weight: Array, eps: float, residual: Array | None = None
) -> tuple[Array, Array]:
    """The normalized rows and the updated residual, with the kernel's own order of the sum."""
    if residual is not None:
        total = x.astype(np.float32) + residual.astype(np.float32)
        x = codes.rounded(total, x.dtype)
    wide = x.astype(np.float32)
    mean = sum_of_squares(wide) / np.float32(x.shape[-1])
    factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
    normal = codes.rounded(wide * factor[..., None], x.dtype).astype(np.float32)
    return codes.rounded(normal * weight.astype(np.float32), x.dtype), x


def sum_of_squares(x: Array) -> Array:
    """Of float32 rows: fma along a thread's octets, then a tree over lanes, then warps in order."""
    threads, held = _tile(x.shape[-1])
    padded = np.zeros((*x.shape[:-1], held * threads * 8), np.float32)
    padded[..., : x.shape[-1]] = x
    parts = padded.reshape(*x.shape[:-1], held, threads, 8)
    sums = np.zeros((*x.shape[:-1], threads), np.float32)
    for h in range(held):
        for i in range(8):
            sums = _fma(parts[..., h, :, i], sums)
    lanes = sums.reshape(*x.shape[:-1], threads // 32, 32)
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[..., np.arange(32) ^ distance]
    total = lanes[..., 0, 0]
    for warp in range(1, threads // 32):
        total = total + lanes[..., warp, 0]
    return total


def _fma(x: Array, total: Array) -> Array:
    """x * x + total in float32, rounded once: the float64 sum is rounded to odd before."""
    product, addend = x.astype(np.float64) ** 2, total.astype(np.float64)
    near = product + addend
    back = near - product
    lost = (product - (near - back)) + (addend - back)  # exact: Knuth's sum of two
    toward = np.nextafter(near, np.where(lost > 0, np.inf, -np.inf))
    even = near.view(np.int64) % 2 == 0
    return np.where((lost != 0) & even, toward, near).astype(np.float32)


# Launches.


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
    if _tile(columns) not in TILES or 8 * x.itemsize * math.prod(_tile(columns)) > 1 << 16:
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
    x: Array, weight: Array, eps: float, fmt: Format, residual: Array | None = None
) -> tuple[Pending, Array | None]:
    """Launch what normalizes rows and quantizes them; nothing waits.

    `x`, and `residual` if there is one, have columns next to each other and rows a fixed distance
    apart; `weight` is one row of any float dtype.

    Returns
    -------
    Pending, array or None
        The parts, and x + residual of x's dtype.
    """
    machine = launch.machine_of(x)
    spec = emit_quantize.spec(fmt)
    parts, flat, flag = _parts(machine, fmt, x.shape)
    updated = None if residual is None else machine.empty(x.shape, x.dtype)
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
    threads, held = _tile(columns)
    words = ["true" if word else "false" for word in (residual, grouped)]
    arguments = ", ".join(
        [spec.name, f"lb::quant::{NUMBERS[x]}", f"lb::quant::{NUMBERS[weight]}",
         str(threads), str(held), *words]
    )  # fmt: skip
    return emit_quantize.source("fused.cuh", spec, "rmsnorm_rows", arguments, threads)


def _tile(columns: int) -> tuple[int, int]:
    """Threads and octets a thread for a row; beyond all of TILES where nothing holds it."""
    fits = (tile for tile in TILES if -(-columns // 8) <= math.prod(tile))
    return next(fits, (1024, -(-columns // (8 * 1024))))


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


def rows_of(x: Array, argument: str) -> Array:
    """All rows as one matrix, a view; a ValueError where they do not lie a fixed distance apart."""
    if x.ndim == 2:
        return x
    steps = x.strides[:-1]
    even = all(
        x.shape[i] == 1 or steps[i] == steps[i + 1] * x.shape[i + 1] for i in range(x.ndim - 2)
    )
    if not even:
        raise ValueError(
            f"{argument}: rows of shape {x.shape} and strides {x.strides} do not lie a fixed "
            "distance apart; copy it first"
        )
    return x.reshape(-1, x.shape[-1])


def _described(machine: Machine, rows: Array) -> tuple[Any, ...]:
    return rows, np.int64(rows.strides[0]), np.int32(alignment(machine, rows))

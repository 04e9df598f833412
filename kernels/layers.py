"""Layers that end in a quantization, by definition: what kernels of every backend compute.

A step is rounded to x's dtype where separate layers would write it, as vLLM and Hugging Face do::

    silu_mul    y = T(T(silu(gate)) * up)
    rmsnorm     h = T(x + residual)          y = T(T(h / sqrt(mean(h^2) + eps)) * weight)

T rounds to x's dtype; everything between is float32, or float64 for float64 x. silu itself is
float64 here; a kernel's may be wrong by `kernels.declare.ACTIVATION_ERROR`. The sum of squares has
the order of `sum_of_squares`, so that a row has the same bits everywhere.
"""

from __future__ import annotations

import math

import numpy as np

from lowbit.formats.codes import rounded
from lowbit.formats.reference import arithmetic
from lowbit.kernels.declare import Array

# Threads of a row and octets a thread, for rows of up to 2048 ... 32768 columns. They decide the
# order of the sum, and so the bits: of longer rows 1024 threads, with as many octets as it takes.
TILES = ((128, 2), (256, 4), (256, 8), (512, 8))
_WARP = 32
_NORMAL = 2.0**-125  # from here on float32 has all of its 24 bits


def silu_mul(gate: Array, up: Array) -> Array:
    """silu(gate) * up, silu in float64."""
    dtype, between = gate.dtype.newbyteorder("="), arithmetic(gate)
    with np.errstate(all="ignore"):
        wide = gate.astype(np.float64)
        silu = rounded(wide / (1 + np.exp(-wide)), dtype).astype(between)
        return rounded(silu * up.astype(between), dtype)


def rmsnorm(
    x: Array, weight: Array, eps: float, residual: Array | None = None
) -> tuple[Array, Array]:
    """The normalized rows, and the updated residual (x itself without one).

    A row whose sum of squares is not finite is NaN, as its scale would be 0 for every number.
    """
    dtype, between = x.dtype.newbyteorder("="), arithmetic(x)
    with np.errstate(all="ignore"):
        if residual is not None:
            x = rounded(x.astype(between) + residual.astype(between), dtype)
        total = sum_of_squares(x)
        mean = np.where(np.isfinite(total), total, np.nan) / between.type(x.shape[-1])
        factor = between.type(1) / np.sqrt(mean + between.type(eps))
        normal = rounded(x.astype(between) * factor[..., None], dtype).astype(between)
        return rounded(normal * weight.astype(between), dtype), x


def tile(columns: int) -> tuple[int, int]:
    """Threads and octets a thread for a row; beyond all of TILES where nothing there holds it."""
    fits = (tile for tile in TILES if -(-columns // 8) <= math.prod(tile))
    return next(fits, (1024, -(-columns // (8 * 1024))))


def sum_of_squares(x: Array) -> Array:
    """Of each row: fma along a thread's octets, then a tree over lanes, then warps in order.

    In float32; of float64 rows in float64, products and sums rounded one after the other.
    """
    lead, columns = x.shape[:-1], x.shape[-1]
    threads, _ = tile(columns)
    # Warps without numbers would add 0.
    warps = min(-(-columns // (8 * _WARP)), threads // _WARP)
    sums = np.zeros((*lead, warps * _WARP), arithmetic(x))
    with np.errstate(all="ignore"):
        for begin in range(0, columns, 8 * threads):
            part = x[..., begin : begin + 8 * threads]
            if part.shape[-1] % 8:
                padded = np.zeros((*lead, -(-part.shape[-1] // 8) * 8), x.dtype)
                padded[..., : part.shape[-1]] = part
                part = padded
            octets = part.reshape(*lead, -1, 8)
            held = sums[..., : octets.shape[-2]]
            for i in range(8):
                held[...] = _fma(octets[..., i], held)
        lanes = sums.reshape(*lead, warps, _WARP)
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        total = np.zeros(lead, sums.dtype)
        for warp in range(warps):
            total = total + lanes[..., warp, 0]
    return total


def _fma(x: Array, total: Array) -> Array:
    """x * x + total, rounded once to float32; of float64 numbers, each step rounded to that."""
    product, addend = x.astype(np.float64) ** 2, total.astype(np.float64)
    near = product + addend
    if x.dtype.itemsize != 4:
        # Where the float64 sum of 11-bit numbers' squares is not exact, one of the two is too
        # small to count in float32.
        return near.astype(total.dtype)
    odd = near.view(np.int64)
    tied = (odd & ((1 << 29) - 1)) == 1 << 28
    if near.min(initial=1) >= _NORMAL and not tied.any():
        return near.astype(np.float32)  # no tie of two float32 numbers: rounding twice is once
    back = near - product
    lost = (product - (near - back)) + (addend - back)  # exact: Knuth's sum of two
    # To odd before the second rounding, which then cannot take it for a tie. Sums are positive,
    # so their bits count up with them.
    step = (lost > 0).astype(np.int8) - (lost < 0)
    odd += step * (1 - (odd & 1))
    return near.astype(np.float32)

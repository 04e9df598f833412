"""The arithmetic of the compiled kernels in NumPy: one float32 operation after another.

Results of `gemm` equal these bit for bit, on every instruction set, up to the activation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c, rounded once.

    The product is exact in float64. The sum is rounded to odd there, by means of its error
    (Knuth's two-sum), so that the rounding to float32 is the only one: 53 >= 24 + 2 bits.
    """
    with np.errstate(all="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        addend = np.asarray(c, np.float64)
        total = product + addend
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        pattern = total.view(np.int64)
        away = (pattern ^ lost.view(np.int64)) >= 0
        moved = pattern + np.where(away, 1, -1)
        inexact = np.isfinite(lost) & (lost != 0) & (pattern & 1 == 0)
        return np.where(inexact, moved, pattern).view(np.float64).astype(np.float32)


def _scaled(total: Array, g: Array, w_scale: Array, x_scale: Array | None) -> Array:
    if x_scale is None:
        return fma(w_scale[None, :], g, total)
    with np.errstate(all="ignore"):
        return fma(x_scale[:, None], w_scale[None, :] * g, total)


def products(
    x: Array,
    values: Array,
    scales: Array,
    segment: int,
    *,
    x_scales: Array | None = None,
    biases: Array | None = None,
    x_sums: Array | None = None,
) -> Array:
    """float32 [m, n] of float32 x [m, k] and values [n, k], zero points already taken off.

    `scales` and `biases` are [n, segments], `x_scales` and `x_sums` [m, segments].
    """
    total = np.zeros((len(x), len(values)), np.float32)
    for s, start in enumerate(range(0, x.shape[1], segment)):
        g = np.zeros_like(total)
        for k in range(start, min(start + segment, x.shape[1])):
            g = fma(x[:, k, None], values[None, :, k], g)
        total = _scaled(total, g, scales[:, s], None if x_scales is None else x_scales[:, s])
        if biases is not None and x_sums is not None:
            total = fma(x_sums[:, s, None], biases[None, :, s], total)
    return total


def integer_products(
    x: Array, values: Array, scales: Array, segment: int, *, x_scales: Array | None = None
) -> Array:
    """float32 [m, n] of whole numbers: each segment's sum is exact, then rounded to float32."""
    total = np.zeros((len(x), len(values)), np.float32)
    for s, start in enumerate(range(0, x.shape[1], segment)):
        part = slice(start, start + segment)
        exact = x[:, part].astype(np.int64) @ values[:, part].astype(np.int64).T
        g = exact.astype(np.float32)
        total = _scaled(total, g, scales[:, s], None if x_scales is None else x_scales[:, s])
    return total


def finish(total: Array, alpha: float, bias: Array | None) -> Array:
    """alpha * total + bias, rounded once."""
    addend = np.full_like(total, -0.0) if bias is None else np.broadcast_to(bias, total.shape)
    return fma(np.full_like(total, alpha), total, addend)

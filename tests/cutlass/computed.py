"""Operands of products, as a GPU's memory holds them, and what kernels on CUTLASS make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

import lowbit as lb
from lowbit.formats import reference

Array = Any
DTYPES: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
}  # fmt: skip


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros at a multiple of 16 bytes, as a GPU's memory is."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 16, np.uint8)
    at = -raw.ctypes.data % 16
    return raw[at : at + size].view(dtype).reshape(shape)


def placed(array: Array) -> Array:
    """The same numbers there."""
    found = aligned(array.shape, array.dtype)
    found[...] = array
    return found


def quantized(fmt: str, shape: tuple[int, int], seed: int) -> reference.Packed:
    """Random numbers in a format."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    parts = reference.quantize(lb.format(fmt), values)
    return replace(parts, codes=placed(parts.codes), scales=placed(parts.scales))


def sums(x_fmt: str, w_fmt: str, x: Array, w: Array, zero: Any = 0) -> Array:
    """Products of codes: exact in float64, for as many columns as are drawn here."""
    left, right = (np.array(lb.format(fmt).element.values) for fmt in (x_fmt, w_fmt))
    return (left[x] - zero) @ right[w].T


def finished(
    total: Array,
    x_scale: Any,
    w_scale: Any,
    alpha: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
) -> Array:
    """What dense.finish computes, fma in float64, where that rounds no otherwise."""
    scaled = x_scale[:, None].astype(np.float64) * (w_scale * total.astype(np.float32))
    result = np.float64(alpha) * scaled.astype(np.float32) + bias
    result = result.astype(np.float32)
    result = np.maximum(result, 0) if activation else result
    return result if residual is None else result + residual.astype(np.float32)


def interleaved(scales: Array) -> Array:
    """Scales of blocks (rows, columns) in the order in which tensor cores take them.

    128 rows and 4 columns are 512 bytes: row r, column c at 16 (r mod 32) + 4 (r div 32) + c. What
    is missing there is zero.
    """
    (rows, columns), (high, wide) = scales.shape, (128, 4)
    down, across = -(-rows // high), -(-columns // wide)
    held = np.zeros((down * high, across * wide), scales.dtype)
    held[:rows, :columns] = scales
    return held.reshape(down, 4, 32, across, wide).transpose(0, 3, 2, 1, 4).reshape(-1)

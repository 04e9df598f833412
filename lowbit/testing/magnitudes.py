"""An exact product, and the sums of absolute values that the error of a computed one grows with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.array import QArray
from lowbit.formats import codes, reference, scaling

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sums:
    """Of one product, in its logical shape; entries that are not finite count as 0."""

    value: Array
    """sum x w, tensor scales included, in float64."""
    size: Array
    """sum |x| (|s c| + |b|), without tensor scales."""
    tensor_scale: Array
    """|product of the tensor scales|."""
    scales: Array
    """sum over k of |sx sw| + |sx|."""
    weights: Array
    """sum over k of |s c| + |b|."""
    highest: Array
    """No partial sum exceeds it, whichever of the scales it has met."""
    depth: int
    biased: bool
    """w or x has block biases."""


@dataclass(frozen=True)
class Pieces:
    """Absolute values of an operand's pieces, in its logical shape."""

    values: Array
    """|s c| + |b|, without the tensor scale."""
    plain: Array
    """|c|; of a dense operand its values."""
    scales: Array
    tensor_scale: Array
    """(..., 1, 1)"""
    biased: bool = False


def sums(left: Array | QArray, right: Array | QArray) -> Sums:
    """Compute them, for operands of any number of axes."""
    x, w = pieces(left), pieces(right)
    second = x.tensor_scale * w.tensor_scale
    second = second[..., 0, :] if left.ndim == 1 else second
    second = second[..., 0] if right.ndim == 1 else second
    size, ones = np.matmul(x.values, w.values), np.ones_like(w.values)
    total = np.matmul(x.values, ones)
    partial = [np.matmul(x.plain, w.plain), np.matmul(x.plain, w.values)]
    partial += [np.matmul(x.values, w.plain), size]
    return Sums(
        value=np.matmul(_values(left), _values(right)),
        size=size,
        tensor_scale=second,
        scales=np.matmul(x.scales, w.scales) + np.matmul(x.scales, ones),
        weights=np.matmul(np.ones_like(x.values), w.values),
        highest=np.maximum.reduce([*partial, total] if w.biased else partial),
        depth=left.shape[-1],
        biased=x.biased or w.biased,
    )


def _values(operand: Array | QArray) -> Array:
    if isinstance(operand, QArray):
        return operand.dequantize(np.float64)
    return operand.astype(np.float64)


def pieces(operand: Array | QArray) -> Pieces:
    """Take an operand apart."""
    if not isinstance(operand, QArray):
        finite = _finite(operand.astype(np.float64))
        return Pieces(finite, finite, np.ones_like(finite), np.ones((1, 1)))
    parts = operand._rows()
    fmt = parts.format
    plain = _finite(reference.centred(parts))
    spread = scaling.decode_scales(fmt, parts.scales).astype(np.float64)
    scales = np.abs(reference.spread(spread, fmt.scale.block, parts.matrix))
    second = np.ones((1, 1))
    if parts.tensor_scale is not None:
        second = np.abs(parts.tensor_scale.astype(np.float64))[..., None, None]
    if parts.biases is not None:
        # The tensor scale does not multiply the blocks' addends.
        scales, second = scales * second, np.ones((1, 1))
    values = plain * scales
    if parts.biases is not None:
        spread = np.abs(parts.biases.astype(np.float64))
        values = values + reference.spread(spread, fmt.scale.block, parts.matrix)
    if parts.zeros is not None:
        # A kernel may take the codes' sum and the zero point's apart.
        spread = np.abs(parts.zeros.astype(np.float64))
        stored = _finite(codes.decode(fmt.element, reference.element_codes(parts)))
        plain = stored + reference.spread(spread, fmt.scale.block, parts.matrix)
    shaped = [_logical(operand, each) for each in (values, plain, scales)]
    return Pieces(shaped[0], shaped[1], shaped[2], second, parts.biases is not None)


def _finite(x: Array) -> Array:
    return np.abs(np.where(np.isfinite(x), x, 0)).astype(np.float64)


def _logical(operand: QArray, stored: Array) -> Array:
    """Bring (..., rows, columns) as stored to the operand's logical shape and order."""
    if operand.divisor is not None:
        divisor = np.abs(operand.divisor.astype(np.float64))
        stored = stored / (divisor if operand.columns is None else divisor[operand.columns])
    if operand.columns is not None:
        ordered = np.empty_like(stored)
        ordered[..., operand.columns] = stored
        stored = ordered
    if operand.ndim == 1:
        first: Array = stored[0]
        return first
    return stored.swapaxes(-1, -2) if operand._transposed else stored

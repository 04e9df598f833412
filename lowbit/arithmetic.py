"""Arithmetic that keeps an array quantized: only where every value comes out exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lowbit import checks
from lowbit.array import QArray
from lowbit.formats import Element, codes, reference, scaling
from lowbit.formats.reference import Array, Packed
from lowbit.indexing import per_row


def negate(w: QArray) -> QArray:
    """-w, exactly: the scales change sign, or the codes where scales have none."""
    parts = w._rows()
    kind = parts.format.scale.element
    if parts.tensor_scale is not None:
        changed = replace(parts, tensor_scale=-parts.tensor_scale)
    elif not isinstance(kind, Element):
        changed = replace(parts, scales=-parts.scales)
    elif kind.min < 0:
        changed = replace(parts, scales=_recode(kind, parts.scales))
    else:
        bits, columns = parts.format.element.bits, parts.shape[-1]
        flipped = _recode(parts.format.element, reference.element_codes(parts))
        # Eight-bit codes are their own packing.
        packed = flipped if bits == 8 else codes.pack(flipped[..., :columns], bits)
        changed = replace(parts, codes=packed)
    if changed.biases is not None:
        changed = replace(changed, biases=-changed.biases)
    return w._with(changed)


def _recode(element: Element, held: Array) -> Array:
    """Codes of the negated values."""
    table = codes.decode(element, np.arange(2**element.bits, dtype=np.uint8))
    negative = codes.encode(element, -table)
    back = codes.decode(element, negative)
    wrong = ~((back == -table) | np.isnan(table))
    if wrong[held].any():
        raise ValueError(
            f"-w: {element.name} holds {table[wrong][0]:g} but not its negative; "
            "use alpha=-1 in lowbit.matmul, or .dequantize()"
        )
    return negative[held]


def multiply(w: QArray, factor: Any) -> QArray:
    """w * number, or w * column of numbers (one a row), where the scaled scales are exact."""
    if isinstance(factor, QArray):
        raise TypeError("w * w would need the values; .dequantize() one of them")
    array = np.asarray(factor)
    if array.dtype.kind not in "fiu" and array.dtype != checks.BFLOAT16:
        return NotImplemented  # type: ignore[no-any-return]
    checks.finite_array(array.astype(np.float64), "w * factor")
    parts = w._rows()
    if array.ndim == 0:
        return w._with(_scale_all(parts, array.astype(np.float64)))
    rows = parts.shape[-2]
    column = (1, rows) if w._transposed else (rows, 1)
    if array.shape[-2:] != column or w._vector:
        raise ValueError(
            f"w * factor: want a number, or one for each stored row, shape {column}; "
            f"got {array.shape}. Other products need .dequantize()."
        )
    factors = array.reshape(*array.shape[:-2], rows, 1).astype(np.float64)
    return w._with(_scale_rows(per_row(parts), factors))


def divide(w: QArray, divisor: Any) -> QArray:
    """w / number where that is exact: powers of two always are."""
    number = checks.finite_scalar(divisor, "w / divisor")
    if number == 0:
        raise ZeroDivisionError("w / 0")
    mantissa = np.frexp(number)[0]
    if abs(mantissa) != 0.5:
        raise ValueError(
            f"w / {number:g} is not exact; use alpha in lowbit.matmul, or .dequantize()"
        )
    return multiply(w, 1 / number)


def _scale_all(parts: Packed, factor: Array) -> Packed:
    if parts.tensor_scale is not None:
        return replace(parts, tensor_scale=_exact(parts.tensor_scale, factor, "tensor scale"))
    return _scale_rows(parts, factor)


def _scale_rows(parts: Packed, factors: Array) -> Packed:
    kind = parts.format.scale.element
    if isinstance(kind, Element):
        wanted = scaling.decode_scales(parts.format, parts.scales).astype(np.float64) * factors
        scales = codes.encode(kind, wanted)
        if (codes.decode(kind, scales) != wanted).any():
            raise ValueError(
                f"w * factor: the scales of {parts.format.name} times the factor are not exact in "
                f"{kind.name}; use alpha in lowbit.matmul, or .dequantize()"
            )
    else:
        scales = _exact(parts.scales, factors, "scale")
    biases = None if parts.biases is None else _exact(parts.biases, factors, "bias")
    return replace(parts, scales=scales, biases=biases)


def _exact(held: Array, factor: Array, what: str) -> Array:
    wanted = held.astype(np.float64) * factor
    with np.errstate(over="ignore", under="ignore"):
        rounded = wanted.astype(held.dtype)
    if (rounded.astype(np.float64) != wanted).any():
        raise ValueError(
            f"w * factor: a {what} times the factor is not exact in {held.dtype.name}; "
            "use alpha in lowbit.matmul, or .dequantize()"
        )
    return rounded


def array_equal(a: Any, b: Any) -> bool:
    """Whether two arrays stand for the same values in the same shape.

    Parameters
    ----------
    a, b : QArray or array-like

    Returns
    -------
    bool
        NaN equals nothing, as in numpy.array_equal.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(4, dtype=np.float32), "int8_row")
    >>> lb.array_equal(w, w.T), lb.array_equal(w, np.zeros((4, 4)))
    (True, False)
    """
    left, right = (
        s.dequantize(np.float64) if isinstance(s, QArray) else np.asarray(s) for s in (a, b)
    )
    return bool(np.array_equal(left, right))

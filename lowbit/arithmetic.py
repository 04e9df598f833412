"""Arithmetic that keeps an array quantized: only where every value comes out exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit import checks, interop
from lowbit.array import QArray
from lowbit.device import HOST
from lowbit.formats import Element, Format, codes, reference, scaling
from lowbit.formats.reference import Array, Packed
from lowbit.indexing import per_row


def negate(w: QArray) -> QArray:
    """-w, exactly: the scales change sign, or codes and zero points where scales have none."""
    parts = w._rows()
    kind = parts.format.scale.element
    if w._place is not HOST and parts.tensor_scale is None and isinstance(kind, Element):
        # Codes change, which tables of the host say how.
        return negate(w.to_device("cpu")).to_device(w.device)
    if parts.tensor_scale is not None:
        changed = replace(parts, tensor_scale=w._place.xp.asarray(-parts.tensor_scale))
    elif not isinstance(kind, Element):
        changed = replace(parts, scales=-parts.scales)
    elif kind.min < 0:
        changed = replace(parts, scales=_recode(kind, parts.scales))
    else:
        bits, columns = parts.format.element.bits, parts.shape[-1]
        flipped = _recode(parts.format.element, reference.element_codes(parts))
        # Eight-bit codes are their own packing.
        packed = flipped if bits == 8 else codes.pack(flipped[..., :columns], bits)
        changed = replace(parts, codes=packed, zeros=_opposite(parts.format, parts.zeros))
    if changed.biases is not None:
        changed = replace(changed, biases=-changed.biases)
    return w._with(changed)


def _recode(element: Element, held: Array) -> Array:
    """Codes of the negated values."""
    table = codes.decode(element, np.arange(2**element.bits, dtype=np.uint8))
    negative = codes.encode(element, -table)
    back = codes.decode(element, negative)
    wrong = ~((back == -table) | np.isnan(table))[held]
    if wrong.any():
        raise ValueError(
            f"-w: {element.name} holds {table[held[wrong][0]]:g} but not its negative; "
            "use alpha=-1 in lowbit.matmul, or .dequantize()"
        )
    return negative[held]


def _opposite(fmt: Format, zeros: Array | None) -> Array | None:
    """Negated zero points."""
    if zeros is None or not isinstance(fmt.zero, Element):
        return None if zeros is None else -zeros
    wide = -zeros.astype(np.int16)
    wrong = (wide < fmt.zero.min) | (wide > fmt.zero.max)
    if wrong.any():
        raise ValueError(
            f"-w: {fmt.zero.name} holds the zero point {zeros[wrong][0]} but not its negative; "
            "use alpha=-1 in lowbit.matmul, or .dequantize()"
        )
    return wide.astype(zeros.dtype)


def multiply(w: QArray, factor: Any) -> QArray:
    """w * number, or w * column of numbers (one a row), where the scaled scales are exact."""
    array, _ = interop.to_numpy(factor, "factor")
    factors = array.astype(np.float64)
    checks.finite_array(factors, "factor")
    # No scale has more bits than float32, so a factor of more never gives an exact one. Python
    # compares its integers with floats exactly, NumPy does not.
    lost = factors.astype(object) != array.astype(object)
    if np.any(lost | (np.ldexp(np.frexp(factors)[0], 24) % 1 != 0)):
        raise ValueError(
            "w * factor: a factor of more than 24 significant bits is not exact; round it to "
            "float32, use alpha in lowbit.matmul, or .dequantize()"
        )
    place = w._place
    # Scales are few: they are worked on by the host, wherever the codes are.
    parts = _blocks(w._rows(), place.get)
    if factors.size == 1 and factors.ndim <= w.ndim:
        return w._with(_blocks(_scale_all(parts, factors.reshape(())), place.put))
    rows = (*parts.shape[:-1], 1)
    if w._transposed:
        factors = (factors if factors.ndim > 1 else factors[None]).swapaxes(-1, -2)
    try:
        if w._vector:
            raise ValueError
        factors = np.broadcast_to(factors, rows)
    except ValueError:
        wanted = (*rows[:-2], *(rows[:-3:-1] if w._transposed else rows[-2:]))
        raise ValueError(
            f"w * factor: want a number, or one for each stored row, shape {wanted}; got "
            f"{array.shape}. Other products need .dequantize()."
        ) from None
    return w._with(_blocks(_scale_rows(per_row(parts), factors), place.put))


def _blocks(parts: Packed, change: Callable[[Array], Array]) -> Packed:
    """Every part but the codes changed alike."""
    zeros, biases, second = (
        None if p is None else change(p) for p in (parts.zeros, parts.biases, parts.tensor_scale)
    )
    return replace(
        parts, scales=change(parts.scales), zeros=zeros, biases=biases, tensor_scale=second
    )


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
    if parts.tensor_scale is None:
        return _scale_rows(parts, factor)
    changed = replace(parts, tensor_scale=_exact(parts.tensor_scale, factor, "tensor scale"))
    return replace(changed, biases=_scaled_biases(parts, factor))


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
    return replace(parts, scales=scales, biases=_scaled_biases(parts, factors))


def _scaled_biases(parts: Packed, factors: Array) -> Array | None:
    return None if parts.biases is None else _exact(parts.biases, factors, "bias")


def _exact(held: Array, factor: Array, what: str) -> Array:
    wanted = held.astype(np.float64) * factor
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.asarray(wanted.astype(held.dtype))
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
        s.to_device("cpu").dequantize(np.float64)
        if isinstance(s, QArray)
        else interop.to_numpy(s, name)[0]
        for s, name in ((a, "a"), (b, "b"))
    )
    return bool(np.array_equal(left, right))

"""How a block's scale follows from its values: the named rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lowbit.formats import codes
from lowbit.formats.declare import Element, Format

Array = npt.NDArray[Any]

METHODS = ("absmax", "fullrange", "signed_max", "mse", "floor", "ceil", "rceil", "even")
POWER_RULES = ("floor", "ceil", "rceil", "even")  # MX: how an E8M0 scale is chosen

_FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def float_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a float scale or zero point."""
    return _FLOATS[name]


def method_for(fmt: Format, method: str) -> str:
    """The rule that `method` means for this format; "absmax" is every format's default."""
    if method not in METHODS:
        raise ValueError(f"method: want one of {', '.join(METHODS)}, got {method!r}")
    power = _is_power(fmt.scale.element)
    if power and method == "absmax":
        # Round up: the OCP rule (floor) lets a block whose largest value is 6.9 keep scale 1
        # and saturate at 6. docs/decisions/0004-mx-scale-rounding.md
        return "rceil"
    if method in POWER_RULES and not power:
        raise ValueError(f"method {method!r} is for E8M0 scales; {fmt.name} has none")
    if method in ("fullrange", "signed_max"):
        if power or fmt.zero is not None or fmt.bias or not _twos_complement(fmt.element):
            raise ValueError(
                f"method {method!r} is for signed integers without zero point and with float "
                f"scales; {fmt.name} is none. Use 'absmax'."
            )
    return method


def _is_power(scale: Element | str) -> bool:
    return isinstance(scale, Element) and scale.name == "float8_e8m0fnu"


def _twos_complement(element: Element) -> bool:
    return element.integral and element.min == -(2 ** (element.bits - 1))


def limits(element: Element) -> tuple[float, float]:
    """The values that the ends of a symmetric block map to: +-qmax for signed integers, which
    leaves -2^(b-1) unused so that the grid is symmetric; else the ends of the table."""
    if _twos_complement(element) and element.bits > 1:
        return -element.max, element.max
    return element.min, element.max


def ideal(fmt: Format, low: Array, high: Array, method: str) -> Array:
    """The scale of each block before it is rounded to the scale's type; 0 for an all-zero block.

    `low` <= 0 <= `high` are the extremes of each block, in the arithmetic's dtype.
    """
    element = fmt.element
    if fmt.zero is not None or fmt.bias:
        levels = low.dtype.type(element.max - element.min)
        return high / levels - low / levels  # high - low alone could overflow
    if method == "signed_max":
        extreme = np.where(high > -low, high, low)
        return extreme / low.dtype.type(element.min)
    bottom, top = limits(element)
    if method == "fullrange":
        top = bottom = -element.min
        return np.maximum(high, -low) / low.dtype.type(top)
    _refuse_one_sided(fmt, low, high, bottom, top)
    if method in ("floor", "ceil", "even"):
        return np.maximum(high, -low)  # these rules look at the magnitude itself
    above = high / low.dtype.type(top) if top > 0 else np.zeros_like(high)
    below = low / low.dtype.type(bottom) if bottom < 0 else np.zeros_like(low)
    return np.maximum(above, below)


def _refuse_one_sided(fmt: Format, low: Array, high: Array, bottom: float, top: float) -> None:
    for side, found, word in ((bottom < 0, low < 0, "negative"), (top > 0, high > 0, "positive")):
        if not side and found.any():
            raise ValueError(
                f"quantize: {fmt.name} has no {word} value, and {int(found.sum())} blocks hold "
                f"{word} numbers. Use a zero point: {fmt.element.name}_..._asym."
            )


def _exponent_of(amax: Array) -> Array:
    """floor(log2(amax)), exact; amax > 0."""
    return np.frexp(amax)[1].astype(np.int64) - 1


def largest_exponent(element: Element) -> int:
    """emax of the MX rules: floor(log2(largest value))."""
    return math.frexp(element.max)[1] - 1


def mantissa_bits(element: Element) -> int:
    """Fraction bits, counted from the table: 2**m values share the fullest binade."""
    binades = [math.frexp(v)[1] for v in element.values if math.isfinite(v) and v > 0]
    return (max(binades.count(b) for b in set(binades))).bit_length() - 1


def power_codes(element: Element, magnitude: Array, method: str) -> Array:
    """E8M0 codes by an MX rule (names as in torchao).

    `magnitude` is amax for floor, ceil and even, and amax / largest value for rceil; zero gives
    scale 1.
    """
    safe = np.where(magnitude > 0, magnitude, 1)
    if method == "even":
        # Round amax to the element's mantissa; a carry into the exponent counts.
        fraction, exponent = np.frexp(safe)
        bits = mantissa_bits(element) + 1
        safe = np.ldexp(np.rint(np.ldexp(fraction, bits)), exponent - bits)
    exponent = _exponent_of(safe)
    if method in ("ceil", "rceil"):
        exponent += np.ldexp(1.0, exponent) < safe
    if method != "rceil":
        exponent -= largest_exponent(element)
    code = np.clip(exponent + 127, 0, 254).astype(np.uint8)
    return np.where(magnitude > 0, code, np.uint8(127)).astype(np.uint8)


def encode_scales(fmt: Format, wanted: Array, method: str) -> Array:
    """Scales rounded to their type: uint8 codes, or an array of the float dtype.

    A block of zeros has scale 1. A scale that would underflow becomes the smallest one instead,
    so that a tiny block is coarse, never divided by zero.
    """
    kind = fmt.scale.element
    if _is_power(kind):
        return power_codes(fmt.element, wanted, method)
    wanted = np.where(wanted == 0, wanted.dtype.type(1), wanted)
    if isinstance(kind, Element):
        largest, rounded = kind.max, codes.encode(kind, np.abs(wanted))
        smallest = min(c for c, v in enumerate(kind.values) if v > 0)
        rounded = np.maximum(rounded, np.uint8(smallest))
    else:
        dtype = float_dtype(kind)
        info = ml_dtypes.finfo(dtype)
        largest = float(info.max)
        with np.errstate(over="ignore"):
            rounded = wanted.astype(dtype)
        tiny = np.copysign(np.asarray(info.smallest_subnormal, wanted.dtype), wanted)
        rounded = np.where(rounded == 0, tiny.astype(dtype), rounded)
    too_large = np.abs(wanted) > largest
    if too_large.any():
        word = kind.name if isinstance(kind, Element) else kind
        raise ValueError(
            f"quantize: {int(too_large.sum())} blocks of {fmt.name} need a scale beyond the "
            f"largest {word}, {largest:g}. Use a float32 or bfloat16 scale."
        )
    return rounded


def decode_scales(fmt: Format, scales: Array) -> Array:
    """float32 scales, exact for every scale type."""
    kind = fmt.scale.element
    return codes.decode(kind, scales.view(np.uint8)) if isinstance(kind, Element) else (
        scales.astype(np.float32)
    )

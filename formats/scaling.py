"""How a block's scale follows from its values: the named rules."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lowbit.formats import codes
from lowbit.formats.declare import Element, Format

Array = npt.NDArray[Any]

METHODS = ("absmax", "fullrange", "signed_max", "mse", "floor", "ceil", "rceil", "even")
POWER_RULES = ("floor", "ceil", "rceil", "even")  # MX: how an E8M0 scale is chosen

_FLOATS: dict[str, np.dtype[Any]] = {
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
    if method in ("floor", "ceil", "even") and fmt.zero is not None:
        raise ValueError(
            f"method {method!r} looks at the largest magnitude, and {fmt.name} has zero points. "
            "Use 'rceil'."
        )
    if method in ("fullrange", "signed_max"):
        signed = _twos_complement(fmt.element) and fmt.element.bits > 1
        if power or fmt.zero is not None or fmt.bias or not signed:
            raise ValueError(
                f"method {method!r} is for signed integers of 2 bits or more, with float scales "
                f"and no zero point or bias; {fmt.name} is none. Use 'absmax'."
            )
    return method


def _is_power(scale: Element | str) -> bool:
    return isinstance(scale, Element) and scale.name == "float8_e8m0fnu"


def _twos_complement(element: Element) -> bool:
    return element.min < 0 and codes.consecutive(element)


def limits(element: Element) -> tuple[float, float]:
    """The values that the ends of a symmetric block map to: the ends of the table.

    For signed integers +-qmax: -2^(b-1) stays unused, so that the grid is symmetric.
    """
    if _twos_complement(element) and element.bits > 1:
        return -element.max, element.max
    return element.min, element.max


def ideal(fmt: Format, low: Array, high: Array, method: str, further: float = 1) -> Array:
    """The scale of each block before it is rounded to the scale's type; 0 for an all-zero block.

    `low` and `high` are the extremes of each block, in the arithmetic's dtype; `further` divides
    once more. For floor, ceil and even it is the largest magnitude, which these rules look at.
    """
    number = low.dtype.type
    if fmt.zero is not None or fmt.bias:
        levels = number((fmt.element.max - fmt.element.min) * further)
        with np.errstate(over="ignore"):
            span = high - low
        wanted = np.where(np.isfinite(span), span / levels, high / levels - low / levels)
        return _not_underflowed(wanted, high > low)
    extreme = np.where(high > -low, high, low)
    if method == "signed_max":
        return _not_underflowed(extreme / number(fmt.element.min), extreme != 0)
    bottom, top = limits(fmt.element)
    if method == "fullrange":
        bottom, top = fmt.element.min, -fmt.element.min
    if method in ("floor", "ceil", "even"):
        return np.abs(extreme)
    wanted = np.zeros_like(low)
    if top > 0:
        wanted = np.maximum(wanted, high / number(top * further))
    if bottom < 0:
        wanted = np.maximum(wanted, low / number(bottom * further))
    # abs: 0 divided by a negative end is -0.
    return _not_underflowed(np.abs(wanted), extreme != 0)


def range_end(fmt: Format) -> float:
    """What the largest block scale becomes under a tensor scale: the end of its type's range.

    A float or a power of two has range to spare, and gets 1.
    """
    kind = fmt.scale.element
    return 1.0 if isinstance(kind, str) or _is_power(kind) else kind.max


def _not_underflowed(wanted: Array, needed: Array) -> Array:
    """The smallest scale instead of none, so that a tiny block is coarse and not lost."""
    tiny = np.copysign(np.finfo(wanted.dtype).smallest_subnormal, wanted)
    return np.where((wanted == 0) & needed, tiny, wanted)


def refuse_one_sided(fmt: Format, low: Array, high: Array) -> None:
    """Refuse data of a sign that the element lacks, where no zero point can shift them."""
    if fmt.zero is not None or fmt.bias:
        return
    bottom, top = limits(fmt.element)
    worst = {"negative": low.min(initial=0), "positive": high.max(initial=0)}
    for word, end in (("negative", bottom), ("positive", top)):
        if not end and worst[word]:
            raise ValueError(
                f"quantize: {fmt.name} has no {word} value, and x holds {worst[word]:g}. "
                f"Use a zero point: {fmt.element.name}_..._asym."
            )


def largest_exponent(element: Element) -> int:
    """emax of the MX rules: floor(log2(largest value))."""
    return math.frexp(element.max or -element.min)[1] - 1


def mantissa_bits(element: Element) -> int:
    """Fraction bits, counted from the table: 2**m values share the fullest binade."""
    finite = (abs(v) for v in set(element.values) if math.isfinite(v) and v)
    binades = Counter(math.frexp(v)[1] for v in set(finite))
    return max(binades.values(), default=1).bit_length() - 1


def power_codes(element: Element, magnitude: Array, method: str) -> Array:
    """E8M0 codes by an MX rule (names as in torchao).

    `magnitude` is amax for floor, ceil and even, and amax / largest value for rceil; zero gives
    scale 1.
    """
    fraction, exponent = np.frexp(np.where(magnitude > 0, magnitude, 1))  # fraction in [1/2, 1)
    exponent = exponent.astype(np.int64) - 1  # floor(log2)
    if method in ("ceil", "rceil"):
        exponent += fraction > 0.5
    elif method == "even":
        # Round amax to the element's mantissa; a carry into the exponent counts.
        bits = mantissa_bits(element) + 1
        exponent += np.rint(np.ldexp(fraction, bits)) == 2**bits
    if method != "rceil":
        exponent -= largest_exponent(element)
    if exponent.max(initial=0) > 127:
        raise ValueError(
            f"quantize: x needs a scale of 2**{exponent.max()}, beyond the largest E8M0, 2**127. "
            "Scale x down, or use a float32 scale."
        )
    code = np.maximum(exponent + 127, 0)
    return np.where(magnitude > 0, code, 127).astype(np.uint8)


def scale_dtype(fmt: Format) -> np.dtype[Any]:
    """dtype that scales are kept in: uint8 for the codes of an element, or their float dtype."""
    kind = fmt.scale.element
    return np.dtype(np.uint8) if isinstance(kind, Element) else float_dtype(kind)


def encode_scales(fmt: Format, wanted: Array, method: str) -> Array:
    """Scales rounded to their type, as `scale_dtype` keeps them.

    A block of zeros has scale 1. A scale that would underflow becomes the smallest one instead,
    so that a tiny block is coarse, never divided by zero.
    """
    kind = fmt.scale.element
    if _is_power(kind):
        return power_codes(fmt.element, wanted, method)
    wanted = np.where(wanted == 0, wanted.dtype.type(1), wanted)
    if isinstance(kind, Element):
        largest = kind.max
        smallest = min(c for c, v in enumerate(kind.values) if v > 0)
        rounded = np.maximum(codes.encode(kind, np.abs(wanted)), np.uint8(smallest))
    else:
        info: Any = ml_dtypes.finfo(float_dtype(kind))  # type: ignore[no-untyped-call]
        largest = float(info.max)
        with np.errstate(over="ignore"):
            rounded = codes.rounded(wanted, info.dtype)
        tiny = np.copysign(float(info.smallest_subnormal), wanted).astype(info.dtype)
        rounded = np.where(rounded == 0, tiny, rounded)
    _refuse_beyond(fmt, np.abs(wanted), largest)
    return rounded


def _refuse_beyond(fmt: Format, wanted: Array, largest: float) -> None:
    if wanted.max(initial=0) > largest:
        kind = fmt.scale.element
        raise ValueError(
            f"quantize: {fmt.name} would need a scale of {wanted.max():g}, beyond the largest "
            f"{kind.name if isinstance(kind, Element) else kind}, {largest:g}. Use a scale type "
            "of more range (bf16, f32), or scale x down."
        )


def decode_scales(fmt: Format, scales: Array) -> Array:
    """float32 scales, exact for every scale type."""
    kind = fmt.scale.element
    if isinstance(kind, Element):
        return codes.decode(kind, scales.view(np.uint8))
    return scales.astype(np.float32)

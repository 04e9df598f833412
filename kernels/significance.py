"""How many bits numbers have: what decides which arithmetic is exact until its last rounding."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import isfinite

from lowbit.formats import Element

FLOATS = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}
"""Significant bits of a dtype, and the exponent of its lowest bit."""


def significant(numbers: Iterable[float]) -> tuple[int, int]:
    """The most significant bits of any number, and the exponent of the lowest bit of all."""
    width, lowest = 1, 1024
    for number in numbers:
        exact = Fraction(number)
        if not exact:
            continue
        top, bottom = abs(exact.numerator), exact.denominator
        twos = (top & -top).bit_length() - 1
        width = max(width, (top >> twos).bit_length())
        lowest = min(lowest, twos - bottom.bit_length() + 1)
    return width, lowest


def finite(element: Element) -> list[float]:
    """The numbers among the values of an element."""
    return [v for v in element.values if isfinite(v)]

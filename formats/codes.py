"""Numbers to codes and back, codes to bytes and back: the truth, in NumPy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit.formats.declare import Element

Array = npt.NDArray[Any]
Overflow = Literal["saturate", "nan", "raise"]


def decode(element: Element, codes: Array) -> Array:
    """The float32 value of each code (uint8, one code an entry)."""
    return _table(element)[codes]


@lru_cache(maxsize=256)
def _table(element: Element) -> Array:
    table = np.array(element.values, np.float32)
    table.flags.writeable = False
    return table


class Ladder(NamedTuple):
    """The finite values of an element in ascending order, and where rounding changes over."""

    values: Array  # float64, no negative zero
    codes: Array  # uint8, the code of each value
    edges: Array  # float64; y > edges[i] rounds to values[i + 1] or above
    negative_zero: int | None
    low_limit: float  # y below this is out of range under rounding to nearest
    high_limit: float


@lru_cache(maxsize=256)
def ladder(element: Element) -> Ladder:
    """Sort the table once. Ties go to the even code, so an edge whose upper code is even moves
    down by one float64 step: the tie itself then counts as above it."""
    table = np.array(element.values, np.float64)
    zeros = [c for c in range(len(table)) if table[c] == 0 and np.signbit(table[c])]
    order = np.argsort(table, kind="stable")
    order = order[np.isfinite(table[order])]
    order = np.array([c for c in order if c not in zeros], np.uint8)
    values = table[order]
    values, first = np.unique(values, return_index=True)  # a codebook may repeat a value
    order = order[first]
    middle = (values[:-1] + values[1:]) / 2
    edges = np.where(order[1:] % 2 == 0, np.nextafter(middle, -np.inf), middle)
    top = (values[-1] - values[-2]) / 2 if len(values) > 1 else np.inf
    bottom = (values[1] - values[0]) / 2 if len(values) > 1 else np.inf
    # The first value past the end would have a code of the other parity.
    high, low = values[-1] + top, values[0] - bottom
    high = high if order[-1] % 2 == 0 else np.nextafter(high, -np.inf)
    low = low if order[0] % 2 == 0 else np.nextafter(low, np.inf)
    return Ladder(values, order, edges, zeros[0] if zeros else None, float(low), float(high))


def encode(
    element: Element,
    y: Array,
    *,
    overflow: Overflow = "saturate",
    uniform: Array | None = None,
) -> Array:
    """The code of the value next to each number.

    Parameters
    ----------
    element : Element
    y : ndarray of float32 or float64
        NaN becomes the element's NaN code; the caller refuses NaN where there is none.
    overflow : {"saturate", "nan", "raise"}
        What becomes of a number that rounds beyond the largest value, infinities included.
    uniform : ndarray in [0, 1), optional
        Round stochastically, up where the number exceeds this share of the gap; otherwise to
        nearest, ties to the even code. A negative number that rounds to zero is -0 where the
        element has one.

    Returns
    -------
    ndarray of uint8
    """
    steps = ladder(element)
    wide = y.astype(np.float64)
    if uniform is None and element.integral and _consecutive(element):
        nearest = np.clip(np.rint(wide), steps.values[0], steps.values[-1])
        codes = np.nan_to_num(nearest).astype(np.int16).astype(np.uint8)
        codes &= np.uint8(2**element.bits - 1)
    else:
        if uniform is None:
            index = np.searchsorted(steps.edges, wide, side="left")
        else:
            index = _stochastic(steps, wide, uniform)
        codes = steps.codes[np.minimum(index, len(steps.codes) - 1)]
        if steps.negative_zero is not None:
            value = steps.values[np.minimum(index, len(steps.codes) - 1)]
            codes[(value == 0) & np.signbit(wide)] = steps.negative_zero
    if element.nan_code is not None:
        codes[np.isnan(wide)] = element.nan_code
    if overflow != "saturate":
        _overflow(element, wide, codes, overflow, uniform is not None)
    return codes


@lru_cache(maxsize=256)
def _consecutive(element: Element) -> bool:
    """Two's complement or plain binary: rounding needs no table."""
    codes = np.arange(2**element.bits)
    return all(codes == np.array(element.values).astype(np.int64) % 2**element.bits)


def _stochastic(steps: Ladder, y: Array, uniform: Array) -> Array:
    inside = np.clip(y, steps.values[0], steps.values[-1])
    low = np.searchsorted(steps.values, inside, side="right") - 1
    low = np.clip(low, 0, len(steps.values) - 1)
    high = np.minimum(low + 1, len(steps.values) - 1)
    gap = steps.values[high] - steps.values[low]
    share = np.where(gap > 0, (inside - steps.values[low]) / np.where(gap > 0, gap, 1), 0)
    return np.where(share > uniform, high, low)


def _overflow(element: Element, y: Array, codes: Array, policy: str, stochastic: bool) -> None:
    steps = ladder(element)
    if stochastic:
        beyond = (y > steps.values[-1]) | (y < steps.values[0])
    else:
        beyond = (y > steps.high_limit) | (y < steps.low_limit)
    if policy == "nan":
        if element.nan_code is None:
            raise ValueError(f"overflow: {element.name} has no NaN code; use 'saturate' or 'raise'")
        codes[beyond] = element.nan_code
    elif beyond.any():
        first = tuple(int(i) for i in np.argwhere(beyond)[0])
        raise OverflowError(
            f"overflow='raise': {int(beyond.sum())} scaled values exceed {element.name}'s range "
            f"[{element.min:g}, {element.max:g}], first at {first}: {y[first]:g}. "
            "Use overflow='saturate' or a larger scale."
        )


def pack(codes: Array, bits: int) -> Array:
    """A little-endian bit stream along the last axis: code i owns bits [i*bits, (i+1)*bits).

    Every row ends on a byte; the spare bits are zero. Eight codes fill `bits` bytes whatever the
    width, so one 64-bit word carries them and codes that straddle bytes need no special case.
    """
    count = codes.shape[-1]
    words = -(-count // 8)
    padded = np.zeros((*codes.shape[:-1], words * 8), np.uint8)
    padded[..., :count] = codes
    lanes = padded.reshape(*codes.shape[:-1], words, 8)
    stream = np.zeros(lanes.shape[:-1], "<u8")
    for i in range(8):
        stream |= lanes[..., i].astype("<u8") << np.uint64(i * bits)
    octets = stream.view(np.uint8).reshape(*lanes.shape[:-1], 8)[..., :bits]
    return octets.reshape(*codes.shape[:-1], words * bits)[..., : -(-count * bits // 8)].copy()


def unpack(packed: Array, bits: int, count: int) -> Array:
    """The first `count` codes of each row's bit stream, one uint8 each."""
    words = -(-count // 8)
    octets = np.zeros((*packed.shape[:-1], words * bits), np.uint8)
    used = min(packed.shape[-1], words * bits)
    octets[..., :used] = packed[..., :used]
    wide = np.zeros((*packed.shape[:-1], words, 8), np.uint8)
    wide[..., :bits] = octets.reshape(*packed.shape[:-1], words, bits)
    stream = wide.view("<u8")[..., 0]
    codes = np.empty((*packed.shape[:-1], words, 8), np.uint8)
    for i in range(8):
        codes[..., i] = (stream >> np.uint64(i * bits)) & np.uint64(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], words * 8)[..., :count]

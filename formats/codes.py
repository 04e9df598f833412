"""Numbers to codes and back, codes to bytes and back: the truth, in NumPy."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import ml_dtypes
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
    """Sort the table once. A tie goes to the upper value if its code is even, else to the lower.

    Past either end the last gap is thought to repeat, to a code of the other parity.
    """
    table = np.array(element.values, np.float64)
    zeros = np.flatnonzero((table == 0) & np.signbit(table))
    order = np.argsort(table, kind="stable")
    order = order[np.isfinite(table[order]) & ~np.isin(order, zeros)]
    values, first = np.unique(table[order], return_index=True)  # a codebook may repeat a value
    order = order[first].astype(np.uint8)
    edges = [
        _edge(Fraction(low) + Fraction(high), upper_wins=code % 2 == 0)
        for low, high, code in zip(values[:-1], values[1:], order[1:].tolist(), strict=True)
    ]
    low = high = np.inf
    if len(values) > 1:
        low, high = values[1] - values[0], values[-1] - values[-2]
    bottom, top = values[0] - low / 2, values[-1] + high / 2
    bottom = bottom if order[0] % 2 == 0 else np.nextafter(bottom, np.inf)
    top = top if order[-1] % 2 == 0 else np.nextafter(top, -np.inf)
    negative_zero = int(zeros[0]) if len(zeros) else None
    return Ladder(values, order, np.array(edges), negative_zero, float(bottom), float(top))


def _edge(twice: Fraction, *, upper_wins: bool) -> float:
    """The largest float64 that still rounds down, where `twice` is twice the middle."""
    edge = float(twice / 2)
    if Fraction(edge) * 2 > twice or (upper_wins and Fraction(edge) * 2 == twice):
        edge = math.nextafter(edge, -math.inf)
    return edge


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
        Round stochastically: up where the number lies further into its gap than this share.
        Without it to nearest, ties to the even code. A negative number that rounds to zero
        becomes -0 where the element has one.

    Returns
    -------
    ndarray of uint8
    """
    short = _by_upper_half(element) if uniform is None and y.dtype == np.float32 else None
    codes = _nearest(element, y, uniform) if short is None else short[_upper_half(y)]
    if overflow != "saturate":
        wide = y.astype(np.float64)
        outside = beyond(element, wide, stochastic=uniform is not None)
        if overflow == "raise" and outside.any():
            first = tuple(int(i) for i in np.argwhere(outside)[0])
            raise OverflowError(overflow_message(element, int(outside.sum()), first, wide[first]))
        if overflow == "nan":
            if element.nan_code is None:
                raise ValueError(f"overflow: {element.name} has no NaN code; saturate or raise")
            codes[outside] = element.nan_code
    return codes


def _nearest(element: Element, y: Array, uniform: Array | None = None) -> Array:
    """The code that `encode` defines, by a search in the ladder."""
    steps = ladder(element)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = y.astype(np.float64)
    if uniform is None:
        index = np.searchsorted(steps.edges, wide, side="left")
    else:
        index = _stochastic(steps, wide, uniform)
    index = np.minimum(index, len(steps.codes) - 1)
    codes: Array = steps.codes[index]
    if steps.negative_zero is not None:
        codes[(steps.values[index] == 0) & np.signbit(wide)] = steps.negative_zero
    if element.nan_code is not None:
        codes[np.isnan(wide)] = element.nan_code
    return codes


@lru_cache(maxsize=64)
def _by_upper_half(element: Element) -> Array | None:
    """`_nearest` of every float32, looked up by its upper 16 bits and whether the lower are 0.

    Numbers that share both lie strictly between two bfloat16 numbers, or are one. So no table
    exists where rounding changes over inside such a gap (NF4), and it is exact everywhere else.
    """
    values = ladder(element).values
    middles = (values[:-1] + values[1:]) / 2
    narrow = middles.astype(np.float32)
    if (narrow != middles).any() or (narrow.view(np.uint32) & 0xFFFF).any():
        return None
    keys = np.arange(2**17, dtype=np.uint32)
    numbers = (keys >> 1 << 16 | (keys & 1) << 15).view(np.float32)
    # In parts, or the first array of a format would need 4 MB of its own.
    return np.concatenate([_nearest(element, part) for part in np.split(numbers, 16)])


def _upper_half(y: Array) -> Array:
    bits = np.ascontiguousarray(y).view(np.uint32)
    keys: Array = bits >> 16 << 1 | ((bits & 0xFFFF) != 0)
    return keys


@lru_cache(maxsize=256)
def consecutive(element: Element) -> bool:
    """Two's complement or plain binary: rounding needs no table."""
    low, count = element.min, 2**element.bits
    if low not in (0, -count // 2):
        return False
    return element.values == tuple(c - count if c >= count + low else c for c in range(count))


def _stochastic(steps: Ladder, y: Array, uniform: Array) -> Array:
    inside = np.clip(y, steps.values[0], steps.values[-1])
    low = np.searchsorted(steps.values, inside, side="right") - 1
    low = np.clip(low, 0, len(steps.values) - 1)
    high = np.minimum(low + 1, len(steps.values) - 1)
    gap = steps.values[high] - steps.values[low]
    share = np.where(gap > 0, (inside - steps.values[low]) / np.where(gap > 0, gap, 1), 0)
    return np.where(share > uniform, high, low)


def beyond(element: Element, y: Array, *, stochastic: bool = False) -> Array:
    """True where a number rounds to something past the ends of the table."""
    steps = ladder(element)
    # A limit next to a tie is no float32, and NumPy would round it to y's dtype.
    wide = y.astype(np.float64)
    if stochastic:
        return np.asarray((wide > steps.values[-1]) | (wide < steps.values[0]))
    return np.asarray((wide > steps.high_limit) | (wide < steps.low_limit))


def overflow_message(element: Element, count: int, first: tuple[int, ...], value: float) -> str:
    """What `overflow="raise"` says."""
    return (
        f"overflow='raise': {count} scaled values exceed {element.name}'s range "
        f"[{element.min:g}, {element.max:g}], first at {first}: {value:g}. "
        "Use overflow='saturate' or a larger scale."
    )


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """x in another float dtype, rounded once.

    ml_dtypes takes float64 to bfloat16 through float32, which rounds twice.
    """
    with np.errstate(over="ignore", under="ignore"):
        if x.dtype != np.float64 or dtype != ml_dtypes.bfloat16:
            return x.astype(dtype)
        single = x.astype(np.float32)
    # Rounding to odd: an inexact number ends in 1, so the second rounding cannot take it for a tie.
    single = np.where(np.abs(single) > np.abs(x), np.nextafter(single, np.float32(0)), single)
    single.view(np.uint32)[...] |= single != x
    return single.astype(dtype)


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

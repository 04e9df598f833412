"""Weights as kernels of mixed.py read them: scales turned, zero points as addends.

It is done once, when a product is bound, by operations on arrays that NumPy and CuPy share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lowbit.formats import Element, Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda.launch import Machine
from lowbit.kernels.cutlass.mixed import TABLE, Spec
from lowbit.kernels.declare import Array

ROOM = 8.0
"""Numbers of a table are an eighth of what they stand for, so that int4's codes have room."""
_PIECE = 16  # bytes that TMA's rows begin at multiples of


@dataclass
class Weight:
    """What a kernel reads of w; the arrays are here so that they stay."""

    codes: Array
    scales: Array | None = None
    """(..., groups, n), rows at multiples of 16 bytes."""
    zeros: Array | None = None
    row_scales: Array | None = None
    """float32 (..., rows, 1), or (..., 1, 1) for all."""
    factor: float = 1.0
    """That multiplies all."""


def laid(machine: Machine, spec: Spec, w: Packed) -> Weight | None:
    """w as a kernel reads it: codes as they lie wherever they can, scales turned.

    None where float16 does not hold its numbers.
    """
    scale = spec.scale
    codes, fmt = w.codes.view(np.uint8), w.format
    if isinstance(fmt.scale.element, Element):
        narrow = _of_rows(w, w.scales.view(np.uint8))
        if scale == TABLE:
            found, codes = tabled(machine, narrow), recoded(codes)
        else:
            # Of 4 significant bits: their products with int4's codes are exact in bfloat16.
            found = _turned(machine, str(scale), _float8s(narrow) / np.float32(ROOM))
        return Weight(codes, found, row_scales=_second(w), factor=ROOM)
    scales, zeros = _floats(str(fmt.scale.element), w.scales), w.zeros
    if scale is None:
        return Weight(codes, row_scales=_of_rows(w, scales, whole=True))
    _, columns = fmt.scale.block
    turned = partial(_turned, machine, scale)
    if not fmt.bias and (columns is None or columns >= w.shape[-1]):
        assert zeros is not None
        off = -_of_rows(w, zeros).astype(np.float32)
        ones = off * np.float32(0) + np.float32(1)
        return Weight(codes, turned(ones), turned(off), _of_rows(w, scales, whole=True))
    scales, added = _of_rows(w, scales), None
    if fmt.bias:
        added = _of_rows(w, _floats(str(fmt.scale.element), w.biases))
    elif isinstance(fmt.zero, Element):
        assert zeros is not None
        scales = shortened(scales, fmt)
        added = -(_of_rows(w, zeros).astype(np.float32) * scales)
    factor = None
    if spec.x == "cutlass::half_t":
        factor = _factor(scales, fmt)
        if factor is None:
            return None
        scales = scales / factor
        added = None if added is None else added / factor
    return Weight(codes, turned(scales), None if added is None else turned(added), factor)


def _factor(scales: Array, fmt: Format) -> Array | None:
    """Powers of two by which numbers of rows are divided, so that float16 holds each as normal.

    None where scales of a row differ too much for that.
    """
    sizes = np.abs(np.array(fmt.element.values))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    least, most = sizes.min(), sizes.max()
    if isinstance(fmt.zero, Element):
        least, most = 1, most + max(abs(fmt.zero.min), abs(fmt.zero.max))
    found = abs(scales)
    top = found.max(-1, keepdims=True)
    usual = (top == 0) | ((top > np.float32(2.0**-100)) & (top < np.float32(2.0**100)))
    rounded = ((top.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
    room = np.float32(2.0 ** (np.ceil(np.log2(most)) - 15))
    factor: Array = rounded * room + (top == 0).astype(np.float32)
    held = (found == 0) | (found >= factor * np.float32(2.0**-14 / least))
    return factor if bool((usual & held).all()) else None


def _second(w: Packed) -> Array | None:
    """The second-level scale as one for all rows."""
    found = w.tensor_scale
    return None if found is None else found.reshape(*found.shape, 1, 1)


def _of_rows(w: Packed, numbers: Array, *, whole: bool = False) -> Array:
    """Numbers of blocks as those of their rows; `whole`: one for all rows may stay one."""
    rows, n = w.format.scale.block[0], w.shape[-2]
    if rows == 1 or (whole and numbers.shape[-2] == 1):
        return numbers
    spread: Array = numbers.repeat(n if rows is None else rows, -2)[..., :n, :]
    return spread


def _floats(dtype: str, numbers: Any) -> Array:
    """As float32."""
    if dtype == "bfloat16":
        found: Array = (numbers.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return found
    found = numbers if dtype == "float32" else numbers.astype(np.float32)
    return found


def shortened(scales: Array, fmt: Format) -> Array:
    """Scales of so few bits that their products with codes and zero points are exact in float32.

    The lowest bits are dropped: up to 2**-15 of a scale. Then a code that equals its zero point
    stands for 0 exactly, which a rounded product of both would miss.
    """
    zero, element = fmt.zero, fmt.element
    assert isinstance(zero, Element)
    largest = max(abs(v) for v in (element.min, element.max, zero.min, zero.max))
    dropped = int(largest).bit_length()
    if fmt.scale.element != "float32":
        return scales  # 11 bits or 8
    kept = np.uint32((1 << 32) - (1 << dropped))
    found: Array = (scales.view(np.uint32) & kept).view(np.float32)
    return found


def _turned(machine: Machine, kind: str, numbers: Array) -> Array:
    """(..., groups, n) of a C++ type, that holds every number exactly."""
    bits = numbers.view(np.uint32) if kind == "float" else numbers
    if kind == "cutlass::bfloat16_t":
        bits = (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    elif kind == "cutlass::half_t":
        bits = numbers.astype(np.float16).view(np.uint16)
    elif kind == "int8_t":
        bits = numbers.astype(np.int8).view(np.uint8)
    return _padded(machine, bits)


def _padded(machine: Machine, numbers: Array) -> Array:
    *stack, n, groups = numbers.shape
    together = _PIECE // numbers.itemsize
    made: Array = machine.empty((*stack, groups, -(-n // together) * together), numbers.dtype)
    made[..., :n] = numbers.swapaxes(-1, -2)
    return made


def recoded(codes: Array) -> Array:
    """int4's codes as an index into a table of -8 to -1, and a sign: 1 to 7 become 7 to 1."""

    def index(code: Array) -> Any:
        positive = (code >> np.uint8(3)) - np.uint8(1)  # all bits, or none
        return code ^ ((code ^ (-code & np.uint8(7))) & positive)

    found: Array = index(codes & np.uint8(15)) | index(codes >> np.uint8(4)) << np.uint8(4)
    return found


def _small(size: Array) -> Array:
    """float8_e4m3fn without its sign, times 2**-120: subnormals too.

    Its exponent and mantissa are float32's there; NaN is 480.
    """
    found: Array = (size.astype(np.uint32) << np.uint32(20)).view(np.float32)
    return found


def _float8s(codes: Array) -> Array:
    """float8_e4m3fn as float32, by operations that CuPy has."""
    sign, size = codes & np.uint8(0x80), codes & np.uint8(0x7F)
    found = _small(size) * np.float32(2.0**120)
    nan = size == np.uint8(0x7F)
    signed: Array = found * (np.float32(1) - np.float32(2) * (sign != 0).astype(np.float32))
    signed[nan] = np.nan
    return signed


def tabled(machine: Machine, scales: Array) -> Array:
    """(..., groups, 8 n): float8 of -8 to -1 times an eighth of each scale; 0 needs no number."""
    codes = scales.view(np.uint8)
    *stack, n, groups = codes.shape
    sign, size = codes & np.uint8(0x80), codes & np.uint8(0x7F)
    wide = _small(size)
    nan = (size == np.uint8(0x7F)).astype(np.uint8) * np.uint8(0x7F)
    made: Array = machine.empty((*stack, groups, n + n % 2, 8), np.uint8)
    for i in range(8):
        bits = (wide * np.float32((8 - i) / ROOM)).view(np.uint32)
        even = (bits >> np.uint32(20)) & np.uint32(1)
        found = ((bits + np.uint32(0x7FFFF) + even) >> np.uint32(20)).astype(np.uint8)
        made[..., :n, i] = ((found | nan) | (sign ^ np.uint8(0x80))).swapaxes(-1, -2)
    return made.reshape(*stack, groups, -1)

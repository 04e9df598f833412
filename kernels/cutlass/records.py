"""Structs that CUTLASS's kernels take by value, laid out as C++ lays them out.

The members are those of CUTLASS 4.2; tests/test_cutlass_params.py holds every byte to what its own
C++ writes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Value = int | float | bytes


@dataclass(frozen=True)
class Layout:
    """Where the members of a struct lie."""

    size: int
    align: int
    members: Mapping[str, tuple[int, str]]
    """Path, such as ``epilogue.thread.op_0``: offset, and its code of Python's `struct`."""


def scalar(code: str) -> Layout:
    """A number: "i", "I", "Q", "f", ... aligned to its size."""
    size = struct.calcsize(code)
    return Layout(size, size, {"": (0, code)})


def block(size: int, align: int) -> Layout:
    """Bytes that somebody else lays out."""
    return Layout(size, align, {"": (0, f"{size}s")})


def record(*members: tuple[str, Layout | str]) -> Layout:
    """A struct; one without members takes a byte."""
    at, align, found = 0, 1, {}
    for name, kind in members:
        layout = scalar(kind) if isinstance(kind, str) else kind
        at = -(-at // layout.align) * layout.align
        align = max(align, layout.align)
        for path, (offset, code) in layout.members.items():
            found[f"{name}.{path}" if path else name] = at + offset, code
        at += layout.size
    return Layout(-(-max(at, 1) // align) * align, align, found)


EMPTY = record()


def pack(layout: Layout, values: Mapping[str, Value]) -> bytearray:
    """The bytes of a struct: the members that `values` names, zeros elsewhere."""
    data = bytearray(layout.size)
    for path, value in values.items():
        offset, code = layout.members[path]
        if code == "f":
            with np.errstate(over="ignore"):
                value = float(np.float32(value))  # infinite, where Python's pack would refuse
        struct.pack_into("<" + code, data, offset, value)
    return data


MAP = record(("descriptor", block(128, 64)), ("strides", EMPTY))
"""A cute::TiledCopy by TMA whose strides are static."""

DIVISOR = record(("divisor", "Q"), ("multiplier", "Q"), ("shift", "I"), ("round_up", "I"))
"""cutlass::FastDivmodU64."""

POWER = record(("divisor", "Q"), ("shift", "I"))
"""cutlass::FastDivmodU64Pow2."""

NARROW = record(("divisor", "i"), ("multiplier", "I"), ("shift", "I"))
"""cutlass::FastDivmod."""


def divisor(name: str, by: int) -> dict[str, Value]:
    """Members of a FastDivmodU64 that divides."""
    shift = by.bit_length() - 1
    if by & (by - 1) == 0:
        numbers = (by, 0, shift, 0)
    else:
        low = (1 << shift + 64) // by % (1 << 64)
        high = ((1 << shift + 64) + (1 << shift)) // by % (1 << 64)
        numbers = (by, high, shift, int(low == high))
    return {f"{name}.{m}": v for m, v in zip(DIVISOR.members, numbers, strict=True)}


def power(name: str, by: int) -> dict[str, Value]:
    """Members of a FastDivmodU64Pow2 that divides."""
    return {f"{name}.divisor": by, f"{name}.shift": by.bit_length() - 1}


def narrow(name: str, by: int) -> dict[str, Value]:
    """Members of a FastDivmod that divides."""
    shift = 31 + (by - 1).bit_length()
    multiplier, shift = (0, 0) if by == 1 else (-(-(1 << shift) // by) % (1 << 32), shift - 32)
    numbers = (by, multiplier, shift)
    return {f"{name}.{m}": v for m, v in zip(NARROW.members, numbers, strict=True)}

"""Memory that faults where a kernel must not go."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from emulator_build import EmulatorError

Array = npt.NDArray[Any]
PAGE, GUARD = mmap.PAGESIZE, 1 << 20
READ, WRITE, PRIVATE, ANONYMOUS, NORESERVE = 1, 2, 0x02, 0x20, 0x4000
POISON = 0xFF  # a NaN in every floating-point type of 8 to 64 bits, and an index far outside

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True)
class Pages:
    """Memory between two guards that nobody may touch."""

    base: int
    """Where the first guard begins."""
    size: int
    """In bytes, a multiple of a page; no guard counted."""

    @classmethod
    def map(cls, size: int) -> Pages:
        """Map at least `size` bytes; they take memory only where they are written."""
        size = max(PAGE, -(-size // PAGE) * PAGE)
        flags = PRIVATE | ANONYMOUS | NORESERVE
        base = _libc.mmap(None, size + 2 * GUARD, 0, flags, -1, 0)
        if base is None or base == ctypes.c_void_p(-1).value:
            raise MemoryError(f"cannot map {size} bytes")
        pages = cls(base, size)
        pages.protect(READ | WRITE)
        return pages

    @property
    def start(self) -> int:
        """Where the pages begin."""
        return self.base + GUARD

    @property
    def end(self) -> int:
        """Where the pages end."""
        return self.start + self.size

    def protect(self, what: int) -> None:
        """Let the pages be read, or written."""
        _libc.mprotect(self.start, self.size, what)

    def unmap(self) -> None:
        """Give the memory back."""
        _libc.munmap(self.base, self.size + 2 * GUARD)

    def bytes(self) -> Array:
        """All bytes as an array, which must not outlive the pages."""
        return np.frombuffer(
            memoryview((ctypes.c_char * self.size).from_address(self.start)), np.uint8
        )


@dataclass(frozen=True)
class Argument:
    """An array that a kernel is given by its address."""

    index: int
    array: Array
    const: bool
    low: int
    """Address of the array's first byte; with negative strides not that of element 0."""
    high: int
    """Address after its last byte."""

    @classmethod
    def of(cls, index: int, array: Array, const: bool) -> Argument:
        """Find where an array lies."""
        if not const and not array.flags.writeable:
            raise EmulatorError(
                f"argument {index} is a read-only array, the kernel's parameter is not const"
            )
        low, high = np.lib.array_utils.byte_bounds(array)
        if not array.size:
            low = high = array.ctypes.data
        return cls(index, array, const, low, high)

    @property
    def name(self) -> str:
        """For errors."""
        return f"argument {self.index}, {self.array.dtype} of shape {self.array.shape}"


def groups(arguments: list[Argument]) -> list[list[Argument]]:
    """Put the arguments together whose memory overlaps."""
    found: list[list[Argument]] = []
    end = 0
    for argument in sorted(arguments, key=lambda a: (a.low, a.high)):
        if found and argument.low < end:
            found[-1].append(argument)
        else:
            found.append([argument])
        end = max(end, argument.high)
    return found


class Copy:
    """Copy of arrays that share memory, which ends or starts at a guard.

    Element offsets and the address modulo 16 stay what they were, so the last 15 bytes before a
    guard may be reachable; they and what lies between a view's elements hold poison.
    """

    def __init__(self, arguments: list[Argument], *, at_start: bool) -> None:
        self.arguments = arguments
        self.low = min(a.low for a in arguments)
        self.size = max(a.high for a in arguments) - self.low
        self.read_only = all(a.const for a in arguments)
        self.pages = Pages.map(self.size + 16)
        if at_start:
            self.start = self.pages.start + self.low % 16
        else:
            last = self.pages.end - self.size
            self.start = last - (last - self.low) % 16
        self.pages.bytes()[:] = POISON
        for argument in arguments:
            np.copyto(self.view(argument), argument.array)
        if self.read_only:
            self.pages.protect(READ)

    def view(self, argument: Argument) -> Array:
        """The argument's array, in the copy."""
        array, first = argument.array, self.address(argument) - self.pages.start
        return np.ndarray(array.shape, array.dtype, self.pages.bytes(), first, array.strides)

    def address(self, argument: Argument) -> int:
        """Address of the argument's element 0, in the copy."""
        return self.start + argument.array.ctypes.data - self.low

    def copy_back(self) -> None:
        """Hand over what the kernel wrote; it must not have written between or beside elements."""
        if self.read_only:
            return
        covered = np.zeros(self.pages.size, bool)
        for a in self.arguments:
            first = self.address(a) - self.pages.start
            shape, strides = (*a.array.shape, a.array.itemsize), (*a.array.strides, 1)
            np.ndarray(shape, bool, covered, first, strides)[...] = True
        wrong = np.flatnonzero((self.pages.bytes() != POISON) & ~covered)
        if wrong.size:
            where = self.describe(self.pages.start + int(wrong[0]))
            raise EmulatorError(f"a kernel wrote beside an array's elements: {where}")
        for argument in self.arguments:
            if not argument.const:
                np.copyto(argument.array, self.view(argument))

    def describe(self, address: int) -> str | None:
        """Say where in the arguments an address lies, if near them."""
        if not self.pages.base <= address < self.pages.end + GUARD:
            return None
        near = []
        for argument in self.arguments:
            byte = address - (self.start + argument.low - self.low)
            near.append(f"byte {byte} of {argument.high - argument.low} of {argument.name}")
        return " and ".join(near) + (", which is const" if self.read_only else "")


_sparse: dict[int, int] = {}  # memory of `sparse`: where it starts, where it ends


def sparse(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return zeros that take memory only where they are written, and end at a guard.

    Kernels get the memory itself, not a copy: for arrays of many GiB, of which `Emulator.blocks`
    lets a launch touch a little.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    pages = Pages.map(size)
    start = (pages.end - size) // 16 * 16
    buffer = (ctypes.c_char * size).from_address(start)
    _sparse[pages.start] = pages.end
    weakref.finalize(buffer, _release, pages)
    return np.ndarray(shape, dtype, memoryview(buffer))


def _release(pages: Pages) -> None:
    del _sparse[pages.start]
    pages.unmap()


def is_sparse(argument: Argument) -> bool:
    """Whether an array lies in memory of `sparse`."""
    return any(start <= argument.low and argument.high <= end for start, end in _sparse.items())


def poisoned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return new memory with no number in it, aligned as CuPy aligns."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.full(size + 256, POISON, np.uint8)
    first = -raw.ctypes.data % 256
    return raw[first : first + size].view(dtype).reshape(shape)

"""Runs the text of CUDA kernels on the CPU and finds what a GPU would hide.

A kernel gets its machine by `launch.machine_of`, so a whole operation runs here by ::

    from emulator import Emulator, EmulatorError
    from lowbit.kernels.cuda import launch

    def test_something(emulator):              # the fixture skips, in words, where g++ is missing
        with launch.pretending(emulator):
            run = kernel.build(problem)(weights)
            run(x, epilogue, out)              # NumPy arrays

and a kernel of its own by ::

    function = emulator.function(Source(text, "scale<float>", threads=128))
    function((blocks,), (128,), (x, y, np.int32(n)), shared_mem=0)

What a test may set: `emulator.seed` (order of blocks and lanes; place of arrays before or behind a
guard), `emulator.device`, `emulator.blocks` (run these blocks only, for `emulator.sparse` arrays
beyond 4 GiB). `races.rerun` runs tests again under ThreadSanitizer, `planted` plants bugs.

Arguments are arrays of any strides (the kernel gets the address of element 0), NumPy scalars and
structs (`bytes`, `np.void`) of the parameter's size, `np.uintp(0)` for a null pointer, and
`emulator.tensor_map(...)`. Arrays go to guarded copies: parameters that point to const are
read-only, others are copied back. Memory of `empty`, shared memory and uninitialised variables hold
0xFF (NaN), copies in flight land as late as they may, lanes run in random order.

Not modelled: clusters, proxy fences, weak memory (fences only under ThreadSanitizer), registers
that wgmma still reads, how tensor cores round their sums, contraction of a * b + c into fma (write
fmaf where bits matter), blocks that wait for others, banks of shared memory, time.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from emulator_build import CompileError, EmulatorError, RaceError, build, missing
from emulator_memory import Argument, Array, Copy, groups, is_sparse, poisoned, sparse
from races import Log

from lowbit.kernels.cuda import tensor_maps
from lowbit.kernels.cuda.launch import Device, Source

__all__ = ["CompileError", "Emulator", "EmulatorError", "RaceError", "TensorMap", "missing"]

HOPPER = Device(90, 4, plain=True)
KIB = 1024
# Most dynamic shared memory of a block, in KiB (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99}
GRID, BLOCK = (2**31 - 1, 65535, 65535), (1024, 1024, 64)

_races = Log()
_one_launch = threading.Lock()  # the scheduler's state is its library's


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("shared_limit", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("only", ctypes.c_void_p),
        ("only_count", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled describes: a 2-D array read in boxes of rows and columns."""

    array: Array
    box: tuple[int, int]
    swizzle: int
    """Bytes: 0 or 128."""

    def __post_init__(self) -> None:
        rows, columns = self.box
        width, pitch = columns * self.array.itemsize, self.array.strides[0]
        if self.swizzle == 128 and width > 128:
            raise EmulatorError(f"a box of {columns} columns is wider than the swizzle's 128 bytes")
        if width % 16 or not 1 <= rows <= 256 or not 1 <= columns <= 256:
            raise EmulatorError(f"a box has 1..256 rows and columns of 16 bytes, not {self.box}")
        if pitch % 16 or self.array.strides[1] != self.array.itemsize:
            raise EmulatorError(f"rows {pitch} bytes apart, want a multiple of 16, columns dense")
        if self.array.ctypes.data % 16:
            raise EmulatorError("the array does not begin at a multiple of 16 bytes")

    def encode(self, address: int) -> bytes:
        """As `lb::TensorMap` of emu_sm90.h reads it."""
        rows, columns = self.array.shape
        head = np.array([address, columns, rows, self.array.strides[0]], np.uint64).tobytes()
        box = [self.box[1], self.box[0], self.array.itemsize, self.swizzle]
        return (head + np.array(box, np.uint32).tobytes()).ljust(128, b"\0")


class Emulator:
    """A `launch.Machine` on NumPy arrays."""

    def __init__(self, device: Device = HOPPER, *, seed: int = 0) -> None:
        self.device = device
        self.seed = seed
        self.sanitize = os.environ.get("LOWBIT_EMULATOR_SANITIZE", "")
        self.blocks: Sequence[int] | None = None
        """Linear indices of the blocks that run; None: all."""
        self.launches: list[str] = []
        """Name expressions of what ran, in order."""
        self._functions: dict[tuple[Source, str], EmulatedFunction] = {}
        self._counters = np.zeros(0, np.int32)

    def function(self, source: Source) -> EmulatedFunction:
        """Compile a kernel, or take it from memory or the cache."""
        key = source, self.sanitize
        if key not in self._functions:
            library = build(source.text, source.name, self.sanitize)
            self._functions[key] = EmulatedFunction(self, source, library)
        return self._functions[key]

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """New memory that holds no number: 0xFF."""
        return poisoned(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """New memory of zero bytes."""
        array = poisoned(shape, dtype)
        array.view(np.uint8)[...] = 0
        return array

    def counters(self, count: int) -> Array:
        """Zeros, as long as every kernel leaves zeros behind."""
        if self._counters.size < count:
            self._counters = self.zeros((count,), np.int32)
        return self._counters

    def scratch(self, count: int) -> Array:
        """New memory each time, so that nobody relies on what another left there."""
        return self.empty((count,), np.int32)

    def number(self, kind: type[np.generic], value: float) -> Any:
        """A number as launches here take it."""
        return kind(value)

    def matmul(self, x: Array, w: Array) -> Array:
        """x @ w.T, summed in float64 and rounded to float32."""
        return (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.float32)

    def sparse(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeros of any size that take memory only where written; kernels get them uncopied."""
        return sparse(shape, dtype)

    def settle(self) -> None:
        """Nothing is under way."""

    def address(self, array: Array) -> int:
        """Where an array begins; its copy begins at the same address modulo 16."""
        return array.ctypes.data

    def encode(self, wanted: tensor_maps.TensorMap) -> bytes:
        """Refuse: nothing asks a plain device for it."""
        raise AssertionError("a kernel on CUTLASS was launched on the emulator, a plain device")

    def by_value(self, data: bytes) -> Any:
        """Refuse: nothing asks a plain device for it."""
        raise AssertionError("a kernel on CUTLASS was launched on the emulator, a plain device")

    def tensor_map(self, array: Array, box: tuple[int, int], *, swizzle: int = 128) -> TensorMap:
        """An argument for a parameter of type `lb::TensorMap`."""
        return TensorMap(array, box, swizzle)


class EmulatedFunction:
    """A compiled kernel, called as CuPy's RawKernel is."""

    def __init__(self, emulator: Emulator, source: Source, library: ctypes.CDLL) -> None:
        self._emulator, self._source = emulator, source
        self._entry = library["emu_launch"]
        self._entry.restype = ctypes.c_char_p
        self._entry.argtypes = [ctypes.POINTER(_Launch), ctypes.c_void_p]
        signature = library["emu_signature"]
        signature.restype = ctypes.c_char_p
        # c: pointer to const, p: another pointer, v: value; and its size.
        self._parameters = [(p[0], int(p[1:])) for p in signature().decode().split()]

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Launch and wait."""
        try:
            self._check(grid, block, args, shared_mem)
            self._launch(grid, block, args, shared_mem)
        except EmulatorError as e:
            raise type(e)(f"{self._source.name}: {e}") from None
        self._emulator.launches.append(self._source.name)

    def _check(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int
    ) -> None:
        for what, dims, most in ("grid", grid, GRID), ("block", block, BLOCK):
            if not 1 <= len(dims) <= 3 or any(
                not 1 <= d <= m for d, m in zip(dims, most, strict=False)
            ):
                raise EmulatorError(f"{what} is {dims}, want up to three numbers in 1..{most}")
        threads = int(np.prod(block))
        if threads > self._source.threads:
            raise EmulatorError(f"{threads} threads, compiled for {self._source.threads}")
        if shared_mem > self._source.shared:
            raise EmulatorError(
                f"{shared_mem} bytes of shared memory, compiled for {self._source.shared}"
            )
        most_shared = SHARED[self._emulator.device.capability] * KIB
        if shared_mem > most_shared:
            raise EmulatorError(
                f"{shared_mem} bytes of shared memory, a block of "
                f"{self._emulator.device.name} has at most {most_shared}"
            )
        if len(args) != len(self._parameters):
            raise EmulatorError(f"takes {len(self._parameters)} arguments, not {len(args)}")

    def _launch(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int
    ) -> None:
        seed, blocks = self._emulator.seed, self._emulator.blocks
        values: list[bytes] = []
        pointers: list[Argument] = []
        for index, (value, (kind, size)) in enumerate(zip(args, self._parameters, strict=True)):
            if isinstance(value, TensorMap):
                pointers.append(Argument.of(index, value.array, True))
                values.append(b"")
            elif isinstance(value, np.ndarray) and value.ndim + (kind != "v"):
                if kind == "v":
                    raise EmulatorError(f"argument {index} is an array, the parameter a value")
                pointers.append(Argument.of(index, value, kind == "c"))
                values.append(b"")
            else:
                values.append(_value(index, value, kind, size))
        copies = [
            Copy(group, at_start=seed % 4 == 3)
            for group in groups([p for p in pointers if not is_sparse(p)])
        ]
        try:
            address = {a.index: copy.address(a) for copy in copies for a in copy.arguments}
            for pointer in pointers:
                where = address.get(pointer.index, pointer.array.ctypes.data)
                given = args[pointer.index]
                values[pointer.index] = (
                    given.encode(where)
                    if isinstance(given, TensorMap)
                    else where.to_bytes(8, "little")
                )
            message = self._run(grid, block, values, shared_mem, seed, blocks)
            if message is not None:
                raise EmulatorError(message + _place(message, copies))
            races = _races.news()
            if races:
                raise RaceError("; ".join(races))
            for copy in copies:
                copy.copy_back()
        finally:
            for copy in copies:
                copy.pages.unmap()

    def _run(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        values: list[bytes],
        shared_mem: int,
        seed: int,
        blocks: Sequence[int] | None,
    ) -> str | None:
        # Aligned as a struct of 64-byte alignment may be.
        buffers = [np.zeros(len(v) + 64, np.uint8) for v in values]
        pointers = (ctypes.c_void_p * len(values))()
        for i, (buffer, value) in enumerate(zip(buffers, values, strict=True)):
            first = -buffer.ctypes.data % 64
            buffer[first : first + len(value)] = np.frombuffer(value, np.uint8)
            pointers[i] = buffer.ctypes.data + first
        only = np.asarray([] if blocks is None else blocks, np.uint64)
        limit = SHARED[self._emulator.device.capability] * KIB
        launch = _Launch(
            _three(grid), _three(block), shared_mem, limit, seed, only.ctypes.data, only.size
        )
        with _one_launch:
            message = self._entry(ctypes.byref(launch), pointers)
        return None if message is None else str(message.decode())


def _three(dims: tuple[int, ...]) -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 3)(*[*dims, 1, 1][:3])


def _value(index: int, value: Any, kind: str, size: int) -> bytes:
    if not isinstance(value, (np.generic, np.ndarray, bytes)):
        raise EmulatorError(
            f"argument {index} is of type {type(value).__name__}; want an array, a NumPy scalar "
            f"or the bytes of a struct, {size} of them"
        )
    raw = value if isinstance(value, bytes) else value.tobytes()
    if len(raw) != size:
        raise EmulatorError(f"argument {index} has {len(raw)} bytes, the parameter {size}")
    if kind != "v" and any(raw):
        raise EmulatorError(f"argument {index} is an address, want the array or np.uintp(0)")
    return raw


def _place(message: str, copies: list[Copy]) -> str:
    """Where in the arguments a fault was."""
    found = re.search(r"at address 0x([0-9a-f]+)", message)
    if found is None:
        return ""
    places = [copy.describe(int(found[1], 16)) for copy in copies]
    return "".join(f": {place}" for place in places if place)

"""The seam between kernels and what runs them: a GPU through CuPy, or the emulator of the tests.

Kernels are written against `Machine` alone, so every launch of theirs can be made without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lowbit.kernels.cuda.tensor_maps import TensorMap


@dataclass(frozen=True, slots=True)
class Source:
    """One kernel: the text that NVRTC compiles, and what does not change between its launches."""

    text: str
    """C++17. Headers of this folder are included by name."""
    name: str
    """Name expression of the kernel, such as ``gemm<Tile>``."""
    threads: int
    """Of a block."""
    shared: int = 0
    """Bytes of dynamic shared memory."""
    headers: str | None = None
    """"cutlass" where the text includes CUTLASS's headers."""


class Function(Protocol):
    """A compiled kernel, called as CuPy's RawKernel is; it runs on the caller's current stream."""

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Launch; `args` are arrays, and numbers of the parameters' own sizes.

        A NumPy scalar will do. One of `Machine.number` is taken as it is, at a tenth of the price.
        """


@dataclass(frozen=True, slots=True)
class Device:
    """What the choice of kernels and tiles may know of a GPU."""

    capability: int
    """Compute capability times ten: 80, 89, 90, 100, 120."""
    processors: int
    """Streaming multiprocessors."""
    plain: bool = False
    """It runs lowbit's own kernels only, as the emulator of the tests does: none on a library."""

    @property
    def name(self) -> str:
        """As `Problem.device` spells it: ``cuda:90:132``."""
        return f"cuda:{self.capability}:{self.processors}{':plain' if self.plain else ''}"


def parse(name: str) -> Device:
    """Read `Device.name` back."""
    backend, capability, processors, *plain = name.split(":")
    if backend != "cuda":
        raise ValueError(f"device: want cuda:capability:processors, got {name!r}")
    return Device(int(capability), int(processors), bool(plain))


class Machine(Protocol):
    """A device that launches kernels on arrays of its own kind."""

    @property
    def device(self) -> Device:
        """What kernels and tiles are chosen for."""
        ...

    def function(self, source: Source) -> Function:
        """Return the compiled kernel, from memory or a cache where it is there."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Return new memory on the device, in the order of the current stream."""

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Return new memory on the device, filled with zero bytes."""

    def counters(self, count: int) -> Any:
        """Return int32 zeros that every kernel of the current stream shares.

        Kernels of a stream run one after the other, and each leaves zeros behind.
        """

    def scratch(self, count: int) -> Any:
        """Return 32-bit words, `count` or more of any contents, that the stream's kernels share."""

    def number(self, kind: type[np.generic], value: float, /) -> Any:
        """Return an argument for launches: a number of this type, made once for equal values."""

    def matmul(self, x: Any, w: Any) -> Any:
        """Return x @ w.T in float32 by the vendor's library.

        Both are float32 or both bfloat16; of float32 no bit is dropped (no TF32). Either may be a
        transposed view.
        """

    def tensor_map(self, array: Any, box: tuple[int, int], *, swizzle: int) -> Any:
        """Return an argument of type `lb::TensorMap`: an array that TMA reads in boxes.

        Rows of the array begin at multiples of 16 bytes; `swizzle` is 0 or 128.
        """

    def encode(self, wanted: TensorMap) -> bytes:
        """Return the descriptor that the driver makes, 128 bytes."""
        ...

    def by_value(self, data: bytes) -> Any:
        """Return an argument for a parameter that is a struct of these bytes."""

    def settle(self) -> None:
        """Wait for the current stream: what was just made is then there for every other."""

    def address(self, array: Any) -> int:
        """Return where an array begins, for choosing the width of loads."""
        ...


class _Local(threading.local):
    pretended: Machine | None = None


_local = _Local()


@contextmanager
def pretending(machine: Machine) -> Iterator[None]:
    """Let this thread's launches on NumPy arrays go to `machine`, such as an emulator."""
    before = _local.pretended
    _local.pretended = machine
    try:
        yield
    finally:
        _local.pretended = before


def machine_of(array: Any) -> Machine:
    """Return what runs kernels on this array, a CuPy array or, while `pretending`, a NumPy one."""
    if isinstance(array, np.ndarray):
        if _local.pretended is None:
            raise TypeError("launch: a NumPy array lies in the host's memory; want a CuPy array")
        return _local.pretended
    from lowbit.kernels.cuda import gpu

    return gpu.machine(array.device.id)

"""A GPU that runs nothing and remembers what it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda.launch import Device, Source
from lowbit.kernels.cuda.tensor_maps import TensorMap


class Recorder:
    """A `launch.Machine` on NumPy arrays; what they hold is never looked at."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.sources: dict[Source, str] = {}
        """What was launched, in order, and what it was launched for first."""
        self._label = ""

    @contextmanager
    def asked_by(self, label: str) -> Any:
        """Let launches on NumPy arrays come here, for this purpose."""
        self._label = label
        with launch.pretending(self):
            yield

    def function(self, source: Source) -> Callable[..., None]:
        """Remember the kernel once it is launched."""

        def run(grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
            threads = int(np.prod(block))
            if (threads, shared_mem) != (source.threads, source.shared):
                raise AssertionError(
                    f"{source.name} is declared for {source.threads} threads and {source.shared} "
                    f"bytes of shared memory, launched with {threads} and {shared_mem}"
                )
            self.sources.setdefault(source, self._label)

        return run

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Memory that takes none until it is written."""
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Memory that takes none until it is written."""
        return np.zeros(shape, dtype)

    def counters(self, count: int) -> Any:
        """Zeros."""
        return np.zeros(count, np.int32)

    def scratch(self, count: int) -> Any:
        """Memory."""
        return np.zeros(1, np.int32)

    def number(self, kind: type[np.generic], value: float) -> Any:
        """A number as launches here take it."""
        return kind(value)

    def matmul(self, x: Any, w: Any) -> Any:
        """Nothing of the right shape."""
        return np.empty((x.shape[0], w.shape[0]), np.float32)

    def tensor_map(self, array: Any, box: tuple[int, int], *, swizzle: int) -> Any:
        """Nothing of the right size."""
        return np.zeros((), "V128")

    def encode(self, wanted: TensorMap) -> bytes:
        """Nothing of the right size."""
        return bytes(128)

    def by_value(self, data: bytes) -> Any:
        """Nothing."""
        return None

    def settle(self) -> None:
        """Nothing is under way."""

    def address(self, array: Any) -> int:
        """As CuPy's memory: 512-byte aligned, and views of it where they are."""
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        return int(array.ctypes.data - base.ctypes.data)

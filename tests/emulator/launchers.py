"""One call for a kernel's test, in the emulator and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from emulator import Emulator, TensorMap

from lowbit.kernels.cuda.launch import Device, Machine, Source


def no_gpu() -> str | None:
    """Say why nothing can run on a GPU here, or None."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return "wants a GPU: CuPy is not installed"
    except Exception as e:  # CuPy's own, which nothing else can name
        return f"wants a GPU: {e}"
    return None if count else "wants a GPU: CUDA finds none"


class Launcher:
    """Launches kernels on NumPy arrays, in place."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @property
    def device(self) -> Device:
        """What runs the kernels."""
        return self.machine.device

    def seed(self, seed: int) -> None:
        """Choose the emulator's order of blocks and lanes; a GPU has its own."""
        if isinstance(self.machine, Emulator):
            self.machine.seed = seed

    def launch(
        self,
        source: Source,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
    ) -> None:
        """Run the kernel; its arrays, C-contiguous, hold the results."""
        function = self.machine.function(source)
        if isinstance(self.machine, Emulator):
            function(grid, block, args, shared_mem=source.shared)
            return
        import cupy

        arrays = [getattr(a, "array", a) for a in args]  # of a TensorMap
        sent = [cupy.asarray(a.view(np.uint8)) if isinstance(a, np.ndarray) else a for a in arrays]
        given = [
            self._mapped(a, there) if isinstance(a, TensorMap) else there
            for a, there in zip(args, sent, strict=True)
        ]
        function(grid, block, tuple(given), shared_mem=source.shared)
        for array, there in zip(arrays, sent, strict=True):
            if isinstance(array, np.ndarray):
                array.view(np.uint8)[...] = cupy.asnumpy(there)

    def _mapped(self, asked: TensorMap, there: Any) -> Any:
        numbers = there.view(f"u{asked.array.itemsize}")
        return self.machine.tensor_map(numbers, asked.box, swizzle=asked.swizzle)

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
            _encoded(a, there.data.ptr) if isinstance(a, TensorMap) else there
            for a, there in zip(args, sent, strict=True)
        ]
        function(grid, block, tuple(given), shared_mem=source.shared)
        for array, there in zip(arrays, sent, strict=True):
            if isinstance(array, np.ndarray):
                array.view(np.uint8)[...] = cupy.asnumpy(there)


def _encoded(tensor_map: TensorMap, address: int) -> Any:
    """The driver's own form of a map of 16-bit numbers."""
    from cuda.bindings import driver

    (rows, columns), box = tensor_map.array.shape, tensor_map.box
    swizzle = "128B" if tensor_map.swizzle else "NONE"
    status, found = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
        2,
        address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(tensor_map.array.strides[0])],
        [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle[f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"],
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {status}")
    return np.array([int(word) for word in found.opaque], np.uint64)

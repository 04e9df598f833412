"""The emulator launches as CuPy does, and refuses what a GPU would refuse or hide."""

import numpy as np
import pytest
from emulator import Emulator, EmulatorError

from lowbit.kernels.cuda.launch import Source

SCALE = """
#include "primitives.cuh"
__global__ void scale(const float* __restrict__ x, float* __restrict__ y, float by, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = by * x[i];
}
"""


def test_a_kernel_runs(emulator: Emulator):
    x, y = np.arange(100, dtype=np.float32), emulator.empty((100,), np.float32)
    f = emulator.function(Source(SCALE, "scale", 64))
    f((2,), (64,), (x, y, np.float32(3), np.int32(100)))
    assert (y == 3 * x).all()


def test_a_store_outside_is_named(emulator: Emulator):
    x, y = np.zeros(128, np.float32), np.zeros(100, np.float32)
    f = emulator.function(Source(SCALE, "scale", 64))
    with pytest.raises(EmulatorError, match=r"byte 4\d\d of 400 of argument 1, float32"):
        f((2,), (64,), (x, y, np.float32(3), np.int32(128)))

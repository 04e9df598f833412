"""Sums of the codes of a weight's rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda.launch import Source

_THREADS = 128
_TYPES = {"int8": "signed char", "uint8": "unsigned char"}


def row_sums(codes: Any) -> Any:
    """Return int32 sums of int8 or uint8 codes (rows, columns), whose columns lie side by side."""
    machine = launch.machine_of(codes)
    rows, columns = codes.shape
    sums = machine.empty((rows,), np.int32)
    name = f"lb::row_sums<{_TYPES[codes.dtype.name]}>"
    function = machine.function(Source('#include "row_sums.cuh"\n', name, _THREADS))
    arguments = (codes, np.int64(codes.strides[0]), np.int32(columns), np.int32(rows), sums)
    function((-(-rows // (_THREADS // 32)),), (_THREADS,), arguments)
    return sums

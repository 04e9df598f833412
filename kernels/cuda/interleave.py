"""Scales of blocks, in the order in which Blackwell's tensor cores take them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda.launch import Source

_THREADS = 256
_HIGH, _WIDE = 128, 4  # rows and scales of a row that lie together
_SOURCE = Source('#include "interleave.cuh"\n', "lb::interleave", _THREADS)


def words(rows: int, columns: int) -> int:
    """32-bit words that the scales of so many rows and blocks of columns take."""
    return -(-rows // _HIGH) * -(-columns // _WIDE) * _HIGH


def interleave(scales: Any, found: Any) -> None:
    """Write uint8 scales (rows, columns) into the words `found`.

    128 rows and 4 columns are 512 bytes: row r, column c at 16 (r mod 32) + 4 (r div 32) + c; these
    follow each other along the columns. What is missing there is zero.
    """
    machine = launch.machine_of(scales)
    rows, columns = scales.shape
    function = machine.function(_SOURCE)
    pitch, count = np.int64(scales.strides[0]), words(rows, columns)
    arguments = (scales, pitch, np.int32(rows), np.int32(columns), found)
    function((-(-count // _THREADS),), (_THREADS,), arguments)

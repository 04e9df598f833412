"""Sums of rows, on the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda.row_sums import row_sums


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (5, 64), (9, 257)])
def test_row_sums(emulator: Any, dtype: Any, rows: int, columns: int) -> None:
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(columns)
    wide = rng.integers(limits.min, limits.max, (rows, columns + 5), dtype, endpoint=True)
    codes = wide[:, 2 : columns + 2]
    with launch.pretending(emulator):
        found = row_sums(codes)
    np.testing.assert_array_equal(found, codes.astype(np.int64).sum(1))

"""The order of scales for Blackwell, on the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from computed import interleaved

from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda.interleave import interleave, words


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (128, 4), (130, 9), (300, 32)])
def test_interleave(emulator: Any, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    wide = rng.integers(0, 255, (rows, columns + 5), np.uint8, endpoint=True)
    scales = wide[:, 2 : columns + 2]
    found = np.full(words(rows, columns), 0xDEADBEEF, np.uint32)
    with launch.pretending(emulator):
        interleave(scales, found)
    np.testing.assert_array_equal(found.view(np.uint8), interleaved(scales))

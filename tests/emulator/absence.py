"""What a test wants and is not here: the test is left out, or fails where CI has everything."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from lowbit.kernels.cutlass import package

_ALL_IS_HERE = os.environ.get("CI") == "true"


def absent(reason: str) -> NoReturn:
    """End a test that cannot run."""
    if _ALL_IS_HERE:
        pytest.fail(reason)
    pytest.skip(reason)


needs_headers = pytest.mark.skipif(
    package.headers() is None and not _ALL_IS_HERE,
    reason="chooses among kernels that it may compile, or compiles: wants nvidia-cutlass",
)

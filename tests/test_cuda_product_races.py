"""The product kernels under ThreadSanitizer: threads of a block, and blocks that share columns."""

import os
from pathlib import Path

import pytest
import races

HERE = Path(__file__).parent


def test_products_have_no_races(emulator):
    reason = races.missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    files = [str(HERE / name) for name in ("test_cuda_products.py", "test_cuda_hopper.py")]
    races.rerun(*files, "-k", "blocks_share_the_columns or (every_kind and int4_g64)")

"""Kernels whose results cannot show a race are seen to have one."""

from pathlib import Path

import pytest
import races
from absence import absent

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def sanitizer(emulator):
    reason = races.missing()
    if reason is not None:
        absent(reason)


def test_planted_races_are_found():
    races.rerun(str(HERE / "emulator/race_cases.py"))


def test_pipelines_have_no_races():
    chosen = "(pipelined_gemm and 33) or (tma_feeds and 100 and not cuda)"
    files = [str(HERE / name) for name in ("test_emulator_bugs.py", "test_cuda_sm90.py")]
    races.rerun(*files, "-k", chosen)


def test_blocks_that_share_a_sum_have_no_races():
    products = str(HERE / "test_cuda_products.py")
    races.rerun(products, "-k", "share_the_columns and int8_row")


def test_a_failure_is_told():
    with pytest.raises(AssertionError, match="deselected"):
        races.rerun(str(HERE / "test_emulator.py"), "-k", "no_such_test")

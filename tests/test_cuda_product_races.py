"""The product kernels under ThreadSanitizer: threads of a block, and blocks that share columns."""

from pathlib import Path

import races
from absence import absent

HERE = Path(__file__).parent


def test_products_have_no_races(emulator):
    reason = races.missing()
    if reason is not None:
        absent(reason)
    files = [str(HERE / name) for name in ("test_cuda_products.py", "test_cuda_hopper.py")]
    races.rerun(*files, "-k", "blocks_share_the_columns or (every_kind and int4_g64)")

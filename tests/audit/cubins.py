"""Machine code that the package brings along: the kernels of common products.

`make cubins` compiles them and writes kernels/cuda/cubins.

tests/test_cuda_shipped.py fails where that is stale.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import usual

from lowbit.kernels.cuda import archive, compile

BUDGET = 1_500_000
"""Bytes that all archives may take in the wheel."""


def keys(arch: str) -> set[str]:
    """What an archive has to hold."""
    return {compile.key(source, arch) for source in usual.shipped(arch)}


def write(arch: str) -> int:
    """Compile and pack the kernels of an architecture; return the bytes that they take."""
    sources = {compile.key(source, arch): source for source in usual.shipped(arch)}
    before = archive.load(arch)
    same = before is not None and before.nvrtc == compile.version()
    known = dict(before.cubins) if before is not None and same else {}
    fresh = [key for key in sources if key not in known]
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda key: compile.nvrtc(sources[key], arch), fresh)
        known |= {key: (each.code, each.name) for key, each in zip(fresh, made, strict=True)}
    cubins = {key: known[key] for key in sources}
    return archive.save(arch, archive.Archive(compile.version(), cubins), archive.FOLDER)


def main() -> None:
    """Bring the archives up to date."""
    total = 0
    for arch in usual.DEVICES:
        size = write(arch)
        total += size
        print(f"{arch}: {len(keys(arch))} kernels, {size / 1000:.0f} kB")
    if total > BUDGET:
        sys.exit(f"{total} bytes, more than the budget of {BUDGET}: see tests/audit/usual.py")


if __name__ == "__main__":
    main()

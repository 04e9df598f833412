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
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda source: compile.nvrtc(source, arch), sources.values()))
    cubins = {key: (each.code, each.name) for key, each in zip(sources, made, strict=True)}
    return archive.save(arch, archive.Archive(compile.version(), cubins), archive.FOLDER)


if __name__ == "__main__":
    for path in archive.FOLDER.glob("*.xz"):
        path.unlink()
    total = 0
    for arch in usual.DEVICES:
        size = write(arch)
        total += size
        print(f"{arch}: {len(keys(arch))} kernels, {size / 1000:.0f} kB")
    if total > BUDGET:
        sys.exit(f"{total} bytes, more than the budget of {BUDGET}: see tests/audit/usual.py")

"""Machine code that the package brings along: the kernels of common products.

`make cubins` compiles them and writes kernels/cuda/cubins: all of an architecture into one file,
those on CUTLASS, which take half a minute each, into one file each.

tests/test_cuda_shipped.py fails where that is stale.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import sass
import usual

from lowbit.kernels import cutlass
from lowbit.kernels.cuda import archive, compile
from lowbit.kernels.cuda.compile import Cubin
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cutlass.package import Shipped

PRODUCTS = "[HIQ]?G?MMA|UTC.*MMA|OMMA"
"""Names of instructions of the tensor cores."""
BUDGET = 1_500_000
"""Bytes that the archives of architectures may take in the wheel."""
BUDGET_ALONE = 4_000_000
"""Bytes that the kernels on CUTLASS may take."""
TABLE = Path(__file__).parent / "cutlass.json"
"""What the kernels on CUTLASS take; docs/generate.py prints it."""
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
"""Of kernels on CUTLASS."""


def keys(arch: str) -> set[str]:
    """What an archive has to hold."""
    return {compile.key(source, arch) for source in usual.shipped(arch)}


Kernels = dict[tuple[str, str], tuple[Source, Shipped]]
"""By architecture and key."""


def families() -> dict[str, Kernels]:
    """Kernels with an archive each, by the module that they are of."""
    found: dict[str, Kernels] = {}
    for info in iter_modules(cutlass.__path__, f"{cutlass.__name__}."):
        module = import_module(info.name)
        if hasattr(module, "shipped"):
            found[info.name.rpartition(".")[2]] = {
                (arch, compile.key(source, arch)): (source, shipped)
                for arch in ARCHS
                for source, shipped in module.shipped(arch).items()
            }
    return found


def alone() -> Kernels:
    """Kernels with an archive each."""
    return {each: kernel for kernels in families().values() for each, kernel in kernels.items()}


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


def write_alone(arch: str, key: str, source: Source, shipped: Shipped) -> None:
    """Compile and pack one kernel."""
    made, said = compile.nvrtc_said(source, arch)
    usage = sass.usage(made, arch)
    faults = usage.faults()
    if "wgmma" in said:  # which the compiler makes wait for each other
        faults.append(said)
    if faults:
        raise ValueError(
            f"{arch} {shipped.label}: {usage.registers} registers, {'; '.join(faults)}"
        )
    content = {key: (made.code, made.name)}
    packed = archive.Archive(compile.version(), content)
    size = archive.save(archive.file_of(arch, key), packed, archive.FOLDER)
    print(f"{arch} {shipped.label}: {usage.registers} registers, {size / 1000:.0f} kB", flush=True)


def row(arch: str, key: str, source: Source, shipped: Shipped) -> dict[str, Any]:
    """What the machine code of one kernel takes and holds."""
    made = archive.load(arch, key)
    assert made is not None
    cubin = Cubin(*made.cubins[key])
    found = sass.disassembled(cubin)
    return {
        "arch": arch,
        "for": shipped.label,
        "registers": sass.usage(cubin, arch).registers,
        "argument": shipped.argument,
        "products": sass.count(found, PRODUCTS),
        "instructions": sum(found.values()),
    }


def write_table(wanted: Kernels) -> None:
    """Bring the table of the kernels on CUTLASS up to date."""
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    rows = {}
    for each, kernel in wanted.items():
        name = archive.file_of(*each)
        rows[name] = known.get(name) or row(*each, *kernel)
        rows[name] |= {"for": kernel[1].label, "argument": kernel[1].argument}
    TABLE.write_text(json.dumps(rows, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def main() -> None:
    """Bring the archives up to date."""
    total = 0
    for arch in usual.DEVICES:
        size = write(arch)
        total += size
        print(f"{arch}: {len(keys(arch))} kernels, {size / 1000:.0f} kB")
    if total > BUDGET:
        sys.exit(f"{total} bytes, more than the budget of {BUDGET}: see tests/audit/usual.py")
    wanted = alone()
    names = {f"{archive.file_of(*each)}.xz" for each in wanted}
    for path in archive.FOLDER.glob("*-*.xz"):
        if path.name not in names:
            path.unlink()
    fresh = [each for each in wanted if not archive.exists(*each)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(write_alone, *each, *wanted[each]) for each in fresh]
    failed = [error for error in (job.exception() for job in jobs) if error is not None]
    for error in failed:
        print(error, file=sys.stderr)
    if failed:
        sys.exit(f"{len(failed)} kernels failed")
    write_table(wanted)
    total = sum(path.stat().st_size for path in archive.FOLDER.glob("*-*.xz"))
    print(f"on CUTLASS: {len(wanted)} kernels, {total / 1000:.0f} kB")
    if total > BUDGET_ALONE:
        sys.exit(f"{total} bytes, more than the budget of {BUDGET_ALONE}")


if __name__ == "__main__":
    main()

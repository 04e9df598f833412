"""Every kernel that the dispatcher can choose for common formats, its machine code in numbers.

`make audit` compiles them all and writes table.json.

tests/test_cuda_audit.py fails where table.json is stale, docs/generate.py prints it.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sass
import usual

from lowbit.kernels.cuda import compile
from lowbit.kernels.cuda.launch import Source

PATH = Path(__file__).parent / "table.json"
Table = dict[str, Any]


def keys(arch: str) -> dict[str, tuple[Source, str]]:
    """All kernels by their key, each with what it is for."""
    return {compile.key(s, arch): (s, label) for s, label in usual.audited(arch).items()}


def numbers(arch: str, source: Source, label: str) -> dict[str, int]:
    """Compile one kernel and look at what it takes."""
    usage = sass.usage(compile.nvrtc(source, arch), arch)
    shared = source.shared + usage.shared
    blocks = sass.blocks(arch, usage.registers, source.threads, shared)
    faults = [*usage.faults(), *([] if blocks else ["no room for a block"])]
    if faults:
        raise SystemExit(f"{arch} {label}, {source.name}: {'; '.join(faults)}")
    return {
        "threads": source.threads,
        "registers": usage.registers,
        "shared": shared,
        "blocks": blocks,
        "in flight": sass.in_flight(source.text, source.shared, blocks),
    }


def table(arch: str, known: Table) -> Table:
    """Key and description of every kernel; what is known is not compiled again."""
    found = keys(arch)
    made: Table = {}
    with ThreadPoolExecutor() as pool:
        fresh = {
            key: pool.submit(numbers, arch, source, label)
            for key, (source, label) in found.items()
            if key not in known
        }
        for key, (source, label) in found.items():
            name = source.name.partition("<")[0].removeprefix("lb::")
            made[key] = {"for": label, "kernel": name}
            made[key] |= fresh[key].result() if key in fresh else known[key] | made[key]
            print(f"\r{arch}: {len(made)} of {len(found)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return made


def main() -> None:
    """Bring table.json up to date."""
    known: Table = json.loads(PATH.read_text()) if PATH.exists() else {}
    version = list(compile.version())
    if known.get("nvrtc") != version:
        known = {}
    tables = {arch: table(arch, known.get(arch, {})) for arch in usual.DEVICES}
    text = json.dumps({"nvrtc": version, **tables}, separators=(",", ":"))
    PATH.write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()

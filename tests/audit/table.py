"""Every kernel that the dispatcher can choose for common formats, its machine code in numbers.

`make audit` compiles them all and writes table.json.

tests/test_cuda_audit.py fails where table.json is stale, docs/generate.py prints it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sass
import usual
from sass import Report

from lowbit.kernels.cuda import compile
from lowbit.kernels.cuda.launch import Source

PATH = Path(__file__).parent / "table.json"


def faults(report: Report) -> list[str]:
    """What no kernel may have."""
    found = []
    if report.spills or report.local:
        found.append(f"{report.spills} loads and stores of {report.local} bytes of local memory")
    if report.stack:
        found.append(f"{report.stack} bytes of stack")
    return found


def keys(arch: str) -> dict[str, tuple[Source, str]]:
    """All kernels by their key, each with what it is for."""
    return {compile.key(s, arch): (s, label) for s, label in usual.audited(arch).items()}


def row(arch: str, source: Source, label: str) -> dict[str, Any]:
    """Compile one kernel and describe it."""
    report = sass.read(compile.nvrtc(source, arch), arch)
    wrong = faults(report)
    if wrong:
        raise SystemExit(f"{arch} {label}, {source.name}: {'; '.join(wrong)}")
    shared = source.shared + report.shared
    blocks = sass.blocks(arch, report.registers, source.threads, shared)
    return {
        "for": label,
        "kernel": source.name.partition("<")[0].removeprefix("lb::"),
        "threads": source.threads,
        "registers": report.registers,
        "shared": shared,
        "blocks": blocks,
        "in flight": sass.in_flight(source.text, source.shared, blocks),
        "instructions": sum(report.opcodes.values()),
    }


def rows(arch: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and description of every kernel."""
    found = keys(arch)
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda each: row(arch, *each), found.values())
        for number, (key, described) in enumerate(zip(found, made, strict=True), 1):
            print(f"\r{arch}: {number} of {len(found)}", end="", file=sys.stderr, flush=True)
            yield key, described
    print(file=sys.stderr)


if __name__ == "__main__":
    found = {"nvrtc": compile.version(), **{arch: dict(rows(arch)) for arch in usual.DEVICES}}
    lines = json.dumps(found, separators=(",", ":")).replace('"},"', '"},\n"').replace("},", "},\n")
    PATH.write_text(lines + "\n")

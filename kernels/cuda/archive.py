"""Machine code that comes with the package: one compressed file for each architecture.

Kernels on a library are big, and have a file each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "cubins"


class Archive(NamedTuple):
    """What an architecture's file holds."""

    nvrtc: tuple[int, int]
    """Version that compiled it."""
    cubins: Mapping[str, tuple[bytes, str]]
    """Key of compile.py: machine code, linker's name of the kernel."""


@cache
def load(arch: str, alone: str | None = None) -> Archive | None:
    """Return the archive of an architecture, or of one kernel's key; None where there is none."""
    path = FOLDER / f"{file_of(arch, alone)}.xz"
    return unpack(path.read_bytes()) if path.exists() else None


def exists(arch: str, alone: str) -> bool:
    """Return whether a kernel has an archive of its own."""
    return (FOLDER / f"{file_of(arch, alone)}.xz").exists()


def file_of(arch: str, alone: str | None = None) -> str:
    """Return the name of an archive: of an architecture, or of a kernel that has its own."""
    return arch if alone is None else f"{arch}-{alone[:20]}"


def unpack(packed: bytes) -> Archive:
    """Return what `save` has written."""
    import lzma

    head, content = lzma.decompress(packed).split(b"\n", 1)
    table = json.loads(head)
    cubins, at = {}, 0
    for key, name, size in table["cubins"]:
        cubins[key] = content[at : at + size], name
        at += size
    major, minor = table["nvrtc"]
    return Archive((major, minor), cubins)


def save(name: str, archive: Archive, folder: Path) -> int:
    """Write an archive and return its size. Equal content gives equal bytes."""
    import lzma

    order = sorted(archive.cubins.items())
    table = [[key, name, len(code)] for key, (code, name) in order]
    head = json.dumps({"nvrtc": archive.nvrtc, "cubins": table}, separators=(",", ":"))
    # One stream: kernels resemble each other, and alone each would take twice the room.
    data = head.encode() + b"\n" + b"".join(code for _, (code, _) in order)
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.xz").write_bytes(packed)
    return len(packed)

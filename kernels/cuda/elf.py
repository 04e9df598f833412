"""The ELF files that NVRTC makes: names cut short, and what a kernel says of itself."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_OBJECT, _SYMTAB = 1, 2
_ARGUMENT = 0x1704  # EIATTR_KPARAM_INFO: index, ordinal, offset, and in 14 high bits the size
_CLUSTER = 0x3D04  # EIATTR_CTA_PER_CLUSTER: x, y, z
_LONG = 4  # the format of an attribute that has its length in place of its value


class _Section(NamedTuple):
    name: str
    kind: int
    at: int
    size: int
    link: int


def shortened(code: bytes) -> bytes:
    """The same file with short names of its variables, which nothing asks for by name.

    NVRTC keeps every constant of the headers as a variable: CUTLASS's names take a megabyte.
    """
    found = bytearray(code)
    sections = list(_sections(code))
    for table in sections:
        if table.kind != _SYMTAB:
            continue
        names = sections[table.link]
        held = {b"": 0}
        text = bytearray(1)
        for i, at in enumerate(range(table.at, table.at + table.size, 24)):
            name_at, info = struct.unpack_from("<IB", code, at)
            start = names.at + name_at
            name = code[start : code.index(b"\0", start)]
            if info & 15 == _OBJECT and len(name) > 8:
                name = b"v%x" % i
            if name not in held:
                held[name] = len(text)
                text += name + b"\0"
            struct.pack_into("<I", found, at, held[name])
        if len(text) > names.size:
            return code
        found[names.at : names.at + names.size] = text.ljust(names.size, b"\0")
    return bytes(found)


def argument_bytes(code: bytes, name: str) -> list[int]:
    """Sizes of a kernel's arguments."""
    found = (struct.unpack("<IHHI", each) for each in _attributes(code, name, _ARGUMENT))
    return [packed >> 18 for _, _, _, packed in sorted(found, key=lambda each: each[1])]


def cluster(code: bytes, name: str) -> tuple[int, int, int]:
    """Blocks of a cluster that a kernel asks for by itself."""
    for each in _attributes(code, name, _CLUSTER):
        x, y, z = struct.unpack("<III", each)
        return x, y, z
    return 1, 1, 1


def _attributes(code: bytes, name: str, wanted: int) -> Iterator[bytes]:
    info = next((s for s in _sections(code) if s.name == f".nv.info.{name}"), None)
    if info is None:
        raise ValueError(f"{name}: no kernel of this file")
    at = info.at
    while at < info.at + info.size:
        kind, length = struct.unpack_from("<HH", code, at)
        end = at + 4 + (length if kind & 0xFF == _LONG else 0)
        if kind == wanted:
            yield code[at + 4 : end]
        at = end


def _sections(code: bytes) -> Iterator[_Section]:
    if code[:5] != b"\x7fELF\2":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count, names = struct.unpack_from("<HHH", code, 58)
    heads = [struct.unpack_from("<IIQQQQI", code, table + i * size) for i in range(count)]
    start = heads[names][4]
    for name, kind, _, _, at, length, link in heads:
        end = code.index(b"\0", start + name)
        yield _Section(code[start + name : end].decode(), kind, at, length, link)

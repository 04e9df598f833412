"""The ELF files that NVRTC makes: names cut short, and what a kernel's arguments take."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_OBJECT, _SYMTAB, _STRTAB = 1, 2, 3
_PARAMETER = 0x1704  # EIATTR_KPARAM_INFO: index, ordinal, offset, and in 14 high bits the size
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
        if len(text) <= names.size:
            found[names.at : names.at + names.size] = text.ljust(names.size, b"\0")
        else:
            return code
    return bytes(found)


def parameter_bytes(code: bytes, name: str) -> int:
    """Bytes of a kernel's only argument."""
    for section in _sections(code):
        if section.name == f".nv.info.{name}":
            at, end = section.at, section.at + section.size
            while at < end:
                kind, length = struct.unpack_from("<HH", code, at)
                if kind == _PARAMETER:
                    return int(struct.unpack_from("<I", code, at + 12)[0] >> 18)
                at += 4 + (length if kind & 0xFF == _LONG else 0)
    raise ValueError(f"{name}: no kernel of this file")


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

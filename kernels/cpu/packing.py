"""Canonical rows of codes to words16 and back, compiled: a tile of the pool is one panel.

Both ways go through words of the stream, those of sixteen rows side by side. Where a word of the
panel is another one, granules are taken apart and put together in vectors of sixteen rows: four
neighbouring codes are spread to a byte each, and each plane takes its bits of all four at once.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit.kernels.cpu import native, pack, pool
from lowbit.kernels.cpu.ir import INT, LANES, VECTOR, Function, Module, Value, constant
from lowbit.kernels.cpu.isa import Isa, host
from lowbit.kernels.cpu.pool import address
from lowbit.kernels.layouts import PANEL, WIDTHS, granule, granule_words, planes, row_words

Array = npt.NDArray[Any]
Change = Callable[[Function, list[Value], int], list[Value]]

_CHUNK = 16  # granules between the two steps: lines of a row, and at most 7 KB of words


class Arguments(NamedTuple):
    """The block that the tiles read."""

    rows: int
    stride: int  # bytes
    n: int
    size: int  # bytes of a row
    panels: int
    granules: int  # of a row


_BLOCK = struct.Struct(f"<{len(Arguments._fields)}q")


@dataclass(frozen=True)
class Rearrangement:
    """One direction for codes of one width, compiled; it may be called concurrently."""

    bits: int
    entry: int

    def __call__(
        self, *, rows: int, stride: int, n: int, k: int, panels: int, threads: int | None = None
    ) -> None:
        """Rearrange `n` rows of `k` codes, `stride` bytes apart; arrays are given by address."""
        granules = row_words(self.bits, k) // granule_words(self.bits)
        size = -(-k * self.bits // 8)
        argument = _BLOCK.pack(rows, stride, n, size, panels, granules)
        held = ctypes.create_string_buffer(argument, _BLOCK.size)
        scratch = pack.POINTERS + VECTOR + _CHUNK * granule_words(self.bits) * VECTOR
        pool.run(self.entry, ctypes.addressof(held), -(-n // PANEL), scratch, threads)


@lru_cache(maxsize=64)
def packing(bits: int, isa: Isa) -> Rearrangement:
    """Rows to words16: reads `rows`, writes every word of `panels`."""
    return Rearrangement(bits, native.load(pack_text(bits, isa), isa).address("tile"))


@lru_cache(maxsize=64)
def unpacking(bits: int, isa: Isa) -> Rearrangement:
    """words16 to rows: reads `panels`, writes every byte of `rows`."""
    return Rearrangement(bits, native.load(unpack_text(bits, isa), isa).address("tile"))


def words16(rows: Array, bits: int, k: int) -> Array:
    """What `layouts.words16` gives, for each matrix of a stack: [..., panels, row_words, 16]."""
    lead, n = rows.shape[:-2], rows.shape[-2]
    out = _empty((*lead, -(-n // PANEL), row_words(bits, k), PANEL), np.uint32)
    if not out.size:
        return out
    if rows.strides[-1] != 1:
        rows = np.ascontiguousarray(rows)
    run = packing(bits, host())
    for index in np.ndindex(lead):
        one = rows[index]
        run(rows=address(one), stride=one.strides[0], n=n, k=k, panels=address(out[index]))
    return out


def rows(panels: Array, n: int, bits: int, k: int) -> Array:
    """What `layouts.rows` gives, for each matrix of a stack: [..., n, bytes]."""
    lead = panels.shape[:-3]
    out = _empty((*lead, n, -(-k * bits // 8)), np.uint8)
    if not out.size:
        return out
    run = unpacking(bits, host())
    for index in np.ndindex(lead):
        one = np.ascontiguousarray(panels[index])
        run(rows=address(out[index]), stride=out.shape[-1], n=n, k=k, panels=address(one))
    return out


def _empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """Memory that begins with a cache line, so that no vector of a panel lies in two."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + VECTOR, np.uint8)
    start = -address(memory) % VECTOR
    found: Array = memory[start : start + size].view(dtype).reshape(shape)
    return found


def pack_text(bits: int, isa: Isa) -> str:
    """IR of the `tile` that arranges one panel; see `Arguments`."""
    return _Tile(bits, isa).pack()


def unpack_text(bits: int, isa: Isa) -> str:
    """IR of the `tile` that restores the rows of one panel; see `Arguments`."""
    return _Tile(bits, isa).unpack()


class _Tile:
    """Writes one of the two tiles.

    Scratch: addresses of the rows, one vector, the words of some granules.
    """

    def __init__(self, bits: int, isa: Isa) -> None:
        self.bits, self.module = bits, Module(isa)
        names = {"a": "ptr", "number": "i64", "scratch": "ptr"}
        f = self.function = self.module.function("tile", names, "external")
        block, number, self.table = f.parameters
        self.vector = f.at(self.table, pack.POINTERS)
        self.lines = f.at(self.vector, VECTOR)
        kinds = {"rows": "ptr", "panels": "ptr"}
        self.a = {
            name: f.load(kinds.get(name, "i64"), f.at(block, 8 * i), 4)
            for i, name in enumerate(Arguments._fields)
        }
        first = f.mul(number, PANEL)
        a, one = self.a, constant("i64", 1)
        f.run(pack.row_table(self.module), a["rows"], self.table, a["stride"], first, a["n"], one)
        self.valid = f.op("sub", a["n"], first)
        # Addresses and sizes in granules; a pure width's granule is a word.
        self.words = granule_words(bits)
        across = f.mul(f.mul(number, a["granules"]), self.words * VECTOR)
        self.panel = f.at(a["panels"], across)

    def pack(self) -> str:
        """Text of rows to words16."""
        f, a = self.function, self.a
        transpose = pack.transposer(self.module)
        zero = constant("i64", 0)
        if self.bits in WIDTHS:
            f.run(transpose, self.table, self.valid, zero, a["size"], self.panel)
            return self.module.text()
        arrange = self._each_granule("arrange", _planed)
        with f.loop(0, a["granules"], _CHUNK) as loop:
            count, start, stop = self._chunk(loop.index)
            f.run(transpose, self.table, self.valid, start, stop, self.lines)
            missing = f.over(f.op("sub", stop, start), 4)
            with f.loop(missing, f.mul(count, self.words)) as word:
                f.store(constant(INT, 0), f.at(self.lines, f.mul(word.index, VECTOR)), 4)
            f.run(arrange, self.lines, self._granule(loop.index), count)
        return self.module.text()

    def unpack(self) -> str:
        """Text of words16 to rows."""
        f, a = self.function, self.a
        restore = _restorer(self.module)
        operands = (self.table, self.valid)
        if self.bits in WIDTHS:
            zero = constant("i64", 0)
            f.run(restore, *operands, zero, a["size"], self.panel, self.vector)
            return self.module.text()
        stream = self._each_granule("stream", _streamed)
        with f.loop(0, a["granules"], _CHUNK) as loop:
            count, start, stop = self._chunk(loop.index)
            f.run(stream, self._granule(loop.index), self.lines, count)
            f.run(restore, *operands, start, stop, self.lines, self.vector)
        return self.module.text()

    def _chunk(self, first: Value) -> tuple[Value, Value, Value]:
        """Granules from `first` on, and the bytes of a row where they start and stop."""
        f, a, size = self.function, self.a, 4 * self.words
        count = f.least(f.op("sub", a["granules"], first), _CHUNK)
        stop = f.least(f.mul(f.add(first, count), size), a["size"])
        return count, f.mul(first, size), stop

    def _granule(self, number: Value) -> Value:
        f = self.function
        return f.at(self.panel, f.mul(number, self.words * VECTOR))

    def _each_granule(self, name: str, change: Change) -> Function:
        """A function of (source, out, count): a change of the words of one granule, for all."""
        f = self.module.function(name, {"source": "ptr", "out": "ptr", "count": "i64"}, "apart")
        source, out, count = f.parameters
        lanes = self.module.isa.lanes  # of one register, or the words would not stay in them
        kind = f"<{lanes} x i32>"
        with f.loop(0, count) as loop:
            place = f.mul(loop.index, self.words * VECTOR)
            for lane in range(0, LANES, lanes):
                start, to = (f.at(base, f.add(place, 4 * lane)) for base in (source, out))
                held = [f.load(kind, f.at(start, w * VECTOR), 4) for w in range(self.words)]
                for w, word in enumerate(change(f, held, self.bits)):
                    f.store(word, f.at(to, w * VECTOR), 4)
        return f


class _Words:
    """Vectors that are or-ed together piece by piece."""

    def __init__(self, f: Function, count: int) -> None:
        self.f = f
        self.found: list[Value | None] = [None] * count

    def put(self, word: int, piece: Value) -> None:
        """Add a piece whose bits no other one has."""
        before = self.found[word]
        self.found[word] = piece if before is None else self.f.op("or", before, piece)

    def all(self) -> list[Value]:
        """The words, each of which has a piece."""
        return [word for word in self.found if word is not None]


def _shifted(f: Function, word: Value, left: int) -> Value:
    """Shift by `left` bits, to the right if negative."""
    if not left:
        return word
    return f.op("shl", word, left) if left > 0 else f.op("lshr", word, -left)


def _octets(mask: int) -> int:
    """The byte `mask` four times, as a signed word."""
    return int.from_bytes(bytes([mask]) * 4, "little", signed=True)


def _fields(bits: int, dword: int) -> list[tuple[int, int, int, int]]:
    """Where four codes lie: (word of the granule, shift in it, width, lowest bit) a plane."""
    found, base, low = [], 0, 0
    for width in planes(bits):
        word, place = divmod(dword, 8 // width)
        found.append((base + word, place * width, width, low))
        base += granule(bits) * width // 32
        low += width
    return found


def _planed(f: Function, stream: list[Value], bits: int) -> list[Value]:
    """A granule's words of the stream to words of its planes."""
    planar = _Words(f, len(stream))
    half, one = 2 ** (2 * bits) - 1, 2**bits - 1
    for dword in range(granule(bits) // 4):
        word, place = divmod(4 * bits * dword, 32)
        codes = _shifted(f, stream[word], -place)
        if place + 4 * bits > 32:
            codes = f.op("or", codes, _shifted(f, stream[word + 1], 32 - place))
        # Two and two codes, then one in each byte.
        upper = f.op("and", _shifted(f, codes, 16 - 2 * bits), half << 16)
        pairs = f.op("or", f.op("and", codes, half), upper)
        upper = f.op("and", _shifted(f, pairs, 8 - bits), (one << 8) * 0x10001)
        octets = f.op("or", f.op("and", pairs, one * 0x10001), upper)
        for to, shift, width, low in _fields(bits, dword):
            mask = _octets((2**width - 1) << shift)
            planar.put(to, f.op("and", _shifted(f, octets, shift - low), mask))
    return planar.all()


def _streamed(f: Function, planar: list[Value], bits: int) -> list[Value]:
    """A granule's words of its planes to words of the stream."""
    stream = _Words(f, len(planar))
    half, one = 2 ** (2 * bits) - 1, 2**bits - 1
    for dword in range(granule(bits) // 4):
        octets = _Words(f, 1)
        for source, shift, width, low in _fields(bits, dword):
            mask = _octets((2**width - 1) << low)
            octets.put(0, f.op("and", _shifted(f, planar[source], low - shift), mask))
        (codes,) = octets.all()
        # Two and two codes side by side, then all four.
        upper = f.op("and", _shifted(f, codes, bits - 8), (one << bits) * 0x10001)
        pairs = f.op("or", f.op("and", codes, one * 0x10001), upper)
        upper = f.op("and", _shifted(f, pairs, 2 * bits - 16), half << 2 * bits)
        codes = f.op("or", f.op("and", pairs, half), upper)
        word, place = divmod(4 * bits * dword, 32)
        stream.put(word, _shifted(f, codes, place))
        if place + 4 * bits > 32:
            stream.put(word + 1, _shifted(f, codes, place - 32))
    return stream.all()


def _restorer(module: Module) -> Function:
    """Bytes [start, stop) of sixteen rows from their words, of which the first begins at `start`.

    `rows` is a table of 16 addresses; of these `valid` are rows, the others are not touched. No
    byte outside of [start, stop) is written, no word beyond is read. `vector` is memory for one.
    """
    f = module.function(
        "restore",
        {"rows": "ptr", "valid": "i64", "start": "i64", "stop": "i64"}
        | dict.fromkeys(("words", "vector"), "ptr"),
        "apart",
    )
    rows, valid, start, stop, words, vector = f.parameters
    size = f.op("sub", stop, start)
    whole = f.select(f.compare("sge", valid, PANEL), f.op("udiv", size, 4), 0)
    done = constant("i64", 0)  # words
    # Whole cache lines first: lines of rows a power of two apart leave the cache before a second
    # piece is written to them.
    for count in (16, 4):
        end = f.mul(f.op("udiv", whole, count), count)
        with f.loop(done, end, count) as loop:
            source = f.at(words, f.mul(loop.index, VECTOR))
            offset = f.add(start, f.mul(loop.index, 4))
            lanes = LANES if count == 16 and module.isa.lanes == 16 else 4
            for lane in range(0, LANES, lanes):
                parts = _columns(f, f.at(source, 4 * lane), count, lanes)
                for i, part in enumerate(parts):
                    to = f.at(f.load("ptr", f.at(rows, 8 * (lane + i % lanes)), 8), offset)
                    f.store(part, f.at(to, i // lanes * 4 * lanes), 1)
        done = end
    real = f.least(valid, PANEL)
    with f.loop(done, f.over(size, 4)) as loop:
        word = f.load(INT, f.at(words, f.mul(loop.index, VECTOR)), 4)
        f.store(word, vector, 4)
        from_start = f.mul(loop.index, 4)
        left = f.op("sub", size, from_start)
        offset = f.add(start, from_start)
        with f.loop(0, real) as row:
            place = f.mul(row.index, 4)
            base = f.load("ptr", f.at(rows, f.mul(place, 2)), 8)
            to = f.at(base, offset)
            part = f.load("i32", f.at(vector, place), 4)
            with f.when(f.compare("sge", left, 4)):
                f.store(part, to, 1)
            with f.when(f.compare("slt", left, 4)), f.loop(0, left) as octet:
                byte = f.op("lshr", part, f.cast("trunc", f.mul(octet.index, 8), "i32"))
                f.store(f.cast("trunc", byte, "i8"), f.at(to, octet.index), 1)
    return f


def _columns(f: Function, source: Value, count: int, lanes: int) -> list[Value]:
    """Words of `lanes` rows, `lanes` words a vector; first the first ones of every row."""
    kind = f"<{lanes} x i32>"
    held = [f.load(kind, f.at(source, w * VECTOR), 4) for w in range(count)]
    return [part for at in range(0, count, lanes) for part in _transposed(f, held[at : at + lanes])]


def _transposed(f: Function, vectors: list[Value]) -> list[Value]:
    """Vectors of as many lanes: their numbers swapped with those of the lanes."""
    lanes = len(vectors)
    distance = lanes // 2
    while distance:
        # Blocks beside the diagonal, `distance` wide, change places.
        low = [lane & ~distance for lane in range(lanes)]
        front = [lane + (lanes if at & distance else 0) for at, lane in enumerate(low)]
        found = list(vectors)
        for i in range(lanes):
            if not i & distance:
                pair = vectors[i], vectors[i + distance]
                found[i] = f.shuffle(*pair, front)
                found[i + distance] = f.shuffle(*pair, [lane + distance for lane in front])
        vectors, distance = found, distance // 2
    return vectors

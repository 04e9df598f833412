"""x as the micro-kernels read it: converted, permuted, padded, one row a tile of the pool.

Numbers of x become operands (see `steps`), each granule in the order in which the codes of w come
out of their words. Zeros follow the last column, and each segment where tiles are not full. For
tiles, sixteen rows lie together, 64 bytes of each at a time.
Quantization of activations and the sums of integer codes happen on the way, while a row is in the
nearest cache.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lowbit.formats.declare import Element
from lowbit.kernels.cpu import absmax, native, pack, pool
from lowbit.kernels.cpu.decode import decoder
from lowbit.kernels.cpu.epilogue import narrow
from lowbit.kernels.cpu.ir import INT, LANES, Function, Module, Value, constant
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.tiles import TALL

CHUNK = 64  # bytes
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int16": 2, "int32": 4}
_SMALL = 1 << 16  # numbers that one thread arranges sooner than it wakes another


@dataclass(frozen=True)
class Arrangement:
    """What is compiled."""

    source: Element | str
    """A float dtype, "int8", or the element whose codes are given."""
    target: str
    """dtype of the operands."""
    order: tuple[int, ...]
    """Code of a granule by its place."""
    quantized: bool = False
    """Float numbers become codes of a signed integer, by the largest magnitude of each block."""
    tiled: bool = False
    sums: bool = False
    """The codes of each segment are summed."""

    @property
    def bits(self) -> int:
        """Of a stored number."""
        if isinstance(self.source, Element):
            return self.source.bits
        return 8 * SIZES[self.source]

    @property
    def copied(self) -> bool:
        """Numbers are operands already."""
        return self.source == self.target


class Arguments(NamedTuple):
    """The block that the generated `tile` reads."""

    x: int
    x_stride: int  # bytes
    k: int
    out: int
    out_stride: int  # bytes
    chunks: int  # of a row of operands
    tile: int  # bytes of a row that one tile has, at most a chunk
    segment: int  # columns
    segments: int
    segment_tiles: int
    padded: int  # 1: some tile is not full
    scales: int
    scales_stride: int
    block: int  # columns that share a scale
    blocks: int
    sums: int
    sums_stride: int
    factor: int  # that sums are multiplied by
    flag: int
    natural_at: int
    largest: float  # magnitude of a code


_FORMAT = struct.Struct(f"<{len(Arguments._fields) - 1}qf4x")
_ADDRESSES = ("x", "out", "scales", "sums", "flag")


def text(each: Arrangement, isa: Isa) -> str:
    """IR of `tile`."""
    module = Module(isa)
    f = module.function("tile", {"a": "ptr", "number": "i64", "scratch": "ptr"}, "external")
    block, number, scratch = f.parameters
    a = {}
    for i, name in enumerate(Arguments._fields):
        kind = "ptr" if name in _ADDRESSES else "float" if name == "largest" else "i64"
        a[name] = f.load(kind, f.at(block, 8 * i), 4)
    row = f.at(a["x"], f.mul(number, a["x_stride"]))
    natural = f.at(scratch, a["natural_at"])
    size = SIZES[each.target]
    whole = Value("i1", "true")
    if each.tiled:
        full = f.compare("eq", a["tile"], CHUNK)
        whole = f.op("and", full, f.compare("eq", a["padded"], 0))
    if each.quantized:
        codes = natural if each.target == "int8" else f.at(scratch, CHUNK)
        _quantize(f, each, a, row, number, codes)
        if each.target != "int8":
            _convert(f, "int8", each.target, a["k"], codes, natural, scratch)
    elif each.copied:
        row = _copied(f, whole, row, natural, f.mul(a["k"], size))
    else:
        if each.bits < 8:
            row = _expanded(f, each.bits, a["k"], row, f.at(scratch, CHUNK))
        _convert(f, each.source, each.target, a["k"], row, natural, scratch)
    if not each.copied:
        row = natural
        _zero(f, f.at(natural, f.mul(a["k"], size)), 4 * CHUNK)
    if not each.tiled:
        out = f.at(a["out"], f.mul(number, a["out_stride"]))
        _chunks(f, each, a, row, out, scratch, 1)
    else:
        above = f.mul(f.op("udiv", number, TALL), TALL)
        place = f.mul(f.op("sub", number, above), CHUNK)
        out = f.at(f.at(a["out"], f.mul(above, a["out_stride"])), place)
        _tiles(f, each, a, row, out, scratch, whole)
    if each.sums:
        _sums(f, each, a, row, number)
    return module.text()


def _quantize(
    f: Function, each: Arrangement, a: dict[str, Value], row: Value, number: Value, codes: Value
) -> None:
    assert isinstance(each.source, str)
    quantizer = absmax.quantizer(f.module, each.source)
    scales = f.at(a["scales"], f.mul(f.mul(number, a["scales_stride"]), 4))
    with f.loop(0, a["blocks"]) as loop:
        first = f.mul(loop.index, a["block"])
        f.run(
            quantizer,
            f.at(row, f.mul(first, SIZES[each.source])),
            f.least(f.op("sub", a["k"], first), a["block"]),
            f.at(codes, first),
            f.at(scales, f.mul(loop.index, 4)),
            a["largest"],
            a["flag"],
        )


def _copied(f: Function, whole: Value, row: Value, natural: Value, size: Value) -> Value:
    """The row itself; where it is not taken by whole chunks, a copy with zeros behind it."""

    def copy() -> list[Value]:
        _move(f, row, natural, size)
        _zero(f, f.at(natural, size), 4 * CHUNK)
        return [natural]

    (found,) = f.either(whole, lambda: [row], copy)
    return found


def _expanded(f: Function, bits: int, k: Value, row: Value, out: Value) -> Value:
    """Codes of a bit stream as a byte each."""
    count = f.over(f.mul(k, bits), 8)
    f.run(pack.expander(f.module, bits), row, constant("i64", 0), count, count, out)
    return out


def _convert(
    f: Function,
    source: Element | str,
    target: str,
    k: Value,
    row: Value,
    natural: Value,
    scratch: Value,
) -> None:
    """Stored numbers to operands, sixteen at a time; the last ones through a copy."""
    stored = 8 if isinstance(source, Element) else 8 * SIZES[source]
    size = SIZES[target]

    def sixteen(at: Value, to: Value) -> None:
        lanes = f.load(f"<{LANES} x i{stored}>", at, 1)
        narrow_integer = f"<{LANES} x i{8 * size}>"
        if source == "int8" and target.startswith("int"):
            result = f.cast("sext", lanes, narrow_integer)
        else:
            value = decoder(source, f.module).emit(f, f.cast("zext", lanes, INT), 0)
            if target.startswith("int"):
                result = f.cast("trunc", f.cast("fptosi", value, INT), narrow_integer)
            else:
                result = narrow(f, value, target)
        f.store(result, to, 1)

    whole = f.mul(f.op("udiv", k, LANES), LANES)
    with f.loop(0, whole, LANES) as loop:
        sixteen(f.at(row, f.mul(loop.index, stored // 8)), f.at(natural, f.mul(loop.index, size)))
    with f.when(f.compare("slt", whole, k)):
        _zero(f, scratch, CHUNK)
        left = f.mul(f.op("sub", k, whole), stored // 8)
        _move_bytes(f, f.at(row, f.mul(whole, stored // 8)), scratch, left)
        sixteen(scratch, f.at(natural, f.mul(whole, size)))


def _chunks(
    f: Function,
    each: Arrangement,
    a: dict[str, Value],
    row: Value,
    out: Value,
    scratch: Value,
    pitch: int,
) -> None:
    """A row chunk by chunk, `pitch` chunks apart."""
    size = f.mul(a["k"], SIZES[each.target])
    whole = f.mul(f.op("udiv", size, CHUNK), CHUNK)
    with f.loop(0, whole, CHUNK) as loop:
        _permuted(f, each, f.at(row, loop.index), f.at(out, f.mul(loop.index, pitch)), CHUNK)
    with f.when(f.compare("slt", whole, size)):
        _zero(f, scratch, CHUNK)
        _move_bytes(f, f.at(row, whole), scratch, f.op("sub", size, whole))
        _permuted(f, each, scratch, f.at(out, f.mul(whole, pitch)), CHUNK)
    with f.loop(f.over(size, CHUNK), a["chunks"]) as loop:
        f.store(constant(INT, 0), f.at(out, f.mul(loop.index, pitch * CHUNK)), 4)


def _tiles(
    f: Function,
    each: Arrangement,
    a: dict[str, Value],
    row: Value,
    out: Value,
    scratch: Value,
    whole: Value,
) -> None:
    """A row of tiles: whole chunks, or as many pieces as a tile has."""
    granule = len(each.order) * SIZES[each.target]
    piece = max(16, granule)

    def chunks() -> list[Value]:
        _chunks(f, each, a, row, out, scratch, TALL)
        return []

    def pieces() -> list[Value]:
        with f.loop(0, a["chunks"]) as loop:
            f.store(constant(INT, 0), f.at(out, f.mul(loop.index, TALL * CHUNK)), 4)
        even = f.compare("eq", f.op("urem", a["tile"], piece), 0)
        whole = f.op("and", even, f.compare("eq", a["padded"], 0))
        f.either(whole, lambda: cut(piece), lambda: cut(granule))
        return []

    def cut(size: int) -> list[Value]:
        with f.loop(0, a["segments"]) as loop:
            first = f.mul(loop.index, a["segment"])
            count = f.mul(f.least(f.op("sub", a["k"], first), a["segment"]), SIZES[each.target])
            source = f.at(row, f.mul(first, SIZES[each.target]))
            to = f.at(out, f.mul(f.mul(loop.index, a["segment_tiles"]), TALL * CHUNK))
            with f.loop(0, f.over(count, a["tile"])) as tile:
                start = f.mul(tile.index, a["tile"])
                stop = f.least(f.op("sub", count, start), a["tile"])
                begin = f.at(to, f.mul(tile.index, TALL * CHUNK))
                with f.loop(0, stop, size) as inner:
                    at = f.at(source, f.add(start, inner.index))
                    _permuted(f, each, at, f.at(begin, inner.index), size)
        return []

    f.either(whole, chunks, pieces)


def _permuted(f: Function, each: Arrangement, source: Value, to: Value, size: int) -> None:
    """Some bytes of operands, each granule brought into the order of w's steps."""
    width, granule = SIZES[each.target], len(each.order)
    kind = f"<{size // width} x i{8 * width}>"
    held = f.load(kind, source, 1)
    if each.order != tuple(range(granule)):
        places = range(size // width)
        held = f.shuffle(
            held, held, [i // granule * granule + each.order[i % granule] for i in places]
        )
    f.store(held, to, 1)


def _sums(f: Function, each: Arrangement, a: dict[str, Value], row: Value, number: Value) -> None:
    """Sums of the codes of each segment, from the row in its natural order."""
    size = SIZES[each.target]
    lane = f"i{8 * size}"
    to = f.at(a["sums"], f.mul(f.mul(number, a["sums_stride"]), 4))
    factor = f.cast("trunc", a["factor"], "i32")
    with f.loop(0, a["segments"]) as loop:
        first = f.mul(loop.index, a["segment"])
        count = f.least(f.op("sub", a["k"], first), a["segment"])
        source = f.at(row, f.mul(first, size))
        whole = f.mul(f.op("udiv", count, LANES), LANES)
        with f.loop(0, whole, LANES, carried=[constant(INT, 0)]) as inner:
            lanes = f.load(f"<{LANES} x {lane}>", f.at(source, f.mul(inner.index, size)), 1)
            inner.carried = [f.add(inner.carried[0], f.cast("sext", lanes, INT))]
        total = f.call("llvm.vector.reduce.add.v16i32", "i32", inner.results[0])
        with f.loop(whole, count, carried=[total]) as rest:
            one = f.load(lane, f.at(source, f.mul(rest.index, size)), 1)
            rest.carried = [f.add(rest.carried[0], f.cast("sext", one, "i32"))]
        f.store(f.mul(rest.results[0], factor), f.at(to, f.mul(loop.index, 4)), 4)


def _zero(f: Function, to: Value, size: int) -> None:
    for offset in range(0, size, CHUNK):
        f.store(constant(INT, 0), f.at(to, offset), 1)


def _move(f: Function, source: Value, to: Value, size: Value) -> None:
    whole = f.mul(f.op("udiv", size, CHUNK), CHUNK)
    with f.loop(0, whole, CHUNK) as loop:
        f.store(f.load(INT, f.at(source, loop.index), 1), f.at(to, loop.index), 1)
    _move_bytes(f, f.at(source, whole), f.at(to, whole), f.op("sub", size, whole))


def _move_bytes(f: Function, source: Value, to: Value, size: Value) -> None:
    with f.loop(0, size) as loop:
        f.store(f.load("i8", f.at(source, loop.index), 1), f.at(to, loop.index), 1)


@dataclass(frozen=True)
class Arrange:
    """A compiled arrangement; see `Arguments` for what a call takes."""

    each: Arrangement
    entry: int

    def __call__(self, rows: int, arguments: Arguments) -> None:
        """Arrange `rows` rows."""
        k = arguments.k
        each = self.each
        apart = each.bits < 8 or (each.quantized and each.target != "int8")
        natural = 2 * CHUNK + (k + CHUNK if apart else 0)
        room = natural + k * SIZES[each.target] + 5 * CHUNK
        packed = _FORMAT.pack(*arguments._replace(natural_at=natural))
        held = ctypes.create_string_buffer(packed, _FORMAT.size)
        threads = 1 if rows * k <= _SMALL else None
        pool.run(self.entry, ctypes.addressof(held), rows, room, threads)


@lru_cache(maxsize=256)
def build(each: Arrangement, isa: Isa) -> Arrange:
    """Compile, or take from the object cache."""
    return Arrange(each, native.load(text(each, isa), isa).address("tile"))

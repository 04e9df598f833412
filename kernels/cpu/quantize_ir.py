"""Quantizing as a module: extremes of blocks, their scales, codes, bit streams.

Three functions for the thread pool share one block of arguments:

- `fused`: everything, for blocks that fit a near cache;
- `extremes`: smallest and largest number of each block;
- `encode`: codes, given each block's divisor and offset.

Their work is counted in chunks: a band of rows (for `encode` one row) by a part of the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lowbit.formats.declare import Element
from lowbit.kernels.cpu import encode_bits, quantize_rule
from lowbit.kernels.cpu.absmax import in_vectors
from lowbit.kernels.cpu.encode import encoder
from lowbit.kernels.cpu.encode_lanes import (
    SIZES,
    Divisor,
    load_numbers,
    prefetch,
    quotient,
    store_lanes,
)
from lowbit.kernels.cpu.ir import LANES, Function, Module, Value, constant
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.quantize_extremes import extremes

PIECE = 2048  # codes that wait as bytes before they are packed
_AHEAD = 1 << 13  # bytes, where all of an array is read in order


@dataclass(frozen=True)
class Spec:
    """What is compiled; sizes, strides and block shapes are run-time arguments."""

    dtype: str
    """Of the numbers: float32, float16 or bfloat16."""
    element: Element
    scale: Element | str
    zero: Element | str | None = None
    bias: bool = False
    tensor_scale: bool = False
    signed: bool = True
    """Both extremes are looked for, not the largest magnitude alone."""
    vectors: int = 0
    """A block is one row of so many whole vectors; 0: any block."""

    @property
    def offset(self) -> bool:
        """A block has a zero point or a bias."""
        return self.zero is not None or self.bias

    @property
    def power(self) -> bool:
        """Scales are powers of two alone, so that dividing is multiplying."""
        kind = self.scale
        return isinstance(kind, Element) and quantize_rule.is_power(kind) and not self.tensor_scale


class Arguments(NamedTuple):
    """The block that the functions read: 64-bit integers and addresses, one float at the end.

    Strides are bytes for x and codes, entries for blocks; `*_at` are offsets into scratch.
    """

    rows: int
    columns: int
    first_row: int  # of x, where blocks of rows are counted from
    block_rows: int
    block_columns: int
    band: int  # rows of a chunk
    part: int  # columns of a chunk
    across: int  # chunks side by side
    per: int  # chunks of a tile
    chunks: int
    quick: int
    x_stride: int
    codes_stride: int
    grid_stride: int
    x: int
    codes: int
    scales: int
    zeros: int
    biases: int
    low: int
    high: int
    steps: int
    reciprocals: int
    offsets: int
    flag: int
    steps_at: int
    reciprocals_at: int
    offsets_at: int
    low_at: int
    high_at: int
    work_at: int
    bytes_at: int
    quick_at: int
    second: float


FORMAT = f"<{len(Arguments._fields) - 1}qf4x"
_ADDRESSES = Arguments._fields[Arguments._fields.index("x") : Arguments._fields.index("steps_at")]


def text(spec: Spec, isa: Isa) -> str:
    """The module's IR."""
    module = Module(isa)
    find, encode = extremes(spec, module), _encode(spec, module)
    rule = quantize_rule.rule(spec, module)
    _fused(spec, module, find, rule, encode)
    _extremes_alone(spec, module, find)
    _encode_alone(spec, module, encode)
    return module.text()


def _entry(
    module: Module, name: str, body: Callable[[Function, dict[str, Value], Value, Value], None]
) -> None:
    """A function for the pool: body(function, arguments, band, part) for each chunk of a tile."""
    f = module.function(name, {"a": "ptr", "number": "i64", "scratch": "ptr"}, "external")
    block, number, scratch = f.parameters
    a: dict[str, Value] = {"scratch": scratch}
    for i, each in enumerate(Arguments._fields):
        kind = "ptr" if each in _ADDRESSES else "float" if each == "second" else "i64"
        a[each] = f.load(kind, f.at(block, 8 * i), 8)
    first = f.mul(number, a["per"])
    a["last"] = f.least(f.add(first, a["per"]), a["chunks"])
    with f.loop(first, a["last"]) as loop:
        a["chunk"] = loop.index
        body(f, a, *_place(f, a, loop.index))


def _place(f: Function, a: dict[str, Value], chunk: Value) -> tuple[Value, Value]:
    """Band and part."""
    return f.op("udiv", chunk, a["across"]), f.op("urem", chunk, a["across"])


def _fused(spec: Spec, module: Module, find: Function, rule: Function, encode: Function) -> None:
    def body(f: Function, a: dict[str, Value], band: Value, part: Value) -> None:
        row, column = f.mul(band, a["band"]), f.mul(part, a["part"])
        rows = f.least(f.op("sub", a["rows"], row), a["band"])
        columns = f.least(f.op("sub", a["columns"], column), a["part"])
        blocks = f.over(columns, a["block_columns"])
        x = f.at(a["x"], f.add(f.mul(row, a["x_stride"]), f.mul(column, SIZES[spec.dtype])))
        names = ("low", "high", "steps", "reciprocals", "offsets", "work", "bytes", "quick")
        at = {name: f.at(a["scratch"], a[f"{name}_at"]) for name in names}
        f.run(
            find, x, a["x_stride"], rows, columns, a["block_columns"], constant("i64", 0),
            at["low"], at["high"], at["work"], a["flag"],
        )  # fmt: skip
        place = f.add(f.mul(band, a["grid_stride"]), f.op("udiv", column, a["block_columns"]))
        sizes = quantize_rule.sizes(spec)
        parts = [f.at(a[name], f.mul(place, size)) for name, size in sizes.items()]
        f.run(
            rule, at["low"], at["high"], blocks, *parts,
            at["steps"], at["reciprocals"], at["offsets"], at["quick"], a["flag"], a["second"],
        )  # fmt: skip
        quick = f.load("i64", at["quick"], 8)
        # While a chunk is encoded memory would idle: the one after the next comes into the second
        # cache, and the next one from there into the nearest.
        next_band, next_part = _place(
            f, a, f.least(f.add(a["chunk"], 1), f.op("sub", a["last"], 1))
        )
        ahead = f.add(
            f.mul(f.op("sub", next_band, band), f.mul(a["band"], a["x_stride"])),
            f.mul(f.op("sub", next_part, part), f.mul(a["part"], SIZES[spec.dtype])),
        )
        octet = f.op("lshr", f.mul(column, spec.element.bits), 3)
        with f.loop(0, rows) as loop:
            below = f.add(row, loop.index)
            f.run(
                encode,
                f.at(x, f.mul(loop.index, a["x_stride"])),
                f.at(a["codes"], f.add(f.mul(below, a["codes_stride"]), octet)),
                constant("i64", 0), columns, a["block_columns"],
                at["steps"], at["reciprocals"], at["offsets"], at["bytes"], quick, ahead,
            )  # fmt: skip

    _entry(module, "fused", body)


def _extremes_alone(spec: Spec, module: Module, find: Function) -> None:
    def body(f: Function, a: dict[str, Value], band: Value, part: Value) -> None:
        row, column = f.mul(band, a["band"]), f.mul(part, a["part"])
        place = f.add(f.mul(band, a["grid_stride"]), f.op("udiv", column, a["block_columns"]))
        f.run(
            find,
            f.at(a["x"], f.add(f.mul(row, a["x_stride"]), f.mul(column, SIZES[spec.dtype]))),
            a["x_stride"],
            f.least(f.op("sub", a["rows"], row), a["band"]),
            f.least(f.op("sub", a["columns"], column), a["part"]),
            a["block_columns"],
            constant("i64", _AHEAD),
            f.at(a["low"], f.mul(place, 4)),
            f.at(a["high"], f.mul(place, 4)),
            f.at(a["scratch"], a["work_at"]),
            a["flag"],
        )

    _entry(module, "extremes", body)


def _encode_alone(spec: Spec, module: Module, encode: Function) -> None:
    def body(f: Function, a: dict[str, Value], row: Value, part: Value) -> None:
        column = f.mul(part, a["part"])
        above = f.op("udiv", f.add(a["first_row"], row), a["block_rows"])
        place = f.mul(f.mul(above, a["grid_stride"]), 4)
        octet = f.op("lshr", f.mul(column, spec.element.bits), 3)
        f.run(
            encode,
            f.at(a["x"], f.mul(row, a["x_stride"])),
            f.at(a["codes"], f.add(f.mul(row, a["codes_stride"]), octet)),
            column,
            f.least(f.add(column, a["part"]), a["columns"]),
            a["block_columns"],
            *(f.at(a[name], place) for name in ("steps", "reciprocals", "offsets")),
            f.at(a["scratch"], a["bytes_at"]),
            a["quick"],
            constant("i64", _AHEAD),
        )

    _entry(module, "encode", body)


# Codes.


def _encode(spec: Spec, module: Module) -> Function:
    """Codes of columns [start, stop) of one row; `start` is a multiple of 8.

    x, steps, reciprocals and offsets stand at column 0, out where the codes of `start` go. Numbers
    `ahead` bytes behind those of the row are asked for, and into a farther cache as many again.
    """
    pointers = ("steps", "reciprocals", "offsets", "bytes")
    f = module.function(
        "encode_row",
        dict.fromkeys(("x", "out"), "ptr")
        | dict.fromkeys(("start", "stop", "block"), "i64")
        | dict.fromkeys(pointers, "ptr")
        | {"quick": "i64", "ahead": "i64"},
        "apart",
    )
    x, out, start, stop, block, steps, reciprocals, offsets, octets, quick, ahead = f.parameters
    further = f.add(ahead, ahead)
    bits, size = spec.element.bits, SIZES[spec.dtype]
    choice = encoder(spec.element, module)
    pack = None if bits == 8 else encode_bits.packer(module, bits)
    # Where a quotient that is not exact would matter: see `encode_lanes.SMALLEST_DIVISOR`.
    hasty = module.fused and choice.smallest >= 2.0**-29

    def segment(
        number: Value, begin: Value, end: Value, to: Value, *, quickly: bool, vectors: int = 0
    ) -> None:
        """Columns [begin, end) of one block."""
        place = f.mul(number, 4)
        step = f.splat(f.load("float", f.at(steps, place), 4))
        inverse = None
        if quickly:
            inverse = f.splat(f.load("float", f.at(reciprocals, place), 4))
        offset = f.splat(f.load("float", f.at(offsets, place), 4)) if spec.offset else None

        def body(index: Value, mask: Value | None) -> None:
            address = f.at(x, f.mul(f.add(begin, index), size))
            prefetch(f, f.at(address, ahead), near=True)
            prefetch(f, f.at(address, further), near=False)
            y = load_numbers(f, spec.dtype, address, mask)
            if spec.bias and offset is not None:
                y = f.op("fsub", y, offset)
            if spec.power and inverse is not None:
                y = f.op("fmul", y, inverse)
            else:
                y = quotient(f, y, Divisor(step, inverse))
            if spec.zero is not None and offset is not None:
                y = f.op("fadd", y, offset)
            codes = f.cast("trunc", choice.emit(f, y), f"<{LANES} x i8>")
            store_lanes(f, codes, f.at(to, index), mask)

        if vectors:
            with f.loop(0, vectors * LANES, min(vectors, 4) * LANES) as loop:
                for i in range(min(vectors, 4)):
                    body(f.add(loop.index, i * LANES), None)
        else:
            in_vectors(f, f.op("sub", end, begin), body)

    def piece(begin: Value, end: Value, to: Value, *, quickly: bool) -> None:
        """The blocks that [begin, end) touches."""
        first, last = f.op("udiv", begin, block), f.over(end, block)
        if spec.vectors:
            # Pieces begin where blocks do.
            whole = f.op("udiv", end, block)
            with f.loop(first, whole) as loop:
                at = f.mul(loop.index, block)
                target = f.at(to, f.op("sub", at, begin))
                segment(loop.index, at, at, target, quickly=quickly, vectors=spec.vectors)
            first = whole
        with f.loop(first, last) as loop:
            at = f.mul(loop.index, block)
            left = f.greatest(at, begin)
            right = f.least(f.add(at, block), end)
            segment(loop.index, left, right, f.at(to, f.op("sub", left, begin)), quickly=quickly)

    with f.loop(start, stop, PIECE) as loop:
        begin, end = loop.index, f.least(f.add(loop.index, PIECE), stop)
        done = f.op("sub", begin, start)
        target = octets if pack is not None else f.at(out, done)

        def both(*, quickly: bool) -> list[Value]:
            piece(begin, end, target, quickly=quickly)
            return []

        if spec.power:
            piece(begin, end, target, quickly=True)
        elif hasty:
            f.either(
                f.compare("ne", quick, 0),
                lambda: both(quickly=True),
                lambda: both(quickly=False),
            )
        else:
            piece(begin, end, target, quickly=False)
        if pack is not None:
            place = f.op("lshr", f.mul(done, bits), 3)
            f.run(pack, octets, f.op("sub", end, begin), f.at(out, place))
    return f

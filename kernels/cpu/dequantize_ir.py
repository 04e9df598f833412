"""Dequantizing as a module: bit streams to bytes, to numbers, times their scales, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lowbit.formats.declare import Element
from lowbit.kernels.cpu import encode_bits
from lowbit.kernels.cpu.absmax import in_vectors
from lowbit.kernels.cpu.decode import consecutive, decoder
from lowbit.kernels.cpu.dequantize_ways import PRODUCTS, double, narrowed, smallest_scale, way
from lowbit.kernels.cpu.encode_lanes import SIZES, lanes_below, load_lanes
from lowbit.kernels.cpu.ir import (
    DOUBLE,
    FLOAT,
    INT,
    LANES,
    Function,
    Module,
    Value,
    constant,
)
from lowbit.kernels.cpu.isa import Isa

PIECE = 2048  # numbers that wait in scratch before they are written
_LINE = 64
_AHEAD = 1 << 14  # bytes between what is computed and what is asked for


@dataclass(frozen=True)
class Spec:
    """What is compiled; sizes, strides and block shapes are run-time arguments."""

    out: str
    """float32, float16 or bfloat16."""
    element: Element
    scale: Element | str
    zero: str | None = None
    """dtype of the zero points: int8, uint8 or a float dtype."""
    bias: bool = False
    tensor_scale: bool = False
    vectors: int = 0
    """A block has so many whole vectors of columns; 0: any number of columns."""


class Arguments(NamedTuple):
    """The block that `tile` reads: 64-bit integers and addresses, and a float64 at the end.

    Strides are bytes. A chunk is a part of one row.
    """

    columns: int
    block_rows: int
    block_columns: int
    part: int  # columns of a chunk, a multiple of 8
    across: int  # chunks side by side
    per: int  # chunks of a tile
    chunks: int
    codes_stride: int
    codes_size: int  # bytes of a row of codes
    scales_stride: int
    zeros_stride: int
    biases_stride: int
    out_stride: int
    codes: int
    scales: int
    zeros: int
    biases: int
    out: int
    scales_at: int
    zeros_at: int
    biases_at: int
    codes_at: int
    out_at: int
    quick_at: int
    second: float


FORMAT = f"<{len(Arguments._fields) - 1}qd"
_ADDRESSES = ("codes", "scales", "zeros", "biases", "out")


def text(spec: Spec, isa: Isa) -> str:
    """The module's IR."""
    module = Module(isa)
    chosen = way(spec, module)
    prepare, values = _prepare(spec, module, chosen), _values(spec, module, chosen)
    f = module.function("tile", {"a": "ptr", "number": "i64", "scratch": "ptr"}, "external")
    block, number, scratch = f.parameters
    a: dict[str, Value] = {}
    for i, each in enumerate(Arguments._fields):
        kind = "ptr" if each in _ADDRESSES else "double" if each == "second" else "i64"
        a[each] = f.load(kind, f.at(block, 8 * i), 8)
    at = {
        name: f.at(scratch, a[f"{name}_at"])
        for name in ("scales", "zeros", "biases", "codes", "out", "quick")
    }
    first = f.mul(number, a["per"])
    with f.loop(first, f.least(f.add(first, a["per"]), a["chunks"])) as loop:
        row, part = f.op("udiv", loop.index, a["across"]), f.op("urem", loop.index, a["across"])
        start = f.mul(part, a["part"])
        stop = f.least(f.add(start, a["part"]), a["columns"])
        origin = f.op("udiv", start, a["block_columns"])
        blocks = f.op("sub", f.over(stop, a["block_columns"]), origin)
        above = f.op("udiv", row, a["block_rows"])
        stored = [
            f.at(a[name], f.add(f.mul(above, a[f"{name}_stride"]), f.mul(origin, size)))
            for name, size in _sizes(spec).items()
        ]
        names = ("scales", "zeros", "biases", "quick")
        f.run(prepare, *stored, blocks, *(at[name] for name in names), a["second"])
        octet = f.op("lshr", f.mul(start, spec.element.bits), 3)
        codes = f.at(a["codes"], f.add(f.mul(row, a["codes_stride"]), octet))
        out = f.add(f.mul(row, a["out_stride"]), f.mul(start, SIZES[spec.out]))
        f.run(
            values, codes, f.op("sub", a["codes_size"], octet), start, stop, a["block_columns"],
            origin, at["scales"], at["zeros"], at["biases"], at["codes"], at["out"],
            f.at(a["out"], out), f.load("i64", at["quick"], 8),
            f.cast("fptrunc", a["second"], "float"),
        )  # fmt: skip
    return module.text()


def _sizes(spec: Spec) -> dict[str, int]:
    """Bytes of a stored scale, zero point and bias."""
    scale = 1 if isinstance(spec.scale, Element) else SIZES[spec.scale]
    return {"scales": scale, "zeros": SIZES.get(spec.zero or "", 1), "biases": scale}


def _kinds(spec: Spec) -> dict[str, Element | str]:
    """What goes with each block, and how it is stored."""
    kinds: dict[str, Element | str | None] = {"scales": spec.scale, "zeros": spec.zero}
    kinds["biases"] = spec.scale if spec.bias else None
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _prepare(spec: Spec, module: Module, chosen: str) -> Function:
    """Scales, zero points and biases of some blocks: float64, and before them float32 if used.

    `quick` is whether every scale allows the way "odd".
    """
    names = ("scales", "zeros", "biases")
    f = module.function(
        "prepare",
        dict.fromkeys(names, "ptr")
        | {"blocks": "i64"}
        | {f"{name}_out": "ptr" for name in names}
        | {"quick": "ptr", "second": "double"},
        "apart",
    )
    blocks, quick, second = f.parameters[3], f.parameters[7], f.parameters[8]
    sizes = _sizes(spec)
    f.store(constant("i64", 1), quick, 8)
    with f.loop(0, blocks, LANES) as loop:
        mask = lanes_below(f, f.op("sub", blocks, loop.index))
        for i, (name, kind) in enumerate(_kinds(spec).items()):
            which = names.index(name)
            source, target = f.parameters[which], f.parameters[4 + which]
            size = sizes[name]
            bits = load_lanes(f, f"i{8 * size}", f.at(source, f.mul(loop.index, size)), mask)
            number = decoder(kind, module).emit(f, f.cast("zext", bits, INT), 0)
            place = f.at(target, f.mul(loop.index, 12))
            # 16 float32, then 16 float64: 12 bytes a block.
            f.store(number, place, 64)
            if chosen in ("odd", "double"):
                wide = f.cast("fpext", number, DOUBLE)
                if name == "scales" and spec.tensor_scale:
                    wide = f.op("fmul", wide, f.splat(second))
                f.store(wide, f.at(place, 4 * LANES), 64)
            if chosen == "odd" and i == 0:
                size_bits = f.bits(f.op("and", f.bits(number, INT), 0x7FFFFFFF), FLOAT)
                small = f.op("and", f.compare("olt", size_bits, smallest_scale(spec)), mask)
                with f.when(f.compare("ne", f.bits(small, f"i{LANES}"), 0)):
                    f.store(constant("i64", 0), quick, 8)
    return f


def _values(spec: Spec, module: Module, chosen: str) -> Function:
    """Numbers of columns [start, stop) of one row; `start` is a multiple of 8.

    Codes and out stand at `start`, the blocks' numbers at block `origin`.
    """
    f = module.function(
        "values",
        {"codes": "ptr"}
        | dict.fromkeys(("size", "start", "stop", "block", "origin"), "i64")
        | dict.fromkeys(("scales", "zeros", "biases", "octets", "wait", "out"), "ptr")
        | {"quick": "i64", "second": "float"},
        "apart",
    )
    codes, size, start, stop, block, origin, *tables, octets, wait, out, quick, second = (
        f.parameters
    )
    bits, width = spec.element.bits, SIZES[spec.out]
    decode = _decoder(spec.element, module)
    factor = f.splat(second) if spec.tensor_scale and chosen != "double" else None
    # All that a block can hold fits one register of AVX-512: its results are looked up.
    tabled = width == 2 and bits <= 5 and module.isa.permute == "vpermps512"
    unpack = None if bits == 8 else encode_bits.unpacker(module, bits)
    copy = _copier(module)
    kinds = [["scales", "zeros", "biases"].index(name) for name in _kinds(spec)]

    def numbers(number: Value, kind: str) -> dict[int, Value]:
        """The block's scale, zero point and bias in all lanes."""
        relative = f.op("sub", number, origin)
        group, lane = f.op("lshr", relative, 4), f.op("and", relative, LANES - 1)
        place = f.mul(group, 12 * LANES)
        if kind == "double":
            offset = f.add(f.add(place, 4 * LANES), f.mul(lane, 8))
        else:
            offset = f.add(place, f.mul(lane, 4))
        return {
            i: f.splat(
                f.load("double" if kind == "double" else "float", f.at(tables[i], offset), 4)
            )
            for i in kinds
        }

    def segment(
        number: Value,
        count: Value,
        source: Value,
        target: Value,
        there: Value,
        kind: str,
        vectors: int = 0,
    ) -> None:
        """`count` codes of one block; memory that is written later is at `there`."""
        held = numbers(number, kind)

        def finished(codes: Value) -> Value:
            """Results of one code a lane."""
            scale, zero, bias = (held.get(i) for i in range(3))
            assert scale is not None
            value = decode(f, codes)
            if kind == "double":
                return double(spec, f, value, scale, zero, bias)
            if zero is not None:
                value = f.op("fsub", value, zero)
            if factor is not None:
                value, scale = f.op("fmul", value, scale), factor
            return narrowed(f, spec, PRODUCTS[kind](f, value, scale))

        def ask(index: Value) -> None:
            """For the line that will be written some time later, since storing reads it first."""
            fetch(f, f.at(there, f.mul(index, width)))

        def body(index: Value, mask: Value | None) -> None:
            ask(index)
            codes = load_lanes(f, "i8", f.at(source, index), mask if bits == 8 else None)
            # What is written behind the last number is overwritten, or not copied.
            f.store(finished(codes), f.at(target, f.mul(index, width)), width)

        if tabled and vectors > 1:
            table = _table(f, spec, finished)
            with f.loop(0, vectors * LANES, 2 * LANES) as loop:
                ask(loop.index)
                _look_up(f, table, f.at(source, loop.index), f.at(target, f.mul(loop.index, 2)))
        elif vectors:
            some = min(vectors, 4)
            with f.loop(0, vectors * LANES, some * LANES) as loop:
                for i in range(some):
                    body(f.add(loop.index, i * LANES), None)
        elif tabled:
            table = _table(f, spec, finished)
            # Bytes of whole pairs of vectors lie in scratch, codes or not.
            with f.loop(0, count, 2 * LANES) as loop:
                ask(loop.index)
                _look_up(f, table, f.at(source, loop.index), f.at(target, f.mul(loop.index, 2)))
        else:
            in_vectors(f, count, body)

    def piece(begin: Value, end: Value, source: Value, kind: str) -> list[Value]:
        later = f.at(out, f.add(f.mul(f.op("sub", begin, start), width), _AHEAD))
        first, last = f.op("udiv", begin, block), f.over(end, block)
        if spec.vectors and kind == chosen:
            # Pieces begin where blocks do.
            whole = f.op("udiv", end, block)
            with f.loop(first, whole) as loop:
                at = f.op("sub", f.mul(loop.index, block), begin)
                target = f.at(wait, f.mul(at, width))
                there = f.at(later, f.mul(at, width))
                segment(loop.index, block, f.at(source, at), target, there, kind, spec.vectors)
            first = whole
        with f.loop(first, last) as loop:
            at = f.mul(loop.index, block)
            left, right = f.greatest(at, begin), f.least(f.add(at, block), end)
            done = f.op("sub", left, begin)
            count, target = f.op("sub", right, left), f.at(wait, f.mul(done, width))
            there = f.at(later, f.mul(done, width))
            segment(loop.index, count, f.at(source, done), target, there, kind)
        return []

    with f.loop(start, stop, PIECE) as loop:
        begin, end = loop.index, f.least(f.add(loop.index, PIECE), stop)
        done, count = f.op("sub", begin, start), f.op("sub", end, begin)
        octet = f.op("lshr", f.mul(done, bits), 3)
        source = f.at(codes, octet)
        if unpack is not None:
            f.run(unpack, source, count, f.op("sub", size, octet), octets)
            source = octets
        if chosen == "odd":
            f.either(
                f.compare("ne", quick, 0),
                lambda: piece(begin, end, source, "odd"),
                lambda: piece(begin, end, source, "double"),
            )
        else:
            piece(begin, end, source, chosen)
        f.run(copy, wait, f.at(out, f.mul(done, width)), f.mul(count, width))
    return f


def fetch(f: Function, address: Value) -> None:
    """Ask for a line that will be written; the address need not exist."""
    how = (constant("i32", 1), constant("i32", 2), constant("i32", 1))
    f.call("llvm.prefetch.p0", "void", address, *how)


def _decoder(element: Element, module: Module) -> Callable[[Function, Value], Value]:
    """float32 of codes in bytes."""
    choice = decoder(element, module)
    whole = consecutive(element)
    if element.bits == 8 and whole is not None and whole[1] == 1:
        extend = "sext" if whole[0] else "zext"
        return lambda f, codes: f.cast("sitofp", f.cast(extend, codes, INT), FLOAT)
    return lambda f, codes: choice.emit(f, f.cast("zext", codes, INT), 0)


def _table(f: Function, spec: Spec, finished: Callable[[Value], Value]) -> Value:
    """The results of all codes, 32 lanes, repeated where there are fewer."""
    halves = []
    for start in (0, LANES) if spec.element.bits == 5 else (0,):
        codes = ", ".join(f"i8 {start + lane}" for lane in range(LANES))
        result = finished(Value(f"<{LANES} x i8>", f"<{codes}>"))
        halves.append(f.bits(result, f"<{LANES} x i16>"))
    return f.shuffle(halves[0], halves[-1], list(range(2 * LANES)))


def _look_up(f: Function, table: Value, source: Value, target: Value) -> None:
    """Results of 32 codes; bits of an index above the fifth do not count."""
    wide = "<32 x i16>"
    index = f.cast("zext", f.load("<32 x i8>", source, 1), wide)
    f.store(f.call("llvm.x86.avx512.permvar.hi.512", wide, table, index), target, 2)


def _copier(module: Module) -> Function:
    """Function that copies bytes to whole lines where it can; `source` begins with one."""
    f = module.function("copy", {"source": "ptr", "out": "ptr", "size": "i64"}, "apart")
    source, out, size = f.parameters
    line = f"<{_LINE} x i8>"
    address = f.cast("ptrtoint", out, "i64")
    head = f.op("and", f.op("sub", constant("i64", 0), address), _LINE - 1)
    stop = f.op("sub", size, f.op("and", f.add(address, size), _LINE - 1))

    def lines() -> list[Value]:
        with f.when(f.compare("ne", head, 0)):
            f.store(f.load(line, source, 1), out, 1)
        with f.loop(head, stop, _LINE) as loop:
            f.store(f.load(line, f.at(source, loop.index), 1), f.at(out, loop.index), _LINE)
        with f.when(f.compare("ne", stop, size)):
            rest = f.op("sub", size, _LINE)
            f.store(f.load(line, f.at(source, rest), 1), f.at(out, rest), 1)
        return []

    def octets() -> list[Value]:
        with f.loop(0, size) as loop:
            f.store(f.load("i8", f.at(source, loop.index), 1), f.at(out, loop.index), 1)
        return []

    f.either(f.compare("sge", size, 2 * _LINE), lines, octets)
    return f

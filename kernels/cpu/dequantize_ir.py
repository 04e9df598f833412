"""Dequantizing as a module: bit streams to bytes, to numbers, times their scales, rounded once.

The reference computes ((value - zero) * scale * tensor scale) + bias in float64, one operation
after another, and rounds the result once. Four ways give its bits:

- "single": value - zero is exact in float32. A product of two float32 is exact in float64, so that
  rounding it to float32 is float32's own product. A narrower result needs the product itself to
  be exact: few bits in both factors.
- "directed": of the float32 products rounded down and up the one with an odd last bit (both are the
  same if the product is exact), so that rounding it to a narrower type is the only rounding that
  counts. AVX-512 rounds a single instruction its own way.
- "odd": the same by the error that fma gives. Tiny scales, whose error underflows, go the next way.
- "double": float64, operation for operation, and one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import NamedTuple

from lowbit.formats.declare import Element
from lowbit.kernels.cpu import encode_bits
from lowbit.kernels.cpu.absmax import in_vectors
from lowbit.kernels.cpu.decode import consecutive, decoder
from lowbit.kernels.cpu.encode_lanes import SIZES, lanes_below, load_lanes
from lowbit.kernels.cpu.epilogue import narrow
from lowbit.kernels.cpu.ir import (
    DOUBLE,
    FLOAT,
    INT,
    LANES,
    LONG,
    Function,
    Module,
    Value,
    constant,
)
from lowbit.kernels.cpu.isa import Isa

# Numbers that wait in scratch before they are written. glibc's memcpy takes the way described in
# `_values` from 8 KB on.
PIECE = 2048
_MANTISSA = {"float16": (10, -14), "bfloat16": (7, -126)}  # bits, exponent of the smallest normal
_FLOATS = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}


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


# Which way: from the tables alone.


def _significant(numbers: Iterable[float]) -> tuple[int, int]:
    """The most significant bits of any number, and the exponent of the lowest bit of all."""
    width, lowest = 1, 1024
    for number in numbers:
        exact = Fraction(number)
        if not exact:
            continue
        top, bottom = abs(exact.numerator), exact.denominator
        twos = (top & -top).bit_length() - 1
        width = max(width, (top >> twos).bit_length())
        lowest = min(lowest, twos - bottom.bit_length() + 1)
    return width, lowest


def _finite(element: Element) -> list[float]:
    return [v for v in element.values if isfinite(v)]


def _centred(spec: Spec) -> list[float]:
    """What the scales multiply; with zero points whole numbers of as many bits as any of it."""
    if spec.zero is None:
        return _finite(spec.element)
    low, high = (-128, 127) if spec.zero == "int8" else (0, 255)
    reach = max(spec.element.max - low, high - spec.element.min)
    return [2.0 ** int(reach).bit_length() - 1]


def way(spec: Spec, module: Module) -> str:
    """How the bits of the reference come about: see above."""
    if spec.bias or spec.zero not in (None, "int8", "uint8"):
        return "double"
    if spec.zero is not None and not spec.element.integral:
        return "double"
    values, scale = _centred(spec), spec.scale
    width, lowest = _significant(values)
    bits, last = _significant(_finite(scale)) if isinstance(scale, Element) else _FLOATS[scale]
    wide = module.isa.permute == "vpermps512"
    if spec.tensor_scale:
        # The tensor scale is the one factor, value * scale the other one, if that is a float32.
        if not isinstance(scale, Element) or (spec.out != "float32" and not wide):
            return "double"
        largest = max(map(abs, values)) * max(map(abs, _finite(scale)))
        width, lowest, bits, last = width + bits, lowest + last, *_FLOATS["float32"]
        if width > 24 or lowest < -149 or largest >= 2.0**128:
            return "double"
    if spec.out == "float32" or (width + bits <= 24 and lowest + last >= -149):
        return "single"
    if wide:
        return "directed"
    return "odd" if module.fused and smallest_scale(spec) <= 2.0**-20 else "double"


def smallest_scale(spec: Spec) -> float:
    """From here on the error of a product is a float32: its last bit is one of 2**-149 or more."""
    lowest = _significant(_centred(spec))[1]
    return 2.0 ** max(-126 - lowest, -126)


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
        number: Value, count: Value, source: Value, target: Value, kind: str, vectors: int = 0
    ) -> None:
        """`count` codes of one block."""
        held = numbers(number, kind)

        def finished(codes: Value) -> Value:
            """Results of one code a lane."""
            scale, zero, bias = (held.get(i) for i in range(3))
            assert scale is not None
            value = decode(f, codes)
            if kind == "double":
                return _double(spec, f, value, scale, zero, bias)
            if zero is not None:
                value = f.op("fsub", value, zero)
            if factor is not None:
                value, scale = f.op("fmul", value, scale), factor
            return _narrowed(f, spec, _PRODUCTS[kind](f, value, scale))

        def body(index: Value, mask: Value | None) -> None:
            codes = load_lanes(f, "i8", f.at(source, index), mask if bits == 8 else None)
            # What is written behind the last number is overwritten, or not copied.
            f.store(finished(codes), f.at(target, f.mul(index, width)), width)

        if tabled and vectors > 1:
            table = _table(f, spec, finished)
            with f.loop(0, vectors * LANES, 2 * LANES) as loop:
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
                _look_up(f, table, f.at(source, loop.index), f.at(target, f.mul(loop.index, 2)))
        else:
            in_vectors(f, count, body)

    def piece(begin: Value, end: Value, source: Value, kind: str) -> list[Value]:
        first, last = f.op("udiv", begin, block), f.over(end, block)
        if spec.vectors and kind == chosen:
            # Pieces begin where blocks do.
            whole = f.op("udiv", end, block)
            with f.loop(first, whole) as loop:
                at = f.op("sub", f.mul(loop.index, block), begin)
                target = f.at(wait, f.mul(at, width))
                segment(loop.index, block, f.at(source, at), target, kind, spec.vectors)
            first = whole
        with f.loop(first, last) as loop:
            at = f.mul(loop.index, block)
            left, right = f.greatest(at, begin), f.least(f.add(at, block), end)
            done = f.op("sub", left, begin)
            count, target = f.op("sub", right, left), f.at(wait, f.mul(done, width))
            segment(loop.index, count, f.at(source, done), target, kind)
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
        # The C library writes lines without having read them, where the machine can: half of the
        # traffic. Stores past the caches (movnt) took twice as long as plain ones.
        f.call("memcpy", "ptr", f.at(out, f.mul(done, width)), wait, f.mul(count, width))
    return f


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


def _single(f: Function, value: Value, scale: Value) -> Value:
    return f.op("fmul", value, scale)


def _directed(f: Function, value: Value, scale: Value) -> Value:
    low, high = (
        f.call("llvm.x86.avx512.mul.ps.512", FLOAT, value, scale, constant("i32", direction))
        for direction in (9, 10)  # down and up, without exceptions
    )
    even = f.compare("eq", f.op("and", f.bits(low, INT), 1), 0)
    return f.select(even, high, low)


def _odd(f: Function, value: Value, scale: Value) -> Value:
    product = f.op("fmul", value, scale)
    error = f.fma(value, scale, f.let(FLOAT, f"fneg {product}"))
    pattern = f.bits(product, INT)
    # +1 where the error points away from zero, else -1.
    away = f.op("or", f.op("ashr", f.op("xor", pattern, f.bits(error, INT)), 31), 1)
    even = f.compare("eq", f.op("and", pattern, 1), 0)
    inexact = f.compare("one", error, 0.0)
    odd = f.select(f.op("and", even, inexact), f.add(pattern, away), pattern)
    return f.bits(odd, FLOAT)


_PRODUCTS = {"single": _single, "directed": _directed, "odd": _odd}


def _double(
    spec: Spec, f: Function, value: Value, scale: Value, zero: Value | None, bias: Value | None
) -> Value:
    wide = f.cast("fpext", value, DOUBLE)
    if zero is not None:
        wide = f.op("fsub", wide, zero)
    wide = f.op("fmul", wide, scale)
    if bias is not None:
        wide = f.op("fadd", wide, bias)
    if spec.out != "float32":
        wide = _rounded(spec, f, wide)
    return _narrowed(f, spec, f.cast("fptrunc", wide, FLOAT))


def _rounded(spec: Spec, f: Function, wide: Value) -> Value:
    """Float64 to the nearest number of a narrow type, as float64 without overflow.

    Next to 1.5 units in the last place of a number times 2**52 it is rounded as that type's
    mantissa is; subnormal numbers have the unit of the smallest normal one.
    """
    mantissa, least = _MANTISSA[spec.out]
    pattern = f.bits(wide, LONG)
    size = f.op("and", pattern, 2**63 - 1)
    floor = (least + 1023) << 52
    larger = f.select(f.compare("sgt", size, floor), size, floor)
    unit = f.add(f.op("and", larger, 0x7FF << 52), (52 - mantissa) << 52)
    moved = f.op("fadd", f.bits(size, DOUBLE), f.bits(unit, DOUBLE))
    near = f.bits(f.op("fsub", moved, f.bits(unit, DOUBLE)), LONG)
    # Infinities and NaN stay what they are: their unit's exponent wraps around to a small one.
    signed = f.op("or", near, f.op("and", pattern, -(2**63)))
    return f.bits(signed, DOUBLE)


def _narrowed(f: Function, spec: Spec, x: Value) -> Value:
    if spec.out == "float16" and (f.module.arm or "f16c" in f.module.isa.needs):
        return f.cast("fptrunc", x, f"<{LANES} x half>")
    if spec.out == "bfloat16" and all(isfinite(v) for v in spec.element.values):
        # As `narrow` does, but there is no NaN to look for.
        bits = f.bits(x, INT)
        odd = f.op("and", f.op("lshr", bits, 16), 1)
        rounded = f.op("lshr", f.add(f.add(bits, 0x7FFF), odd), 16)
        return f.cast("trunc", rounded, f"<{LANES} x i16>")
    return narrow(f, x, spec.out)

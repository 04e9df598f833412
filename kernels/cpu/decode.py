"""Codes to float32: the shortest instruction sequence that gives an element's table.

A code lies somewhere in a 32-bit lane, with other bits around it. Every method below is first
compared, in NumPy, with the table over all codes; the table alone decides which one is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.formats.declare import Element
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, Function, Module, Value, constant

Array = npt.NDArray[Any]
Emit = Callable[[Function, Value, int], Value]
"""emit(function, lanes, shift): the float32 value of the code at bits [shift, shift + bits)."""


@dataclass(frozen=True)
class Decoder:
    """How the codes of one table become numbers."""

    method: str
    bits: int
    emit: Emit = field(repr=False)


def decoder(element: Element | str, module: Module) -> Decoder:
    """Choose for an element, or for numbers of a float dtype."""
    if element == "float32":
        return Decoder("bits", 32, lambda f, lanes, shift: f.bits(lanes, FLOAT))
    if element == "bfloat16":
        return Decoder("bits", 16, _bfloat16)
    if element == "float16":
        return Decoder("minifloat", 16, _minifloat(HALF))
    if element in ("int8", "uint8"):
        return Decoder("integer", 8, _integer(8, element == "int8", 1.0))
    assert isinstance(element, Element)
    for choose in (_by_permute, _by_integer, _by_minifloat, _by_exponent):
        found = choose(element, module)
        if found is not None:
            return found
    return Decoder("load", element.bits, _load(element, module))


def _bfloat16(f: Function, lanes: Value, shift: int) -> Value:
    high = f.op("and", lanes, 0xFFFF0000 - 2**32) if shift else f.op("shl", lanes, 16)
    return f.bits(high, FLOAT)


def consecutive(element: Element) -> tuple[bool, float] | None:
    """(signed, step) if the codes are plain binary or two's complement, times a power of two."""
    count = 2**element.bits
    codes = np.arange(count)
    for signed in (False, True):
        numbers = np.where(codes >= count // 2, codes - count, codes) if signed else codes
        step = element.values[1] * (-1 if signed and count == 2 else 1)
        if not math.isfinite(step) or step <= 0 or math.frexp(step)[0] != 0.5:
            continue
        if _same(numbers * step, element.values):
            return signed, step
    return None


def _same(numbers: Array, values: tuple[float, ...]) -> bool:
    """Equal as bits of float32: NaN is NaN, and zeros have a sign."""
    a, b = np.asarray(numbers, np.float32), np.asarray(values, np.float32)
    nan = np.isnan(a) & np.isnan(b)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | nan).all())


# Small integers: shift the code to the top, shift it back with or without its sign, convert.


def _by_integer(element: Element, module: Module) -> Decoder | None:
    found = consecutive(element)
    if found is None:
        return None
    signed, step = found
    emit = _integer(element.bits, signed, step)
    if module.isa.permute == "vpermps512" and step == 1:
        emit = _by_magic(element.bits, signed)
    return Decoder("integer", element.bits, emit)


def _by_magic(bits: int, signed: bool) -> Emit:
    """Below 2**23 + 2**bits a float32 ends in its whole number.

    With a mask and a flip in one instruction (vpternlog) that takes one shift, where extending
    the sign takes two: a core has one port for them, and two for everything else.
    """
    half = 2 ** (bits - 1) if signed else 0
    magic = 0x4B000000  # 2**23

    def emit(f: Function, lanes: Value, shift: int) -> Value:
        lowered = f.op("lshr", lanes, shift) if shift else lanes
        code = f.op("and", lowered, 2**bits - 1)
        return f.op("fsub", f.bits(f.op("xor", code, magic | half), FLOAT), 2.0**23 + half)

    return emit


def _integer(bits: int, signed: bool, step: float) -> Emit:
    def emit(f: Function, lanes: Value, shift: int) -> Value:
        top = 32 - bits - shift
        raised = f.op("shl", lanes, top) if top else lanes
        number = f.op("ashr" if signed else "lshr", raised, 32 - bits)
        exact = f.cast("sitofp", number, FLOAT)
        return exact if step == 1 else f.op("fmul", exact, step)

    return emit


# Tables in registers: AVX-512 looks up 16 entries in one instruction, 32 in another one.


def _by_permute(element: Element, module: Module) -> Decoder | None:
    permute = module.isa.permute
    if permute == "vpermps512" and element.bits <= 6:
        return Decoder("permute", element.bits, _permute512(element))
    if permute == "vpermps256x2" and element.bits <= 4 and consecutive(element) is None:
        return Decoder("permute", element.bits, _permute256(element))
    if permute == "tbl4" and element.bits <= 4 and consecutive(element) is None:
        return Decoder("permute", element.bits, _tbl4(element))
    return None


def _table(element: Element, start: int, count: int) -> Value:
    """`count` entries from `start` as a vector, repeated where the element has fewer."""
    size = len(element.values)
    lanes = (constant("float", element.values[(start + i) % size]) for i in range(count))
    return Value(f"<{count} x float>", f"<{', '.join(map(str, lanes))}>")


def _permute512(element: Element) -> Emit:
    def emit(f: Function, lanes: Value, shift: int) -> Value:
        # The permutes ignore the bits above their index.
        index = f.op("lshr", lanes, shift) if shift else lanes
        if element.bits <= 4:
            table = _table(element, 0, 16)
            return f.call("llvm.x86.avx512.permvar.sf.512", FLOAT, table, index)
        parts = [
            f.call(
                "llvm.x86.avx512.vpermi2var.ps.512",
                FLOAT,
                _table(element, start, 16),
                index,
                _table(element, start + 16, 16),
            )
            for start in range(0, 2**element.bits, 32)
        ]
        if len(parts) == 1:
            return parts[0]
        low = f.compare("eq", f.op("and", index, 32), 0)
        return f.select(low, parts[0], parts[1])

    return emit


def _permute256(element: Element) -> Emit:
    half = "<8 x i32>"

    def look_up(f: Function, index: Value, start: int) -> Value:
        table = _table(element, start, 8)
        parts = []
        for lanes in (range(8), range(8, LANES)):
            part = f.shuffle(index, index, list(lanes))
            assert part.type == half
            parts.append(f.call("llvm.x86.avx2.permps", "<8 x float>", table, part))
        return f.shuffle(parts[0], parts[1], list(range(LANES)))

    def emit(f: Function, lanes: Value, shift: int) -> Value:
        index = f.op("lshr", lanes, shift) if shift else lanes
        low = look_up(f, index, 0)
        if element.bits <= 3:
            return low
        upper = f.compare("slt", f.op("shl", lanes, 28 - shift), 0)
        return f.select(upper, look_up(f, index, 8), low)

    return emit


def _tbl4(element: Element) -> Emit:
    """Bytes from a table of 64: the four of entry i are 4 i to 4 i + 3."""
    octets, four = "<16 x i8>", "<4 x i32>"
    table = [Value(octets, _bytes(element, start)) for start in range(0, 16, 4)]

    def emit(f: Function, lanes: Value, shift: int) -> Value:
        index = f.op("and", f.op("lshr", lanes, shift) if shift else lanes, 15)
        places = f.add(f.mul(index, 0x04040404), constant(INT, 0x03020100))
        parts = []
        for start in range(0, LANES, 4):
            place = f.bits(f.shuffle(places, places, list(range(start, start + 4))), octets)
            part = f.call("llvm.aarch64.neon.tbl4.v16i8", octets, *table, place)
            parts.append(f.bits(part, four))
        halves = [f.shuffle(parts[i], parts[i + 1], list(range(8))) for i in (0, 2)]
        return f.bits(f.shuffle(halves[0], halves[1], list(range(LANES))), FLOAT)

    return emit


def _bytes(element: Element, start: int) -> str:
    """Four entries from `start` as bytes, repeated where the element has fewer."""
    values = [element.values[(start + i) % len(element.values)] for i in range(4)]
    return f"<{', '.join(f'i8 {b}' for b in np.array(values, np.float32).tobytes())}>"


# Minifloats: sign | magnitude in the place of float32's fields, times a power of two. The product
# is exact, subnormals included; the tile function has turned flushing to zero off.


@dataclass(frozen=True)
class Minifloat:
    """A table that is sign and magnitude with `mantissa` bits, times 2**power.

    Specials replace what that gives: magnitudes from each threshold up become the pattern (with
    the sign), and single whole codes become NaN.
    """

    bits: int
    mantissa: int
    power: int
    thresholds: tuple[tuple[int, int], ...] = ()
    nans: tuple[int, ...] = ()

    def numbers(self) -> Array:
        """What the instructions give for each code."""
        codes = np.arange(2**self.bits, dtype=np.uint32)
        half = 2 ** (self.bits - 1)
        magnitude = codes % half
        sign = (codes // half) << 31
        fields = ((magnitude << (23 - self.mantissa)) | sign).astype(np.uint32)
        with np.errstate(over="ignore"):
            result: Array = fields.view(np.float32) * np.float32(2.0**self.power)
        for least, pattern in self.thresholds:
            special = (sign | pattern).astype(np.uint32).view(np.float32)
            result = np.where(magnitude >= least, special, result)
        result[list(self.nans)] = np.nan
        return result


_INFINITY, _NAN = 0x7F800000, 0x7FC00000
HALF = Minifloat(16, 10, 112, ((0x7C00, _INFINITY), (0x7C01, _NAN)))


def minifloat(element: Element) -> Minifloat | None:
    """Recognise a table, whatever it is called."""
    half = 2 ** (element.bits - 1)
    if element.bits < 3 or element.values[1] <= 0:
        return None
    thresholds: list[tuple[int, int]] = []
    nans: list[int] = []
    for code in range(half):
        above, below = element.values[code], element.values[code + half]
        if math.isnan(above) and math.isnan(below):
            pattern = _NAN
        elif math.isinf(above) and below == -above:
            pattern = _INFINITY
        else:
            nans += [c for c in (code, code + half) if math.isnan(element.values[c])]
            continue
        if not thresholds or thresholds[-1][1] != pattern:
            thresholds.append((code, pattern))
    for mantissa in range(element.bits - 1):
        fraction, exponent = math.frexp(element.values[1])
        power = exponent - 1 + 126 + mantissa
        if fraction != 0.5 or not -126 <= power <= 127:
            return None
        found = Minifloat(element.bits, mantissa, power, tuple(thresholds), tuple(nans))
        if element.bits - 1 - mantissa < 8 and _same(found.numbers(), element.values):
            return found
    return None


def _by_minifloat(element: Element, module: Module) -> Decoder | None:
    found = minifloat(element)
    return None if found is None else Decoder("minifloat", element.bits, _minifloat(found))


def _minifloat(form: Minifloat) -> Emit:
    place = 23 - form.mantissa
    fields = (2 ** (form.bits - 1) - 1) << place

    def emit(f: Function, lanes: Value, shift: int) -> Value:
        top = 32 - form.bits - shift
        raised = f.op("shl", lanes, top) if top else lanes
        placed = f.op("ashr", raised, 32 - form.bits - place)
        pattern = f.op("and", placed, fields - 2**31)
        magnitude, sign = f.op("and", pattern, fields), f.op("and", pattern, -(2**31))
        if f.module.x86 and form.bits < 8 and 0 < form.power < 128:
            result = _scaled(f, magnitude, sign, form.power)
        else:
            result = f.op("fmul", f.bits(pattern, FLOAT), 2.0**form.power)
        for least, special in form.thresholds:
            beyond = f.compare("ugt", magnitude, (least << place) - 1)
            result = f.select(beyond, f.bits(f.op("or", sign, special), FLOAT), result)
        for code in form.nans:
            code_pattern = (code % 2 ** (form.bits - 1)) << place
            signed = code_pattern - (2**31 if code >= 2 ** (form.bits - 1) else 0)
            result = f.select(f.compare("eq", pattern, signed), constant(FLOAT, math.nan), result)
        return result

    return emit


def _scaled(f: Function, magnitude: Value, sign: Value, power: int) -> Value:
    """The fields times 2**power, without a subnormal float32: x86 takes 150 cycles for each.

    With exponent e, fraction m and u = 2**(power - 127), a = (1 + m) 2**e u is right for e > 0, and
    b = 2 a - 2 u for e = 0; the smaller one always is. All of it is exact.
    """
    a = f.add(magnitude, constant(INT, power << 23))
    b = f.op("fsub", f.bits(f.add(a, constant(INT, 1 << 23)), FLOAT), 2.0 ** (power - 126))
    low = f.bits(a, FLOAT)
    number = f.select(f.compare("olt", low, b), low, b)
    return f.bits(f.op("or", f.bits(number, INT), sign), FLOAT)


# E8M0 and its kin: the code is float32's exponent field.


def _by_exponent(element: Element, module: Module) -> Decoder | None:
    if element.bits != 8 or not _same(_exponents(), element.values):
        return None

    def emit(f: Function, lanes: Value, shift: int) -> Value:
        code = f.op("and", f.op("lshr", lanes, shift) if shift else lanes, 255)
        # 2**-127 is subnormal: its pattern has the top fraction bit instead of an exponent.
        pattern = f.greatest(f.op("shl", code, 23), 0x00400000)
        nan = f.compare("eq", code, 255)
        return f.select(nan, constant(FLOAT, math.nan), f.bits(pattern, FLOAT))

    return Decoder("exponent", 8, emit)


def _exponents() -> Array:
    return np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan)


# Any other table: one load a lane.


def _load(element: Element, module: Module) -> Emit:
    base = module.table(f"table.{element.digest}", element.values)

    def emit(f: Function, lanes: Value, shift: int) -> Value:
        index = f.op("and", f.op("lshr", lanes, shift) if shift else lanes, 2**element.bits - 1)
        result = Value(FLOAT, "poison")
        for lane in range(LANES):
            one = f.let("i32", f"extractelement {index}, i64 {lane}")
            offset = f.op("shl", f.cast("zext", one, "i64"), 2)
            number = f.load("float", f.at(base, offset), 4)
            result = f.let(FLOAT, f"insertelement {result}, {number}, i64 {lane}")
        return result

    return emit

"""Float32 to codes: the shortest instruction sequence that gives an element's nearest code.

The codes are those of `formats.codes.encode` that saturates, for any number but NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.formats.codes import ladder
from lowbit.formats.declare import Element
from lowbit.kernels.cpu.decode import consecutive, minifloat
from lowbit.kernels.cpu.encode_lanes import clamped, whole_bits
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, Function, Module, Value, constant

Array = npt.NDArray[Any]
Emit = Callable[[Function, Value], Value]
"""emit(function, float32 lanes): the codes in int32 lanes, nothing above them."""


@dataclass(frozen=True)
class Encoder:
    """How numbers become the codes of one table."""

    method: str
    bits: int
    smallest: float
    """Numbers of a smaller magnitude have the code of a zero of their sign."""
    emit: Emit = field(repr=False)


def encoder(element: Element, module: Module) -> Encoder:
    """Choose by the table alone."""
    for choose in (_by_rounding, _by_fields):
        found = choose(element)
        if found is not None:
            return found
    nearest = np.abs(edges(element)).min(initial=np.inf)
    return Encoder("ladder", element.bits, float(nearest), _ladder(element, module))


# Whole numbers times a power of two.


def _by_rounding(element: Element) -> Encoder | None:
    found = consecutive(element)
    if found is None:
        return None
    step = found[1]
    low, high = (constant(FLOAT, end / step) for end in (element.min, element.max))

    def emit(f: Function, y: Value) -> Value:
        # Exact, or so small or large that it does not matter.
        scaled = y if step == 1 else f.op("fmul", y, 1 / step)
        whole = whole_bits(f, clamped(f, scaled, low, high))
        return f.op("and", whole, 2**element.bits - 1)

    return Encoder("integer", element.bits, step / 2, emit)


# Minifloats: next to 1.5 units in the last place of a number times 2**23 the number is rounded as
# the minifloat's mantissa is; subnormal ones have the unit of the smallest normal number.


def _by_fields(element: Element) -> Encoder | None:
    form = minifloat(element)
    if form is None or form.mantissa < 1:
        return None
    half, least = 2 ** (element.bits - 1), form.power - 126  # exponent of the smallest normal
    values = np.array(element.values)
    top = int(np.flatnonzero(values[:half] == element.max)[0])
    numbers = np.isfinite(values[:half])
    if element.min != -element.max or not (numbers == (np.arange(half) <= top)).all():
        return None
    place = 23 - form.mantissa
    if least < -126 or math.frexp(element.max)[1] + place > 127:
        return None
    minus_zero = values[half] == 0
    first = (least + 127) << 23  # pattern of the smallest normal number
    largest = int(np.float32(element.max).view(np.uint32))

    def emit(f: Function, y: Value) -> Value:
        bits = f.bits(y, INT)
        size = f.least(f.op("and", bits, 0x7FFFFFFF), largest)
        exponent = f.op("and", f.greatest(size, first), 0x7F800000)
        unit = f.add(exponent, place << 23)
        rounded = f.op("fadd", f.bits(size, FLOAT), f.bits(unit, FLOAT))
        mantissa = f.op("sub", f.bits(rounded, INT), unit)
        field = f.op("lshr", f.op("sub", exponent, first), place)
        magnitude = f.add(mantissa, field)
        sign = f.op("and", f.op("lshr", bits, 32 - element.bits), half)
        code = f.op("or", magnitude, sign)
        if minus_zero:
            return code
        return f.select(f.compare("eq", magnitude, 0), magnitude, code)

    return Encoder("minifloat", element.bits, math.ldexp(1.0, least - form.mantissa - 1), emit)


# Any other table: how many edges of its ladder lie below the number.


def edges(element: Element) -> Array:
    """float32: y lies above an edge of `ladder` exactly if it lies above this one."""
    wide = ladder(element).edges
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    above = narrow.astype(np.float64) > wide
    return np.where(above, np.nextafter(narrow, np.float32(-np.inf)), narrow)


def _ladder(element: Element, module: Module) -> Emit:
    steps = ladder(element)
    levels = max(1, (len(steps.codes) - 1).bit_length())
    if module.isa.permute == "load" and levels <= 4:
        search = _sum(edges(element), steps.codes)
    else:
        search = _bisection(edges(element), steps.codes, levels)
    zero = np.flatnonzero(steps.values == 0)
    if steps.negative_zero is None or not len(zero):
        return search
    plain, minus = int(steps.codes[zero[0]]), steps.negative_zero

    def emit(f: Function, y: Value) -> Value:
        code = search(f, y)
        negative = f.compare("slt", f.bits(y, INT), 0)
        lost = f.op("and", negative, f.compare("eq", code, plain))
        return f.select(lost, constant(INT, minus), code)

    return emit


def _sum(limits: Array, codes: Array) -> Emit:
    """Add the difference of two neighbouring codes for each edge that lies below."""

    def emit(f: Function, y: Value) -> Value:
        code = constant(INT, int(codes[0]))
        for limit, low, high in zip(limits, codes[:-1], codes[1:], strict=True):
            above = f.compare("ogt", y, float(limit))
            code = f.add(code, f.select(above, constant(INT, int(high) - int(low)), 0))
        return code

    return emit


def _bisection(limits: Array, codes: Array, levels: int) -> Emit:
    padded = np.full(2**levels - 1, np.inf)
    padded[: len(limits)] = limits

    def emit(f: Function, y: Value) -> Value:
        # A register of AVX-512 holds the middles of a level where the index points already;
        # elsewhere the bits found so far count them.
        spaced = f.module.isa.permute == "vpermps512" and levels <= 5
        index = constant(INT, 0)
        for level in range(levels):
            half = 2 ** (levels - 1 - level)
            middles = padded[half - 1 :: 2 * half]
            if spaced and level:
                middles = np.repeat(middles, 2 * half)
            above = f.compare("ogt", y, look_up(f, middles.tolist(), index))
            if not spaced:
                index = f.add(index, index)
            step = half if spaced else 1
            index = f.select(above, f.add(index, step), index)
        if (codes == np.arange(len(codes))).all():
            return index
        return f.cast("fptosi", look_up(f, codes.tolist(), index), INT)

    return emit


def look_up(f: Function, table: Sequence[float], index: Value) -> Value:
    """table[index] in float32 lanes; every index is inside of the table."""
    permute = f.module.isa.permute
    if len(table) == 1:
        return constant(FLOAT, table[0])
    if permute == "vpermps512" and len(table) <= 64:
        return _permuted512(f, table, index)
    if permute == "vpermps256x2" and len(table) <= 32:
        return _permuted256(f, table, index)
    values = ".".join(float(v).hex() for v in table)
    base = f.module.table(f'"look_up.{values}"', table)
    result = Value(FLOAT, "poison")
    for lane in range(LANES):
        one = f.cast("zext", f.let("i32", f"extractelement {index}, i64 {lane}"), "i64")
        number = f.load("float", f.at(base, f.op("shl", one, 2)), 4)
        result = f.let(FLOAT, f"insertelement {result}, {number}, i64 {lane}")
    return result


def _vector(table: Sequence[float], start: int, count: int) -> Value:
    """`count` entries from `start`, repeated where the table has fewer."""
    numbers = (constant("float", table[(start + i) % len(table)]) for i in range(count))
    return Value(f"<{count} x float>", f"<{', '.join(map(str, numbers))}>")


def _permuted512(f: Function, table: Sequence[float], index: Value) -> Value:
    if len(table) <= 16:
        return f.call("llvm.x86.avx512.permvar.sf.512", FLOAT, _vector(table, 0, 16), index)
    parts = [
        f.call(
            "llvm.x86.avx512.vpermi2var.ps.512",
            FLOAT,
            _vector(table, start, 16),
            index,
            _vector(table, start + 16, 16),
        )
        for start in range(0, len(table), 32)
    ]
    if len(parts) == 1:
        return parts[0]
    return f.select(f.compare("slt", index, 32), parts[0], parts[1])


def _permuted256(f: Function, table: Sequence[float], index: Value) -> Value:
    halves = [f.shuffle(index, index, list(lanes)) for lanes in (range(8), range(8, LANES))]
    result: Value | None = None
    for start in range(0, len(table), 8):
        eight = _vector(table, start, 8)
        found = [f.call("llvm.x86.avx2.permps", "<8 x float>", eight, half) for half in halves]
        part = f.shuffle(found[0], found[1], list(range(LANES)))
        result = part if result is None else f.select(f.compare("slt", index, start), result, part)
    assert result is not None
    return result

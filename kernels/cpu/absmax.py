"""A row of numbers to signed integer codes and their scale: dynamic quantization of activations.

The bits are those of `formats.reference.quantize` for a signed integer element with float32 scales
and "absmax": scale = amax / qmax, code = rint(x / scale).
"""

from __future__ import annotations

from collections.abc import Callable

from lowbit.kernels.cpu.encode_lanes import (
    SIZES,
    Divisor,
    clamped,
    divides_quickly,
    lanes_below,
    load_lanes,
    load_numbers,
    quick_divisor,
    quotient,
    slow_divisor,
    store_lanes,
    whole_bits,
    widened,
)
from lowbit.kernels.cpu.ir import LANES, Function, Module, Value, constant

_UNROLLED = 4  # vectors a turn
INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
SMALLEST = 2.0**-149


def quantizer(module: Module, dtype: str) -> Function:
    """Function that quantizes `count` contiguous numbers of a float dtype.

    It writes `count` codes, a byte each, and one float32 scale. `qmax` is the element's largest
    value, 1 to 127. Neither x nor codes are touched beyond `count`; they may have any alignment.
    NaN or infinity among the numbers sets the 64-bit `flag`, and codes and scale mean nothing.
    """
    f = module.function(
        f"absmax_{dtype}",
        {
            "x": "ptr",
            "count": "i64",
            "codes": "ptr",
            "scale": "ptr",
            "qmax": "float",
            "flag": "ptr",
        },
        "apart",
    )
    x, count, codes, scale, qmax, flag = f.parameters
    largest = largest_pattern(f, dtype, x, count)
    with f.when(f.compare("uge", largest, INFINITY[dtype])):
        f.store(constant("i64", 1), flag, 8)
    amax = _number(f, dtype, largest)
    step = f.op("fdiv", amax, qmax)
    # A tiny row is coarse, not lost; a row of zeros has scale 1.
    step = f.select(f.compare("oeq", step, 0.0), constant("float", SMALLEST), step)
    step = f.select(f.compare("oeq", amax, 0.0), constant("float", 1.0), step)
    f.store(step, scale, 4)
    high = f.splat(qmax)
    low = f.op("fsub", constant(high.type, -1.0), high)

    def encode(address: Value, to: Value, mask: Value | None, by: Divisor) -> None:
        y = clamped(f, quotient(f, load_numbers(f, dtype, address, mask), by), low, high)
        store_lanes(f, f.cast("trunc", whole_bits(f, y), f"<{LANES} x i8>"), to, mask)

    def row(divisor: Callable[[Function, Value], Divisor]) -> list[Value]:
        by = divisor(f, step)

        def body(index: Value, mask: Value | None) -> None:
            encode(f.at(x, f.mul(index, SIZES[dtype])), f.at(codes, index), mask, by)

        in_vectors(f, count, body)
        return []

    quick = divides_quickly(f, step)
    if quick is None:
        row(slow_divisor)
    else:
        f.either(quick, lambda: row(quick_divisor), lambda: row(slow_divisor))
    return f


def in_vectors(f: Function, count: Value, body: Callable[[Value, Value | None], None]) -> None:
    """body(first lane's index, mask) for all of `count` lanes; the mask is of the last ones."""
    wide = _UNROLLED * LANES
    turns = f.mul(f.op("udiv", count, wide), wide)
    with f.loop(0, turns, wide) as loop:
        for i in range(_UNROLLED):
            body(f.add(loop.index, i * LANES), None)
    whole = f.mul(f.op("udiv", count, LANES), LANES)
    with f.loop(turns, whole, LANES) as loop:
        body(loop.index, None)
    with f.when(f.compare("slt", whole, count)):
        body(whole, lanes_below(f, f.op("sub", count, whole)))


def largest_pattern(f: Function, dtype: str, x: Value, count: Value) -> Value:
    """The largest bit pattern without its sign: that of amax, or of NaN or infinity."""
    lane = f"i{8 * SIZES[dtype]}"
    lanes = 64 // SIZES[dtype]  # a cache line
    vector = f"<{lanes} x {lane}>"
    magnitude = constant(vector, 2 ** (8 * SIZES[dtype] - 1) - 1)

    def larger(a: Value, b: Value) -> Value:
        size = f.op("and", b, magnitude)
        return f.call(f"llvm.umax.v{lanes}{lane}", vector, a, size)

    zero = constant(vector, 0)
    wide = _UNROLLED * lanes
    turns = f.mul(f.op("udiv", count, wide), wide)
    with f.loop(0, turns, wide, carried=[zero, zero]) as loop:
        start = f.at(x, f.mul(loop.index, SIZES[dtype]))
        for i in range(_UNROLLED):
            part = f.load(vector, f.at(start, 64 * i), 1)
            loop.carried[i % 2] = larger(loop.carried[i % 2], part)
    most = f.call(f"llvm.umax.v{lanes}{lane}", vector, *loop.results)
    found = f.call(f"llvm.vector.reduce.umax.v{lanes}{lane}", lane, most)
    narrow = f"<{LANES} x {lane}>"
    with f.loop(turns, count, LANES, carried=[constant(narrow, 0)]) as rest:
        mask = lanes_below(f, f.op("sub", count, rest.index))
        part = load_lanes(f, lane, f.at(x, f.mul(rest.index, SIZES[dtype])), mask)
        size = f.op("and", part, 2 ** (8 * SIZES[dtype] - 1) - 1)
        rest.carried = [f.call(f"llvm.umax.v{LANES}{lane}", narrow, rest.carried[0], size)]
    last = f.call(f"llvm.vector.reduce.umax.v{LANES}{lane}", lane, rest.results[0])
    return f.select(f.compare("ugt", last, found), last, found)


def _number(f: Function, dtype: str, pattern: Value) -> Value:
    """Float32 of one pattern."""
    lanes = widened(f, dtype, f.splat(pattern))
    return f.let("float", f"extractelement {lanes}, i64 0")

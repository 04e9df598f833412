"""Sixteen numbers in and sixteen codes out of registers, and the quotient between them."""

from __future__ import annotations

from typing import NamedTuple

from lowbit.kernels.cpu.decode import decoder
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, Function, Value, constant

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

# Where the quotient's remainders are exact: neither they nor the reciprocal leave float32's normal
# range for numerators above 2**-100. Smaller ones have quotients below 2**-30, whatever is lost,
# and these, added to a zero point, do not change the code of a whole number.
SMALLEST_DIVISOR, LARGEST_DIVISOR = 2.0**-70, 2.0**100


def lanes_below(f: Function, count: Value) -> Value:
    """The mask of the first `count` lanes; any i64."""
    few = f.cast("trunc", f.least(count, LANES), "i32")
    return f.compare("slt", f.lane_numbers(), f.splat(few))


def load_lanes(f: Function, kind: str, address: Value, mask: Value | None) -> Value:
    """16 numbers of `kind`, aligned or not; lanes outside of the mask are 0 and not touched."""
    vector = f"<{LANES} x {kind}>"
    if mask is None:
        return f.load(vector, address, 1)
    name = f"llvm.masked.load.v{LANES}{kind}.p0"
    return f.call(name, vector, address, constant("i32", 1), mask, constant(vector, 0))


def store_lanes(f: Function, value: Value, address: Value, mask: Value | None) -> None:
    """The lanes of the mask, and no byte beside them."""
    if mask is None:
        f.store(value, address, 1)
        return
    kind = value.type.split(" x ")[1][:-1]
    name = f"llvm.masked.store.v{LANES}{kind}.p0"
    f.call(name, "void", value, address, constant("i32", 1), mask)


def widened(f: Function, dtype: str, bits: Value) -> Value:
    """float32 lanes from the bit patterns of a float dtype, as `load_lanes` gives them."""
    # F16C and the base of aarch64 convert in hardware; elsewhere LLVM would call a library.
    if dtype == "float16" and (f.module.arm or "f16c" in f.module.isa.needs):
        return f.cast("fpext", f.bits(bits, f"<{LANES} x half>"), FLOAT)
    return decoder(dtype, f.module).emit(f, f.cast("zext", bits, INT), 0)


def load_numbers(f: Function, dtype: str, address: Value, mask: Value | None = None) -> Value:
    """16 numbers of a float dtype as float32, exactly."""
    return widened(f, dtype, load_lanes(f, f"i{8 * SIZES[dtype]}", address, mask))


def prefetch(f: Function, address: Value, *, near: bool) -> None:
    """Ask for a cache line, into the nearest cache or the second; the address need not exist."""
    how = (constant("i32", 0), constant("i32", 3 if near else 2), constant("i32", 1))
    f.call("llvm.prefetch.p0", "void", address, *how)


class Divisor(NamedTuple):
    """A number that many lanes are divided by."""

    number: Value  # float32 lanes
    reciprocal: Value | None  # rounded; None: divide by the instruction


def divides_quickly(f: Function, number: Value) -> Value | None:
    """Whether `quick_divisor` may be used for a positive scalar; None: never on this machine."""
    if not f.module.fused:
        return None
    large = f.compare("oge", number, SMALLEST_DIVISOR)
    return f.op("and", large, f.compare("ole", number, LARGEST_DIVISOR))


def quick_divisor(f: Function, number: Value) -> Divisor:
    """Divide by multiplication; see `quotient`."""
    one = f.op("fdiv", constant("float", 1.0), number)
    return Divisor(f.splat(number), f.splat(one))


def slow_divisor(f: Function, number: Value) -> Divisor:
    """Divide by the instruction, which takes any number."""
    return Divisor(f.splat(number), None)


def quotient(f: Function, x: Value, by: Divisor) -> Value:
    """x / by, correctly rounded.

    A division of 16 lanes takes as long as 20 multiplications. Markstein's step (IBM J. Res. Dev.
    34, 1990) corrects the product with the rounded reciprocal by its exact remainder. The error
    left is below 5 / (2**48 by) for the integer mantissas of x and by, and of the 52 million pairs
    of them whose quotients come that close to a midpoint between two float32 each one was tried.
    """
    if by.reciprocal is None:
        return f.op("fdiv", x, by.number)
    guess = f.op("fmul", x, by.reciprocal)
    # This order of signs keeps that of -0.
    rest = f.fma(by.number, guess, f.let(FLOAT, f"fneg {x}"))
    return f.fma(f.let(FLOAT, f"fneg {rest}"), by.reciprocal, guess)


# 1.5 * 2**23: next to it float32 has the spacing 1, so that an addition rounds to a whole number,
# ties to even, which then stands in the low bits of the pattern in two's complement.
WHOLE = 1.5 * 2.0**23


def clamped(f: Function, y: Value, low: Value, high: Value) -> Value:
    """Y between two numbers; NaN becomes `low`."""
    y = f.select(f.compare("ogt", y, low), y, low)
    return f.select(f.compare("olt", y, high), y, high)


def whole_bits(f: Function, y: Value) -> Value:
    """Int32 lanes whose low 22 bits are y rounded to even in two's complement, |y| < 2**21."""
    return f.bits(f.op("fadd", y, WHOLE), INT)

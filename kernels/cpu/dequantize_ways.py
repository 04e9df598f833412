"""The arithmetic of dequantizing: which way gives the reference's bits, and its instructions.

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

from typing import TYPE_CHECKING

from lowbit.formats.declare import Element
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
from lowbit.kernels.significance import FLOATS, finite, significant

if TYPE_CHECKING:
    from lowbit.kernels.cpu.dequantize_ir import Spec

_MANTISSA = {"float16": (10, -14), "bfloat16": (7, -126)}  # bits, exponent of the smallest normal


def _centred(spec: Spec) -> list[float]:
    """What the scales multiply; with zero points whole numbers of as many bits as any of it."""
    if spec.zero is None:
        return finite(spec.element)
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
    width, lowest = significant(values)
    bits, last = significant(finite(scale)) if isinstance(scale, Element) else FLOATS[scale]
    wide = module.isa.permute == "vpermps512"
    if spec.tensor_scale:
        # The tensor scale is the one factor, value * scale the other one, if that is a float32.
        if not isinstance(scale, Element) or (spec.out != "float32" and not wide):
            return "double"
        largest = max(map(abs, values)) * max(map(abs, finite(scale)))
        width, lowest, bits, last = width + bits, lowest + last, *FLOATS["float32"]
        if width > 24 or lowest < -149 or largest >= 2.0**128:
            return "double"
    if spec.out == "float32" or (width + bits <= 24 and lowest + last >= -149):
        return "single"
    if wide:
        return "directed"
    return "odd" if module.fused and smallest_scale(spec) <= 2.0**-20 else "double"


def smallest_scale(spec: Spec) -> float:
    """From here on the error of a product is a float32: its last bit is one of 2**-149 or more."""
    lowest = significant(_centred(spec))[1]
    return 2.0 ** max(-126 - lowest, -126)


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


PRODUCTS = {"single": _single, "directed": _directed, "odd": _odd}


def double(
    spec: Spec, f: Function, value: Value, scale: Value, zero: Value | None, bias: Value | None
) -> Value:
    """The reference's steps, and one rounding; value is float32, the others are float64."""
    wide = f.cast("fpext", value, DOUBLE)
    if zero is not None:
        wide = f.op("fsub", wide, zero)
    wide = f.op("fmul", wide, scale)
    if bias is not None:
        wide = f.op("fadd", wide, bias)
    if spec.out != "float32":
        wide = _rounded(spec, f, wide)
    return narrowed(f, spec, f.cast("fptrunc", wide, FLOAT))


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


def narrowed(f: Function, spec: Spec, x: Value) -> Value:
    """Float32 lanes, rounded to even, as they are stored."""
    if spec.out == "float16" and (f.module.arm or "f16c" in f.module.isa.needs):
        return f.cast("fptrunc", x, f"<{LANES} x half>")
    if spec.out == "bfloat16":
        # As `narrow` does, but the only NaN here is a table's, which has no low bits to carry.
        bits = f.bits(x, INT)
        odd = f.op("and", f.op("lshr", bits, 16), 1)
        rounded = f.op("lshr", f.add(f.add(bits, 0x7FFF), odd), 16)
        return f.cast("trunc", rounded, f"<{LANES} x i16>")
    return narrow(f, x, spec.out)

"""Activation functions of float32 vectors, with the same bits on every instruction set.

They are made of fma, division and bit patterns alone.
The polynomials are weighted least squares on Chebyshev points, the weights multiplied by each
point's error until the largest relative error stops falling (Lawson), then rounded to float32.
"""

from __future__ import annotations

import math
import struct

from lowbit.kernels.cpu.ir import FLOAT, INT, Function, Value, constant

_LN2 = 0.693147182464599609375  # float32(ln 2)
_LN2_REST = math.log(2) - _LN2
_ROUNDER = 1.5 * 2**23  # adding it rounds a float32 to the nearest whole number
# (exp(r) - 1 - r) / r**2 for |r| <= 0.36; 1 + r + r**2 q is exp(r) within 2**-27.9.
_EXP = (
    0.49999991059303284,
    0.1666649729013443,
    0.041668668389320374,
    0.008371495641767979,
    0.001380884787067771,
)
# exp(x**2 / 2) Phi(-x) / t with t = 1 / (1 + 5/16 x), 0 <= x <= 14.6, within 2**-25.4.
_TAIL_STEP = 0.3125
_TAIL = (
    0.12466548383235931,
    0.12474795430898666,
    0.11190357059240341,
    0.0899941623210907,
    0.05582486838102341,
    -0.00308586866594851,
    0.07496707886457443,
    -0.15160967409610748,
    0.09166005998849869,
    -0.01906764507293701,
)
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = _GELU_LINEAR * 0.044715
_LOWEST = -105.0  # exp of it is below half of the smallest float32


def activate(f: Function, name: str | None, x: Value) -> Value:
    """One of the activation functions of `kernels.reference.activate`."""
    if name is None:
        return x
    if name == "relu":
        return f.select(f.compare("ugt", x, 0.0), x, 0.0)
    result = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}[name](f, x)
    # There the exponential is 0; an infinite x would make it NaN.
    return f.select(f.compare("olt", x, _LOWEST), constant(FLOAT, -0.0), result)


def exponential(f: Function, high: Value, low: Value) -> Value:
    """exp(high + low) for high <= 0 and a small correction; 0 from -105 down."""
    tiny = f.compare("olt", high, _LOWEST)
    high = f.select(tiny, constant(FLOAT, _LOWEST), high)
    low = f.select(tiny, constant(FLOAT, 0.0), low)
    moved = f.fma(high, constant(FLOAT, 1 / math.log(2)), constant(FLOAT, _ROUNDER))
    whole = f.op("fsub", moved, _ROUNDER)
    rest = f.fma(whole, constant(FLOAT, -_LN2), high)
    rest = f.fma(whole, constant(FLOAT, -_LN2_REST), rest)
    rest = f.op("fadd", rest, low)
    part = _polynomial(f, rest, _EXP)
    part = f.fma(f.op("fmul", rest, rest), part, rest)
    part = f.op("fadd", part, 1.0)
    # Two factors: one alone could not reach the subnormal numbers.
    power = f.op("sub", f.bits(moved, INT), f.bits(constant(FLOAT, _ROUNDER), INT))
    first = f.op("ashr", power, 1)
    for each in (first, f.op("sub", power, first)):
        factor = f.bits(f.op("shl", f.add(each, 127), 23), FLOAT)
        part = f.op("fmul", part, factor)
    return part


def _polynomial(f: Function, x: Value, coefficients: tuple[float, ...]) -> Value:
    total = constant(FLOAT, coefficients[-1])
    for each in reversed(coefficients[:-1]):
        total = f.fma(total, x, constant(FLOAT, each))
    return total


def _negated(f: Function, x: Value) -> Value:
    return f.let(FLOAT, f"fneg {x}")


def _magnitude(f: Function, x: Value) -> Value:
    return f.bits(f.op("and", f.bits(x, INT), 2**31 - 1), FLOAT)


def _gelu(f: Function, x: Value) -> Value:
    """x Phi(x): the tail Phi(-|x|) = exp(-x**2 / 2) W(|x|) is small and never cancels."""
    half = f.op("fmul", x, 0.5)
    square = f.op("fmul", half, x)
    lost = f.fma(half, x, _negated(f, square))
    power = exponential(f, _negated(f, square), _negated(f, lost))
    step = f.fma(_magnitude(f, x), constant(FLOAT, _TAIL_STEP), constant(FLOAT, 1.0))
    t = f.op("fdiv", constant(FLOAT, 1.0), step)
    tail = f.op("fmul", power, f.op("fmul", t, _polynomial(f, t, _TAIL)))
    share = f.op("fsub", constant(FLOAT, 1.0), tail)
    negative = f.compare("olt", x, 0.0)
    return f.op("fmul", x, f.select(negative, tail, share))


def _silu(f: Function, x: Value) -> Value:
    size = _magnitude(f, x)
    return _times_logistic(f, x, size, constant(FLOAT, 0.0))


def _times_logistic(f: Function, x: Value, high: Value, low: Value) -> Value:
    """x / (1 + exp(-v)) where v has the sign of x and the size high + low."""
    power = exponential(f, _negated(f, high), _negated(f, low))
    scaled = f.select(f.compare("olt", x, 0.0), f.op("fmul", x, power), x)
    return f.op("fdiv", scaled, f.op("fadd", power, 1.0))


def _gelu_tanh(f: Function, x: Value) -> Value:
    """x (1 + tanh(v / 2)) / 2 = x / (1 + exp(-v)), v = x (linear + cubic x**2) in two float32."""
    linear, cubic = (constant(FLOAT, c) for c in (_GELU_LINEAR, _GELU_CUBIC))
    linear_rest, cubic_rest = (constant(FLOAT, c - _single(c)) for c in (_GELU_LINEAR, _GELU_CUBIC))
    size = _magnitude(f, x)
    square = f.op("fmul", size, size)
    square_rest = f.fma(size, size, _negated(f, square))
    product = f.op("fmul", cubic, square)
    product_rest = f.fma(cubic, square, _negated(f, product))
    product_rest = f.fma(cubic, square_rest, product_rest)
    product_rest = f.fma(cubic_rest, square, product_rest)
    factor = f.op("fadd", linear, product)
    back = f.op("fsub", factor, linear)
    lost = f.op(
        "fadd",
        f.op("fsub", linear, f.op("fsub", factor, back)),
        f.op("fsub", product, back),
    )
    factor_rest = f.op("fadd", f.op("fadd", lost, product_rest), linear_rest)
    high = f.op("fmul", size, factor)
    low = f.fma(size, factor_rest, f.fma(size, factor, _negated(f, high)))
    return _times_logistic(f, x, high, low)


def _single(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])

"""The scale rule in registers: `formats.scaling` and `formats.reference` for 16 blocks at a time.

One float32 operation after another, as they have it. What they refuse, and what is better left to
them, sets a flag; the caller then asks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes

from lowbit.formats import scaling
from lowbit.formats.declare import Element
from lowbit.kernels.cpu.decode import decoder
from lowbit.kernels.cpu.encode import encoder
from lowbit.kernels.cpu.encode_lanes import (
    LARGEST_DIVISOR,
    SMALLEST_DIVISOR,
    WHOLE,
    clamped,
    lanes_below,
    store_lanes,
)
from lowbit.kernels.cpu.epilogue import narrow
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, Function, Module, Value, constant

if TYPE_CHECKING:
    from lowbit.kernels.cpu.quantize_ir import Spec

_TINY = 2.0**-149
_INFINITY = float("inf")


def is_power(kind: Element) -> bool:
    """Whether a scale element is E8M0, whose rule is one of its own."""
    return kind.name == "float8_e8m0fnu"


def sizes(spec: Spec) -> dict[str, int]:
    """Bytes of a stored scale, zero point and bias."""
    scale = 1 if isinstance(spec.scale, Element) else scaling.float_dtype(spec.scale).itemsize
    zero = scaling.float_dtype(spec.zero).itemsize if isinstance(spec.zero, str) else 1
    return {"scales": scale, "zeros": zero, "biases": scale}


def symmetric(element: Element) -> bool:
    """The ends of a block are alike, so that its largest magnitude is all that counts."""
    bottom, top = scaling.limits(element)
    return bottom == -top


def raise_flag(f: Function, bad: Value, flag: Value) -> None:
    """Set the flag if any lane is bad."""
    any_lane = f.compare("ne", f.bits(bad, f"i{LANES}"), 0)
    with f.when(any_lane):
        f.store(constant("i64", 1), flag, 8)


def rule(spec: Spec, module: Module) -> Function:
    """Scales, zero points and biases of `blocks` blocks, and how their numbers become codes.

    `quick` is whether every divisor allows `encode_lanes.quotient` by its reciprocal.
    """
    pointers = ("scales", "zeros", "biases", "steps", "reciprocals", "offsets", "quick", "flag")
    f = module.function(
        "rule",
        {"low": "ptr", "high": "ptr", "blocks": "i64"}
        | dict.fromkeys(pointers, "ptr")
        | {"second": "float"},
        "apart",
    )
    low, high, blocks, scales, zeros, biases, steps, reciprocals, offsets, quick, flag, second = (
        f.parameters
    )
    size = sizes(spec)
    f.store(constant("i64", 1), quick, 8)
    with f.loop(0, blocks, LANES) as loop:
        mask = lanes_below(f, f.op("sub", blocks, loop.index))
        place = f.mul(loop.index, 4)
        top = f.load(FLOAT, f.at(high, place), 4)
        bottom = f.load(FLOAT, f.at(low, place), 4) if spec.signed else None
        check = _Check(f, mask, flag)
        wanted = _ideal(spec, f, bottom, top, check)
        factor = f.splat(second) if spec.tensor_scale else None
        if factor is not None:
            wanted = _shared_out(spec, f, wanted, factor)
        stored = _stored(spec, f, wanted, check)
        store_lanes(f, stored, f.at(scales, f.mul(loop.index, size["scales"])), mask)
        step = _number(f, spec.scale, stored)
        if factor is not None:
            step = f.op("fmul", step, factor)
        check.refuse(f.op("or", _not(f, "ogt", step, 0.0), _not(f, "olt", step, _INFINITY)))
        f.store(step, f.at(steps, place), 4)
        f.store(f.op("fdiv", constant(FLOAT, 1.0), step), f.at(reciprocals, place), 4)
        if bottom is not None and spec.bias:
            product = f.op("fmul", constant(FLOAT, spec.element.min), step)
            kept, number = _narrowed(f, f.op("fsub", bottom, product), spec.scale, check)
            store_lanes(f, kept, f.at(biases, f.mul(loop.index, size["biases"])), mask)
            f.store(number, f.at(offsets, place), 4)
        if bottom is not None and spec.zero is not None:
            ratio = f.op("fdiv", bottom, step)
            zero = f.op("fsub", constant(FLOAT, spec.element.min), ratio)
            if isinstance(spec.zero, Element):
                kept, number = _whole(f, zero, spec.zero)
            else:
                kept, number = _narrowed(f, zero, spec.zero, check)
            store_lanes(f, kept, f.at(zeros, f.mul(loop.index, size["zeros"])), mask)
            f.store(number, f.at(offsets, place), 4)
        small = _not(f, "oge", step, SMALLEST_DIVISOR)
        odd = f.op("and", f.op("or", small, _not(f, "ole", step, LARGEST_DIVISOR)), mask)
        with f.when(f.compare("ne", f.bits(odd, f"i{LANES}"), 0)):
            f.store(constant("i64", 0), quick, 8)
    return f


class _Check:
    """Sets the flag for lanes that hold a block."""

    def __init__(self, f: Function, mask: Value, flag: Value) -> None:
        self._f, self._mask, self._flag = f, mask, flag

    def refuse(self, bad: Value) -> None:
        """Leave the whole array to the reference if any of these lanes is bad."""
        raise_flag(self._f, self._f.op("and", bad, self._mask), self._flag)


def _not(f: Function, predicate: str, a: Value, b: float) -> Value:
    """NaN too is not what is asked for."""
    return f.op("xor", f.compare(predicate, a, b), Value(f"<{LANES} x i1>", "splat (i1 true)"))


def _ideal(spec: Spec, f: Function, low: Value | None, high: Value, check: _Check) -> Value:
    """`scaling.ideal` for "absmax"."""
    element = spec.element
    if spec.offset:
        assert low is not None
        levels = element.max - element.min
        span = f.op("fsub", high, low)
        parts = [f.op("fdiv", each, levels) for each in (span, high, low)]
        finite = f.compare("olt", span, _INFINITY)
        wanted = f.select(finite, parts[0], f.op("fsub", parts[1], parts[2]))
        return _not_underflowed(f, wanted, f.compare("ogt", high, low))
    bottom, top = scaling.limits(element)
    if low is None:
        return _not_underflowed(f, f.op("fdiv", high, top), f.compare("ogt", high, 0.0))
    needed = f.op("or", f.compare("ogt", high, 0.0), f.compare("olt", low, 0.0))
    wanted = constant(FLOAT, 0.0)
    if top > 0:
        wanted = f.op("fdiv", high, top)
    else:
        check.refuse(f.compare("ogt", high, 0.0))
    if bottom < 0:
        below = f.op("fdiv", low, bottom)
        wanted = f.select(f.compare("ogt", below, wanted), below, wanted)
    else:
        check.refuse(f.compare("olt", low, 0.0))
    return _not_underflowed(f, wanted, needed)


def _not_underflowed(f: Function, wanted: Value, needed: Value) -> Value:
    lost = f.op("and", f.compare("oeq", wanted, 0.0), needed)
    return f.select(lost, constant(FLOAT, _TINY), wanted)


def _shared_out(spec: Spec, f: Function, wanted: Value, second: Value) -> Value:
    """`reference._shared_out`; the tensor scale is positive."""
    left = f.op("fdiv", wanted, second)
    if isinstance(spec.scale, Element):
        left = f.select(f.compare("olt", left, spec.scale.max), left, spec.scale.max)
    lost = f.op("and", f.compare("oeq", left, 0.0), f.compare("one", wanted, 0.0))
    return f.select(lost, constant(FLOAT, _TINY), left)


def _stored(spec: Spec, f: Function, wanted: Value, check: _Check) -> Value:
    """`scaling.encode_scales`, as narrow as they are stored."""
    kind = spec.scale
    octets = f"<{LANES} x i8>"
    if isinstance(kind, Element) and is_power(kind):
        return f.cast("trunc", _power_codes(f, wanted, check), octets)
    wanted = f.select(f.compare("oeq", wanted, 0.0), constant(FLOAT, 1.0), wanted)
    if isinstance(kind, Element):
        check.refuse(f.compare("ogt", wanted, kind.max))
        smallest = min(c for c, v in enumerate(kind.values) if v > 0)
        code = encoder(kind, f.module).emit(f, wanted)
        return f.cast("trunc", f.greatest(code, smallest), octets)
    info: Any = ml_dtypes.finfo(scaling.float_dtype(kind))  # type: ignore[no-untyped-call]
    check.refuse(f.compare("ogt", wanted, float(info.max)))
    rounded = narrow(f, wanted, kind)
    # The smallest subnormal number's pattern is 1 in every float type.
    return f.select(f.compare("eq", rounded, 0), constant(rounded.type, 1), rounded)


def _power_codes(f: Function, wanted: Value, check: _Check) -> Value:
    """E8M0 by "rceil": the exponent, rounded up. 2**-127 and below have code 0."""
    bits = f.bits(wanted, INT)
    exponent, fraction = f.op("lshr", bits, 23), f.op("and", bits, 0x7FFFFF)
    limit = f.select(f.compare("eq", exponent, 0), constant(INT, 0x400000), 0)
    above = f.cast("zext", f.compare("sgt", fraction, limit), INT)
    code = f.add(exponent, above)
    check.refuse(f.compare("sgt", code, 254))
    return f.select(f.compare("oeq", wanted, 0.0), constant(INT, 127), code)


def _number(f: Function, kind: Element | str, stored: Value) -> Value:
    """float32 of stored scales."""
    bits = stored if stored.type == INT else f.cast("zext", stored, INT)
    return decoder(kind, f.module).emit(f, bits, 0)


def _narrowed(
    f: Function, wanted: Value, kind: Element | str, check: _Check
) -> tuple[Value, Value]:
    """`reference._narrowed`: as stored, and the float32 of that."""
    assert isinstance(kind, str)
    kept = narrow(f, wanted, kind)
    number = _number(f, kind, kept)
    size = f.op("and", f.bits(number, INT), 0x7FFFFFFF)
    check.refuse(f.compare("sge", size, 0x7F800000))
    return kept, number


def _whole(f: Function, wanted: Value, kind: Element) -> tuple[Value, Value]:
    """A zero point of whole numbers: a byte, and its float32."""
    low, high = constant(FLOAT, kind.min), constant(FLOAT, kind.max)
    moved = f.op("fadd", clamped(f, wanted, low, high), WHOLE)
    return f.cast("trunc", f.bits(moved, INT), f"<{LANES} x i8>"), f.op("fsub", moved, WHOLE)

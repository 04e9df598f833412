"""C++ text from declarations for quantizing and dequantizing: what kernels know of a format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from lowbit.formats import Element, Format, codes, scaling
from lowbit.formats.declare import Scale, integer
from lowbit.kernels.cuda import emit
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.significance import FLOATS, finite, significant

NUMBERS = {"float32": "Float32", "float16": "Float16", "bfloat16": "Bfloat16"}
_RULES = {
    "floor": "power_floor",
    "ceil": "power_ceil",
    "rceil": "power_rceil",
    "even": "power_even",
}


@dataclass(frozen=True)
class Spec:
    """All that the text depends on: a format without its block, and the rule of its scales."""

    element: Element
    scale: Element | str
    zero: Element | str | None
    bias: bool
    tensor_scale: bool
    rule: str

    @property
    def name(self) -> str:
        """Of the struct."""
        zero = self.zero.name if isinstance(self.zero, Element) else self.zero
        scale = self.scale.digest if isinstance(self.scale, Element) else self.scale
        words = (self.element.digest, scale, zero, self.bias, self.tensor_scale, self.rule)
        return "Format_" + "_".join(map(str, words))

    @property
    def ends(self) -> tuple[float, float]:
        """The values that the ends of a block map to."""
        if self.rule == "fullrange":
            return self.element.min, -self.element.min
        return scaling.limits(self.element)

    @property
    def apart(self) -> bool:
        """Whether both extremes of a block count, or its largest magnitude alone."""
        bottom, top = self.ends
        offset = self.zero is not None or self.bias
        return offset or self.rule == "signed_max" or bottom != -top


def spec(fmt: Format, method: str = "absmax") -> Spec:
    """What is compiled for a format and a rule."""
    rule = scaling.method_for(fmt, method)
    return Spec(fmt.element, fmt.scale.element, fmt.zero, fmt.bias, fmt.tensor_scale, rule)


def source(header: str, spec: Spec, kernel: str, arguments: str, threads: int) -> Source:
    """A kernel of `header` for a format."""
    text = f'#include "{header}"\n{declare(spec)}'
    return Source(text, f"lb::quant::{kernel}<{arguments}>", threads)


@cache
def declare(spec: Spec) -> str:
    """The struct that stands for a format in the kernels' templates."""
    element, kind = spec.element, spec.scale
    before, element_type = _element(element)
    bottom, top = spec.ends
    further = scaling.range_end(Format(element, scaling_of(kind), tensor_scale=spec.tensor_scale))
    if isinstance(kind, Element):
        head, scale_type = _scale(kind)
        before += head
    else:
        scale_type = f"lb::quant::Float<lb::quant::{NUMBERS[kind]}>"
    if isinstance(spec.zero, Element):
        head, zero_type = _zero(spec.zero)
        before += head
    elif spec.zero is not None:
        zero_type = f"lb::quant::Float<lb::quant::{NUMBERS[spec.zero]}>"
    else:
        zero_type = "lb::quant::None"
    numbers = {
        "low": element.min, "bottom": bottom, "top": top, "levels": element.max - element.min,
        "second_top": top * further, "second_bottom": bottom * further,
    }  # fmt: skip
    functions = "".join(
        f"    static LB_DEV float {name}() {{ return {_float(v)}; }}\n"
        for name, v in numbers.items()
    )
    return before + _guarded(
        spec.name,
        f"struct {spec.name} {{\n"
        f"    using Element = {element_type};\n"
        f"    using Scale = {scale_type};\n"
        f"    using Zero = {zero_type};\n"
        f"    static constexpr bool bias = {_word(spec.bias)}, "
        f"tensor_scale = {_word(spec.tensor_scale)}, apart = {_word(spec.apart)}, "
        f"quick = {_word(_quick(element))};\n"
        f"    static constexpr lb::quant::Rule rule = lb::quant::Rule::"
        f"{_RULES.get(spec.rule, 'signed_max' if spec.rule == 'signed_max' else 'absmax')};\n"
        f"    static constexpr int exponent = {scaling.largest_exponent(element)}, "
        f"mantissa = {scaling.mantissa_bits(element)};\n"
        f"{functions}}};\n",
    )


def scaling_of(kind: Element | str) -> Scale:
    """A scale of this kind, whatever its block."""
    return Scale(kind, (1, None))


def _guarded(name: str, text: str) -> str:
    """Text that may stand in one translation unit several times."""
    return f"#ifndef LOWBIT_{name}\n#define LOWBIT_{name}\n{text}#endif\n"


def _word(value: bool) -> str:
    return "true" if value else "false"


def _float(value: float) -> str:
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return f"lb::bits<float>({int(narrow.view(np.uint32)):#010x}u)"


@cache
def whole(element: Element) -> tuple[bool, int] | None:
    """Whether codes are two's complement, and the exponent of the power of two they count."""
    for signed in (True, False):
        numbers = integer(element.bits, signed=signed).values
        unit = abs(element.values[1]) or math.nan
        exponent = math.frexp(unit)[1] - 1
        same = tuple(math.ldexp(v, exponent) for v in numbers) == element.values
        if same and -100 < exponent < 100:
            return signed, exponent
    return None


@cache
def searched(element: Element) -> bool:
    """Whether codes are found by comparing with a table, which takes registers."""
    return _element(element)[1].startswith("lb::quant::Table")


def _element(element: Element) -> tuple[str, str]:
    """Text to declare before, and the type with `encode` and `decode`."""
    found = whole(element)
    if found is not None:
        return "", f"lb::quant::Whole<{element.bits}, {_word(found[0])}, {found[1]}>"
    fields = emit.minifloat(element)
    if fields is not None:
        return "", (
            f"lb::quant::Minifloat<{element.bits}, {fields.mantissa}, {fields.bias}, "
            f"lb::quant::Special::{fields.special}>"
        )
    if element.name == "float8_e8m0fnu":
        return "", "lb::quant::Power"
    name = f"Table_{element.digest}"
    return _guarded(name, _table(element, name)), f"lb::quant::Table<{name}>"


def edges(element: Element) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """float32: a float32 lies above an edge of `ladder` exactly if it lies above this one."""
    wide = codes.ladder(element).edges
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    above = narrow.astype(np.float64) > wide
    return np.where(above, np.nextafter(narrow, np.float32(-np.inf)), narrow)


def _quick(element: Element) -> bool:
    """Whether only quotients of usual sizes have codes of their own."""
    smallest = float(np.abs(edges(element)).min(initial=np.inf))
    return smallest >= 2.0**-30 and max(element.max, -element.min) <= 2.0**90


def _table(element: Element, name: str) -> str:
    """Where rounding changes over, and the numbers: in memory but for the short ladder."""
    steps = codes.ladder(element)
    limits, order = edges(element).view(np.uint32).tolist(), steps.codes.tolist()
    patterns = np.array(element.values, np.float32)
    patterns[np.isnan(patterns)] = np.nan
    zeros = np.flatnonzero(steps.values == 0)
    minus = -1 if steps.negative_zero is None or not len(zeros) else steps.negative_zero
    text = _array("unsigned", f"{name}_patterns", patterns.view(np.uint32).tolist())
    if len(order) > 16:
        text += _array("unsigned", f"{name}_edges", limits)
        text += _array("unsigned char", f"{name}_codes", order)
        edge, code = f"lb::bits<float>({name}_edges[i])", f"{name}_codes[i]"
    else:
        padded = [*limits, *[0x7F800000] * (15 - len(limits))]
        chosen = "".join(f"i == {i} ? {v:#x}u : " for i, v in enumerate(padded[:-1]))
        nibbles = sum(c << 4 * i for i, c in enumerate(order))
        edge, code = (
            f"lb::bits<float>({chosen}{padded[-1]:#x}u)",
            f"unsigned({nibbles:#x}ull >> 4 * i) & 15u",
        )
    return (
        f"{text}struct {name} {{\n"
        f"    static constexpr int width = {element.bits}, distinct = {len(order)}, "
        f"zero = {int(order[zeros[0]]) if len(zeros) else -1}, minus_zero = {minus};\n"
        f"    static LB_DEV float edge(int i) {{ return {edge}; }}\n"
        f"    static LB_DEV unsigned code(int i) {{ return {code}; }}\n"
        f"    static LB_DEV unsigned pattern(unsigned code) {{ return {name}_patterns[code]; }}\n"
        f"}};\n"
    )


def _array(kind: str, name: str, numbers: list[int]) -> str:
    listed = ", ".join(f"{n:#x}" for n in numbers)
    return f"static __device__ const {kind} {name}[{len(numbers)}] = {{{listed}}};\n"


def _scale(kind: Element) -> tuple[str, str]:
    before, decodes = _element(kind)
    name, steps = f"Scales_{kind.digest}", codes.ladder(kind)
    least = min(c for c, v in enumerate(kind.values) if v > 0)
    text = (
        f"struct {name} {{\n"
        f"    static constexpr unsigned least = {least};\n"
        f"    static LB_DEV float most() {{ return {_float(kind.max)}; }}\n"
        f"    static LB_DEV double given_low() {{ return {steps.low_limit.hex()}; }}\n"
        f"    static LB_DEV double given_high() {{ return {steps.high_limit.hex()}; }}\n"
        f"}};\n"
    )
    power = _word(kind.name == "float8_e8m0fnu")
    return before + _guarded(name, text), f"lb::quant::Codes<{decodes}, {power}, {name}>"


def _zero(element: Element) -> tuple[str, str]:
    name = f"Zeros_{element.digest}"
    text = (
        f"struct {name} {{\n"
        f"    static constexpr bool negative = {_word(element.min < 0)};\n"
        f"    static LB_DEV float low() {{ return {_float(element.min)}; }}\n"
        f"    static LB_DEV float high() {{ return {_float(element.max)}; }}\n"
        f"}};\n"
    )
    return _guarded(name, text), f"lb::quant::Integers<{name}>"


# Dequantizing: which arithmetic gives the reference's bits. See dequantize.cuh.


def _centred(spec: Spec) -> list[float]:
    """What the scales multiply; with zero points whole numbers of as many bits as any of it."""
    if not isinstance(spec.zero, Element):
        return finite(spec.element)
    low, high = (-128, 127) if spec.zero.min < 0 else (0, 255)
    reach = max(spec.element.max - low, high - spec.element.min)
    return [2.0 ** int(reach).bit_length() - 1]


@cache
def way(spec: Spec, out: str) -> str:
    """The cheapest arithmetic of dequantize.cuh that is exact until the last rounding."""
    if spec.bias or isinstance(spec.zero, str) or (spec.zero is not None and spec.tensor_scale):
        return "twofold"
    values, scale = _centred(spec), spec.scale
    width, lowest = significant(values)
    bits, last = significant(finite(scale)) if isinstance(scale, Element) else FLOATS[scale]
    if spec.tensor_scale:
        # The tensor scale is the one factor, value * scale the other one, if that is a float32.
        if not isinstance(scale, Element):
            return "twofold"
        largest = max(map(abs, values)) * max(map(abs, finite(scale)))
        width, lowest, bits, last = width + bits, lowest + last, *FLOATS["float32"]
        if width > 24 or lowest < -149 or largest >= 2.0**128:
            return "twofold"
    if out == "float32" or (width + bits <= 24 and lowest + last >= -149):
        return "single"
    return "directed"

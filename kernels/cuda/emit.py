"""C++ text from declarations: what a code, a scale, a zero point is to a CUDA kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np

from lowbit.formats import Element, Format, reference
from lowbit.formats.declare import floating, integer

NUMBERS = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
_OPERANDS = {"Half": np.dtype(np.float16), "Bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SPECIALS = {"none": "none", "fn": "top_is_nan", "ieee": "ieee", "fnuz": "minus_zero_is_nan"}


@dataclass(frozen=True)
class Minifloat:
    """Sign, exponent, mantissa."""

    exponent: int
    mantissa: int
    bias: int
    special: str


@cache
def whole(element: Element) -> bool | None:
    """True where codes are two's complement, False where unsigned, None where no whole numbers."""
    for signed in (True, False):
        if element.values == integer(element.bits, signed=signed).values:
            return signed
    return None


@cache
def minifloat(element: Element) -> Minifloat | None:
    """The fields of an element whose table is that of a small float."""
    bits = element.bits
    for exponent in range(2, min(bits - 1, 6)):
        for specials, name in _SPECIALS.items():
            if specials != "none" and bits != 8:
                continue
            table = floating(exponent, bits - 1 - exponent, specials=specials).values
            if np.array_equal(_bits(element.values), _bits(table)):
                bias = 2 ** (exponent - 1) - (0 if specials == "fnuz" else 1)
                return Minifloat(exponent, bits - 1 - exponent, bias, name)
    return None


def _bits(values: tuple[float, ...]) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    found = np.array(values, np.float32)
    found[np.isnan(found)] = np.nan  # one NaN is as good as another
    return found.view(np.uint32)


@cache
def exact(element: Element, operand: str) -> bool:
    """Whether every value is a number of the tensor core's operand type."""
    values = np.array(element.values)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        return bool((values.astype(_OPERANDS[operand]).astype(np.float64) == values).all())


@cache
def exact_scaled(fmt: Format, operand: str) -> bool:
    """Whether every value times every scale is a number of the operand type."""
    if not isinstance(fmt.scale.element, Element) or fmt.zero is not None or fmt.bias:
        return False
    values, scales = (np.array(e.values) for e in (fmt.element, fmt.scale.element))
    products = np.outer(values[np.isfinite(values)], scales[np.isfinite(scales)])
    with np.errstate(over="ignore"):
        return bool((products.astype(_OPERANDS[operand]).astype(np.float64) == products).all())


@cache
def fits(element: Element, operand: str) -> bool:
    """Whether every value can be rounded to the operand type without leaving its normal range."""
    info = ml_dtypes.finfo(_OPERANDS[operand])  # type: ignore[no-untyped-call]
    least, most = float(info.smallest_normal), float(info.max)
    return exact(element, operand) or all(
        v == 0 or least <= abs(v) <= most for v in element.values if math.isfinite(v)
    )


def numbers(element: Element, operand: str, name: str) -> tuple[str, str]:
    """Text to declare before, and the type that decodes octets of the element to operands."""
    signed, fields = whole(element), minifloat(element)
    if signed is not None:
        return "", f"lb::Integer<lb::{operand}, {element.bits}, {_boolean(signed)}>"
    if fields is not None and (operand == "Bfloat16" or fields.exponent < 5 or _is_half(fields)):
        return "", (
            f"lb::Minifloat<lb::{operand}, {element.bits}, {fields.mantissa}, {fields.bias}, "
            f"lb::Special::{fields.special}>"
        )
    return _codebook(element, operand, name), f"lb::Codebook<{name}>"


def _is_half(fields: Minifloat) -> bool:
    return fields.bias == 15 and fields.special == "ieee"


def _codebook(element: Element, operand: str, name: str) -> str:
    with np.errstate(over="ignore"):
        table = np.array(element.values, np.float32).astype(_OPERANDS[operand]).view(np.uint16)
    text = (
        f"struct {name} {{\n    using Op = lb::{operand};\n"
        f"    static constexpr int bits = {element.bits};\n"
    )
    if element.bits > 4:
        stored = f"static __device__ const unsigned short {name}_numbers[{len(table)}]"
        at = f"unsigned short at(unsigned code) {{ return {name}_numbers[code]; }}"
        return f"{stored} = {_list(table)};\n{text}    static LB_DEV {at}\n}};\n"
    padded = np.resize(table, 16)
    for half, part in (("low", padded & 0xFF), ("high", padded >> 8)):
        first, *others = (f"{word:#x}u" for word in part.astype(np.uint8).view("<u4"))
        choice = "".join(f"i == {i} ? {word} : " for i, word in enumerate(others, 1)) + first
        text += f"    static LB_DEV constexpr unsigned {half}(int i) {{ return {choice}; }}\n"
    return text + "};\n"


def octets(element: Element) -> str:
    """The type that decodes octets of a whole-number element to bytes."""
    signed = whole(element)
    assert signed is not None
    return f"lb::Bytes<{element.bits}, {_boolean(signed)}>"


def scale(kind: Element | str, name: str) -> str:
    """A struct that loads a scale, or a block bias, as float32."""
    if isinstance(kind, str):
        return (
            f"struct {name} {{\n    using Stored = {NUMBERS[kind]};\n"
            f"    static LB_DEV float load(Stored s) {{ return {_widened(kind, 's')}; }}\n}};\n"
        )
    with np.errstate(over="ignore"):
        table = np.array(kind.values, np.float32).view(np.uint32)
    return (
        f"static __device__ const unsigned {name}_bits[{len(table)}] = {_list(table)};\n"
        f"struct {name} {{\n    using Stored = unsigned char;\n"
        "    static LB_DEV float load(Stored s) { return lb::bits<float>("
        f"{name}_bits[s]); }}\n}};\n"
    )


def zero(fmt: Format, name: str) -> str:
    """A struct that loads a zero point as float32."""
    kind = None if fmt.zero is None else reference.zero_dtype(fmt).name
    stored = {"int8": "signed char", "uint8": "unsigned char", None: "unsigned char"}.get(kind)
    if stored is None:
        assert kind is not None
        stored = NUMBERS[kind]
    value = "float(s)" if stored.endswith("char") else _widened(str(kind), "s")
    return (
        f"struct {name} {{\n    using Stored = {stored};\n"
        f"    static constexpr bool present = {_boolean(kind is not None)};\n"
        f"    static LB_DEV float load(Stored s) {{ return {value}; }}\n}};\n"
    )


def _widened(dtype: str, name: str) -> str:
    return {
        "float32": name,
        "float16": f"__half2float({name})",
        "bfloat16": f"__bfloat162float({name})",
    }[dtype]


def widen(dtype: str) -> str:
    """A member function: a number of memory as float32."""
    number, value = NUMBERS[dtype], _widened(dtype, "s")
    return f"    static LB_DEV float widen({number} s) {{ return {value}; }}\n"


def narrow(dtype: str) -> str:
    """A member function: float32 rounded once to a number of memory."""
    value = {"float32": "v", "float16": "__float2half_rn(v)", "bfloat16": "__float2bfloat16_rn(v)"}
    return f"    static LB_DEV {NUMBERS[dtype]} narrow(float v) {{ return {value[dtype]}; }}\n"


def _list(table: np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]) -> str:
    return "{" + ", ".join(f"{int(v):#x}u" for v in table) + "}"


def _boolean(value: bool) -> str:
    return "true" if value else "false"

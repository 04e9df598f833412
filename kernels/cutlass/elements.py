"""CUTLASS's names of the numbers that kernels read and write."""

from __future__ import annotations

from lowbit.formats import Element
from lowbit.kernels.cuda import emit

DTYPES = {
    "float32": "float",
    "float16": "cutlass::half_t",
    "bfloat16": "cutlass::bfloat16_t",
    "int32": "int32_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "float8_e4m3fn": "cutlass::float_e4m3_t",
}
_FLOATS = {
    "float8_e4m3fn": "cutlass::float_e4m3_t",
    "float8_e5m2": "cutlass::float_e5m2_t",
    "float4_e2m1fn": "cutlass::float_e2m1_t",
}
_WHOLE = {
    (8, True): "int8_t",
    (8, False): "uint8_t",
    (4, True): "cutlass::int4b_t",
    (4, False): "cutlass::uint4b_t",
}


def name(element: Element) -> str | None:
    """The type whose bits and values are those of an element; None where CUTLASS has none."""
    signed = emit.whole(element)
    if signed is not None:
        return _WHOLE.get((element.bits, signed))
    return _FLOATS.get(element.name)

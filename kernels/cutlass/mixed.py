"""Weights of fewer bits than x, made x's numbers on their way to Hopper's tensor cores.

w is the first operand, so that a tile may have as few rows of x as there are: its codes come by TMA
in lowbit's own order, go through registers, where they become numbers of x's type, and are
multiplied from there. On that way they can meet scales and addends of a group of columns:
value = code * scale + zero, in the scales' type, then rounded to x's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from lowbit.kernels.cuda.tensor_maps import TensorMap
from lowbit.kernels.cutlass import dense
from lowbit.kernels.cutlass.dense import Matrices
from lowbit.kernels.cutlass.records import MAP, Layout, Value, pack, record

BITS = {
    "cutlass::int4b_t": 4, "cutlass::uint4b_t": 4, "int8_t": 8, "cutlass::float_e4m3_t": 8,
    "cutlass::bfloat16_t": 16, "cutlass::half_t": 16, "float": 32,
    "cutlass::Array<cutlass::float_e4m3_t, 8>": 64,
}  # fmt: skip
"""Of a number, by its C++ type."""
TABLE = "cutlass::Array<cutlass::float_e4m3_t, 8>"
"""In place of a scale: the float8 numbers of int4's codes -8 to -1, whose negatives are those of 8
to 1; codes say which one, see `recoded` of weights.py."""
_KINDS = {
    "cutlass::bfloat16_t": "bfloat16", "cutlass::half_t": "float16", "float": "float32",
    "int8_t": "uint8",
}  # fmt: skip
_NOWHERE = Matrices(0, 0)


@dataclass(frozen=True)
class Spec(dense.Spec):
    """What is compiled into a kernel: `turned`, 128 bytes of x's columns in a tile."""

    scale: str | None = None
    """C++ type of the scales that codes meet on their way; None: none there."""
    zero: bool = False
    """Addends of the same type follow."""


@dataclass(frozen=True)
class Call(dense.Call):
    """Operands of one launch."""

    group: int = 0
    """Columns that share a scale: whole tiles, or all there are."""
    scales: Matrices = _NOWHERE
    """(groups, n): those of all rows side by side."""
    zeros: Matrices = _NOWHERE


finish = dense.finish


@lru_cache(maxsize=256)
def text(spec: Spec) -> str:
    """C++ of the kernel ``lowbit_gemm``."""
    parts = [spec.w, *([] if spec.scale is None else [spec.scale] * (1 + spec.zero))]
    declared = f"using Weights = cute::tuple<{', '.join(parts)}>;\n"
    together = 128 // BITS[spec.w], 128 // BITS[spec.x]
    return dense.written(replace(spec, w="Weights"), finish(spec), declared, together=together)


@lru_cache(maxsize=256)
def layout(spec: Spec) -> Layout:
    """Of the kernel's only argument."""
    mainloop = record(
        ("first", MAP), ("second", MAP), ("scales", MAP), ("zeros", MAP),
        ("groups", "q"), ("group", "i"), ("bytes", "I"), ("reload", "i"),
        ("first_pitch", "q"), ("first_batch", "q"), ("second_pitch", "q"), ("second_batch", "q"),
    )  # fmt: skip
    return dense.laid_out(spec, finish(spec), mainloop)


def maps(spec: Spec, call: Call) -> dict[str, TensorMap]:
    """What TMA reads and writes, by the member that describes it."""
    (m, n, depth), (a, b) = spec.tile, spec.cluster
    found = dense.maps(spec, call)
    # A cluster's blocks read a tile once: each a part, for all.
    found["mainloop.first.descriptor"] = _codes(call.w, call.n, call, m // b, depth, BITS[spec.w])
    found["mainloop.second.descriptor"] = _codes(call.x, call.m, call, n // a, depth, BITS[spec.x])
    if spec.scale is not None:
        bits = BITS[spec.scale]
        found["mainloop.scales.descriptor"] = _scales(call.scales, call, m, f"uint{bits}")
        if spec.zero:
            found["mainloop.zeros.descriptor"] = _scales(call.zeros, call, m, _KINDS[spec.scale])
    return found


def _codes(codes: Matrices, rows: int, call: Call, box: int, depth: int, bits: int) -> TensorMap:
    size = 2 if bits == 16 else 1
    columns, wide = call.k * bits // (8 * size), depth * bits // 8
    return TensorMap(
        f"uint{8 * size}", codes.address, (columns, rows, call.batches), (codes.pitch, codes.batch),
        (wide // size, box, 1), wide,
    )  # fmt: skip


def _scales(scales: Matrices, call: Call, box: int, kind: str) -> TensorMap:
    return TensorMap(
        kind, scales.address, (call.n, -(-call.k // call.group), call.batches),
        (scales.pitch, scales.batch), (box, 1, 1),
    )  # fmt: skip


def values(spec: Spec, call: Call, processors: int) -> dict[str, Value]:
    """Members of the kernel's argument, descriptors aside."""
    (m, n, depth), scaled = spec.tile, spec.scale is not None
    found = dense.common(spec, call, processors, finish(spec))
    found = {name: each for name, each in found.items() if not name.startswith("mainloop.")}
    bits = (m * BITS[spec.w] + n * BITS[spec.x]) * depth
    if spec.scale is not None:
        bits += m * BITS[spec.scale] * (1 + spec.zero)
    found |= {
        "mainloop.groups": -(-call.k // call.group) if scaled else 0,
        "mainloop.group": call.group if scaled else 0,
        "mainloop.bytes": bits // 8,
        "mainloop.reload": -(-call.group // depth) if scaled else 1,
    }
    for side, codes, kind in (("first", call.w, spec.w), ("second", call.x, spec.x)):
        for name, length in (("pitch", codes.pitch), ("batch", codes.batch)):
            found[f"mainloop.{side}_{name}"] = length * 8 // BITS[kind]
    return found


def arguments(
    spec: Spec, call: Call, processors: int, encode: Callable[[TensorMap], bytes]
) -> bytearray:
    """The kernel's argument; `encode` makes descriptors."""
    described = {name: encode(each) for name, each in maps(spec, call).items()}
    return pack(layout(spec), values(spec, call, processors) | described)

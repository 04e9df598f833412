"""Kernels on CUTLASS 2.x: arguments byte by byte those of its own C++, and machine code."""

from __future__ import annotations

import ctypes
import struct

import host
import pytest
from calls import aligned, matrices, same
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels.cutlass import ampere
from lowbit.kernels.cutlass.ampere import Spec
from lowbit.kernels.cutlass.dense import Call, Matrices

FLOAT8 = "cutlass::float_e4m3_t"
SPECS = {
    "int8": Spec("int8_t", "int8_t", "bfloat16", (128, 128, 64), (64, 64), 4),
    "int8, few rows": Spec("int8_t", "int8_t", "float32", (16, 128, 128), (16, 32), 4),
    "int4": Spec(
        "int8_t", "cutlass::int4b_t", "float16", (64, 128, 128), (32, 64), 3, residual="float32"
    ),
    "float8": Spec(
        FLOAT8, "cutlass::float_e5m2_t", "bfloat16", (128, 128, 64), (64, 32), 4,
        activation="silu", residual="bfloat16",
    ),
    "float8 fast": Spec(FLOAT8, FLOAT8, "bfloat16", (256, 128, 64), (64, 64), 3, fast=True),
}  # fmt: skip
MEMBERS = {
    "pointer": "pointer({}, 0)",
    "default": "{}.null_default",
    "steps.step": "step({})",
    "steps.batch": "cute::get<2>(steps({}, 0))",
    "scalars": "{}.scalars[0]",
    "matrix": "{}.ptr_aux",
    "steps.row": "cute::get<0>({}.dAux)",
}
"""Of a visitor's arguments, by the name of its member in visitors.py."""


def setter(spec: Spec) -> str:
    """C++ that sets a tree's arguments from numbers in the order of its operands."""
    lines = []
    for i, (name, path) in enumerate(ampere.finish(spec).operands.items()):
        member = next(m for m in MEMBERS if path.endswith(m))
        visitor = "a." + path.removesuffix("." + member)
        written = MEMBERS[member].format(visitor)
        if name in ("out.batch", "residual.batch"):
            written = f"cute::get<2>({visitor}.dAux)"
        lines.append(f"    put({written}, bits[{i}]);\n")
    head = "inline void set(typename Finish::Arguments& a, const std::uint64_t* bits) {\n"
    return '#include "epilogue.hpp"\n' + head + "".join(lines) + "}\n"


@st.composite
def calls(draw: st.DrawFn, spec: Spec) -> Call:
    m, batches = draw(st.integers(1, 5000)), draw(st.integers(1, 3))
    n, k = 8 * draw(st.integers(1, 100) | st.integers(1, 2500)), draw(aligned(1, 9000, 32))

    def operand(name: str) -> int | float:
        if name.endswith(".step"):
            return draw(st.integers(0, 1))
        if name.endswith(".batch"):
            return draw(st.integers(0, 1 << 40))
        if name.endswith(".default") or name in ("alpha", "zero"):
            return draw(st.floats(width=32, allow_nan=False))
        return draw(aligned(0, 1 << 46, 4))

    named = {name: operand(name) for name in ampere.finish(spec).operands}
    for name in ("out", "residual"):
        for key in ("", ".row", ".batch"):
            named.pop(name + key, None)

    def rows(count: int, width: int) -> Matrices:
        return draw(matrices(count, width, batches))

    out, added = (4 if d == "float32" else 2 for d in (spec.out, spec.residual or spec.out))
    return Call(
        m, n, k, rows(m, k), rows(n, k * ampere.bits(spec.w) // 8), rows(m, n * out),
        tuple(named.items()), rows(m, n * added) if spec.residual else None, batches,
    )  # fmt: skip


def theirs(spec: Spec, call: Call) -> tuple[bytes, tuple[int, ...]]:
    """CUTLASS's arguments and grid."""
    # The kernel itself is PTX, which no C++ compiler for the host takes.
    types = ampere.text(spec).partition('extern "C"')[0]
    built = host.compiled(f'#include "shim.hpp"\n{types}{setter(spec)}#include "ampere.hpp"\n')
    named = dict(call.finish)
    for name, each, dtype in (
        ("out", call.out, spec.out),
        ("residual", call.residual, spec.residual),
    ):
        if each is not None:
            size = 4 if dtype == "float32" else 2
            named |= {name: each.address, f"{name}.row": each.pitch // size}
            named[f"{name}.batch"] = each.batch // size
    bits = [host.bits(named[name]) for name in ampere.finish(spec).operands]
    finish = (ctypes.c_uint64 * len(bits))(*bits)
    handed = struct.pack(
        "<4i3Q4q", call.m, call.n, call.k, call.batches, ctypes.addressof(finish),
        call.x.address, call.w.address, call.x.pitch * 8 // ampere.bits(spec.x),
        call.w.pitch * 8 // ampere.bits(spec.w), call.x.batch, call.w.batch,
    )  # fmt: skip
    threads, shared = ctypes.c_int(), ctypes.c_int()
    size = built.facts(ctypes.byref(threads), ctypes.byref(shared))
    assert (size, threads.value, shared.value) == (
        ampere.layout(spec).size,
        spec.threads,
        spec.shared,
    )
    held, blocks = ctypes.create_string_buffer(size), (ctypes.c_uint * 3)()
    assert built.build(handed, held, blocks)
    return held.raw, tuple(blocks)


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data())
def test_arguments(name: str, data: st.DataObject) -> None:
    spec = SPECS[name]
    call = data.draw(calls(spec))
    wanted, blocks = theirs(spec, call)
    same(ampere.layout(spec), ampere.arguments(spec, call), wanted)
    assert ampere.grid(spec, call) == blocks

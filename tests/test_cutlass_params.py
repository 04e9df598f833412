"""Arguments of CUTLASS's kernels, byte by byte those that its own C++ makes."""

from __future__ import annotations

import ctypes
import struct

import host
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels.cutlass import dense
from lowbit.kernels.cutlass.dense import Call, Matrices, Spec
from lowbit.kernels.cutlass.schedulers import grid

TILE, TALL = (128, 128, 128), (128, 256, 128)
INT8 = "int8_t", "int8_t"
FLOAT8 = "cutlass::float_e4m3_t", "cutlass::float_e4m3_t"
SPECS = {
    "int8": Spec(*INT8, "bfloat16", TALL, (2, 1), "Cooperative"),
    "int8 turned": Spec(*INT8, "float16", (64, 32, 128), (1, 1), "Pingpong", turned=True),
    "float8": Spec(*FLOAT8, "bfloat16", TILE, (1, 2), "Pingpong", residual="bfloat16"),
    "float8 fast": Spec(*FLOAT8, "float32", TILE, (2, 1), "Pingpong", fast=True),
}


def aligned(low: int, high: int, by: int) -> st.SearchStrategy[int]:
    return st.integers(-(-low // by), high // by).map(lambda i: i * by)


@st.composite
def calls(draw: st.DrawFn, spec: Spec) -> Call:
    m, batches = draw(st.integers(1, 5000)), draw(st.integers(1, 3))
    n, k = draw(aligned(1, 20000, 8)), draw(aligned(1, 9000, 16))
    swizzle = draw(st.sampled_from([1, 2, 4, 8]))

    def matrices(rows: int, width: int) -> Matrices:
        pitch = width + draw(aligned(0, 256, 16))
        pitch += -pitch % 16
        batch = 0 if batches == 1 else rows * pitch
        return Matrices(draw(aligned(1 << 40, 1 << 46, 128)), pitch, batch)

    out, added = (dense._BITS[d] // 8 for d in (spec.out, spec.residual or spec.out))
    named = {name: draw(_operand(name)) for name in dense.finish(spec).operands}
    residual = None if spec.residual is None else matrices(m, n * added)
    return Call(
        m, n, k, matrices(m, k), matrices(n, k), matrices(m, n * out), tuple(named.items()),
        residual, batches, swizzle,
    )  # fmt: skip


def _operand(name: str) -> st.SearchStrategy[float | int]:
    if name.endswith(".step"):
        return st.integers(0, 1)
    if name.endswith(".batch"):
        return st.integers(0, 1 << 40)
    if name.endswith(".default") or name in ("alpha", "zero"):
        return st.floats(width=32, allow_nan=False)
    return aligned(0, 1 << 46, 4)


def theirs(spec: Spec, call: Call, processors: int) -> tuple[bytes, tuple[int, ...]]:
    """CUTLASS's arguments and grid."""
    setter = host.setter(dense.finish(spec))
    text = f'#include "shim.hpp"\n{dense.text(spec)}{setter}#include "dense.hpp"\n'
    built = host.compiled(text)
    named = dict(call.finish)
    bits = [host.bits(named[name]) for name in dense.finish(spec).operands]
    finish = (ctypes.c_uint64 * len(bits))(*bits)
    x, w = (call.x, call.m), (call.w, call.n)
    (first, rows), (second, columns) = (w, x) if spec.turned else (x, w)
    out, added = call.out, call.residual or Matrices(0, 0)
    size, wide = (dense._BITS[d] // 8 for d in (spec.out, spec.residual or spec.out))
    handed = struct.pack(
        "<6iQ4Q8q", rows, columns, call.k, call.batches, processors, call.swizzle,
        ctypes.addressof(finish), first.address, second.address, out.address, added.address,
        first.pitch, second.pitch, out.pitch // size, added.pitch // wide,
        first.batch, second.batch, out.batch // size, added.batch // wide,
    )  # fmt: skip
    threads, shared = ctypes.c_int(), ctypes.c_int()
    size = built.facts(ctypes.byref(threads), ctypes.byref(shared))
    assert (size, threads.value) == (dense.layout(spec).size, dense.THREADS)
    assert shared.value <= dense.SHARED
    held, blocks = ctypes.create_string_buffer(size + 128), (ctypes.c_uint * 3)()
    place = (ctypes.addressof(held) + 127) // 128 * 128
    assert built.build(handed, ctypes.c_void_p(place), blocks)
    return ctypes.string_at(place, size), tuple(blocks)


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data(), st.sampled_from([66, 108, 114, 132, 144]))
def test_arguments(name: str, data: st.DataObject, processors: int) -> None:
    spec = SPECS[name]
    call = data.draw(calls(spec))
    wanted, blocks = theirs(spec, call, processors)
    made = dense.arguments(spec, call, processors, host.recorded)
    for member, (at, code) in dense.layout(spec).members.items():
        size = struct.calcsize(code)
        ours, given = (struct.unpack_from("<" + code, each, at) for each in (made, wanted))
        if code == "128s":
            ours, given = (host.fields(each[0]) for each in (ours, given))
        assert ours == given or made[at : at + size] == wanted[at : at + size], member
    assert grid(dense.tiling(spec, call), processors) == blocks

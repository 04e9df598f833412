"""Launches of CUTLASS's kernels, drawn by hypothesis, and CUTLASS's own arguments of them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import host
from hypothesis import strategies as st

from lowbit.kernels.cutlass import dense
from lowbit.kernels.cutlass.dense import Call, Matrices
from lowbit.kernels.cutlass.records import Layout

PROCESSORS = (66, 108, 114, 132, 144)


def aligned(low: int, high: int, by: int) -> st.SearchStrategy[int]:
    """Multiples."""
    return st.integers(-(-low // by), high // by).map(lambda i: i * by)


@st.composite
def matrices(draw: st.DrawFn, rows: int, width: int, batches: int, by: int = 16) -> Matrices:
    """Rows of so many bytes, that begin at multiples of `by`."""
    pitch = width + draw(aligned(0, 256, by))
    pitch += -pitch % by
    return Matrices(
        draw(aligned(1 << 40, 1 << 46, 128)), pitch, 0 if batches == 1 else rows * pitch
    )


@st.composite
def calls(draw: st.DrawFn, family: ModuleType, spec: dense.Spec) -> Call:
    """Products of a kernel; `family` is the module that it is of."""
    m, batches = draw(st.integers(1, 5000)), draw(st.integers(1, 3))
    n, k = draw(aligned(1, 20000, 16)), draw(aligned(1, 9000, 16))
    out, added = (dense.BITS[d] // 8 for d in (spec.out, spec.residual or spec.out))
    named = {name: draw(operand(name)) for name in family.finish(spec).operands}
    residual = None if spec.residual is None else draw(matrices(m, n * added, batches))
    return Call(
        m, n, k, draw(matrices(m, k, batches)), draw(matrices(n, k, batches)),
        draw(matrices(m, n * out, batches)), tuple(named.items()), residual, batches,
    )  # fmt: skip


@st.composite
def swizzled(draw: st.DrawFn, spec: Any) -> Any:
    """The kernel, its tiles in some order."""
    return replace(spec, swizzle=draw(st.sampled_from([1, 2, 4, 8])))


def operand(name: str) -> st.SearchStrategy[float | int]:
    """A value of an epilogue's operand."""
    if name.endswith(".step"):
        return st.integers(0, 1)
    if name.endswith(".batch"):
        return st.integers(0, 1 << 40)
    if name == "x_zero.default":
        return st.integers(0, 100)
    if name == "w_sum.default":
        return st.integers(0, 1 << 30)
    if name.endswith(".default") or name in ("alpha", "zero", "out_scale"):
        return st.floats(width=32, allow_nan=False)
    return aligned(0, 1 << 46, 4)


def built(family: ModuleType, spec: dense.Spec, header: str = "dense.hpp") -> Any:
    """CUTLASS's own code of a kernel, for the host."""
    setter = host.setter(family.finish(spec))
    return host.compiled(f'#include "shim.hpp"\n{family.text(spec)}{setter}#include "{header}"\n')


def theirs(
    family: ModuleType,
    spec: dense.Spec,
    call: Call,
    processors: int,
    header: str = "dense.hpp",
    more: Callable[[bool], tuple[int, ...]] = lambda first: (),
    threads: int = dense.THREADS,
) -> tuple[bytes, tuple[int, ...]]:
    """CUTLASS's arguments and grid; `more` are numbers of x (True) and w that `header` reads."""
    code = built(family, spec, header)
    named = dict(call.finish)
    bits = [host.bits(named[name]) for name in family.finish(spec).operands]
    finish = (ctypes.c_uint64 * len(bits))(*bits)
    beside = (ctypes.c_uint64 * 64)(*more(not spec.turned), *more(spec.turned))
    x, w = (call.x, call.m), (call.w, call.n)
    (first, rows), (second, columns) = (w, x) if spec.turned else (x, w)
    out, added = call.out, call.residual or Matrices(0, 0)
    size, wide = (dense.BITS[d] // 8 for d in (spec.out, spec.residual or spec.out))
    handed = struct.pack(
        "<6i2Q4Q8q", rows, columns, call.k, call.batches, processors, spec.swizzle,
        ctypes.addressof(finish), ctypes.addressof(beside),
        first.address, second.address, out.address, added.address,
        first.pitch, second.pitch, out.pitch // size, added.pitch // wide,
        first.batch, second.batch, out.batch // size, added.batch // wide,
    )  # fmt: skip
    block, shared = ctypes.c_int(), ctypes.c_int()
    size = code.facts(ctypes.byref(block), ctypes.byref(shared))
    assert (size, block.value) == (family.layout(spec).size, threads)
    assert shared.value <= dense.SHARED
    held, blocks = ctypes.create_string_buffer(size + 128), (ctypes.c_uint * 3)()
    place = (ctypes.addressof(held) + 127) // 128 * 128
    assert code.build(handed, ctypes.c_void_p(place), blocks)
    return ctypes.string_at(place, size), tuple(blocks)


def same(layout: Layout, made: bytes | bytearray, wanted: bytes) -> None:
    """Every member of both arguments, descriptors by what they say."""
    for member, (at, code) in layout.members.items():
        size = struct.calcsize(code)
        ours, given = (struct.unpack_from("<" + code, each, at) for each in (made, wanted))
        if code == "128s":
            ours, given = (host.fields(each[0]) for each in (ours, given))
        assert ours == given or made[at : at + size] == wanted[at : at + size], member

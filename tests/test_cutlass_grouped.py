"""Products of groups on CUTLASS: arguments byte by byte, and the table that the GPU writes."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import host
import numpy as np
import pytest
from calls import PROCESSORS, aligned, built, operand, same
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels.cuda import launch
from lowbit.kernels.cutlass import dense, grouped
from lowbit.kernels.cutlass.dense import Matrices
from lowbit.kernels.cutlass.grouped import Call, Rows, Spec

HOPPER = "cuda:90:132"
INT8 = "int8_t", "int8_t"
FLOAT8 = "cutlass::float_e4m3_t", "cutlass::float_e4m3_t"
SPECS = {
    "int8": Spec(*INT8, "bfloat16", (128, 128, 128), (2, 1), "Cooperative"),
    "float8 turned": Spec(*FLOAT8, "float16", (64, 16, 128), (1, 1), "Pingpong", turned=True),
    "float8 fast": Spec(*FLOAT8, "bfloat16", (64, 128, 128), (1, 2), "Pingpong", fast=True),
}


@st.composite
def calls(draw: st.DrawFn, spec: Spec) -> Call:
    places = aligned(1 << 40, 1 << 46, 8)
    named = {name: draw(operand(name)) for name in dense.finish(spec).operands}
    return Call(
        draw(st.integers(1, 1000)), draw(st.integers(1, 20000)), draw(st.integers(1, 9000)),
        draw(places), draw(aligned(1 << 40, 1 << 46, 128)), tuple(named.items()),
    )  # fmt: skip


def handed(spec: Spec, call: Call, processors: int) -> tuple[bytes, object]:
    """What grouped.hpp reads, and what has to stay."""
    columns = [call.table + 8 * call.groups * i for i in range(8)]
    w, x, out, x_scale, w_pitch, x_pitch, out_pitch, shapes = columns
    named = dict(call.finish) | {"x_scale": x_scale}
    bits = [host.bits(named[name]) for name in dense.finish(spec).operands]
    finish = (ctypes.c_uint64 * len(bits))(*bits)
    sides = [(x, x_pitch), (w, w_pitch)]
    (first, first_pitch), (second, second_pitch) = sides[::-1] if spec.turned else sides
    numbers = struct.pack(
        "<2i9Q", call.groups, processors, ctypes.addressof(finish), shapes, first, second, out,
        first_pitch, second_pitch, out_pitch, call.maps,
    )  # fmt: skip
    return numbers, finish


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data(), st.sampled_from(PROCESSORS))
def test_arguments(name: str, data: st.DataObject, processors: int) -> None:
    spec = SPECS[name]
    call = data.draw(calls(spec))
    code = built(dense, spec, "grouped.hpp")
    numbers, _stays = handed(spec, call, processors)
    threads, shared = ctypes.c_int(), ctypes.c_int()
    size = code.facts(ctypes.byref(threads), ctypes.byref(shared))
    assert (size, threads.value) == (grouped.layout(spec).size, dense.THREADS)
    assert shared.value <= dense.SHARED
    held, blocks = ctypes.create_string_buffer(size + 128), (ctypes.c_uint * 3)()
    place = (ctypes.addressof(held) + 127) // 128 * 128
    assert code.build(numbers, ctypes.c_void_p(place), blocks)
    made = grouped.arguments(spec, call, processors, host.recorded)
    same(grouped.layout(spec), made, ctypes.string_at(place, size))
    assert grouped.grid(spec, processors) == tuple(blocks)
    code.space.restype = ctypes.c_long
    assert grouped.map_bytes(processors) == code.space(numbers)
    entries = (ctypes.c_int * 4)()
    code.entries(entries)
    assert list(entries) == [8, 8, 8, 12]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("most", "counted"), [(0, "int64"), (24, "int32")])
@pytest.mark.parametrize("step", [0, 1])
def test_the_gpu_writes_the_table(
    emulator: Any, turned: bool, most: int, counted: str, step: int
) -> None:
    """Rows of each group: sorted ones by where they end, or counts of a room for 24."""
    rng, groups, n, k = np.random.default_rng(7), 300, 640, 512
    counts = rng.integers(0, 30, groups)
    ends = np.cumsum(counts)
    starts = most * np.arange(groups) if most else ends - counts
    spec = Spec(*INT8, "bfloat16", (64, 16, 128), (1, 1), "Pingpong", turned=turned)
    rows = Rows(
        groups, most, int(ends[-1]), n, k, Matrices(1 << 41, 528, n * 528),
        Matrices(1 << 42, 512), Matrices(1 << 43, 2 * n + 16), 1 << 44, step,
    )  # fmt: skip
    columns, shapes = table(emulator, spec, rows, (counts if most else ends).astype(counted))
    np.testing.assert_array_equal(columns[0], (1 << 41) + np.arange(groups) * n * 528)
    np.testing.assert_array_equal(columns[1], (1 << 42) + 512 * starts)
    np.testing.assert_array_equal(columns[2], (1 << 43) + (2 * n + 16) * starts)
    np.testing.assert_array_equal(columns[3], (1 << 44) + 4 * step * starts)
    assert (columns[4] == 528).all()
    assert (columns[5] == 512).all()
    assert (columns[6] == n + 8).all()
    sizes = np.minimum(counts, most) if most else counts
    all_n, all_k = np.full(groups, n), np.full(groups, k)
    wanted = (all_n, sizes, all_k) if turned else (sizes, all_n, all_k)
    np.testing.assert_array_equal(shapes, np.stack(wanted, 1))


def table(emulator: Any, spec: Spec, rows: Rows, given: Any) -> tuple[Any, Any]:
    """Columns and sizes that the GPU writes."""
    groups = rows.groups
    written = np.full(grouped.table_bytes(groups) // 8 + 1, 7, np.uint64)
    source, numbers = grouped.setup(spec, given.dtype.name)
    blocks = (-(-groups // grouped.SETUP),)
    with launch.pretending(emulator):
        emulator.function(source)(blocks, (grouped.SETUP,), (given, *numbers(rows), written))
    columns = written[: 7 * groups].reshape(7, groups).astype(np.int64)
    shapes = written[7 * groups :].view(np.int32)[: 3 * groups].reshape(groups, 3)
    return columns, shapes


@pytest.mark.parametrize("most", [0, 5])
def test_wrong_numbers_of_rows_reach_no_other_memory(emulator: Any, most: int) -> None:
    spec = Spec(*INT8, "bfloat16", (64, 16, 128), (1, 1), "Pingpong")
    one = Matrices(0, 1)
    rows = Rows(6, most, 30, 8, 16, one, one, Matrices(0, 2), 0)
    given = np.array([-7, 12, 9, 10**12, -(10**12), 10**6])
    columns, shapes = table(emulator, spec, rows, given)
    starts, sizes = columns[1], shapes[:, 0]
    assert (starts >= 0).all()
    assert (sizes >= 0).all()
    assert (starts + sizes <= 30).all()

"""Blocks that share columns of tiles: CUTLASS's arguments, and the work that they stand for."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import host
import pytest
from calls import PROCESSORS, built, calls, same, swizzled, theirs
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit.kernels import Problem
from lowbit.kernels.cutlass import dense, streamk, w8a8
from lowbit.kernels.cutlass.dense import Call, Matrices, Spec
from lowbit.kernels.cutlass.schedulers import Tiling
from lowbit.kernels.cutlass.streamk import Sharing

INT8 = "int8_t", "int8_t"
FLOAT8 = "cutlass::float_e4m3_t", "cutlass::float_e4m3_t"
SPECS = {
    "turned": Spec(
        *INT8, "bfloat16", (128, 16, 128), (1, 1), "Cooperative", turned=True, shared=True
    ),
    "clusters": Spec(*FLOAT8, "float16", (128, 128, 128), (2, 1), "Cooperative", shared=True),
}  # fmt: skip
MODES = (streamk.HEURISTIC, streamk.DATA_PARALLEL, streamk.SPLIT_K, streamk.STREAM_K)


class Drawn(NamedTuple):
    call: Call
    processors: int
    mode: str
    splits: int


@st.composite
def drawn(draw: st.DrawFn, spec: Spec, *, few: bool = False) -> Drawn:
    call = draw(calls(dense, spec))
    # Few tiles of many columns, as well as what `calls` draws.
    if few or draw(st.booleans()):
        call = replace(call, m=draw(st.integers(1, 600)), n=8 * draw(st.integers(1, 500)))
    processors, mode = draw(st.sampled_from(PROCESSORS)), draw(st.sampled_from(MODES))
    whole = mode in (streamk.DATA_PARALLEL, streamk.STREAM_K)
    splits = 1 if whole else draw(st.integers(1, 40))
    tiling, steps = dense.tiling(spec, call), dense.steps(spec, call)
    sharing = streamk.shared(tiling, steps, processors, mode, splits)
    call = replace(call, sharing=sharing, partial=1 << 41, locks=1 << 42)
    return Drawn(call, processors, mode, splits)


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None, max_examples=400)
@given(st.data())
def test_arguments(name: str, data: st.DataObject) -> None:
    spec = data.draw(swizzled(SPECS[name]))
    compared(spec, data.draw(drawn(spec)))


def test_arguments_of_few_tiles() -> None:
    """Half a wave of tiles, groups of unequal size: what is seldom drawn."""
    spec = SPECS["clusters"]
    nothing = Matrices(1 << 40, 1 << 14)
    finish = dense.operands(dense.Vectors(0), dense.Vectors(0), 1.0, 0)
    for m, n, steps, processors, mode in product(
        (1, 2, 4, 6, 10), range(1, 40), (9, 57), (114, 132), (streamk.HEURISTIC, streamk.STREAM_K)
    ):
        call = Call(128 * m, 128 * n, 128 * steps, nothing, nothing, nothing, finish)
        sharing = streamk.shared(dense.tiling(spec, call), steps, processors, mode)
        call = replace(call, sharing=sharing, partial=1 << 41, locks=1 << 42)
        compared(spec, Drawn(call, processors, mode, 1))


def compared(spec: Spec, asked: Drawn) -> None:
    """Ours with CUTLASS's."""
    call, processors, mode, splits = asked
    numbers = MODES.index(mode), splits, call.partial, call.locks
    wanted, grid = theirs(dense, spec, call, processors, "streamk.hpp", lambda first: numbers)
    same(dense.layout(spec), dense.arguments(spec, call, processors, host.recorded), wanted)
    assert streamk.grid(dense.tiling(spec, call), processors) == grid


class Work(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("m", "n", "k", "l", "count", "tile", "last")]


def works(spec: Spec, call: Call, processors: int) -> list[list[Any]]:
    """What every block computes, by CUTLASS's own code, in the order in which blocks start."""
    made = dense.arguments(spec, call, processors, host.recorded)
    place = ctypes.create_string_buffer(len(made) + 64)
    at = (ctypes.addressof(place) + 63) // 64 * 64
    ctypes.memmove(at, bytes(made), len(made))
    across, down, _ = streamk.grid(dense.tiling(spec, call), processors)
    code = built(dense, spec, "streamk.hpp")
    held, found = (Work * 16384)(), []
    for y in range(down):
        for x in range(across):
            count = code.works(
                ctypes.c_void_p(at), (ctypes.c_uint * 2)(across, down), (ctypes.c_uint * 2)(x, y),
                held,
            )  # fmt: skip
            found.append([Work.from_buffer_copy(held[i]) for i in range(count)])
    return found


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_step_of_every_tile_is_computed_once(name: str, data: st.DataObject) -> None:
    spec = data.draw(swizzled(SPECS[name]))
    call, processors, *_ = data.draw(drawn(spec, few=True))
    tiling, steps = dense.tiling(spec, call), dense.steps(spec, call)
    assert call.sharing is not None
    blocks = works(spec, call, processors)
    tiles = defaultdict(list)
    for work in (work for block in blocks for work in block):
        tiles[work.m, work.n, work.l].append(work)
    m, n = tiling.blocks
    assert set(tiles) == {
        (i, j, b) for i in range(m) for j in range(n) for b in range(call.batches)
    }
    places = set()
    for pieces in tiles.values():
        at = 0
        for work in sorted(pieces, key=lambda work: work.k):
            assert work.k == at
            at += work.count
            assert bool(work.last) == (at == steps)
        assert at == steps
        if len(pieces) > 1:
            (place,) = {work.tile for work in pieces}
            assert 0 <= place < call.sharing.partial(tiling)
            assert place not in places
            places.add(place)
    _finishes(blocks)


def _finishes(blocks: list[list[Any]]) -> None:
    """Blocks that wait for the steps before their own come to an end, and locks to zero.

    Each block runs as far as it can before the next one starts: what a block waits for is computed
    by blocks that have started before.
    """
    locks: dict[int, int] = defaultdict(int)
    at = [0] * len(blocks)
    moved = True
    while moved:
        moved = False
        for i, block in enumerate(blocks):
            while at[i] < len(block):
                work = block[at[i]]
                if work.tile >= 0:
                    if locks[work.tile] != work.k:
                        break
                    locks[work.tile] = 0 if work.last else work.k + work.count
                at[i] += 1
                moved = True
    assert at == [len(block) for block in blocks]
    assert not any(locks.values())


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data())
def test_workspace_is_no_larger_than_cutlass_wants(name: str, data: st.DataObject) -> None:
    spec = data.draw(swizzled(SPECS[name]))
    call, processors, mode, splits = data.draw(drawn(spec))
    assert call.sharing is not None
    tiles = call.sharing.partial(dense.tiling(spec, call))
    m, n, _ = spec.tile
    first, second = (call.n, call.m) if spec.turned else (call.m, call.n)
    numbers = (ctypes.c_uint64 * 4)(MODES.index(mode), splits, 0, 0)
    handed = (ctypes.c_int * 32)(first, second, call.k, call.batches, processors, spec.swizzle)
    ctypes.c_uint64.from_buffer(handed, 32).value = ctypes.addressof(numbers)
    space = built(dense, spec, "streamk.hpp").space
    space.restype = ctypes.c_long
    assert 4 * m * n * tiles + 8 * tiles <= space(handed)


@pytest.mark.parametrize(
    ("tiles", "steps", "wanted"),
    [
        (32, 112, Sharing(4)),  # 16 rows by 4096, 14336 columns
        (32, 8, Sharing(2)),  # of no fewer than 4 steps
        (8, 16, Sharing(4)),
        (48, 112, Sharing(1, 48, 132)),  # two blocks to a tile would leave 36 idle
        (150, 112, Sharing(1, 150, 132)),
        (131, 112, Sharing()),
        (200, 112, Sharing()),
    ],
)
def test_few_tiles_fill_the_gpu(tiles: int, steps: int, wanted: Sharing) -> None:
    assert streamk.chosen(Tiling(tiles, 1, 1, (1, 1)), steps, 132) == wanted


def test_tiles_of_small_products_are_shared() -> None:
    int8 = lb.format("int8_row")
    p = Problem(16, 4096, 14336, int8, int8, "bfloat16", device="cuda:90:132")
    family = w8a8.FAMILIES["int8"]
    tile = family.best(p)
    assert tile is not None
    assert tile.shared
    assert tile.waves(p) == 0.25
    for other in (replace(p, m=8192), replace(p, batches=8)):
        found = family.best(other)
        assert found is not None
        assert not found.shared


def test_sums_that_are_exact_are_shared_whatever_the_rows() -> None:
    int8, float8 = lb.format("int8_row"), lb.format("fp8_row")
    for name, fmt in (("int8", int8), ("float8", float8)):
        p = Problem(64, 1024, 14336, fmt, fmt, "bfloat16", device="cuda:90:132")
        found = [
            w8a8.FAMILIES[name].best(replace(p, m=m, batch_invariant=True)) for m in (1, 64, 4096)
        ]
        assert found[0] is not None
        assert found.count(found[0]) == 3
        assert found[0].shared is (name == "int8")

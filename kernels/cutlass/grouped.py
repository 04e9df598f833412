"""Groups of rows, each times a matrix of its own, in one launch on Hopper: text and arguments.

How many rows a group has is known on the GPU alone: a small kernel (kernels/cuda/groups.cuh) writes
addresses and sizes of every product, CUTLASS's scheduler reads them there, and blocks rewrite the
descriptors that they read and write by, in memory that each has for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cuda.tensor_maps import TensorMap
from lowbit.kernels.cutlass import dense
from lowbit.kernels.cutlass.dense import Matrices
from lowbit.kernels.cutlass.records import (
    DIVISOR,
    MAP,
    POWER,
    Layout,
    Value,
    divisor,
    pack,
    power,
    record,
)
from lowbit.kernels.cutlass.schedulers import resident

SETUP = 128
"""Threads of a block that writes tables."""
COUNTS = {"int32": "int", "int64": "long long"}
"""C++ types of numbers of rows."""
_MAP = 128  # bytes of a descriptor
_COLUMNS = ("w", "x", "out", "x_scale", "w_pitch", "x_pitch", "out_pitch")


@dataclass(frozen=True)
class Spec(dense.Spec):
    """What is compiled into a kernel."""

    grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class Call:
    """Operands of one launch."""

    groups: int
    n: int
    k: int
    table: int
    """Address of what `setup` writes: `table_bytes`."""
    maps: int
    """Address of memory for descriptors: `map_bytes`."""
    finish: tuple[tuple[str, Value], ...]
    """Operands of the epilogue by name; those of x's scales are read from the table."""


def table_bytes(groups: int) -> int:
    """Of a launch's table."""
    return groups * (8 * len(_COLUMNS) + 12)


def map_bytes(processors: int) -> int:
    """Of the descriptors that blocks write: of both operands, and two of the result."""
    return 4 * _MAP * processors


@dataclass(frozen=True)
class Rows:
    """What tables are written from."""

    groups: int
    most: int
    """Rows that every group has room for; 0: rows of all groups follow each other."""
    total: int
    """Rows of x."""
    n: int
    k: int
    w: Matrices
    """A matrix for each group."""
    x: Matrices
    out: Matrices
    x_scale: int
    """Address of the scales."""
    x_step: int = 1
    """0: one is for all rows."""


def setup(spec: Spec, counts: str) -> tuple[Source, Callable[[Rows], tuple[Any, ...]]]:
    """The kernel that writes tables, a thread for each group, and its arguments.

    They stand between the numbers of rows (groups,), whose dtype is `counts`, and the table.
    """
    name = f"lb::groups<{str(spec.turned).lower()}, {COUNTS[counts]}>"

    def numbers(each: Rows) -> tuple[Any, ...]:
        sizes = each.groups, each.most, each.total, each.n, each.k
        small = (np.int32(v) for v in sizes)
        w, x, out = each.w, each.x, each.out
        return (
            *small, np.uint64(w.address), np.int64(w.pitch), np.int64(w.batch),
            np.uint64(x.address), np.int64(x.pitch), np.uint64(out.address), np.int64(out.pitch),
            np.int32(dense.BITS[spec.out] // 8), np.uint64(each.x_scale), np.int32(4 * each.x_step),
        )  # fmt: skip

    return Source('#include "groups.cuh"\n', name, SETUP), numbers


@lru_cache(maxsize=256)
def text(spec: Spec) -> str:
    """C++ of the kernel ``lowbit_gemm``."""
    return dense.written(spec, dense.finish(spec))


_GROUPS = record(("groups", "i"), ("shapes", "Q"), ("host", "Q"))
_COORDINATES = record(("m", "i"), ("n", "i"), ("k", "i"))
_SCHEDULER = record(
    ("cluster_major", POWER), ("cluster_minor", POWER), ("rows", DIVISOR), ("columns", DIVISOR),
    ("blocks", "Q"), ("known", "?"), ("log_swizzle", "i"), ("raster", "i"), ("shape", _GROUPS),
    ("tile", _COORDINATES), ("cluster", _COORDINATES),
)  # fmt: skip


@lru_cache(maxsize=256)
def layout(spec: Spec) -> Layout:
    """Of the kernel's only argument."""
    counts = [("bytes", "I")]
    if not spec.integral and not spec.fast:
        counts.append(("promotion", "I"))
    mainloop = record(
        ("first", MAP), ("second", MAP), *counts, ("maps", "Q"),
        ("firsts", "Q"), ("first_pitches", "Q"), ("seconds", "Q"), ("second_pitches", "Q"),
    )  # fmt: skip
    stores = record(
        ("thread", dense.finish(spec).layout), ("c", MAP), ("d", MAP), ("maps", "Q"),
        ("cs", "Q"), ("c_pitches", "Q"), ("ds", "Q"), ("d_pitches", "Q"), ("bytes", "I"),
    )  # fmt: skip
    return record(
        ("mode", "i"), ("shape", _GROUPS), ("mainloop", mainloop), ("epilogue", stores),
        ("hardware", dense.HARDWARE), ("scheduler", _SCHEDULER), ("workspace", "Q"),
    )  # fmt: skip


def grid(spec: Spec, processors: int) -> tuple[int, int, int]:
    """Blocks to launch: as many as stay, whatever the groups."""
    a, b = spec.cluster
    return (processors if a * b == 1 else resident(processors, a * b)) // b, b, 1


def _columns(call: Call) -> dict[str, int]:
    """Addresses of the table's columns."""
    return {name: call.table + 8 * call.groups * i for i, name in enumerate(_COLUMNS)}


def maps(spec: Spec, call: Call) -> dict[str, TensorMap]:
    """Descriptors that blocks start from: addresses, sizes and pitches are replaced."""
    (m, n, depth), (a, b), at = spec.tile, spec.cluster, _columns(call)
    first, second = ("w", "x") if spec.turned else ("x", "w")
    rows, columns = dense.stored(spec)
    size = dense.BITS[spec.out] // 8
    box = (min(rows, 128 // size), columns) if spec.turned else (columns, rows)
    found = {
        "mainloop.first": _started("uint8", at[first], (1, 1), (min(depth, 128), m // b), 128),
        "mainloop.second": _started("uint8", at[second], (1, 1), (min(depth, 128), n // a), 128),
        "epilogue.d": _started(
            spec.out, at["out"], (m, n) if spec.turned else (n, m), box, box[0] * size
        ),
    }
    return {f"{name}.descriptor": each for name, each in found.items()}


def _started(
    kind: str, address: int, sizes: tuple[int, int], box: tuple[int, int], swizzle: int
) -> TensorMap:
    return TensorMap(kind, address & -16, sizes, (0,), box, swizzle)


def values(spec: Spec, call: Call, processors: int) -> dict[str, Value]:
    """Members of the kernel's argument, descriptors aside."""
    (m, n, depth), (a, b), at = spec.tile, spec.cluster, _columns(call)
    named = dict(call.finish) | {"x_scale": at["x_scale"]}
    first, second = ("w", "x") if spec.turned else ("x", "w")
    rows, columns = dense.stored(spec)
    stored = 2 * _MAP * processors
    shapes = call.table + 8 * call.groups * len(_COLUMNS)
    groups = {"groups": call.groups, "shapes": shapes}
    return {
        "mode": 4,
        **{f"shape.{name}": value for name, value in groups.items()},
        "mainloop.bytes": (m + n) * depth,
        **({} if spec.integral or spec.fast else {"mainloop.promotion": 4}),
        "mainloop.maps": call.maps + stored,
        "mainloop.firsts": at[first],
        "mainloop.first_pitches": at[f"{first}_pitch"],
        "mainloop.seconds": at[second],
        "mainloop.second_pitches": at[f"{second}_pitch"],
        **{f"epilogue.thread.{path}": named[n] for n, path in dense.finish(spec).operands.items()},
        "epilogue.maps": call.maps,
        "epilogue.ds": at["out"],
        "epilogue.d_pitches": at["out_pitch"],
        "epilogue.bytes": rows * columns * dense.BITS[spec.out] // 8,
        "hardware.processors": processors,
        **power("scheduler.cluster_major", a),
        **power("scheduler.cluster_minor", b),
        **divisor("scheduler.rows", m),
        **divisor("scheduler.columns", n),
        "scheduler.blocks": processors,
        **{f"scheduler.shape.{name}": value for name, value in groups.items()},
        "scheduler.tile.m": m, "scheduler.tile.n": n, "scheduler.tile.k": depth,
        "scheduler.cluster.m": a, "scheduler.cluster.n": b, "scheduler.cluster.k": 1,
        "workspace": call.maps,
    }  # fmt: skip


def arguments(
    spec: Spec, call: Call, processors: int, encode: Callable[[TensorMap], bytes]
) -> bytearray:
    """The kernel's argument; `encode` makes descriptors."""
    described = {name: encode(each) for name, each in maps(spec, call).items()}
    return pack(layout(spec), values(spec, call, processors) | described)

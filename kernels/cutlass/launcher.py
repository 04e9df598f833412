"""Launches of one kernel on CUTLASS: an argument for every set of addresses, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from lowbit.formats.reference import Packed
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.declare import Array, Epilogue, Problem, Run, itemsize

PIECE = 16
"""Bytes that rows begin at multiples of, where TMA or vectors read them."""

Grid = tuple[int, int, int]


class Places(NamedTuple):
    """What a launch reads and writes beside the weight: addresses, 0 where nothing is there."""

    x: int
    x_pitch: int
    """Bytes from a row to the next."""
    x_scale: int
    x_step: int
    """1 where every row has its own scale, 0 where one is for all."""
    x_zero: int
    x_factor: int
    """Where the number is that all of x's scales are multiplied by."""
    out: int
    out_pitch: int
    bias: int
    residual: int
    residual_pitch: int
    partial: int
    """Where blocks that share tiles leave their sums; with locks, of the current stream."""
    locks: int
    alpha: float

    @property
    def aligned(self) -> bool:
        """Whether all rows begin at multiples of PIECE."""
        rows = (
            self.x | self.x_pitch | self.out | self.out_pitch | self.residual | self.residual_pitch
        )
        return rows % PIECE == 0


def runner(
    machine: Machine,
    source: Source,
    otherwise: Run,
    argument: Callable[[Places], tuple[Grid, bytearray] | None],
    *,
    partial: int = 0,
    locks: int = 0,
) -> Run:
    """Return what launches.

    Where rows are not aligned or have gaps, or `argument` has none, `otherwise` computes.
    `partial` and `locks` count the words that blocks share, the latter zero between launches.
    """
    function, threads, shared = machine.function(source), (source.threads,), source.shared
    address = machine.address

    @lru_cache(maxsize=2048)
    def prepared(*places: Any) -> tuple[Grid, tuple[Any]] | None:
        found = Places(*places)
        made = argument(found) if found.aligned else None
        return None if made is None else (made[0], (machine.by_value(bytes(made[1])),))

    def run(x: Any, epilogue: Epilogue, out: Array) -> None:
        codes, scale, step, zero, factor = x, 0, 0, 0, 0
        if isinstance(x, Packed):
            codes = x.codes
            scale, step = address(x.scales), int(x.scales.size > 1)
            zero = 0 if x.zeros is None else address(x.zeros)
            factor = 0 if x.tensor_scale is None else address(x.tensor_scale)
        bias, residual = epilogue.bias, epilogue.residual
        pitch, out_pitch = pitch_of(codes), pitch_of(out)
        added_pitch = 0 if residual is None else pitch_of(residual)
        found = None
        if pitch and out_pitch and (added_pitch or residual is None):
            found = prepared(
                address(codes),
                pitch,
                scale,
                step,
                zero,
                factor,
                address(out),
                out_pitch,
                0 if bias is None else address(bias),
                0 if residual is None else address(residual),
                added_pitch,
                address(machine.scratch(partial)) if partial else 0,
                address(machine.counters(locks)) if locks else 0,
                epilogue.alpha,
            )
        if found is None:
            otherwise(x, epilogue, out)
        else:
            function(found[0], threads, found[1], shared_mem=shared)

    return run


def pitch_of(rows: Array) -> int:
    """Bytes from a row to the next; 0 where rows have gaps, overlap or go backwards."""
    pitch, along = rows.strides[-2:]
    least: int = rows.shape[-1] * rows.itemsize
    if along != rows.itemsize:
        return 0
    # What lies between the only row and the next one is anything.
    return least if rows.shape[-2] == 1 else pitch if pitch >= least else 0


def steady(machine: Machine, rows: Array) -> bool:
    """Whether rows begin at multiples of PIECE, one behind the other."""
    pitch = pitch_of(rows)
    return pitch > 0 and (machine.address(rows) | pitch) % PIECE == 0


def refuse_rows(p: Problem) -> str | None:
    """Say which rows would not begin at multiples of PIECE, or None."""
    sides = {"x": 8 * itemsize(p.x) if isinstance(p.x, str) else p.x.element.bits}
    sides["w"] = p.w.element.bits
    for side, bits in sides.items():
        if p.k * bits % (8 * PIECE):
            return f"rows of {p.k} columns of {side} do not begin at multiples of {PIECE} bytes"
    return refuse_result(p)


def refuse_result(p: Problem) -> str | None:
    """Say why rows of the result or the residual are not written or read; None if they are."""
    for what, dtype in (("the result", p.out), ("the residual", p.residual)):
        if dtype is not None and p.n * itemsize(dtype) % PIECE:
            return f"rows of {p.n} numbers of {what} do not begin at multiples of {PIECE} bytes"
    return None

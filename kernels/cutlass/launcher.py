"""Launches of one kernel on CUTLASS: an argument for every set of addresses, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

from lowbit.formats import reference
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cutlass.dense import Matrices, Vectors
from lowbit.kernels.declare import Array, Bind, Epilogue, Problem, Run, itemsize

PIECE = 16
"""Bytes that rows begin at multiples of, where TMA or vectors read them."""

Grid = tuple[int, int, int]
Strides = tuple[int, ...]


class Places(NamedTuple):
    """What a launch reads and writes beside the weight; addresses are 0 where nothing is there."""

    x: Matrices
    x_scale: Vectors
    x_zero: Vectors
    x_factor: int
    """Where the number is that all of x's scales are multiplied by."""
    out: Matrices
    bias: int
    residual: Matrices | None
    partial: int
    """Where blocks that share tiles leave their sums; with locks, of the current stream."""
    locks: int
    alpha: float


def runner(
    p: Problem,
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
    bits = 8 if isinstance(p.x, str) else p.x.element.bits
    wide = itemsize(p.x) if isinstance(p.x, str) else 1
    rows = 1 if isinstance(p.x, str) or p.x.scale.block[0] is None else p.m
    steps = int(rows > 1), rows if p.batches > 1 else 0

    @lru_cache(maxsize=2048)
    def prepared(
        x: int, x_strides: Strides, scale: int, zero: int, factor: int, out: int,
        out_strides: Strides, bias: int, residual: int, residual_strides: Strides | None,
        *others: Any,
    ) -> tuple[Grid, tuple[Any]] | None:  # fmt: skip
        left = _matrices(x, x_strides, p.m, p.k * bits // 8 * wide, wide)
        size = itemsize(p.out)
        result = added = _matrices(out, out_strides, p.m, p.n * size, size)
        if residual_strides is not None:
            size = itemsize(str(p.residual))
            added = _matrices(residual, residual_strides, p.m, p.n * size, size)
        if left is None or result is None or added is None:
            return None
        scales, zeros = Vectors(scale, *steps), Vectors(zero, *steps)
        rest = added if residual_strides is not None else None
        made = argument(Places(left, scales, zeros, factor, result, bias, rest, *others))
        return None if made is None else (made[0], (machine.by_value(bytes(made[1])),))

    def run(x: Any, epilogue: Epilogue, out: Array) -> None:
        codes, scale, zero, factor = x, 0, 0, 0
        if isinstance(x, Packed):
            codes = x.codes
            scale = address(x.scales)
            zero = 0 if x.zeros is None else address(x.zeros)
            factor = 0 if x.tensor_scale is None else address(x.tensor_scale)
        bias, residual = epilogue.bias, epilogue.residual
        found = prepared(
            address(codes),
            codes.strides,
            scale,
            zero,
            factor,
            address(out),
            out.strides,
            0 if bias is None else address(bias),
            0 if residual is None else address(residual),
            None if residual is None else residual.strides,
            address(machine.scratch(partial)) if partial else 0,
            address(machine.counters(locks)) if locks else 0,
            epilogue.alpha,
        )
        if found is None:
            otherwise(x, epilogue, out)
        else:
            function(found[0], threads, found[1], shared_mem=shared)

    return run


def _matrices(address: int, strides: Strides, rows: int, least: int, size: int) -> Matrices | None:
    """Matrices of so many rows of `least` bytes, numbers of `size`, as they lie.

    None where rows have gaps, overlap, go backwards or begin elsewhere than at multiples of PIECE,
    or where matrices do not go forwards.
    """
    *stack, pitch, along = strides
    if rows == 1:
        pitch = least  # what lies between the only row and the next one is anything
    batch = stack[0] if stack else 0
    if along != size or pitch < least or (stack and batch <= 0):
        return None
    return None if (address | pitch | batch) % PIECE else Matrices(address, pitch, batch)


def placed(machine: Machine, rows: Array) -> Matrices | None:
    """Where rows begin at multiples of PIECE, one behind the other; None where they do not."""
    size = rows.itemsize
    return _matrices(
        machine.address(rows), rows.strides, rows.shape[-2], rows.shape[-1] * size, size
    )


def vectors(machine: Machine, numbers: Array) -> Vectors:
    """Numbers of rows, or of all rows of a matrix: (..., rows, 1), a matrix's side by side."""
    # Of every other matrix, or where rows were cut off, they do not follow each other.
    batch = numbers.strides[0] // numbers.itemsize if numbers.ndim == 3 else 0
    return Vectors(machine.address(numbers), int(numbers.shape[-2] > 1), batch)


def matrix_by_matrix(build: Callable[[Problem], Bind], p: Problem) -> Bind:
    """Another kernel's run, for memory that kernels here do not read; of a stack, for each."""
    bind = build(replace(p, batches=1))
    if p.batches == 1:
        return bind

    def to(w: Packed) -> Run:
        @cache
        def bound(i: int) -> Run:
            return bind(_matrix(w, i))

        def run(x: Any, epilogue: Epilogue, out: Array) -> None:
            for i in range(p.batches):
                rest = None if epilogue.residual is None else epilogue.residual[i]
                after = Epilogue(epilogue.alpha, epilogue.bias, epilogue.activation, rest)
                bound(i)(_matrix(x, i), after, out[i])

        return run

    return to


def _matrix(stack: Any, i: int) -> Any:
    if isinstance(stack, Packed):
        return reference.take(stack, i, slice(0, stack.shape[-2]))
    return stack[i]


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

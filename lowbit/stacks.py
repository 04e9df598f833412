"""Leading axes: every matrix of a product by a run of its own, or all of them by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import device as places
from lowbit.array import QArray
from lowbit.dispatch import Stated
from lowbit.formats import reference
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue
from lowbit.kernels.declare import NOT_FINITE
from lowbit.kernels.words16 import Words16

Array = npt.NDArray[Any]
Parts = Packed | Words16

Execute = Callable[[Any, Epilogue, Array], object]
"""execute(x, epilogue, out): x as it came, out of all axes; NOT_FINITE, or anything else."""


def matrices(
    stated: Stated,
    parts: Parts,
    run_of: Callable[[Parts], Execute],
    dense: bool,
    together: bool = False,
) -> Execute:
    """Every matrix of the product by its run, or all rows as those of one.

    `together`: runs take whole stacks.
    """
    if not stated.flat:
        if together:
            return _all(stated, run_of(_stack_of(parts)))
        return _each(of_every_matrix(stated.shape[:-2], parts, run_of))
    run, (*lead, columns) = run_of(parts), stated.shape
    if dense and len(lead) == 1 and not stated.dropped[0]:
        return run
    rows, k = math.prod(lead), stated.problem.k

    def execute(x: Any, after: Epilogue, out: Array) -> object:
        if isinstance(x, QArray):
            x = (x.reshape(rows, k) if x.ndim > 2 else x)._rows()
        elif x.ndim != 2:
            x = x.reshape(rows, k)
        if after.residual is not None:
            flat = after.residual.reshape(rows, columns)
            after = Epilogue(after.alpha, after.bias, after.activation, flat)
        return run(x, after, out.reshape(rows, columns))

    return execute


def _all(stated: Stated, run: Execute) -> Execute:
    p = stated.problem

    def execute(x: Any, after: Epilogue, out: Array) -> object:
        x = x.reshape(p.batches, p.m, p.k)
        if after.residual is not None:
            rest = after.residual.reshape(p.batches, p.m, p.n)
            after = Epilogue(after.alpha, after.bias, after.activation, rest)
        x = x._rows() if isinstance(x, QArray) else x
        return run(x, after, out.reshape(p.batches, p.m, p.n))

    return execute


def _stack_of(parts: Parts) -> Packed:
    """All matrices along one leading axis, where they are."""
    assert isinstance(parts, Packed)
    *lead, rows, columns = parts.shape
    axes, found = len(lead), math.prod(lead)
    stack = places.changed(parts, lambda each: each.reshape(found, *each.shape[axes:]))
    return replace(stack, shape=(found, rows, columns))


def of_every_matrix(
    lead: tuple[int, ...], parts: Parts, run_of: Callable[[Parts], Execute]
) -> list[tuple[tuple[int, ...], Execute]]:
    """The run for each place of the result's leading axes; places that share a matrix share it."""
    found: dict[tuple[int, ...], Execute] = {}
    runs = []
    for index in np.ndindex(lead):
        own = _own(parts.shape, index)
        if own not in found:
            found[own] = run_of(matrix_of(parts, index))
        runs.append((index, found[own]))
    return runs


def _each(runs: list[tuple[tuple[int, ...], Execute]]) -> Execute:
    def execute(x: Any, after: Epilogue, out: Array) -> object:
        x = x._rows() if isinstance(x, QArray) else x if x.ndim > 1 else x[None]
        for index, run in runs:
            if run(matrix_of(x, index), at(after, index), out[index]) is NOT_FINITE:
                return NOT_FINITE
        return None

    return execute


def _own(shape: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
    """Where an operand, whose leading axes broadcast, has the matrix of this index."""
    lead = shape[:-2]
    own = index[len(index) - len(lead) :]
    return tuple(0 if length == 1 else i for i, length in zip(own, lead, strict=True))


def matrix_of(operand: Any, index: tuple[int, ...]) -> Any:
    """The matrix of an operand at this index of its leading axes, which broadcast."""
    if len(operand.shape) == 2:
        return operand
    own = _own(operand.shape, index)
    if isinstance(operand, Packed):
        return reference.take(operand, own, slice(0, operand.shape[-2]))
    return operand[own]


def at(after: Epilogue, index: tuple[int, ...]) -> Epilogue:
    """What follows the product of one matrix."""
    if after.residual is None:
        return after
    return Epilogue(after.alpha, after.bias, after.activation, after.residual[index])

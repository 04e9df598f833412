"""Blocks of a matrix: which of them a piece of it touches, and numbers to and from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Block = tuple[int | None, int | None]  # rows and columns that share a number
Piece = tuple[Any, slice, slice]  # leading index, rows, columns

CHUNK = 1 << 14  # numbers worked on at a time, so that quantizing needs little memory of its own


def pieces(shape: tuple[int, ...], *, whole_rows: bool = False) -> Iterator[Piece]:
    """About CHUNK numbers at a time, in row-major order; columns are cut at whole bytes."""
    rows, columns = shape[-2:]
    wide = columns if whole_rows else min(columns, max(CHUNK // 8 * 8, 8))
    tall = max(1, CHUNK // max(wide, 1))  # 1 where a row is cut
    for lead in np.ndindex(shape[:-2]):
        for top in range(0, rows, tall):
            for left in range(0, columns, max(wide, 1)):
                bottom, right = min(top + tall, rows), min(left + wide, columns)
                yield lead, slice(top, bottom), slice(left, right)


def cut(part: slice, size: int | None) -> tuple[slice, Array]:
    """The blocks that a run of entries touches, and where in the run each of them begins."""
    if size is None:
        return slice(0, 1), np.zeros(1, np.intp)
    touched = slice(part.start // size, -(-part.stop // size))
    return touched, np.maximum(np.arange(touched.start, touched.stop) * size - part.start, 0)


def touched(piece: Piece, block: Block) -> Any:
    """Index of the blocks that a piece touches."""
    lead, rows, columns = piece
    return (*lead, cut(rows, block[0])[0], cut(columns, block[1])[0])


def reduce(ufunc: np.ufunc, x: Array, piece: Piece, block: Block) -> Array:
    """`ufunc` over the entries of each block that a piece touches."""
    _, rows, columns = piece
    for axis, part, size in ((-1, columns, block[1]), (-2, rows, block[0])):
        begins = cut(part, size)[1]
        if len(begins) < x.shape[axis]:
            x = ufunc.reduceat(x, begins, axis)
    return x


def expand(numbers: Array, piece: Piece, block: Block) -> Array:
    """The number of its block for each entry of a piece, or an axis of one to broadcast."""
    _, rows, columns = piece
    for axis, part, size in ((-2, rows, block[0]), (-1, columns, block[1])):
        length = part.stop - part.start
        if 1 < numbers.shape[axis] < length:
            numbers = numbers.repeat(np.diff(cut(part, size)[1], append=length), axis)
    return numbers

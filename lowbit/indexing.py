"""Slicing: rows freely, columns where a block and a byte begin."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit import device, interop
from lowbit.formats import Format, Scale
from lowbit.formats.reference import Array, Packed

if TYPE_CHECKING:
    from lowbit.array import QArray

Entry = int | slice | Array  # an array of integers, or a mask over one axis or more


def getitem(w: QArray, index: Any) -> QArray:
    """`w[index]` as NumPy means it, quantized still."""
    entries = _entries(index, w.ndim)
    contraction = w.ndim - (2 if w._transposed else 1)
    at = _position(entries, contraction)
    picked = _columns(w, entries[at])
    entries[at] = slice(None)
    if not any(isinstance(e, np.ndarray) for e in entries):
        # Plain entries take one axis each; stored rows come before their columns.
        del entries[at]
        return _basic(picked, entries)
    return _fancy(picked, entries, contraction)


def _entries(index: Any, ndim: int) -> list[Entry]:
    """What is asked of each axis in turn: Ellipsis spelled out, absent axes whole."""
    given = [_entry(e) for e in (index if isinstance(index, tuple) else (index,))]
    holes = [i for i, e in enumerate(given) if e is Ellipsis]
    if len(holes) > 1:
        raise IndexError("an index can have only one Ellipsis (...)")
    entries: list[Any] = given if holes else [*given, Ellipsis]
    used = sum(_width(e) for e in entries if e is not Ellipsis)
    if used > ndim:
        raise IndexError(f"too many indices: the array has {ndim} axes, {used} were indexed")
    hole = holes[0] if holes else len(given)
    entries[hole : hole + 1] = [slice(None)] * (ndim - used)
    return entries


def _entry(entry: Any) -> Entry | EllipsisType:
    if entry is Ellipsis or isinstance(entry, slice):
        return entry
    if entry is None:
        raise IndexError("a QArray takes no new axes (None) in an index; use .reshape")
    if isinstance(entry, (bool, np.bool_)):
        raise IndexError("a single bool is no index of a QArray; use a mask over the rows")
    if not isinstance(entry, (np.ndarray, list, tuple)) and not hasattr(entry, "__array__"):
        try:
            return operator.index(entry)
        except TypeError:
            pass
    array: Array = interop.to_numpy(entry, "index")[0] if _elsewhere(entry) else np.asarray(entry)
    if isinstance(entry, (list, tuple)) and not array.size:
        array = array.astype(np.intp)  # [] is float64 to NumPy
    if array.dtype.kind not in "biu" or (array.dtype == np.bool_ and not array.ndim):
        raise IndexError(
            "an index is an integer, a slice, or an array of integers or booleans, got "
            f"{type(entry).__name__} of {array.dtype}"
        )
    return array if array.ndim else int(array)


def _elsewhere(entry: Any) -> bool:
    """Whether an index is on a GPU: where rows go is decided on the host, which waits for it."""
    return device.is_gpu_array(entry) or bool(getattr(entry, "is_cuda", False))


def _width(entry: Entry) -> int:
    """Axes that an entry uses up: a mask as many as it has."""
    return entry.ndim if isinstance(entry, np.ndarray) and entry.dtype == np.bool_ else 1


def _position(entries: list[Entry], axis: int) -> int:
    """Place of the entry that an axis falls under."""
    ends = np.cumsum([_width(e) for e in entries])
    return int(np.searchsorted(ends, axis, side="right"))


def _columns(w: QArray, entry: Entry) -> QArray:
    """Columns start:stop where both ends fall on a block of scales and on a byte."""
    parts, fmt = w._parts, w.format
    length, alignment = parts.shape[-1], column_alignment(fmt)
    start, stop, step = entry.indices(length) if isinstance(entry, slice) else (0, 0, 0)
    if (start, stop, step) == (0, length, 1):
        return w
    if step != 1:
        raise IndexError(
            f"columns of {fmt.name} share scales and bytes: take a slice with step 1 whose ends "
            f"are multiples of {alignment}, or .dequantize()[...]"
        )
    stop = max(start, stop)
    if start % alignment or (stop % alignment and stop != length):
        raise IndexError(
            f"columns {start}:{stop} of {fmt.name} cut through a block: the ends have to be "
            f"multiples of {alignment} (or the end, {length}), else .dequantize()[...]"
        )
    if w._columns is not None:
        raise IndexError(
            "columns of an array with a column permutation are not contiguous; .dequantize() first"
        )
    bits, width = fmt.element.bits, fmt.scale.block[1]
    if width is None:
        blocks = slice(None) if stop > start else slice(0, 0)
    else:
        blocks = slice(start // width, -(-stop // width))
    stored = w._rows()
    cut = Packed(
        fmt,
        (*parts.shape[:-1], stop - start),
        stored.codes[..., start * bits // 8 : -(-stop * bits // 8)],
        stored.scales[..., blocks],
        None if stored.zeros is None else stored.zeros[..., blocks],
        None if stored.biases is None else stored.biases[..., blocks],
        stored.tensor_scale,
    )
    divisor = None if w._divisor is None else w._divisor[start:stop]
    return w._with(cut, divisor=divisor)


def column_alignment(fmt: Format) -> int:
    """Smallest step at which columns may be cut."""
    per_byte = 8 // math.gcd(8, fmt.element.bits)
    width = fmt.scale.block[1]
    return per_byte if width is None else math.lcm(width, per_byte)


def _basic(w: QArray, entries: list[Any]) -> QArray:
    """Integers and slices of the leading axes and the rows: views of the parts."""
    lengths = w._parts.shape[:-1]
    if w._vector or all(
        isinstance(e, slice) and e.indices(n) == (0, n, 1)
        for e, n in zip(entries, lengths, strict=True)
    ):
        return w
    *lead, row = entries
    parts, rows = w._rows(), lengths[-1]
    drop = not isinstance(row, slice)
    if drop:
        if not -rows <= row < rows:
            raise IndexError(f"index {row} is out of bounds for an axis of {rows}")
        row = slice(row % rows, row % rows + 1)
    start, stop, step = row.indices(rows)
    size = parts.format.scale.block[0]
    blocks: Any = row
    if not range(start, stop, step):
        blocks = slice(0, 0)
    elif size is None:
        blocks = slice(None)
    elif step == 1 and start % size == 0:
        blocks = slice(start // size, -(-stop // size))
    else:
        parts = per_row(parts)
    at, across = (*lead, row), (*lead, blocks)
    codes = parts.codes[at]
    cut = Packed(
        parts.format,
        (*codes.shape[:-1], parts.shape[-1]),
        codes,
        parts.scales[across],
        None if parts.zeros is None else parts.zeros[across],
        None if parts.biases is None else parts.biases[across],
        None if parts.tensor_scale is None else parts.tensor_scale[(*lead, ...)],
    )
    return _without_row_axis(w, cut) if drop else w._with(cut)


def _without_row_axis(w: QArray, cut: Packed) -> QArray:
    """Drop a row axis of length 1: a vector, or the leading axes become the rows."""
    if len(cut.shape) == 2:
        return w._with(cut, vector=True, transposed=False)
    cut = per_row(cut)
    second = cut.tensor_scale
    if second is not None:
        second = _one_a_matrix(cut.format, second)
    return w._with(
        replace(
            cut,
            shape=(*cut.shape[:-2], cut.shape[-1]),
            codes=cut.codes[..., 0, :],
            scales=cut.scales[..., 0, :],
            zeros=None if cut.zeros is None else cut.zeros[..., 0, :],
            biases=None if cut.biases is None else cut.biases[..., 0, :],
            tensor_scale=second,
        ),
        transposed=False,
    )


def _fancy(w: QArray, entries: list[Entry], contraction: int) -> QArray:
    """Index arrays: every row carries its own scales then, so any choice of rows will do."""
    parts = per_row(w._rows())
    lengths = parts.shape[:-1]
    # NumPy itself says which rows go where, and, told a contraction axis of length 1 and one of
    # length 0, where that axis ends up.
    numbers = np.expand_dims(np.arange(math.prod(lengths)).reshape(lengths), contraction)
    picked = numbers[tuple(entries)]
    hollow = numbers.repeat(0, contraction)[tuple(entries)].shape
    place = next(i for i, (a, b) in enumerate(zip(picked.shape, hollow, strict=True)) if a != b)
    if place < picked.ndim - 2:
        raise IndexError(
            "this index would put the contraction axis among the leading ones; index the rows "
            "first, or .dequantize()[...]"
        )
    rows, here = picked.squeeze(place), w._place
    at: Any = np.unravel_index(rows, lengths) if rows.size else (rows,) * len(lengths)
    if not here.prepares:
        at = tuple(here.put(a) for a in at)
    second = parts.tensor_scale
    cut = Packed(
        parts.format,
        (*rows.shape, parts.shape[-1]),
        parts.codes[at],
        parts.scales[at],
        None if parts.zeros is None else parts.zeros[at],
        None if parts.biases is None else parts.biases[at],
        None
        if second is None
        else _one_a_matrix(parts.format, here.xp.broadcast_to(second[at[:-1]], rows.shape)),
    )
    return w._with(cut, transposed=place == picked.ndim - 2)


def _one_a_matrix(fmt: Format, second: Array) -> Array:
    """Tensor scales of single rows, (..., rows), as one for each matrix."""
    if (second != second[..., :1]).any():
        raise IndexError(
            f"rows of several {fmt.name} matrices have different tensor scales and cannot form "
            "one matrix; index the leading axes alone, or take i:i+1 instead of i"
        )
    xp = device.of(second).xp
    one: Array = second[..., 0] if second.shape[-1] else xp.ones(second.shape[:-1], np.float32)
    return one


def per_row(parts: Packed) -> Packed:
    """The same values with scales of single rows: blocks of rows repeat theirs, exactly."""
    size, width = parts.format.scale.block
    if size == 1:
        return parts
    rows = parts.shape[-2]

    def repeat(blocks: Array | None) -> Array | None:
        if blocks is None:
            return None
        return blocks.repeat(rows if size is None else size, -2)[..., :rows, :]

    scale = Scale(parts.format.scale.element, (1, width))
    scales = repeat(parts.scales)
    assert scales is not None
    return replace(
        parts,
        format=replace(parts.format, scale=scale),
        scales=scales,
        zeros=repeat(parts.zeros),
        biases=repeat(parts.biases),
    )

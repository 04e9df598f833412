"""Slicing: rows freely, columns where a block and a byte begin."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.formats import WHOLE, Scale
from lowbit.formats.reference import Array, Packed

if TYPE_CHECKING:
    from lowbit.array import QArray


def getitem(w: QArray, index: Any) -> QArray:
    """`w[index]` as NumPy means it, quantized still."""
    entries = _expand(index, w.ndim)
    if w._vector:
        return _columns(w, entries[0])
    if w._transposed:
        entries[-1], entries[-2] = entries[-2], entries[-1]
    picked = w if _is_all(entries[-1], w._parts.shape[-1]) else _columns(w, entries[-1])
    return _rows(picked, entries[:-1])


def _expand(index: Any, ndim: int) -> list[Any]:
    """One entry an axis: Ellipsis filled in, masks and lists as integer arrays."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(e is None for e in entries):
        raise IndexError("a QArray takes no new axes (None) in an index; use .reshape")
    widths = [_width(e) for e in entries]
    if Ellipsis in [e for e in entries if not isinstance(e, np.ndarray)]:
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        missing = ndim - sum(widths) + 1
        entries[at : at + 1] = [slice(None)] * missing
        widths = [_width(e) for e in entries]
    if sum(widths) > ndim:
        raise IndexError(f"too many indices: the array has {ndim} axes, {sum(widths)} were indexed")
    entries += [slice(None)] * (ndim - sum(widths))
    expanded: list[Any] = []
    for entry in entries:
        if isinstance(entry, slice) or isinstance(entry, (int, np.integer)):
            if isinstance(entry, (bool, np.bool_)):
                raise IndexError("a single bool is no index of a QArray; use a mask over the rows")
            expanded.append(entry)
            continue
        array = np.asarray(entry)
        if array.dtype == np.bool_:
            expanded.extend(_mask(array))
        elif array.dtype.kind in "iu" or array.size == 0:
            expanded.append(array.astype(np.intp))
        else:
            raise IndexError(
                f"an index is an integer, a slice, or an array of integers or booleans, "
                f"got {type(entry).__name__} of {array.dtype}"
            )
    return expanded


def _width(entry: Any) -> int:
    """Axes that an entry uses up: a mask as many as it has."""
    if entry is Ellipsis:
        return 1
    array = np.asarray(entry) if isinstance(entry, (list, np.ndarray)) else None
    return array.ndim if array is not None and array.dtype == np.bool_ else 1


class _Masked(np.ndarray[Any, Any]):
    """Positions that a mask selected, with the length that the mask has to have."""

    length: int


def _mask(mask: Array) -> list[Array]:
    positions = []
    for found, length in zip(mask.nonzero(), mask.shape, strict=True):
        view = found.view(_Masked)
        view.length = length
        positions.append(view)
    return positions


def _is_all(entry: Any, length: int) -> bool:
    return isinstance(entry, slice) and entry.indices(length) == (0, length, 1)


def _columns(w: QArray, entry: Any) -> QArray:
    """Columns start:stop where both ends fall on a block of scales and on a byte."""
    parts = w._rows()
    length, fmt = parts.shape[-1], parts.format
    if _is_all(entry, length):
        return w
    alignment = column_alignment(fmt)
    if not isinstance(entry, slice) or entry.indices(length)[2] != 1:
        raise IndexError(
            f"columns of {fmt.name} share scales and bytes: take a slice with step 1 whose ends "
            f"are multiples of {alignment}, or .dequantize()[...]"
        )
    start, stop, _ = entry.indices(length)
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
    if width is WHOLE:
        blocks = slice(None) if stop > start else slice(0, 0)
    else:
        blocks = slice(start // width, -(-stop // width))
    cut = Packed(
        fmt,
        (*parts.shape[:-1], stop - start),
        parts.codes[..., start * bits // 8 : -(-stop * bits // 8)],
        parts.scales[..., blocks],
        None if parts.zeros is None else parts.zeros[..., blocks],
        None if parts.biases is None else parts.biases[..., blocks],
        parts.tensor_scale,
    )
    divisor = None if w._divisor is None else w._divisor[start:stop]
    return w._with(cut, divisor=divisor)


def column_alignment(fmt: Any) -> int:
    """Smallest step at which columns may be cut."""
    per_byte = 8 // np.gcd(8, fmt.element.bits)
    width = fmt.scale.block[1]
    return int(per_byte if width is WHOLE else np.lcm(width, per_byte))


def _rows(w: QArray, entries: list[Any]) -> QArray:
    """Apply indices of the leading axes and of the rows."""
    parts = w._rows()
    lengths = parts.shape[:-1]
    for entry, length in zip(entries, lengths, strict=True):
        if isinstance(entry, _Masked) and entry.length != length:
            raise IndexError(f"a mask of length {entry.length} does not fit an axis of {length}")
    if all(_is_all(e, n) for e, n in zip(entries, lengths, strict=True)):
        return w if w._parts is parts else w._with(parts)
    lead, row = entries[:-1], entries[-1]
    if not any(isinstance(e, np.ndarray) for e in entries):
        return _basic(w, parts, tuple(lead), row)
    return _fancy(w, parts, entries)


def _basic(w: QArray, parts: Packed, lead: tuple[Any, ...], row: Any) -> QArray:
    drop = isinstance(row, (int, np.integer))
    if drop:
        row = _one(row, parts.shape[-2])
    start, stop, step = row.indices(parts.shape[-2])
    size = parts.format.scale.block[0]
    whole_blocks = size is not WHOLE and step == 1 and start % size == 0
    if whole_blocks and size != 1 and stop % size and stop != parts.shape[-2]:
        whole_blocks = False
    if size is WHOLE and len(range(start, stop, step)):
        blocks: Any = slice(None)
    elif size == 1 or size is WHOLE:
        blocks = row
    elif whole_blocks:
        blocks = slice(start // size, -(-stop // size))
    else:
        parts, blocks = per_row(parts), row
    at, across = (*lead, row), (*lead, blocks)
    codes = parts.codes[at]
    cut = Packed(
        parts.format,
        (*codes.shape[:-1], parts.shape[-1]),
        codes,
        parts.scales[across],
        None if parts.zeros is None else parts.zeros[across],
        None if parts.biases is None else parts.biases[across],
        None if parts.tensor_scale is None else parts.tensor_scale[lead],
    )
    return _without_row_axis(w, cut) if drop else w._with(cut)


def _one(row: Any, length: int) -> slice:
    if not -length <= row < length:
        raise IndexError(f"index {row} is out of bounds for an axis of {length}")
    position = int(row) % length
    return slice(position, position + 1)


def _fancy(w: QArray, parts: Packed, entries: list[Any]) -> QArray:
    """Index arrays: every row carries its own scales then, so any choice of rows will do."""
    parts = per_row(parts)
    at = tuple(e.view(np.ndarray) if isinstance(e, np.ndarray) else e for e in entries)
    codes = parts.codes[at]
    second = parts.tensor_scale
    if second is not None and len(at) > 1:
        second = np.broadcast_to(second[..., None], parts.shape[:-1])[at]
        if second.ndim and second.shape[-1] and (second != second[..., :1]).any():
            raise IndexError(
                f"rows of several {parts.format.name} matrices have different tensor scales and "
                "cannot form one matrix; index the leading axes alone, or .dequantize()"
            )
        second = second[..., 0] if second.ndim else second
    cut = Packed(
        parts.format,
        (*codes.shape[:-1], parts.shape[-1]),
        codes,
        parts.scales[at],
        None if parts.zeros is None else parts.zeros[at],
        None if parts.biases is None else parts.biases[at],
        second,
    )
    if codes.ndim == 1:
        return w._with(_matrix(cut), vector=True, transposed=False)
    return w._with(cut)


def _matrix(cut: Packed) -> Packed:
    """A single row as a matrix of one row."""
    return replace(
        cut,
        shape=(1, cut.shape[-1]),
        codes=cut.codes[None],
        scales=cut.scales[None],
        zeros=None if cut.zeros is None else cut.zeros[None],
        biases=None if cut.biases is None else cut.biases[None],
    )


def _without_row_axis(w: QArray, cut: Packed) -> QArray:
    """Drop a row axis of length 1: a vector, or the leading axes become the rows."""
    if len(cut.shape) == 2:
        return w._with(cut, vector=True, transposed=False)
    if w._transposed:
        raise IndexError(
            "an integer in place of the last axis of a transposed stack would put the contraction "
            "axis among the leading ones; take a slice, or .dequantize()"
        )
    if cut.tensor_scale is not None:
        raise IndexError(
            f"rows of several {cut.format.name} matrices have a tensor scale each and cannot form "
            "one matrix; take a slice i:i+1 instead"
        )
    cut = per_row(cut)
    drop = (..., 0, slice(None))
    return w._with(
        replace(
            cut,
            shape=(*cut.shape[:-2], cut.shape[-1]),
            codes=cut.codes[drop],
            scales=cut.scales[drop],
            zeros=None if cut.zeros is None else cut.zeros[drop],
            biases=None if cut.biases is None else cut.biases[drop],
        )
    )


def per_row(parts: Packed) -> Packed:
    """The same values with scales of single rows: blocks of rows repeat theirs, exactly."""
    size, width = parts.format.scale.block
    if size == 1:
        return parts
    rows = parts.shape[-2]

    def repeat(blocks: Array | None) -> Array | None:
        if blocks is None:
            return None
        return blocks.repeat(rows if size is WHOLE else size, -2)[..., :rows, :]

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

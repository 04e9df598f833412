"""Reshaping and joining: the parts move, no code changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit import device
from lowbit.array import QArray
from lowbit.formats.reference import Array, Packed
from lowbit.indexing import column_alignment, per_row


def _each(parts: Packed, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Packed:
    """Every part but the tensor scale changed alike."""
    return replace(
        parts,
        shape=shape,
        codes=change(parts.codes),
        scales=change(parts.scales),
        zeros=None if parts.zeros is None else change(parts.zeros),
        biases=None if parts.biases is None else change(parts.biases),
    )


def copy(w: QArray) -> QArray:
    """Memory of its own for every part."""
    place = w._place
    with place.current():
        return w._with(device.changed(w._rows(), place.xp.array))


def transpose(w: QArray, axes: tuple[Any, ...]) -> QArray:
    """Leading axes in any order; the last two stay the last two."""
    if len(axes) == 1 and (axes[0] is None or isinstance(axes[0], (tuple, list))):
        axes = tuple(axes[0] or ())
    if not axes:
        return w.T
    ndim = w.ndim
    order = [int(a) % ndim if -ndim <= a < ndim else ndim for a in axes]
    if sorted(order) != list(range(ndim)):
        raise ValueError(f"transpose: axes {tuple(axes)} do not permute {ndim} axes")
    if ndim == 1:
        return w
    if set(order[-2:]) != {ndim - 2, ndim - 1}:
        raise ValueError(
            f"transpose: axes {tuple(axes)} would move the contraction axis among the leading "
            "ones; only the leading axes, and the last two between themselves, can change places"
        )
    lead = order[:-2]
    swapped = order[-2] == ndim - 1
    parts = w._rows()
    if lead != list(range(ndim - 2)):
        shape = (*(parts.shape[a] for a in lead), *parts.shape[-2:])
        parts = _each(parts, shape, lambda p: p.transpose(*lead, ndim - 2, ndim - 1))
        if parts.tensor_scale is not None:
            parts = replace(parts, tensor_scale=parts.tensor_scale.transpose(*lead))
        w = w._with(parts)
    return w._with(transposed=w._transposed != swapped)


def reshape(w: QArray, shape: tuple[Any, ...]) -> QArray:
    """New leading axes and rows over the same contraction axis."""
    if len(shape) == 1 and not isinstance(shape[0], (int, np.integer)):
        shape = tuple(shape[0])
    wanted = _fill(shape, w.size)
    if w._transposed:
        if wanted == w.shape:
            return w
        raise ValueError("reshape: the array is transposed; reshape .mT and transpose again")
    parts = w._rows()
    columns = parts.shape[-1]
    if not wanted or wanted[-1] != columns:
        raise ValueError(
            f"reshape: {w.shape} to {wanted} would break rows of {columns} codes; the last axis "
            "has to stay, or .dequantize() first"
        )
    if wanted == w.shape:
        return w
    if wanted == (columns,):
        wanted, vector = (1, columns), True
    else:
        vector = False
    if wanted[-2:] != parts.shape[-2:]:
        if parts.tensor_scale is not None and parts.tensor_scale.size > 1:
            raise ValueError(
                f"reshape: {parts.format.name} has one tensor scale for each of "
                f"{parts.tensor_scale.size} matrices; their rows cannot be regrouped"
            )
        parts = per_row(parts)
    lead = wanted[:-2]
    changed = (
        _each(parts, wanted, lambda p: p.reshape(*wanted[:-1], p.shape[-1]))
        if (parts.format.scale.block[0] == 1)
        else _each(parts, wanted, lambda p: p.reshape(*lead, *p.shape[-2:]))
    )
    second = parts.tensor_scale
    if second is not None and second.shape != lead:
        if second.size != math.prod(lead):
            xp = device.of(second).xp
            second = xp.full(lead, second.item() if second.size == 1 else 1, np.float32)
        changed = replace(changed, tensor_scale=second.reshape(lead))
    return w._with(changed, vector=vector)


def _fill(shape: Sequence[Any], size: int) -> tuple[int, ...]:
    """Replace one -1 by what is left."""
    numbers = [int(s) for s in shape]
    holes = [i for i, n in enumerate(numbers) if n == -1]
    known = math.prod(n for n in numbers if n != -1)
    if len(holes) > 1 or any(n < -1 for n in numbers):
        raise ValueError(f"reshape: {tuple(shape)} may have one -1 and no other negative length")
    if holes and known:
        numbers[holes[0]] = size // known
    if math.prod(numbers) != size or -1 in numbers:
        raise ValueError(f"reshape: {size} values do not fill {tuple(shape)}")
    return tuple(numbers)


def _alike(arrays: Sequence[Any], action: str) -> list[QArray]:
    """Refuse what cannot be joined without changing a value."""
    if isinstance(arrays, QArray):
        raise TypeError(f"{action}: want a sequence of QArrays, got one QArray")
    arrays = list(arrays)
    if not arrays:
        raise ValueError(f"{action}: need at least one array")
    for a in arrays:
        if not isinstance(a, QArray):
            raise TypeError(
                f"{action}: every array has to be a QArray, got {type(a).__name__}; quantize it "
                "or .dequantize() the others"
            )
    first: QArray = arrays[0]
    for i, a in enumerate(arrays[1:], 1):
        device.on(first._place, a._parts.codes, f"{action}: array {i}", "array 0")
        if a.format.element != first.format.element or a.dtype != first.dtype:
            raise ValueError(
                f"{action}: formats and dtypes have to agree, got {first.format.name} of "
                f"{first.dtype} and {a.format.name} of {a.dtype}"
            )
        if a._transposed != first._transposed or a._vector != first._vector:
            raise ValueError(f"{action}: some arrays are transposed and some are not")
    return arrays


def _same_columns(pieces: list[QArray], action: str) -> None:
    """Refuse pieces whose columns stand in another order or are divided by other numbers."""
    if _differ([p._columns for p in pieces]) or _differ([p._divisor for p in pieces]):
        raise ValueError(f"{action}: column permutations and divisors have to agree")


def _differ(parts: list[Array | None]) -> bool:
    first = parts[0]
    if first is None:
        return any(p is not None for p in parts)
    return any(p is None or not device.of(p).xp.array_equal(first, p) for p in parts)


def concatenate(arrays: Sequence[Any], axis: int = 0) -> QArray:
    """Join along an existing axis, exactly.

    Parameters
    ----------
    arrays : sequence of QArray
        Of one element, scale type and dtype.
    axis : int
        Any leading axis or the rows; along the contraction axis every piece but the last has to
        end on a block of scales and a byte.

    Returns
    -------
    QArray
        Blocks of several rows become scales of single rows where the pieces do not end on one.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.ones((2, 64), np.float32), "int4_g32")
    >>> lb.concatenate([w, w[:1]]).shape
    (3, 64)
    """
    pieces = _alike(arrays, "concatenate")
    with pieces[0]._place.current():
        return _concatenated(pieces, axis)


def _concatenated(pieces: list[QArray], axis: int) -> QArray:
    ndim = pieces[0].ndim
    if any(p.ndim != ndim for p in pieces):
        raise ValueError("concatenate: arrays have different numbers of axes")
    if axis is None:
        raise TypeError("concatenate: axis=None would flatten the arrays; name an axis")
    if not -ndim <= axis < ndim:
        raise ValueError(f"concatenate: axis {axis} is out of range for {ndim} axes")
    position = axis % ndim - ndim
    if pieces[0]._transposed and position >= -2:
        position = -3 - position
    parts = [p._rows() for p in pieces]
    if pieces[0]._vector or position == -1:
        return pieces[0]._with(_join_columns(parts), divisor=_join_divisors(pieces))
    _same_columns(pieces, "concatenate")
    if position == -2:
        return pieces[0]._with(_join_rows(parts))
    parts = _same_format(parts)
    at = position + len(parts[0].shape)
    _same_lengths(parts, at)
    return pieces[0]._with(_join(parts, at))


def _join_divisors(pieces: list[QArray]) -> Array | None:
    if any(p._columns is not None for p in pieces):
        raise ValueError("concatenate: column permutations cannot be joined along the columns")
    found = [p._divisor for p in pieces]
    if all(d is None for d in found):
        return None
    if any(d is None for d in found):
        raise ValueError("concatenate: some arrays have a divisor and some have none")
    joined: Array = pieces[0]._place.xp.concatenate(found)
    return joined


def _join(parts: list[Packed], at: int) -> Packed:
    xp = device.of(parts[0].codes).xp
    joined = [
        None
        if getattr(parts[0], name) is None
        else xp.concatenate([getattr(p, name) for p in parts], at)
        for name in ("codes", "scales", "zeros", "biases")
    ]
    codes, scales, zeros, biases = joined
    assert codes is not None
    assert scales is not None
    shape = list(parts[0].shape)
    shape[at] = sum(p.shape[at] for p in parts)
    second = parts[0].tensor_scale
    if second is not None and at < len(shape) - 2:
        second = xp.concatenate([p.tensor_scale for p in parts], at)
    return Packed(parts[0].format, tuple(shape), codes, scales, zeros, biases, second)


def _same_lengths(parts: list[Packed], at: int) -> None:
    shapes = [(*p.shape[:at], *p.shape[at + 1 :]) for p in parts]
    if any(s != shapes[0] for s in shapes):
        raise ValueError(
            f"concatenate: shapes {[p.shape for p in parts]} differ in another axis than the joined"
        )


def _same_format(parts: list[Packed]) -> list[Packed]:
    """Bring block heights together; everything else has to agree."""
    if any(p.format != parts[0].format for p in parts):
        parts = [per_row(p) for p in parts]
    names = sorted({p.format.name for p in parts})
    if len(names) > 1:
        raise ValueError(f"concatenate: formats have to agree, got {' and '.join(names)}")
    return parts


def _join_rows(parts: list[Packed]) -> Packed:
    at = len(parts[0].shape) - 2
    _same_lengths(parts, at)
    size = parts[0].format.scale.block[0]
    if size is None or any(p.shape[at] % size for p in parts[:-1]):
        parts = [per_row(p) for p in parts]
    parts = _same_format(parts)
    if _differ([p.tensor_scale for p in parts]):
        raise ValueError(
            f"concatenate: {parts[0].format.name} matrices with different tensor scales cannot "
            "form one matrix exactly; give them a leading axis, or quantize the joined values"
        )
    return _join(parts, at)


def _join_columns(parts: list[Packed]) -> Packed:
    parts = _same_format(parts)
    at = len(parts[0].shape) - 1
    _same_lengths(parts, at)
    fmt = parts[0].format
    if fmt.scale.block[1] is None and len(parts) > 1:
        raise ValueError(
            f"concatenate: {fmt.name} has one scale for whole rows, which cannot be joined along "
            "them; quantize the joined values"
        )
    if _differ([p.tensor_scale for p in parts]):
        raise ValueError(f"concatenate: {fmt.name} matrices have different tensor scales")
    step = column_alignment(fmt)
    if any(p.shape[-1] % step for p in parts[:-1]):
        raise ValueError(
            f"concatenate: along the columns every {fmt.name} piece but the last needs a multiple "
            f"of {step} columns, got {[p.shape[-1] for p in parts]}"
        )
    return _join(parts, at)


def stack(arrays: Sequence[Any], axis: int = 0) -> QArray:
    """Join along a new leading axis.

    Parameters
    ----------
    arrays : sequence of QArray
        Of one format, shape and dtype.
    axis : int
        Position of the new axis in the result; the last two places are taken by the matrices.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.ones((2, 64), np.float32), "int4_g32")
    >>> lb.stack([w, w, w]).shape
    (3, 2, 64)
    """
    pieces = _alike(arrays, "stack")
    with pieces[0]._place.current():
        return _stacked(pieces, axis)


def _stacked(pieces: list[QArray], axis: int) -> QArray:
    _same_columns(pieces, "stack")
    if any(p.shape != pieces[0].shape for p in pieces):
        raise ValueError(f"stack: shapes differ: {[p.shape for p in pieces]}")
    ndim = pieces[0].ndim + 1
    if not -ndim <= axis < ndim:
        raise ValueError(f"stack: axis {axis} is out of range for {ndim} axes")
    at = axis % ndim
    if pieces[0]._vector:
        if at != 0:
            raise ValueError("stack: vectors become the rows of a matrix, axis 0")
        return _join_vectors(pieces)
    if at > ndim - 3:
        raise ValueError(
            f"stack: axis {axis} would put the new axis inside the matrices; only leading places"
        )
    parts, xp = _same_format([p._rows() for p in pieces]), pieces[0]._place.xp
    grown = [
        replace(
            _each(p, (*p.shape[:at], 1, *p.shape[at:]), lambda a: xp.expand_dims(a, at)),
            tensor_scale=None if p.tensor_scale is None else xp.expand_dims(p.tensor_scale, at),
        )
        for p in parts
    ]
    return pieces[0]._with(_join(grown, at))


def _join_vectors(pieces: list[QArray]) -> QArray:
    return pieces[0]._with(_join_rows([p._rows() for p in pieces]), vector=False)


def split(w: QArray, sections: Any, axis: int = 0, *, exact: bool = True) -> list[QArray]:
    """Cut into pieces: views, as `w[...]` gives them.

    Parameters
    ----------
    w : QArray
    sections : int or sequence of int
        A number of equal pieces, or the places to cut.
    axis : int
    exact : bool
        False lets the pieces differ by one, as numpy.array_split does.
    """
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"split: axis {axis} is out of range for {w.ndim} axes")
    axis %= w.ndim
    length = w.shape[axis]
    if isinstance(sections, (int, np.integer)):
        if sections < 1 or (exact and length % sections):
            raise ValueError(f"split: {length} entries do not make {sections} equal pieces")
        short, longer = divmod(length, int(sections))
        sizes = [short + 1] * longer + [short] * (int(sections) - longer)
        cuts = [0, *np.cumsum(sizes).tolist()]
    else:
        cuts = [0, *(int(c) for c in sections), length]
    lead = (slice(None),) * axis
    return [w[(*lead, slice(a, b))] for a, b in itertools.pairwise(cuts)]

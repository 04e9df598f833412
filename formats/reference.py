"""The truth, in NumPy: slow, short, and what every kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.formats import blocks, scaling
from lowbit.formats import codes as code
from lowbit.formats.blocks import Block, Piece, pieces
from lowbit.formats.declare import Element, Format

Array = npt.NDArray[Any]
_EINSUM = 1 << 25  # products at a time, well below a tenth of a second
Place = Callable[[tuple[int, ...]], tuple[int, ...]]


@dataclass(frozen=True)
class Packed:
    """The parts of a quantized array, as a checkpoint stores them.

    Parameters
    ----------
    format : Format
    shape : tuple of int
        (..., rows, columns).
    codes : ndarray
        (..., rows, bytes) uint8 bit stream, or (..., rows, columns) of an 8-bit element's dtype.
    scales : ndarray
        (..., *format.grid): codes (uint8) of a scale element, or its float dtype.
    zeros, biases : ndarray or None
        As many as scales: int8 or uint8 for integer zero points, else the float dtype.
    tensor_scale : ndarray of float32 or None
        One for each matrix: shape[:-2].
    """

    format: Format
    shape: tuple[int, ...]
    codes: Array
    scales: Array
    zeros: Array | None = None
    biases: Array | None = None
    tensor_scale: Array | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.shape[-2], self.shape[-1]


def spread(numbers: Array, block: Block, shape: tuple[int, int]) -> Array:
    """One entry an element: each block's number repeated over its rows and columns."""
    for axis, (size, length) in enumerate(zip(block, shape, strict=True), start=-2):
        if size != 1:
            repeated = numbers.repeat(length if size is None else size, axis)
            numbers = repeated[..., :length, :] if axis == -2 else repeated[..., :length]
    return numbers


def arithmetic(x: Array) -> np.dtype[Any]:
    """Quantizing float64 data works in float64; everything narrower in float32."""
    wide = x.dtype.kind == "f" and x.dtype.itemsize == 8  # of either byte order
    return np.dtype(np.float64 if wide else np.float32)


def quantize(
    fmt: Format,
    x: Array,
    *,
    method: str = "absmax",
    scale: Array | None = None,
    zero: Array | None = None,
    overflow: code.Overflow = "saturate",
    nonfinite: str = "raise",
    rounding: str = "even",
    seed: int | None = None,
    place: Place = tuple,
) -> Packed:
    """Round a float array to a format. See `lowbit.quantize` for the parameters.

    All arithmetic is float32 (float64 for float64 data), one IEEE operation a step, so that any
    kernel can repeat it bit for bit: scale = amax / qmax, rounded to its type;
    code = nearest(x / (scale * tensor_scale) + zero). `place` turns an index of `x` into the one
    that an error shows.
    """
    method = scaling.method_for(fmt, method)
    low, high = extremes(fmt, x, nonfinite, place)
    tensor_scale = None
    if fmt.tensor_scale:
        tensor_scale, scale = _tensor_scale(fmt, low, high, scale), None
    if scale is None:
        scaling.refuse_one_sided(fmt, low, high)
    if method == "mse":
        low, high = _best_extremes(fmt, x, low, high, tensor_scale)
        method = scaling.method_for(fmt, "absmax")
    parts = Packed(
        fmt,
        x.shape,
        np.empty((*x.shape[:-1], fmt.row_bytes(x.shape[-1])), np.uint8),
        *_block_parts(fmt, low, high, method, tensor_scale, scale, zero),
        tensor_scale,
    )
    del low, high
    streams = np.random.default_rng(seed) if rounding == "stochastic" else None
    outside = _Found()
    bits = fmt.element.bits
    for piece in pieces(x.shape):
        lead, rows, columns = piece
        y = _scaled(parts, x[lead][rows, columns], piece)
        uniform = None if streams is None else streams.random(y.shape)
        if overflow == "raise":
            outside.add(y, code.beyond(fmt.element, y, stochastic=streams is not None), piece)
        policy: code.Overflow = "nan" if overflow == "nan" else "saturate"
        narrow = code.encode(fmt.element, y, overflow=policy, uniform=uniform)
        octets = slice(columns.start * bits // 8, -(-columns.stop * bits // 8))
        parts.codes[lead][rows, octets] = code.pack(narrow, bits)
    if outside.count:
        raise OverflowError(
            code.overflow_message(fmt.element, outside.count, place(outside.first), outside.value)
        )
    return parts


class _Found:
    """How many numbers were out of order, and the first of them."""

    count = 0
    first: tuple[int, ...] = ()
    value = 0.0

    def add(self, numbers: Array, bad: Array, piece: Piece) -> None:
        if not self.count and bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            lead, rows, columns = piece
            self.first = (*lead, row + rows.start, column + columns.start)
            self.value = float(numbers[row, column])
        self.count += int(bad.sum())


def extremes(
    fmt: Format, x: Array, nonfinite: str = "raise", place: Place = tuple
) -> tuple[Array, Array]:
    """The smallest and the largest number of each block.

    Zero is counted in unless the format has a float offset, which needs no zero in range.
    """
    dtype, block = arithmetic(x), fmt.scale.block
    grid = (*x.shape[:-2], *fmt.grid((x.shape[-2], x.shape[-1])))
    low, high = np.full(grid, np.inf, dtype), np.full(grid, -np.inf, dtype)
    bad = _Found()
    for piece in pieces(x.shape):
        lead, rows, columns = piece
        part = x[lead][rows, columns].astype(dtype)
        finite = np.isfinite(part)
        if not finite.all():
            bad.add(part, ~finite, piece)
            part[~finite] = 0
        at = blocks.touched(piece, block)
        np.minimum(low[at], blocks.reduce(np.minimum, part, piece, block), out=low[at])
        np.maximum(high[at], blocks.reduce(np.maximum, part, piece, block), out=high[at])
    if bad.count and nonfinite == "raise":
        raise ValueError(
            f"quantize: x holds {bad.count} NaN or infinite values, first at {place(bad.first)}. "
            "Clean the data, or pass nonfinite='nan' for a format that has a NaN code."
        )
    if not (isinstance(fmt.zero, str) or fmt.bias):
        np.minimum(low, 0, out=low)
        np.maximum(high, 0, out=high)
    return low, high


def _tensor_scale(fmt: Format, low: Array, high: Array, given: Array | None) -> Array:
    """Second-level scale: the largest block then uses the largest block scale."""
    if given is not None:
        with np.errstate(over="ignore"):
            narrow = np.broadcast_to(np.asarray(given).astype(np.float32), low.shape[:-2]).copy()
        return _divides(narrow, "the tensor scale")
    ratio = scaling.range_end(fmt)
    largest = np.zeros(low.shape[:-2], low.dtype)
    for lead, rows, columns in pieces(low.shape):
        at: Any = (*lead, rows, columns)
        wanted = scaling.ideal(fmt, low[at], high[at], "absmax", ratio)
        largest[lead] = max(largest[lead], wanted.max())
    if largest.max(initial=0) > np.finfo(np.float32).max:
        raise ValueError(
            f"quantize: {fmt.name} would need a tensor scale of {largest.max():g}, beyond "
            "float32. Scale x down."
        )
    tiny = np.finfo(np.float32).smallest_subnormal
    narrow = np.maximum(largest.astype(np.float32), tiny)
    return np.where(largest > 0, narrow, np.float32(1))


def _block_parts(
    fmt: Format,
    low: Array,
    high: Array,
    method: str,
    tensor_scale: Array | None,
    scale: Array | None,
    zero: Array | None,
) -> tuple[Array, Array | None, Array | None]:
    """Scales, zero points and biases from the extremes of each block, or from what was given."""
    scales = np.empty(low.shape, scaling.scale_dtype(fmt))
    zeros = None if fmt.zero is None else np.empty(low.shape, zero_dtype(fmt))
    biases = np.empty(low.shape, scales.dtype) if fmt.bias else None
    for lead, rows, columns in pieces(low.shape):
        at: Any = (*lead, rows, columns)
        second = None if tensor_scale is None else tensor_scale[lead]
        if scale is None:
            wanted = scaling.ideal(fmt, low[at], high[at], method)
            if second is not None:
                wanted = _shared_out(fmt, wanted, second)
            scales[at] = scaling.encode_scales(fmt, wanted, method)
        else:
            scales[at] = _given_scales(fmt, np.broadcast_to(scale, low.shape)[at])
        step = _step(fmt, scales[at], second, low.dtype)
        bottom = low.dtype.type(fmt.element.min)
        with np.errstate(over="ignore"):
            if biases is not None:
                biases[at] = _narrowed(fmt, low[at] - bottom * step, biases.dtype, "bias")
            if zeros is not None:
                wanted = bottom - low[at] / step
                if zero is not None:
                    wanted = np.broadcast_to(zero, low.shape)[at]
                if isinstance(fmt.zero, Element):
                    wanted = np.clip(np.rint(wanted), fmt.zero.min, fmt.zero.max)
                zeros[at] = _narrowed(fmt, wanted, zeros.dtype, "zero point")
    return scales, zeros, biases


def _shared_out(fmt: Format, wanted: Array, tensor_scale: Any) -> Array:
    """What is left for the block scales once the tensor scale is taken out."""
    with np.errstate(over="ignore"):
        left: Array = wanted / wanted.dtype.type(tensor_scale)
    if isinstance(fmt.scale.element, Element):
        # The division's rounding may pass the end of the range, a given tensor scale by far.
        np.clip(left, -fmt.scale.element.max, fmt.scale.element.max, out=left)
    # A block that is not all zeros keeps a scale of its own, however small.
    tiny = np.finfo(left.dtype).smallest_subnormal
    return np.where((left == 0) & (wanted != 0), tiny, left)


def _given_scales(fmt: Format, wanted: Array) -> Array:
    kind = fmt.scale.element
    if not isinstance(kind, Element):
        with np.errstate(over="ignore"):
            return _divides(code.rounded(wanted, scaling.float_dtype(kind)), "a scale")
    outside = code.beyond(kind, wanted)
    if outside.any():
        raise ValueError(
            f"scale: {wanted[outside][0]:g} is outside the range of {kind.name}, "
            f"[{kind.min:g}, {kind.max:g}]"
        )
    rounded = code.encode(kind, wanted)
    _divides(code.decode(kind, rounded), "a scale")
    return rounded


def _divides(scales: Array, what: str) -> Array:
    """Refuse given scales that became 0 or infinite in their own dtype."""
    wide = scales.astype(np.float32)
    if not np.isfinite(wide).all() or not wide.all():
        raise ValueError(f"scale: {what} becomes 0 or infinite in {scales.dtype.name}")
    return scales


def _narrowed(fmt: Format, wanted: Array, dtype: np.dtype[Any], what: str) -> Array:
    narrow = code.rounded(wanted, dtype)
    bad = ~np.isfinite(narrow.astype(np.float32))
    if bad.any():
        raise ValueError(
            f"quantize: {fmt.name} would need a {what} of {wanted[bad][0]:g}, beyond {dtype.name}. "
            "Use a wider type (f32), an integer zero point, or subtract the mean first."
        )
    return narrow


def _step(fmt: Format, scales: Array, tensor_scale: Any, dtype: np.dtype[Any]) -> Array:
    """scale * tensor_scale of each block, in the arithmetic's dtype."""
    step = scaling.decode_scales(fmt, scales).astype(dtype)
    if tensor_scale is not None:
        with np.errstate(over="ignore"):
            step *= np.asarray(tensor_scale, dtype)[..., None, None]
    return step


def zero_dtype(fmt: Format) -> np.dtype[Any]:
    """dtype of the public zero points: int8 or uint8, or their float dtype."""
    if isinstance(fmt.zero, Element):
        return np.dtype(np.int8 if fmt.zero.min < 0 else np.uint8)
    assert fmt.zero is not None
    return scaling.float_dtype(fmt.zero)


def _scaled(w: Packed, x: Array, piece: Piece) -> Array:
    """x / scale + zero of a piece: what `encode` rounds."""
    fmt, block, dtype = w.format, w.format.scale.block, arithmetic(x)
    at = blocks.touched(piece, block)
    second = None if w.tensor_scale is None else w.tensor_scale[piece[0]]
    y = x.astype(dtype)
    with np.errstate(over="ignore"):
        if w.biases is not None:
            y -= blocks.expand(w.biases[at].astype(dtype), piece, block)
        y /= blocks.expand(_step(fmt, w.scales[at], second, dtype), piece, block)
    if w.zeros is not None:
        y += blocks.expand(w.zeros[at].astype(dtype), piece, block)
    return y


def _best_extremes(
    fmt: Format, x: Array, low: Array, high: Array, tensor_scale: Array | None
) -> tuple[Array, Array]:
    """Shrink each block's range to the share in 1.00, 0.98 ... 0.42 of least squared error."""
    method, block = scaling.method_for(fmt, "absmax"), fmt.scale.block
    if not low.size:
        return low, high
    least = np.full(low.shape, np.inf)
    chosen = np.ones(low.shape, low.dtype)
    for share in np.arange(1.0, 0.41, -0.02).astype(low.dtype):
        found = _block_parts(fmt, low * share, high * share, method, tensor_scale, None, None)
        parts = Packed(fmt, x.shape, np.empty(0), *found, tensor_scale)
        # Each row's sums are made whole, so that their order does not depend on CHUNK.
        error = np.empty((*x.shape[:-1], low.shape[-1]))
        for piece in pieces(x.shape, whole_rows=True):
            lead, rows, columns = piece
            y = _scaled(parts, x[lead][rows, columns], piece)
            miss = code.decode(fmt.element, code.encode(fmt.element, y)) - y.astype(np.float64)
            begins = blocks.cut(columns, block[1])[1]
            error[lead][rows] = np.add.reduceat(miss**2, begins, -1)
        begins = blocks.cut(slice(0, x.shape[-2]), block[0])[1]
        step = _step(fmt, parts.scales, tensor_scale, low.dtype).astype(np.float64)
        total = np.add.reduceat(error, begins, -2) * step**2
        better = total < least
        least = np.where(better, total, least)
        chosen = np.where(better, share, chosen)
    return low * chosen, high * chosen


def element_codes(w: Packed) -> Array:
    """(..., rows, columns) uint8: one code an entry."""
    if w.format.element.bits == 8:
        return w.codes.view(np.uint8)
    return code.unpack(w.codes, w.format.element.bits, w.shape[-1])


def centred(w: Packed) -> Array:
    """values[code] - zero in float64: the numbers that the scales multiply."""
    values = code.decode(w.format.element, element_codes(w)).astype(np.float64)
    if w.zeros is not None:
        values -= spread(w.zeros.astype(np.float64), w.format.scale.block, w.matrix)
    return values


def dequantize(w: Packed) -> Array:
    """float64: what the bytes mean, with no rounding of our own beyond the last product."""
    fmt = w.format
    scales = scaling.decode_scales(fmt, w.scales).astype(np.float64)
    if w.tensor_scale is not None:
        scales = scales * w.tensor_scale.astype(np.float64)[..., None, None]
    values = centred(w) * spread(scales, fmt.scale.block, w.matrix)
    if w.biases is not None:
        values += spread(w.biases.astype(np.float64), fmt.scale.block, w.matrix)
    return values


def take(w: Packed, index: Any, rows: slice) -> Packed:
    """Some rows of one matrix; rows start where a block of rows does."""
    across = blocks.cut(rows, w.format.scale.block[0])[0]
    part = [None if p is None else p[index][across] for p in (w.scales, w.zeros, w.biases)]
    second = None if w.tensor_scale is None else w.tensor_scale[index]
    scales = part[0]
    assert scales is not None
    shape = (rows.stop - rows.start, w.shape[-1])
    return Packed(w.format, shape, w.codes[index][rows], scales, part[1], part[2], second)


def dequantize_to(w: Packed, out: Array) -> None:
    """Write the values into `out`, rounded once to its dtype, a few rows at a time."""
    size = w.format.scale.block[0] or 1
    rows, columns = w.matrix
    tall = max(size, blocks.CHUNK // max(columns, 1) // size * size)
    for lead in np.ndindex(w.shape[:-2]):
        for top in range(0, rows, tall):
            part = slice(top, min(top + tall, rows))
            out[lead][part] = code.rounded(dequantize(take(w, lead, part)), out.dtype)


def matmul(x: Array, w: Array) -> Array:
    """x @ w in float64, in a fixed order: a BLAS may sum differently with its threads.

    Rows go a few at a time, since Python looks for Ctrl-C only between them.
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    lead = np.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    product = np.empty((*lead, x.shape[-2], w.shape[-1]))
    tall = max(1, _EINSUM // max(w.shape[-2] * product[..., :1, :].size, 1))
    for top in range(0, x.shape[-2], tall):
        rows = x[..., top : top + tall, :]
        np.einsum("...mk,...kn->...mn", rows, w, out=product[..., top : top + tall, :])
    return product

"""The truth, in NumPy: slow, short, and what every kernel is tested against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.formats import codes as code
from lowbit.formats import scaling
from lowbit.formats.declare import WHOLE, Element, Format

Array = npt.NDArray[Any]
CHUNK = 1 << 20  # numbers worked on at a time, so that quantizing needs little memory of its own


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
        return self.shape[-2], self.shape[-1]


def spread(blocks: Array, block: tuple[int | None, int | None], shape: tuple[int, int]) -> Array:
    """One entry an element: each block's number repeated over its rows and columns."""
    for axis, (size, length) in enumerate(zip(block, shape, strict=True), start=-2):
        if size != 1:
            repeated = blocks.repeat(length if size is WHOLE else size, axis)
            blocks = repeated[..., :length, :] if axis == -2 else repeated[..., :length]
    return blocks


def reduce_blocks(ufunc: np.ufunc, x: Array, size: int | None, axis: int) -> Array:
    """`ufunc` over each run of `size` entries of an axis; the last run may be short."""
    length = x.shape[axis]
    if size == 1 or length == 0:
        return x
    step = length if size is WHOLE else min(size, length)
    return ufunc.reduceat(x, np.arange(0, length, step), axis=axis)


def arithmetic(x: Array) -> np.dtype[Any]:
    """Quantizing float64 data works in float64; everything narrower in float32."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def _row_chunks(x: Array, block_rows: int | None) -> Iterator[tuple[Any, slice]]:
    """(leading index, rows) pieces of at most CHUNK numbers; whole blocks where rows share one."""
    rows, columns = x.shape[-2:]
    step = max(1, CHUNK // max(columns, 1))
    if block_rows is WHOLE:
        step = max(rows, 1)
    elif block_rows > 1:
        step = max(block_rows, step // block_rows * block_rows)
    for lead in np.ndindex(x.shape[:-2]):
        for start in range(0, rows, step):
            yield lead, slice(start, min(start + step, rows))


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
) -> Packed:
    """Round a float array to a format. See `lowbit.quantize` for the parameters.

    All arithmetic is float32 (float64 for float64 data), one IEEE operation a step, so that any
    kernel can repeat it bit for bit: scale = amax / qmax, rounded to its type;
    code = nearest(x / (scale * tensor_scale) + zero).
    """
    method = scaling.method_for(fmt, method)
    lead, grid = x.shape[:-2], fmt.grid((x.shape[-2], x.shape[-1]))
    low, high = extremes(fmt, x, nonfinite)
    tensor_scale = _tensor_scale(fmt, low, high, scale)
    if scale is not None and not fmt.tensor_scale:
        wanted = np.broadcast_to(np.asarray(scale, arithmetic(x)), (*lead, *grid))
        scales = _given_scales(fmt, wanted)
    else:
        if method == "mse":
            low, high = _best_extremes(fmt, x, low, high, tensor_scale)
        scales = _chosen_scales(fmt, low, high, method, tensor_scale)
    step = steps(fmt, scales, tensor_scale, arithmetic(x))
    zeros, biases = _offsets(fmt, step, low, high, zero)
    streams = np.random.default_rng(seed) if rounding == "stochastic" else None
    out = np.empty((*lead, x.shape[-2], fmt.row_bytes(x.shape[-1])), np.uint8)
    for index, rows in _row_chunks(x, 1):
        y = scaled(fmt, x[index][rows], index, rows, step, zeros, biases)
        uniform = None if streams is None else streams.random(y.shape)
        narrow = code.encode(fmt.element, y, overflow=overflow, uniform=uniform)
        out[index][rows] = code.pack(narrow, fmt.element.bits)
    return Packed(fmt, x.shape, out, scales, zeros, biases, tensor_scale)


def extremes(fmt: Format, x: Array, nonfinite: str = "raise") -> tuple[Array, Array]:
    """The smallest and the largest number of each block, zero counted in unless the format has
    a float offset (which needs no zero in range)."""
    dtype = arithmetic(x)
    lead, (rows, columns) = x.shape[:-2], x.shape[-2:]
    across = fmt.grid((rows, columns))[1]
    low, high = (np.empty((*lead, rows, across), dtype) for _ in range(2))
    bad, first = 0, None
    for index, part in _row_chunks(x, 1):
        piece = x[index][part].astype(dtype)
        finite = np.isfinite(piece)
        if not finite.all():
            if first is None:
                at = np.argwhere(~finite)[0]
                first = (*index, int(at[0]) + part.start, int(at[1]))
            bad += int((~finite).sum())
            piece = np.where(finite, piece, 0)
        for target, ufunc in ((low, np.minimum), (high, np.maximum)):
            target[index][part] = reduce_blocks(ufunc, piece, fmt.scale.block[1], -1)
    if bad and nonfinite == "raise":
        raise ValueError(
            f"quantize: x holds {bad} NaN or infinite values, first at {first}. Clean the data, "
            "or pass nonfinite='nan' for a format that has a NaN code."
        )
    low = reduce_blocks(np.minimum, low, fmt.scale.block[0], -2)
    high = reduce_blocks(np.maximum, high, fmt.scale.block[0], -2)
    if isinstance(fmt.zero, str) or fmt.bias:
        return low, high
    return np.minimum(low, 0), np.maximum(high, 0)


def _tensor_scale(fmt: Format, low: Array, high: Array, given: Array | None) -> Array | None:
    """Second-level scale: the largest block then uses the largest block scale."""
    if not fmt.tensor_scale:
        return None
    lead = low.shape[:-2]
    if given is not None:
        return np.broadcast_to(np.asarray(given, np.float32), lead).copy()
    wanted = scaling.ideal(fmt, low, high, "absmax")
    largest = np.max(np.abs(wanted), axis=(-2, -1), initial=0)
    kind = fmt.scale.element
    if isinstance(kind, Element):
        largest = largest / largest.dtype.type(kind.max)
    narrow = np.asarray(largest, np.float32)
    return np.where(narrow > 0, narrow, np.float32(1))


def _given_scales(fmt: Format, wanted: Array) -> Array:
    if isinstance(fmt.scale.element, Element):
        return code.encode(fmt.scale.element, wanted, overflow="raise")
    return wanted.astype(scaling.float_dtype(fmt.scale.element))


def steps(
    fmt: Format, scales: Array, tensor_scale: Array | None, dtype: np.dtype[Any]
) -> Array:
    """scale * tensor_scale of each block, in the arithmetic's dtype."""
    step = scaling.decode_scales(fmt, scales).astype(dtype)
    if tensor_scale is not None:
        step = step * tensor_scale[..., None, None].astype(dtype)
        # The product of two small scales may underflow; dividing by it must stay possible.
        tiny = dtype.type(np.finfo(np.float32).smallest_subnormal)
        step = np.where(step == 0, tiny, step)
    return step


def _offsets(
    fmt: Format, step: Array, low: Array, high: Array, given: Array | None
) -> tuple[Array | None, Array | None]:
    """Zero points and biases that put each block's smallest number on the lowest code."""
    bottom = step.dtype.type(fmt.element.min)
    if fmt.bias:
        kind = fmt.scale.element
        assert isinstance(kind, str)
        return None, (low - bottom * step).astype(scaling.float_dtype(kind))
    if fmt.zero is None:
        return None, None
    if isinstance(fmt.zero, str):
        wanted = bottom - low / step if given is None else np.broadcast_to(given, step.shape)
        return wanted.astype(scaling.float_dtype(fmt.zero)), None
    wanted = np.rint(bottom - low / step) if given is None else np.broadcast_to(given, step.shape)
    dtype = zero_dtype(fmt)
    return np.clip(wanted, fmt.zero.min, fmt.zero.max).astype(dtype), None


def zero_dtype(fmt: Format) -> np.dtype[Any]:
    """dtype of the public zero points: int8 or uint8, or their float dtype."""
    if isinstance(fmt.zero, Element):
        return np.dtype(np.int8 if fmt.zero.min < 0 else np.uint8)
    assert fmt.zero is not None
    return scaling.float_dtype(fmt.zero)


def scaled(
    fmt: Format,
    x: Array,
    index: Any,
    rows: slice,
    step: Array,
    zeros: Array | None,
    biases: Array | None,
) -> Array:
    """x / scale + zero for some rows of one matrix: what `encode` rounds."""
    shape = (x.shape[0], x.shape[1])

    def of(blocks: Array) -> Array:
        size = fmt.scale.block[0]
        part = blocks[index]
        if size != 1:
            part = part[np.arange(rows.start, rows.stop) // (size or max(rows.stop, 1))]
        else:
            part = part[rows]
        return spread(part.astype(step.dtype), (1, fmt.scale.block[1]), shape)

    y = x.astype(step.dtype)
    if biases is not None:
        y = y - of(biases)
    with np.errstate(over="ignore"):
        y = y / of(step)
    return y if zeros is None else y + of(zeros)


def _chosen_scales(
    fmt: Format, low: Array, high: Array, method: str, tensor_scale: Array | None
) -> Array:
    rule = scaling.method_for(fmt, "absmax") if method == "mse" else method
    wanted = scaling.ideal(fmt, low, high, rule)
    if tensor_scale is not None:
        wanted = wanted / tensor_scale[..., None, None].astype(wanted.dtype)
        if isinstance(fmt.scale.element, Element):
            # The largest block may miss the end of the scale's range by the division's rounding,
            # or by more under a tensor scale that was given.
            wanted = np.minimum(wanted, wanted.dtype.type(fmt.scale.element.max))
    return scaling.encode_scales(fmt, wanted, rule)


def _best_extremes(
    fmt: Format, x: Array, low: Array, high: Array, tensor_scale: Array | None
) -> tuple[Array, Array]:
    """Shrink each block's range to the share in 1.00, 0.98 ... 0.42 of least squared error."""
    best = np.full(low.shape, np.inf)
    chosen = np.ones(low.shape, low.dtype)
    for share in np.arange(1.0, 0.41, -0.02).astype(low.dtype):
        near, far = low * share, high * share
        scales = _chosen_scales(fmt, near, far, "mse", tensor_scale)
        step = steps(fmt, scales, tensor_scale, arithmetic(x))
        zeros, biases = _offsets(fmt, step, near, far, None)
        error = np.empty((*low.shape[:-2], x.shape[-2], low.shape[-1]))
        for index, rows in _row_chunks(x, 1):
            y = scaled(fmt, x[index][rows], index, rows, step, zeros, biases)
            miss = code.decode(fmt.element, code.encode(fmt.element, y)) - y.astype(np.float64)
            error[index][rows] = reduce_blocks(np.add, miss**2, fmt.scale.block[1], -1)
        total = reduce_blocks(np.add, error, fmt.scale.block[0], -2) * np.square(step, dtype=float)
        better = total < best
        best = np.where(better, total, best)
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
    size = w.format.scale.block[0]
    if size is WHOLE:
        across = slice(None)
    else:
        across = slice(rows.start // size, -(-rows.stop // size))
    part = [None if p is None else p[index][across] for p in (w.scales, w.zeros, w.biases)]
    second = None if w.tensor_scale is None else w.tensor_scale[index]
    scales = part[0]
    assert scales is not None
    shape = (rows.stop - rows.start, w.shape[-1])
    return Packed(w.format, shape, w.codes[index][rows], scales, part[1], part[2], second)


def dequantize_to(w: Packed, out: Array) -> None:
    """Write the values into `out`, rounded once to its dtype, a few rows at a time."""
    for index, rows in _row_chunks(out, w.format.scale.block[0] if w.format.scale.block[0] else 1):
        out[index][rows] = dequantize(take(w, index, rows))


def matmul(x: Array, w: Array) -> Array:
    """x @ w in float64 in a fixed order: einsum, since BLAS may sum differently with its threads."""
    return np.einsum("...mk,...kn->...mn", x.astype(np.float64), w.astype(np.float64))

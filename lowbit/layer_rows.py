"""Layers by definition, on the host, quantized a few rows at a time: none is ever whole in memory.

Formats that share a scale between all rows are the exception: there a whole matrix is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from lowbit import checks, device
from lowbit.formats import Format, blocks, reference, scaling
from lowbit.formats.reference import Packed
from lowbit.kernels import layers

Array = npt.NDArray[Any]

_QUANTIZED = 1 << 18  # numbers that are quantized at a time


class SiluMul:
    """silu(gate) * up, a few rows at a time."""

    call, what = "quantize_silu_mul", "silu(gate) * up"

    def __init__(self, gate: Array, up: Array) -> None:
        self.operands = {"gate": gate, "up": up}
        self.gate, self.up = matrix(gate), matrix(up)
        self.shape, self.dtype = self.gate.shape, gate.dtype.newbyteorder("=")

    def rows(self, part: slice) -> Array:
        """The layer's result; all leading axes are taken as one."""
        return layers.silu_mul(_rows_of(self.gate, part), _rows_of(self.up, part))

    def why(self, row: int, column: int) -> str:
        """What made a number that is not finite of finite operands."""
        at = slice(row, row + 1)
        gate, up = (float(_rows_of(x, at)[0, column]) for x in (self.gate, self.up))
        return (
            f"gate is {gate:g} and up is {up:g} there, and {self.dtype.name} ends before their "
            "result. Scale one of them down, or pass a wider dtype."
        )


class Rmsnorm:
    """Normalized rows times a weight, a few rows at a time; writes x + residual on the way."""

    call, what = "quantize_rmsnorm", "the normalized x times weight"

    def __init__(
        self, x: Array, weight: Array, eps: float, residual: Array | None, updated: Array | None
    ) -> None:
        self.operands = {"x": x, "weight": weight}
        if residual is not None:
            self.operands["residual"] = residual
        self.x, self.weight, self.eps = matrix(x), weight, eps
        self.residual = None if residual is None else matrix(residual)
        self.shape, self.dtype = self.x.shape, x.dtype.newbyteorder("=")
        flat = math.prod(self.shape[:-1]), self.shape[-1]
        self.updated = None if updated is None else updated.reshape(flat)

    def rows(self, part: slice) -> Array:
        """As `SiluMul.rows`."""
        y, h = self._both(part)
        if self.updated is not None:
            self.updated[part] = h
        return y

    def _both(self, part: slice) -> tuple[Array, Array]:
        other = None if self.residual is None else _rows_of(self.residual, part)
        return layers.rmsnorm(_rows_of(self.x, part), self.weight, self.eps, other)

    def why(self, row: int, column: int) -> str:
        """As `SiluMul.why`."""
        h = self._both(slice(row, row + 1))[1]
        wide = h[0].astype(reference.arithmetic(h))
        total = layers.sum_of_squares(h)[0]
        if not np.isfinite(wide).all():
            return (
                f"x + residual passes the end of {self.dtype.name} in that row. Scale both down, "
                "or pass a wider dtype."
            )
        if not np.isfinite(total):
            return (
                f"numbers up to {np.abs(wide).max():g} in that row have squares whose sum passes "
                f"the end of {wide.dtype.name}. Scale x down, or pass a wider dtype."
            )
        if not wide.dtype.type(self.eps) + total / wide.dtype.type(len(wide)):
            return "the mean square of that row is 0, and eps is, too. Pass an eps above 0."
        return (
            f"weight is {float(self.weight[column]):g} there, and {self.dtype.name} ends before "
            "their product. Scale weight down, or pass a wider dtype."
        )


Layer = SiluMul | Rmsnorm


def matrix(x: Array) -> Array:
    """A vector as the one row of a matrix."""
    return x[None] if x.ndim == 1 else x


def _rows_of(x: Array, part: slice) -> Array:
    """Rows of a matrix, or of all matrices one after the other: a copy of these few."""
    if x.ndim == 2:
        return x[part]
    at: Any = np.unravel_index(np.arange(part.start, part.stop), x.shape[:-1])
    few: Array = x[at]
    return few


def _few(part: slice, columns: int) -> Iterator[slice]:
    """Rows that are worked on together, so that what lies between stays in a near cache."""
    step = max(1, blocks.CHUNK // columns)
    for begin in range(part.start, part.stop, step):
        yield slice(begin, min(begin + step, part.stop))


class _Run(NamedTuple):
    """Rows that share no scale with others, and their place among the parts."""

    rows: slice
    scales: slice
    matrix: int


def _runs(fmt: Format, shape: tuple[int, ...]) -> Iterator[_Run]:
    rows, columns = shape[-2:]
    total, tall = math.prod(shape[:-1]), fmt.scale.block[0]
    step = max(1, _QUANTIZED // columns)
    if tall == 1 and not fmt.tensor_scale:
        for begin in range(0, total, step):
            part = slice(begin, min(begin + step, total))
            yield _Run(part, part, 0)
        return
    tall = rows if tall is None else tall
    step = rows if fmt.tensor_scale else max(1, step // tall) * tall
    down = fmt.grid((rows, columns))[0]
    for matrix in range(total // rows):
        for top in range(0, rows, step):
            bottom = min(top + step, rows)
            part = slice(matrix * rows + top, matrix * rows + bottom)
            first, last = top // tall, -(-bottom // tall)
            yield _Run(part, slice(matrix * down + first, matrix * down + last), matrix)


def quantize(fmt: Format, layer: Layer) -> Packed:
    """Quantize what a layer computes, as `quantize` would the whole of it."""
    shape, columns = layer.shape, layer.shape[-1]
    grid = (*shape[:-2], *fmt.grid((shape[-2], columns)))
    kept = scaling.scale_dtype(fmt)
    parts = Packed(
        fmt,
        shape,
        np.empty((*shape[:-1], fmt.row_bytes(columns)), np.uint8),
        np.empty(grid, kept),
        None if fmt.zero is None else np.empty(grid, reference.zero_dtype(fmt)),
        np.empty(grid, kept) if fmt.bias else None,
        np.ones(shape[:-2], np.float32) if fmt.tensor_scale else None,
    )
    if not math.prod(shape):
        return parts
    for run in _runs(fmt, shape):
        y = np.empty((run.rows.stop - run.rows.start, columns), layer.dtype)
        for few in _few(run.rows, columns):
            y[few.start - run.rows.start : few.stop - run.rows.start] = layer.rows(few)
        made = _quantized(fmt, y, layer)
        for name, at in (("codes", run.rows), ("scales", run.scales), ("zeros", run.scales),
                         ("biases", run.scales)):  # fmt: skip
            part = getattr(parts, name)
            if part is not None:
                part.reshape(-1, part.shape[-1])[at] = getattr(made, name)
        if parts.tensor_scale is not None:
            parts.tensor_scale.reshape(-1)[run.matrix] = made.tensor_scale
    return parts


def _quantized(fmt: Format, y: Array, layer: Layer) -> Packed:
    usual: dict[str, Any] = {"scale": None, "zero": None, "method": "absmax"}
    usual |= {"rounding": "even", "overflow": "saturate"}
    made = device.HOST.quantize(fmt, y, **usual)
    if made is not None:
        return made
    for few in _few(slice(0, len(y)), y.shape[1]):
        if not _finite(y[few]).all():
            _refuse(layer)
    try:
        return reference.quantize(fmt, y, **usual)
    except ValueError as error:
        said = str(error).removeprefix("quantize: ")
        raise ValueError(f"{layer.call}: with {layer.what} as x, {said}") from error


def _finite(y: Array) -> Array:
    finite: Array = np.isfinite(y.astype(reference.arithmetic(y)))
    return finite


def _refuse(layer: Layer) -> NoReturn:
    """Say where a layer's result is not finite, and why."""
    for argument, x in layer.operands.items():
        checks.finite_array(x, argument)
    count, first = 0, (0, 0)
    rows, columns = math.prod(layer.shape[:-1]), layer.shape[-1]
    for few in _few(slice(0, rows), columns):
        bad = ~_finite(layer.rows(few))
        if bad.any() and not count:
            row, column = (int(i) for i in np.argwhere(bad)[0])
            first = few.start + row, column
        count += int(bad.sum())
    at: tuple[Any, ...] = np.unravel_index(first[0], layer.shape[:-1])
    index = (*(int(i) for i in at), first[1])[-next(iter(layer.operands.values())).ndim :]
    raise ValueError(
        f"{layer.call}: {layer.what} holds {count} NaN or infinite values, first at {index}: "
        f"{layer.why(*first)}"
    )

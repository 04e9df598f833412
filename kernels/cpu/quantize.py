"""Quantizing at the speed of memory: the reference's bits, compiled.

A block that fits a near cache is read once: its extremes, its scale and its codes are one step.
For others, for scales that are given and for the rarer rules the extremes come first, then the
reference's own rule in NumPy, then the codes.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lowbit.formats import reference, scaling
from lowbit.formats.declare import Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cpu import native, pool, quantize_rule
from lowbit.kernels.cpu.encode_lanes import LARGEST_DIVISOR, SMALLEST_DIVISOR
from lowbit.kernels.cpu.ir import VECTOR
from lowbit.kernels.cpu.isa import Isa, host
from lowbit.kernels.cpu.quantize_extremes import WORK
from lowbit.kernels.cpu.quantize_ir import FORMAT, PIECE, Arguments, Spec, text
from lowbit.kernels.policies import refuse_policies

Array = npt.NDArray[Any]

_NEAR = 1 << 19  # numbers of a block that is read once
_TILE = 1 << 17  # numbers of a tile: 30 us
_STRIP = 1 << 18  # numbers copied at a time where memory cannot be read as it is
_BLOCKS = 1 << 15  # blocks whose scales NumPy makes at a time
_UNROLLED = (1, 2, 4, 8, 16)  # vectors of a block
_DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}
_BLOCK = struct.Struct(FORMAT)


def refuse(
    fmt: Format,
    x: Array,
    *,
    method: str = "absmax",
    rounding: str = "even",
    overflow: str = "saturate",
) -> str | None:
    """Why this array is left to the reference, in words; None if it is not."""
    if x.dtype.newbyteorder("=") not in _DTYPES:
        return f"{x.dtype.name} data are worked on in float64"
    return refuse_policies(fmt, method=method, rounding=rounding, overflow=overflow)


def quantize(
    fmt: Format,
    x: Array,
    *,
    method: str = "absmax",
    scale: Array | None = None,
    zero: Array | None = None,
    isa: Isa | None = None,
    threads: int | None = None,
) -> Packed | None:
    """Round an array that `refuse` accepts, as `formats.reference.quantize` does.

    None is for data that the reference has to look at: not finite, of the wrong sign, or of a
    magnitude that a scale cannot hold.
    """
    rule = scaling.method_for(fmt, method)
    lead, columns = x.shape[:-1], x.shape[-1]
    parts = Packed(
        fmt,
        x.shape,
        np.empty((*lead, fmt.row_bytes(columns)), np.uint8),
        *_empty_blocks(fmt, x.shape),
        np.empty(x.shape[:-2], np.float32) if fmt.tensor_scale else None,
    )
    whole, source = _merged(parts, x)
    for index in np.ndindex(source.shape[:-2]):
        given = [None if g is None else _of_matrix(fmt, g, x.shape, index) for g in (scale, zero)]
        one = _Matrix(fmt, source[index], _part(whole, index), isa or host(), threads)
        if not one.fill(rule, *given):
            return None
    return parts


def _empty_blocks(fmt: Format, shape: tuple[int, ...]) -> tuple[Array, Array | None, Array | None]:
    grid = (*shape[:-2], *fmt.grid((shape[-2], shape[-1])))
    scales = np.empty(grid, scaling.scale_dtype(fmt))
    zeros = None if fmt.zero is None else np.empty(grid, reference.zero_dtype(fmt))
    return scales, zeros, np.empty(grid, scales.dtype) if fmt.bias else None


def _merged(parts: Packed, x: Array) -> tuple[Packed, Array]:
    """All matrices as one where blocks do not look beyond a row and memory allows it."""
    fmt = parts.format
    if x.ndim == 2 or fmt.tensor_scale or fmt.scale.block[0] != 1 or not x.flags.c_contiguous:
        return parts, x
    rows = math.prod(x.shape[:-1])

    def flat(part: Array | None) -> Array | None:
        return None if part is None else part.reshape(rows, part.shape[-1])

    codes, scales = flat(parts.codes), flat(parts.scales)
    assert codes is not None
    assert scales is not None
    shape = (rows, x.shape[-1])
    merged = Packed(fmt, shape, codes, scales, flat(parts.zeros), flat(parts.biases))
    return merged, x.reshape(shape)


def _part(parts: Packed, index: Any) -> Packed:
    """The parts of one matrix, as views."""
    held = (parts.codes, parts.scales, parts.zeros, parts.biases)
    codes, scales, zeros, biases = (None if p is None else p[index] for p in held)
    assert codes is not None
    assert scales is not None
    second = None if parts.tensor_scale is None else parts.tensor_scale[(*index, ...)]
    return Packed(parts.format, parts.shape[-2:], codes, scales, zeros, biases, second)


def _of_matrix(fmt: Format, given: Array, shape: tuple[int, ...], index: tuple[int, ...]) -> Array:
    """What is given for one matrix; merged ones have their rows of blocks below each other."""
    wide = shape[:-2] if fmt.tensor_scale else (*shape[:-2], *fmt.grid((shape[-2], shape[-1])))
    spread = np.broadcast_to(given, wide)
    if len(index) == len(shape) - 2:
        return np.asarray(spread[index])
    return spread.reshape(-1, spread.shape[-1])


@lru_cache(maxsize=256)
def build(spec: Spec, isa: Isa) -> native.Module:
    """Compile, or take from the object cache."""
    return native.load(text(spec, isa), isa)


def plan(fmt: Format, dtype: str, shape: tuple[int, int], rule: str) -> tuple[Spec, bool]:
    """What is compiled for a matrix, and whether it is read once."""
    rows, columns = shape
    tall, wide = (
        min(size or length, length) for size, length in zip(fmt.scale.block, shape, strict=True)
    )
    vectors = wide // 16 if wide % 16 == 0 and wide // 16 in _UNROLLED and tall == 1 else 0
    usual = rule == ("rceil" if _powers(fmt) else "absmax")
    offset = fmt.zero is not None or fmt.bias
    signed = offset or not usual or not quantize_rule.symmetric(fmt.element)
    spec = Spec(
        dtype, fmt.element, fmt.scale.element, fmt.zero, fmt.bias, fmt.tensor_scale, signed, vectors
    )
    return spec, usual and min(tall, rows) * min(wide, columns) <= _NEAR


def _powers(fmt: Format) -> bool:
    return not isinstance(fmt.scale.element, str) and quantize_rule.is_power(fmt.scale.element)


@dataclass
class _Matrix:
    """One matrix on its way into its parts."""

    fmt: Format
    x: Array
    parts: Packed
    isa: Isa
    threads: int | None

    def fill(self, rule: str, scale: Array | None, zero: Array | None) -> bool:
        """False: the reference has to look at it."""
        if not self.x.size:
            if self.parts.tensor_scale is not None:
                self.parts.tensor_scale[...] = 1
            return True
        dtype = _DTYPES[self.x.dtype.newbyteorder("=")]
        self.spec, near = plan(self.fmt, dtype, self.parts.matrix, rule)
        self.flag = np.zeros(1, np.int64)
        second = 1.0
        if self.parts.tensor_scale is not None:
            found = self._second(scale)
            if found is None:
                return False
            self.parts.tensor_scale[...] = second = found
            scale = None
        if near and scale is None:
            return self._fused(second)
        return self._apart(rule, second, scale, zero)

    # The three kinds of jobs.

    def _fused(self, second: float) -> bool:
        columns = self.parts.matrix[1]
        tall, wide = self._block()
        part = _columns_of_part(wide, columns, (1 << 12) if tall == 1 else (1 << 15) // tall)
        for top, x in self._strips(tall):
            row = top // tall
            self._run(
                "fused", x, tall, part, -(-min(part, columns) // wide),
                codes=_address(self.parts.codes, top), scales=_address(self.parts.scales, row),
                zeros=_address(self.parts.zeros, row), biases=_address(self.parts.biases, row),
                block_rows=tall, block_columns=wide, second=second,
            )  # fmt: skip
        return not self.flag[0]

    def _extremes(
        self, rows: slice, block: tuple[int, int], *, signed: bool
    ) -> tuple[Array, Array]:
        """Of each block of some rows, which begin where a block does.

        Blocks of many rows or columns are looked at in parts first.
        """
        columns = self.parts.matrix[1]
        count = rows.stop - rows.start
        tall, wide = min(block[0], count), min(block[1], columns)
        fine = (
            _divided(tall, 16, whole=tall == count),
            _divided(wide, 4096, whole=wide == columns),
        )
        grid = (-(-count // fine[0]), -(-columns // fine[1]))
        low, high = np.empty(grid, np.float32), np.empty(grid, np.float32)
        part = _columns_of_part(fine[1], columns, 1 << 14)
        vectors = self.spec.vectors if fine == (1, 16 * self.spec.vectors) else 0
        spec, self.spec = self.spec, replace(self.spec, signed=signed, vectors=vectors)
        try:
            for top, x in self._strips(fine[0], rows):
                row = (top - rows.start) // fine[0]
                self._run(
                    "extremes", x, fine[0], part, 0,
                    block_rows=fine[0], block_columns=fine[1],
                    low=_address(low, row), high=_address(high, row), grid_stride=grid[1],
                )  # fmt: skip
        finally:
            self.spec = spec
        if not signed:
            low = -high
        for axis, (size, small, length) in enumerate(
            zip((tall, wide), fine, (count, columns), strict=True)
        ):
            if size != small:
                begins = np.arange(0, -(-length // small), max(size // small, 1))
                if size >= length:
                    begins = begins[:1]
                low = np.minimum.reduceat(low, begins, axis)
                high = np.maximum.reduceat(high, begins, axis)
        return low, high

    def _codes(self, rows: slice, step: Array, offset: Array | None, largest: float) -> None:
        """Codes of some rows, which begin where a block does, from what divides and moves them.

        `largest` is the largest magnitude of a number.
        """
        columns = self.parts.matrix[1]
        tall, wide = self._block()
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / step
        quick = bool((step >= SMALLEST_DIVISOR).all() and (step <= LARGEST_DIVISOR).all())
        # A scale that is given may be so small that a product with its reciprocal is infinite.
        quick = quick and largest * float(inverse.max()) <= 2.0**126
        part = columns if columns <= 1 << 13 else 1 << 13
        for top, x in self._strips(1, rows):
            self._run(
                "encode", x, 1, part, 0,
                codes=_address(self.parts.codes, top), first_row=top - rows.start,
                block_rows=tall, block_columns=wide, grid_stride=step.shape[1], quick=quick,
                steps=_address(step), reciprocals=_address(inverse), offsets=_address(offset),
            )  # fmt: skip

    def _apart(self, rule: str, second: float, scale: Array | None, zero: Array | None) -> bool:
        """Extremes, then the reference's rule, then codes; some rows of blocks at a time."""
        rows, columns = self.parts.matrix
        tall, wide = self._block()
        across = -(-columns // wide)
        high = max(1, _BLOCKS // across) * tall
        at = self.parts
        for top in range(0, rows, high):
            part = slice(top, min(top + high, rows))
            above = slice(top // tall, -(-part.stop // tall))
            low, most = self._extremes(part, (tall, wide), signed=self.spec.signed)
            if self.flag[0]:
                return False
            try:
                if scale is None:
                    scaling.refuse_one_sided(self.fmt, low, most)
                given = [None if g is None else np.broadcast_to(g, at.scales.shape)[above]
                         for g in (scale, zero)]  # fmt: skip
                ts = None if at.tensor_scale is None else np.float32(second)
                found = reference._block_parts(
                    self.fmt, low, most, rule, None if ts is None else np.asarray(ts), *given
                )
            except ValueError:
                return False  # the reference says it with all the array before its eyes
            for target, part_found in zip((at.scales, at.zeros, at.biases), found, strict=True):
                if target is not None:
                    target[above] = part_found
            step = reference._step(self.fmt, found[0], ts, np.dtype(np.float32))
            offset = found[1] if found[1] is not None else found[2]
            if not (np.isfinite(step) & (step != 0)).all():
                return False
            moved = None if offset is None else np.ascontiguousarray(offset, np.float32)
            largest = max(-float(low.min()), float(most.max()))
            self._codes(part, np.ascontiguousarray(step), moved, largest)
        return True

    def _second(self, given: Array | None) -> float | None:
        """The tensor scale; None for the reference to decide."""
        rows, columns = self.parts.matrix
        low, high = self._extremes(slice(0, rows), (rows, columns), signed=True)
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        if self.flag[0]:
            return None
        try:
            if given is None:
                scaling.refuse_one_sided(self.fmt, low, high)
            # The scale that a block wants grows with its extremes, so the largest one wants that of
            # the whole matrix.
            second = float(reference._tensor_scale(self.fmt, low, high, given))
        except ValueError:
            return None
        return second if second > 0 else None

    # Running them.

    def _block(self) -> tuple[int, int]:
        rows, columns = self.parts.matrix
        tall, wide = self.fmt.scale.block
        return min(tall or rows, rows), min(wide or columns, columns)

    def _strips(self, step: int, rows: slice | None = None) -> Iterator[tuple[int, Array]]:
        """(first row, rows of x in memory that a kernel can read), whole blocks of `step` rows."""
        rows = slice(0, len(self.x)) if rows is None else rows
        x = self.x
        if x.dtype.isnative and x.strides[1] == x.itemsize and x.flags.aligned:
            yield rows.start, x[rows]
            return
        tall = max(1, _STRIP // x.shape[1] // step) * step
        for top in range(rows.start, rows.stop, tall):
            some = x[top : min(top + tall, rows.stop)]
            yield top, np.ascontiguousarray(some, x.dtype.newbyteorder("="))

    def _run(
        self, name: str, x: Array, band: int, part: int, blocks: int, **arguments: Any
    ) -> None:
        rows, columns = x.shape
        across = -(-columns // part)
        chunks = -(-rows // band) * across
        per = max(1, _TILE // (min(band, rows) * min(part, columns)))
        line = max(1, -(-blocks // 16)) * VECTOR
        names = ("steps_at", "reciprocals_at", "offsets_at", "low_at", "high_at", "work_at")
        places: dict[str, int] = {each: i * line for i, each in enumerate(names)}
        places["bytes_at"] = places["work_at"] + WORK
        places["quick_at"] = places["bytes_at"] + PIECE
        filled = {
            "rows": rows, "columns": columns, "band": band, "part": part, "across": across,
            "per": per, "chunks": chunks, "x": _address(x), "x_stride": x.strides[0],
            "codes_stride": self.parts.codes.strides[0], "flag": _address(self.flag),
            "grid_stride": self.parts.scales.shape[-1],
            **places, **arguments,
        }  # fmt: skip
        block = _BLOCK.pack(*(filled.get(field, 0) for field in Arguments._fields))
        held = ctypes.create_string_buffer(block, _BLOCK.size)
        entry = build(self.spec, self.isa).address(name)
        scratch = places["quick_at"] + VECTOR
        pool.run(entry, ctypes.addressof(held), -(-chunks // per), scratch, self.threads)


def _address(a: Array | None, row: int = 0) -> int:
    if a is None:
        return 0
    pointer: int = a.__array_interface__["data"][0]
    return pointer + row * a.strides[0]


def _columns_of_part(block: int, columns: int, wanted: int) -> int:
    """Columns of a chunk: whole blocks and whole bytes of codes."""
    if block >= columns:
        return columns
    unit = math.lcm(block, 8)
    return min(unit * max(1, wanted // unit), columns)


def _divided(length: int, wanted: int, *, whole: bool) -> int:
    """The size of the parts that a length is looked at in: any for a whole axis, else a divisor."""
    if whole:
        return min(length, wanted)
    return next(size for size in range(min(length, wanted), 0, -1) if length % size == 0)

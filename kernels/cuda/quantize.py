"""Quantizing on a GPU: the reference's bits.

A block that fits the registers of a few lanes, or of a thread block, is read once: its extremes,
its scale and its codes are one kernel. Blocks of other shapes, scales that are given and tensor
scales take the extremes first, then the rule, then the codes; x is read twice.

Codes are canonical rows, which is what kernels of products read: nothing is repacked on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from lowbit.formats import reference, scaling
from lowbit.formats.declare import Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import emit_quantize, launch
from lowbit.kernels.cuda.emit_quantize import NUMBERS, Spec
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.policies import refuse_policies

Array = Any

THREADS = 256
GROUP = 256  # most columns of a block that lanes of a warp share
ROWS = 2  # rows that a thread of `quantize_groups` looks at together
# Threads and octets a thread, for blocks of up to 2048 ... 32768 numbers.
TILES = ((128, 2), (256, 4), (256, 8), (512, 8))
_REGISTERS = 1 << 16  # bytes of registers that hold a block
_GRID = 65535  # most thread blocks along a grid's second axis
_PART = 1 << 13  # numbers that a warp looks at for extremes
_BLOCKS = 1 << 16  # blocks whose extremes are kept at a time, or a hundredth of the result's bytes


@dataclass(frozen=True)
class Pending:
    """Parts that kernels on the current stream fill, and whether they may be used."""

    parts: Packed
    flag: Array
    """uint32 of one entry on the device: not 0 where the reference has to look at x."""

    def settled(self) -> Packed | None:
        """Wait for the kernels and return the parts; None: the reference has to look at x.

        This is the only synchronization: it copies the flag, four bytes, to the host.
        """
        return None if int(self.flag[0]) else self.parts


def refuse(
    fmt: Format,
    x: Array,
    *,
    method: str = "absmax",
    rounding: str = "even",
    overflow: str = "saturate",
) -> str | None:
    """Why this array is left to the reference, in words; None if it is not."""
    if x.dtype.name not in NUMBERS or not x.dtype.isnative:
        return f"{x.dtype.name} data are worked on in float64"
    return refuse_policies(fmt, method=method, rounding=rounding, overflow=overflow)


def quantize(
    fmt: Format,
    x: Array,
    *,
    method: str = "absmax",
    scale: Array | None = None,
    zero: Array | None = None,
) -> Packed | None:
    """Round an array that `refuse` accepts, as `formats.reference.quantize` does.

    None is for data that the reference has to look at: not finite, of the wrong sign, or of a
    magnitude that a scale cannot hold. Waits for the device; `enqueue` does not.
    """
    return enqueue(fmt, x, method=method, scale=scale, zero=zero).settled()


def enqueue(
    fmt: Format,
    x: Array,
    *,
    method: str = "absmax",
    scale: Array | None = None,
    zero: Array | None = None,
) -> Pending:
    """Launch what rounds an array to a format; nothing waits.

    Parameters
    ----------
    fmt : Format
    x : device array of float32, float16 or bfloat16, (..., rows, columns), of any strides
    method : str
        As `formats.scaling.METHODS`, without "mse".
    scale, zero : array_like, optional
        Static scales and zero points that broadcast to the blocks; for a format with a tensor
        scale, `scale` is that.
    """
    machine = launch.machine_of(x)
    spec = emit_quantize.spec(fmt, method)
    lead, columns = x.shape[:-1], x.shape[-1]
    grid = (*x.shape[:-2], *fmt.grid((x.shape[-2], columns)))
    kept = scaling.scale_dtype(fmt)
    parts = Packed(
        fmt,
        x.shape,
        machine.empty((*lead, fmt.row_bytes(columns)), np.uint8),
        machine.empty(grid, kept),
        None if fmt.zero is None else machine.empty(grid, reference.zero_dtype(fmt)),
        machine.empty(grid, kept) if fmt.bias else None,
        machine.empty(x.shape[:-2], np.float32) if fmt.tensor_scale else None,
    )
    flag = machine.zeros((1,), np.uint32)
    pending = Pending(parts, flag)
    given = [_given(fmt, g, x, grid) for g in (scale, zero)]
    if parts.tensor_scale is not None and (not x.size or scale is not None):
        parts.tensor_scale[...] = 1 if scale is None else given[0]
    if not x.size:
        return pending
    seconds = parts.tensor_scale if scale is None else None
    if fmt.tensor_scale:
        given[0] = None
    if x.ndim > 2 and not fmt.tensor_scale and fmt.scale.block[0] == 1 and x.flags.c_contiguous:
        # Blocks do not look beyond a row, so that all matrices are one.
        x, parts = x.reshape(-1, columns), _flat(parts)
        given = [None if g is None else g.reshape(-1, g.shape[-1]) for g in given]
    for index in np.ndindex(x.shape[:-2]):
        one = _Matrix(machine, spec, x[index], _part(parts, index), flag)
        if seconds is not None:
            one.find_tensor_scale()
        one.fill(*(None if g is None else g[index] for g in given))
    return pending


def _given(fmt: Format, given: Array | None, x: Array, grid: tuple[int, ...]) -> Array | None:
    """What is given, on x's device: one number a block, or a matrix."""
    if given is None:
        return None
    numpy: Any = np
    if not isinstance(x, np.ndarray):
        import cupy

        numpy = cupy
    if fmt.tensor_scale:
        return numpy.broadcast_to(numpy.asarray(given, np.float32), grid[:-2])
    return numpy.broadcast_to(numpy.asarray(given, np.float64), grid)


def _flat(parts: Packed) -> Packed:
    held = (parts.codes, parts.scales, parts.zeros, parts.biases)
    codes, scales, zeros, biases = (p if p is None else p.reshape(-1, p.shape[-1]) for p in held)
    shape = (math.prod(parts.shape[:-1]), parts.shape[-1])
    assert codes is not None
    assert scales is not None
    return Packed(parts.format, shape, codes, scales, zeros, biases)


def _part(parts: Packed, index: tuple[int, ...]) -> Packed:
    """The parts of one matrix, as views."""
    held = (parts.codes, parts.scales, parts.zeros, parts.biases)
    codes, scales, zeros, biases = (None if p is None else p[index] for p in held)
    at: Any = (*index, ...)
    second = None if parts.tensor_scale is None else parts.tensor_scale[at]
    assert codes is not None
    assert scales is not None
    return Packed(parts.format, parts.shape[-2:], codes, scales, zeros, biases, second)


class Plan(NamedTuple):
    """Which kernel reads a matrix once."""

    kernel: str
    threads: int = THREADS
    held: int = ROWS
    """Octets of a thread."""


def plan(block: tuple[int, int], shape: tuple[int, int], size: int) -> Plan | None:
    """None: numbers, of `size` bytes, are read twice. `block` is no larger than `shape`."""
    (tall, wide), columns = block, shape[1]
    if wide % 8 and wide < columns:
        return None
    if tall == 1 and wide <= GROUP:
        return Plan("quantize_groups")
    octets = tall * -(-wide // 8)
    for threads, held in TILES:
        fits = octets <= threads * held and 8 * size * threads * held <= _REGISTERS
        if fits and -(-columns // wide) <= _GRID:
            return Plan("quantize_tiles", threads, held)
    return None


@cache
def once(spec: Spec, reads: str, plan: Plan) -> Source:
    """The kernel of a plan; `reads` is the type of its input."""
    sizes = f"{plan.threads}, {plan.held}" if plan.kernel == "quantize_tiles" else f"{plan.held}"
    header = "fused.cuh" if "Plain" not in reads else "quantize.cuh"
    arguments = f"{spec.name}, lb::quant::{reads}, {sizes}"
    return emit_quantize.source(header, spec, plan.kernel, arguments, plan.threads)


@cache
def twice(spec: Spec, kernel: str, *arguments: str) -> Source:
    """A kernel of those that come one after another."""
    threads = 32 if kernel == "tensor_rule" else THREADS
    return emit_quantize.source("quantize_apart.cuh", spec, kernel, ", ".join(arguments), threads)


def alignment(machine: Machine, array: Array) -> int:
    """What the address of every row is a multiple of, up to 16; 1 where columns lie apart."""
    if array.strides[-1] != array.itemsize:
        return 1
    places = machine.address(array) | int(array.strides[-2]) | 16
    return places & -places


def log2(count: int) -> int:
    """The least power of two that is not below a count, as its exponent."""
    return max(count - 1, 0).bit_length()


class Reading(NamedTuple):
    """A kernel's first arguments: where numbers come from."""

    kind: str
    arguments: tuple[Any, ...]


class _Matrix:
    """One matrix on its way into its parts."""

    def __init__(self, machine: Machine, spec: Spec, x: Array, parts: Packed, flag: Array) -> None:
        self.machine, self.spec, self.x, self.parts, self.flag = machine, spec, x, parts, flag
        self.dtype = NUMBERS[x.dtype.name]
        rows, columns = parts.matrix
        tall, wide = parts.format.scale.block
        self.block = min(tall or rows, rows), min(wide or columns, columns)
        self.align = alignment(machine, x)

    def fill(self, scale: Array | None, zero: Array | None) -> None:
        chosen = plan(self.block, self.parts.matrix, self.x.itemsize) if scale is None else None
        if chosen is None:
            self._twice(scale, zero)
            return
        x = self.x
        steps = np.int64(x.strides[0]), np.int64(x.strides[0]), np.int64(x.strides[1])
        reading = Reading(f"Plain<lb::quant::{self.dtype}>", (x, x, *steps, np.int32(self.align)))
        run_once(self.machine, self.spec, chosen, reading, self.parts, self.block, self.flag)

    def find_tensor_scale(self) -> None:
        """The tensor scale from the extremes of the whole matrix.

        The scale that a block wants grows with its extremes, so the largest one wants that of the
        whole matrix.
        """
        found = self._extremes(slice(0, self.parts.matrix[0]), self.parts.matrix)
        self._run(twice(self.spec, "tensor_rule", self.spec.name), 1, *found,
                  self.parts.tensor_scale, self.flag)  # fmt: skip

    def _twice(self, scale: Array | None, zero: Array | None) -> None:
        """Some rows of blocks at a time, so that their extremes need little memory."""
        (rows, columns), (tall, wide) = self.parts.matrix, self.block
        across = -(-columns // wide)
        fmt, spec, parts = self.parts.format, self.spec, self.parts
        most = max(_BLOCKS, parts.codes.nbytes // 100)
        high = max(1, most // across) * tall
        absent = parts.scales
        for top in range(0, rows, high):
            part = slice(top, min(top + high, rows))
            above = slice(top // tall, -(-part.stop // tall))
            held = [absent if p is None else p[above]
                    for p in (parts.scales, parts.zeros, parts.biases)]  # fmt: skip
            blocks = (above.stop - above.start) * across
            wanted = scale is None or (zero is None and (fmt.zero is not None or fmt.bias))
            found = self._extremes(part, self.block) if wanted else (self.flag, self.flag)
            if scale is None:
                rule = twice(spec, "block_rule", spec.name)
                second = self.flag if parts.tensor_scale is None else parts.tensor_scale
                self._run(rule, -(-blocks // THREADS), *found, *held, second, self.flag,
                          np.int64(blocks))  # fmt: skip
            else:
                rule = twice(spec, "given_rule", spec.name)
                self._run(rule, -(-blocks // THREADS), *found, *held, self.flag, np.int64(blocks),
                          np.int64(across), *_entries(scale[above]),
                          *_entries(scale[above] if zero is None else zero[above]),
                          np.int32(zero is not None))  # fmt: skip
            self._encode(part, held)

    def _extremes(self, part: slice, block: tuple[int, int]) -> tuple[Array, Array]:
        """Of each block of some rows, which begin where a block does."""
        (tall, wide), columns = block, self.parts.matrix[1]
        rows = part.stop - part.start
        across, down = -(-columns // wide), -(-rows // tall)
        part_columns = min(wide, _PART // 2)
        part_rows = min(tall, max(1, _PART // part_columns))
        row_parts, column_parts = -(-tall // part_rows), -(-wide // part_columns)
        most = self.machine.zeros((down * across,), np.uint32)
        rest = self.machine.zeros((down * across,), np.uint32) if self.spec.apart else most
        source = twice(self.spec, "extremes", f"lb::quant::{self.dtype}",
                       "true" if self.spec.apart else "false")  # fmt: skip
        # Octets of blocks that begin anywhere have no alignment.
        align = 1 if across > 1 and wide % 8 else self.align
        numbers = (
            rows,
            columns,
            tall,
            wide,
            across,
            part_rows,
            part_columns,
            row_parts,
            column_parts,
        )
        grid = -(-down * row_parts // 8), min(across * column_parts, _GRID)
        self._run(source, grid, *self._rows(part, align), most, rest, *map(np.int64, numbers))
        return most, rest

    def _encode(self, part: slice, held: list[Array]) -> None:
        (tall, wide), columns = self.block, self.parts.matrix[1]
        rows, octets = part.stop - part.start, -(-columns // 8)
        log_lanes = min(8, log2(octets))
        codes = self.parts.codes[part]
        second = self.flag if self.parts.tensor_scale is None else self.parts.tensor_scale
        numbers = (rows, columns, -(-columns // wide), tall, wide)
        source = twice(self.spec, "encode_rows", self.spec.name, f"lb::quant::{self.dtype}")
        grid = -(-rows // (THREADS >> log_lanes)), min(-(-octets >> log_lanes), _GRID)
        self._run(source, grid, *self._rows(part, self.align), codes, np.int64(codes.strides[0]),
                  np.int32(alignment(self.machine, codes)), *held, second, self.flag,
                  *map(np.int64, numbers), np.int32(log_lanes))  # fmt: skip

    def _rows(self, part: slice, align: int) -> tuple[Any, ...]:
        x = self.x[part]
        return x, np.int64(x.strides[0]), np.int64(x.strides[1]), np.int32(align)

    def _run(self, source: Source, grid: int | tuple[int, int], *arguments: Any) -> None:
        blocks = grid if isinstance(grid, tuple) else (grid,)
        self.machine.function(source)(blocks, (source.threads,), arguments)


def run_once(
    machine: Machine,
    spec: Spec,
    chosen: Plan,
    reading: Reading,
    parts: Packed,
    block: tuple[int, int],
    flag: Array,
) -> None:
    """Launch the kernel of a plan on one matrix."""
    (rows, columns), (tall, wide) = parts.matrix, block
    across = -(-columns // wide)
    codes, absent = parts.codes, parts.scales
    second = flag if parts.tensor_scale is None else parts.tensor_scale
    common = (
        *reading.arguments, codes, np.int64(codes.strides[0]),
        np.int32(alignment(machine, codes)), parts.scales,
        absent if parts.zeros is None else parts.zeros,
        absent if parts.biases is None else parts.biases, second, flag,
        np.int64(rows), np.int64(columns), np.int64(across),
    )  # fmt: skip
    function = machine.function(once(spec, reading.kind, chosen))
    if chosen.kernel == "quantize_tiles":
        grid = -(-rows // tall), across
        function(grid, (chosen.threads,), (*common, np.int64(tall), np.int64(wide)))
        return
    log_group = log2(-(-wide // 8))
    log_lanes = max(log_group, min(8, log2(across << log_group)))
    grid = (
        -(-rows // (ROWS * (THREADS >> log_lanes))),
        min(-(-(across << log_group) >> log_lanes), _GRID),
    )
    sizes = np.int32(wide), np.int32(log_group), np.int32(log_lanes)
    function(grid, (chosen.threads,), (*common, *sizes))


def _entries(given: Array) -> tuple[Any, Any, Any]:
    """A float64 array and its strides in entries."""
    return given, np.int64(given.strides[0] // 8), np.int64(given.strides[1] // 8)

"""Dequantizing on a GPU: the reference's bits."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import emit_quantize, launch
from lowbit.kernels.cuda.emit_quantize import NUMBERS, Spec
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cuda.quantize import THREADS, alignment, log2

Array = Any

_GRID = 65535  # most thread blocks along a grid's second axis


def refuse(dtype: np.dtype[Any]) -> str | None:
    """Why values of a dtype are left to the reference, in words; None if they are not."""
    if dtype.name not in NUMBERS:
        return f"{dtype.name} is what the reference computes in"
    return None


def dequantize_to(w: Packed, out: Array) -> None:
    """Launch what writes the values into `out`, as `formats.reference.dequantize_to` does.

    Nothing waits. `out` has columns next to each other; its rows may lie apart.
    """
    if not out.size:
        return
    machine = launch.machine_of(out)
    held = [None if p is None else _together(p) for p in (w.scales, w.zeros, w.biases)]
    codes = w.codes if w.codes.strides[-1] == w.codes.itemsize else _copied(w.codes)
    if (
        not w.format.tensor_scale and w.format.scale.block[0] == 1 and out.ndim > 2
        and codes.flags.c_contiguous and out.flags.c_contiguous
    ):  # fmt: skip
        # Blocks do not look beyond a row, so that all matrices are one.
        rows = math.prod(w.shape[:-1])
        held = [None if p is None else p.reshape(rows, -1) for p in held]
        codes, out = codes.reshape(rows, -1), out.reshape(rows, -1)
    spec = emit_quantize.spec(w.format)
    for index in np.ndindex(out.shape[:-2]):
        some = [None if p is None else p[index] for p in held]
        second = None if w.tensor_scale is None else w.tensor_scale[(*index, ...)]
        _matrix(machine, spec, w, codes[index], some, second, out[index])


def _together(part: Array) -> Array:
    return part if part.flags.c_contiguous else _copied(part)


def _copied(part: Array) -> Array:
    return part.copy("C")


@cache
def source(spec: Spec, out: str) -> Source:
    """The kernel for results of a dtype."""
    way = emit_quantize.way(spec, out)
    arguments = f"{spec.name}, lb::quant::{NUMBERS[out]}, lb::quant::Way::{way}"
    return emit_quantize.source("dequantize.cuh", spec, "dequantize_rows", arguments, THREADS)


def _matrix(
    machine: Machine,
    spec: Spec,
    w: Packed,
    codes: Array,
    held: list[Array | None],
    second: Array | None,
    out: Array,
) -> None:
    rows, columns = out.shape
    tall, wide = (
        size or length for size, length in zip(w.format.scale.block, out.shape, strict=True)
    )
    wide = min(wide, columns)
    octets = -(-columns // 8)
    log_lanes = min(8, log2(octets))
    absent = held[0]
    numbers = rows, columns, -(-columns // wide), tall, wide
    arguments = (
        codes, np.int64(codes.strides[0]), np.int32(alignment(machine, codes)),
        *(absent if p is None else p for p in held), absent if second is None else second,
        out, np.int64(out.strides[0]), np.int32(alignment(machine, out)),
        *map(np.int64, numbers), np.int32(log_lanes),
    )  # fmt: skip
    kernel = source(spec, out.dtype.name)
    grid = -(-rows // (THREADS >> log_lanes)), min(-(-octets >> log_lanes), _GRID)
    machine.function(kernel)(grid, (THREADS,), arguments)

"""Dequantizing at the speed of memory: the reference's bits, compiled."""

from __future__ import annotations

import ctypes
import math
import struct
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lowbit.formats.declare import Element, Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cpu import native, pool
from lowbit.kernels.cpu.dequantize_ir import FORMAT, PIECE, Arguments, Spec, text
from lowbit.kernels.cpu.isa import Isa, host
from lowbit.kernels.cpu.pool import address

Array = npt.NDArray[Any]

_TILE = 1 << 16  # numbers of a tile: 10 us
_PART = 1 << 13  # columns of a chunk, whose blocks' numbers stand in scratch
_UNROLLED = (1, 2, 4, 8, 16)  # vectors of a block
_DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}
_BLOCK = struct.Struct(FORMAT)


def refuse(dtype: np.dtype[Any]) -> str | None:
    """Why values of a dtype are left to the reference, in words; None if they are not."""
    if dtype not in _DTYPES:
        return f"{dtype.name} is what the reference computes in"
    return None


def dequantize_to(
    w: Packed, out: Array, *, isa: Isa | None = None, threads: int | None = None
) -> None:
    """Write the values into `out`, C-contiguous, as `formats.reference.dequantize_to` does."""
    if not out.size:
        return
    held = [None if p is None else np.ascontiguousarray(p)
            for p in (w.codes, w.scales, w.zeros, w.biases)]  # fmt: skip
    if not w.format.tensor_scale and w.format.scale.block[0] == 1:
        # Blocks do not look beyond a row, so that all matrices are one.
        rows = math.prod(w.shape[:-1])
        held = [None if p is None else p.reshape(rows, -1) for p in held]
        out = out.reshape(rows, -1)
    spec = plan(w.format, _DTYPES[out.dtype], out.shape[-1])
    for index in np.ndindex(out.shape[:-2]):
        second = 1.0 if w.tensor_scale is None else float(w.tensor_scale[index])
        some = [None if p is None else p[index] for p in held]
        _matrix(w.format, spec, some, second, out[index], isa or host(), threads)


def plan(fmt: Format, dtype: str, columns: int) -> Spec:
    """What is compiled for a result of this dtype."""
    wide = fmt.scale.block[1] or columns
    vectors = wide // 16 if wide % 16 == 0 and wide // 16 in _UNROLLED else 0
    zero = fmt.zero
    if isinstance(zero, Element):
        zero = "int8" if zero.min < 0 else "uint8"
    return Spec(dtype, fmt.element, fmt.scale.element, zero, fmt.bias, fmt.tensor_scale, vectors)


@lru_cache(maxsize=256)
def build(spec: Spec, isa: Isa) -> int:
    """Compile, or take from the object cache; the entry point."""
    return native.load(text(spec, isa), isa).address("tile")


def _matrix(
    fmt: Format,
    spec: Spec,
    held: list[Array | None],
    second: float,
    out: Array,
    isa: Isa,
    threads: int | None,
) -> None:
    rows, columns = out.shape
    tall, wide = (size or length for size, length in zip(fmt.scale.block, out.shape, strict=True))
    part = min(columns, _PART)
    across = -(-columns // part)
    blocks = -(-part // wide) + 1
    table = -(-blocks // 16) * 16 * 12
    codes, scales, zeros, biases = (0 if p is None else address(p) for p in held)
    strides = [0 if p is None else p.strides[0] for p in held]
    codes_at = 3 * table
    out_at = codes_at + PIECE + 64
    quick_at = out_at + PIECE * out.itemsize + 128
    per = max(1, _TILE // part)
    chunks = rows * across
    block = _BLOCK.pack(
        *Arguments(
            columns, tall, wide, part, across, per, chunks, strides[0], fmt.row_bytes(columns),
            strides[1], strides[2], strides[3], out.strides[0],
            codes, scales, zeros, biases, address(out),
            0, table, 2 * table, codes_at, out_at, quick_at, second,
        )
    )  # fmt: skip
    argument = ctypes.create_string_buffer(block, _BLOCK.size)
    scratch = quick_at + 64
    pool.run(build(spec, isa), ctypes.addressof(argument), -(-chunks // per), scratch, threads)

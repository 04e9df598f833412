"""The products that no kernel of ours takes: tiles of values, multiplied by the vendor's library.

Works for every format, pair of formats and shape, and is slow where few rows meet a big weight:
all of its values are written and read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from lowbit.formats import reference
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import costs, dequantize, emit, launch, product
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.declare import (
    ACTIVATION_ERROR,
    Array,
    Bind,
    Epilogue,
    Kernel,
    Problem,
    Roundings,
    Run,
    itemsize,
)

TILE = 1 << 24  # values of w at a time: 64 MB of float32
_THREADS = 256
_MOST_BLOCKS = 1 << 16
_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class _Finish:
    bias: bool
    activation: str | None
    residual: str | None
    out: str


@lru_cache(maxsize=256)
def _finish(spec: _Finish) -> Source:
    text = (
        '#include "finish.cuh"\nstruct Config {\n'
        f"    static constexpr bool bias = {str(spec.bias).lower()};\n"
        f"    static constexpr bool residual = {str(spec.residual is not None).lower()};\n"
        f"{product.after(spec.out, spec.activation, spec.residual)}}};\n"
    )
    return Source(text, "lb::finish<Config>", _THREADS)


@lru_cache(maxsize=16)
def _convert(given: str, wanted: str) -> Source:
    text = (
        '#include "finish.cuh"\nstruct Config {\n'
        f"    using In = {emit.NUMBERS[given]};\n    using Out = {emit.NUMBERS[wanted]};\n"
        f"{emit.widen(given)}{emit.narrow(wanted)}}};\n"
    )
    return Source(text, "lb::convert<Config>", _THREADS)


def _blocks(size: int) -> tuple[int, ...]:
    return (min(-(-size // _THREADS), _MOST_BLOCKS),)


def _values(machine: Machine, operand: Any, dtype: np.dtype[Any]) -> Array:
    """Numbers of an operand, rows without gaps."""
    shape = operand.shape
    made: Array = machine.empty(shape, dtype)
    if isinstance(operand, Packed):
        dequantize.dequantize_to(operand, made)
    elif operand.size:
        rows = operand if operand.strides[1] == operand.itemsize else operand.copy()
        function = machine.function(_convert(rows.dtype.name, dtype.name))
        arguments = (
            rows,
            np.int64(rows.strides[0] // rows.itemsize),
            made,
            np.int32(shape[1]),
            np.int64(shape[0]),
        )
        function(_blocks(rows.size), (_THREADS,), arguments)
    return made


def _bind(p: Problem, dtype: np.dtype[Any]) -> Bind:
    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        size = w.format.scale.block[0] or w.shape[-2]
        tall = max(size, TILE // max(p.k, 1) // size * size) if p.w_along else w.shape[-2]

        def run(x: Any, epilogue: Epilogue, out: Array) -> None:
            left = _values(machine, x, dtype)
            left = left if p.x_along else left.T
            finish = machine.function(
                _finish(_Finish(epilogue.bias is not None, p.activation, p.residual, p.out))
            )
            for top in range(0, w.shape[-2] if p.w_along else 1, tall):
                part = slice(top, min(top + tall, w.shape[-2]))
                right = _values(machine, reference.take(w, (), part), dtype)
                sums = machine.matmul(left, right if p.w_along else right.T)
                columns = slice(0, p.n) if not p.w_along else part
                _finished(finish, sums, epilogue, out[:, columns], columns)

        return run

    return to


def _finished(
    function: launch.Function, sums: Array, epilogue: Epilogue, out: Array, columns: slice
) -> None:
    if not out.size:
        return
    residual = None if epilogue.residual is None else epilogue.residual[:, columns]
    arguments = (
        sums,
        np.float64(epilogue.alpha),
        sums if epilogue.bias is None else epilogue.bias[columns],
        sums if residual is None else residual,
        np.int64(0 if residual is None else residual.strides[0] // residual.itemsize),
        out,
        np.int64(out.strides[0] // out.itemsize),
        np.int32(out.shape[1]),
        np.int64(out.shape[0]),
    )
    function(_blocks(out.size), (_THREADS,), arguments)


def _accepts(p: Problem) -> str | None:
    if p.x == "float64" or p.out == "float64":
        return "computes in float32, float64 was asked for"
    if p.batch_invariant:
        return "the library's order of the sum depends on the number of rows"
    return None


def _accepts_narrow(p: Problem) -> str | None:
    if p.x != "bfloat16":
        return f"multiplies bfloat16 numbers as they come, x is {p.x}"
    return _accepts(p)


def _cost(p: Problem, dtype: str) -> float:
    device, size = launch.parse(p.device), itemsize(dtype)
    rates = costs.rates(device.capability)
    moved = p.bytes + 2 * size * p.k * (p.n + p.m) + 8 * p.m * p.n
    rate = rates.dense if size == 2 else rates.dense / 12
    tiles = max(1, p.n * p.k // TILE)
    return (3 + 2 * tiles) * costs.LAUNCH + moved / rates.bandwidth + p.operations / rate


def _roundings(p: Problem, dtype: str) -> Roundings:
    # Products and sums round in any order, by 2 u at most on tensor cores (see gemm.py), which cut
    # 17 terms for 16 products; then alpha and bias.
    return Roundings(
        "float32",
        3 * p.k + 8,
        f"values rounded to {dtype}, multiplied by the vendor's library in its own order",
        ACTIVATION_ERROR[p.activation],
        weight=_UNIT[dtype] * 1.01,
    )


def build(p: Problem) -> Bind:
    """Bind a product in float32 to weights."""
    return _bind(p, np.dtype(np.float32))


KERNELS = (
    Kernel(
        "matmul.cuda.cublas",
        "cuda",
        accepts=_accepts,
        cost=lambda p: _cost(p, "float32"),
        build=build,
        roundings=lambda p: _roundings(p, "float32"),
    ),
    Kernel(
        "matmul.cuda.cublas16",
        "cuda",
        accepts=_accepts_narrow,
        cost=lambda p: _cost(p, "bfloat16"),
        build=lambda p: _bind(p, np.dtype(ml_dtypes.bfloat16)),
        roundings=lambda p: _roundings(p, "bfloat16"),
    ),
)

"""lowbit's own conversions: quantize, prepare, dequantize. A copy is one more array to convert.

They take no x; the number of rows that they are asked for is without meaning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.checking import Wrong
from harness.work import Array, Operands, Work

import lowbit as lb
from peers import Built

NAMES = ("lowbit.quantize", "lowbit.prepare", "lowbit.dequantize")

CHECKED = 32
"""Rows that are checked, at both ends and between."""


def missing() -> str | None:
    """Never."""
    return None


def version() -> str:
    """The release."""
    return f"lowbit {lb.__version__}"


def refusal(name: str, work: Work) -> str | None:
    """Symmetric formats in groups or whole rows: the check knows no others."""
    fmt = lb.format(work.weight)
    if fmt.zero is not None or fmt.bias or fmt.scale.block[0] != 1:
        return f"the check knows formats with a scale for each group of a row, not {work.weight}"
    return None


def build(name: str, operands: Operands, threads: int) -> Built:
    """Arrays in turn, as many as there are copies."""
    lb.set_num_threads(threads)
    fmt, dense = operands.work.weight, operands.weight
    quantized = lb.quantize(dense, fmt)
    rows = np.unique(np.linspace(0, dense.shape[0] - 1, CHECKED).astype(int))
    inputs: list[Any]
    if name == "lowbit.quantize":
        moved, inputs, convert = dense.nbytes + quantized.nbytes, [dense], _quantize(fmt)
    elif name == "lowbit.dequantize":
        moved, inputs, convert = dense.nbytes + quantized.nbytes, [quantized], _dequantize
    else:
        moved, inputs, convert = 2 * quantized.nbytes, [quantized], _prepare

    def check(answer: Any, x: Array) -> float:
        if name == "lowbit.quantize":
            return _nearest(answer, dense, rows)
        return _equal(answer, quantized, rows)

    return Built(
        weight_bytes=inputs[0].nbytes,
        copy=lambda: inputs.append(inputs[0].copy()),
        take=lambda x: None,
        call=lambda x, i: convert(inputs[i]),
        read=lambda y: y,
        check=check,
        moved=lambda m: moved,
    )


def _quantize(fmt: str) -> Any:
    return lambda dense: lb.quantize(dense, fmt)


def _dequantize(quantized: lb.QArray) -> Array:
    return quantized.dequantize(np.float32)


def _prepare(quantized: lb.QArray) -> lb.QArray:
    return quantized.prepare()


def _nearest(quantized: lb.QArray, dense: Array, rows: Array) -> float:
    """No other code of the format may be nearer to the number that was quantized."""
    values, scales = _decoded(quantized, rows)
    table = np.array([v for v in quantized.format.element.values if np.isfinite(v)])
    wanted = dense[rows].astype(np.float64)
    got, nearest = np.abs(values - wanted), np.full(wanted.shape, np.inf)
    for value in table:
        nearest = np.minimum(nearest, np.abs(value * scales - wanted))
    # The quotient is computed in float32: codes that are as near to its rounding may come out.
    allowed = nearest + 2.0**-22 * np.abs(table).max() * np.abs(scales)
    return _share(got, allowed)


def _equal(answer: Any, quantized: lb.QArray, rows: Array) -> float:
    """The values that codes and scales mean, rounded to float32 once."""
    if not isinstance(answer, np.ndarray):
        answer = answer.dequantize(np.float32)
    wanted = _decoded(quantized, rows)[0]
    return _share(np.abs(answer[rows] - wanted), 2.0**-24 * np.abs(wanted) + 2.0**-149)


def _share(distance: Array, allowed: Array) -> float:
    if not (distance <= allowed).all():
        i, j = (int(at) for at in np.argwhere(~(distance <= allowed))[0])
        raise Wrong(f"checked row {i}, column {j}: off by {distance[i, j]:.3g}")
    return float((distance / np.where(allowed > 0, allowed, 1)).max())


def _decoded(quantized: lb.QArray, rows: Array) -> tuple[Array, Array]:
    """Values and scales of some rows in float64, by the format's table alone."""
    element, k = quantized.format.element, quantized.shape[-1]
    stream = np.ascontiguousarray(np.asarray(quantized.codes)[rows]).view(np.uint8)
    bits = np.unpackbits(stream, axis=1, count=k * element.bits, bitorder="little")
    weights = 1 << np.arange(element.bits)
    codes = (bits.reshape(len(rows), k, element.bits) * weights).sum(-1)
    group = quantized.format.scale.block[1] or k
    scales = np.asarray(quantized.scales)[rows].astype(np.float64).repeat(group, axis=1)[:, :k]
    if quantized.tensor_scale is not None:
        scales = scales * float(quantized.tensor_scale)
    return np.array(element.values)[codes] * scales, scales

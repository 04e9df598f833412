"""lowbit itself: bound products, and calls of the plain functions where the host is timed."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.checking import UNIT, Meaning
from harness.gpu_work import Kept, Operands, host, share_of_bound
from harness.work import Array, Work

import lowbit as lb
from lowbit.kernels import registered
from peers.gpu import Built

NAMES = ("lowbit", "lowbit.matmul", "lowbit.plan")


def missing() -> str | None:
    """Never."""
    return None


def version() -> str:
    """The release."""
    return f"lowbit {lb.__version__}"


def refusal(name: str, work: Work) -> str | None:
    """None: every format and shape is taken."""
    return None


def build(name: str, operands: Operands) -> Built:
    """Quantized once; a plan for each copy and number of rows."""
    work, xp = operands.work, operands.xp
    weights = [lb.quantize(operands.weight(), work.weight)]
    dense = work.x in UNIT
    dtype = work.x if dense else "bfloat16"
    options: dict[str, Any] = {} if dense else {"out_dtype": dtype}
    held = Kept(lambda rows: values(weights[0], rows))
    taken: dict[int, Any] = {}

    def x_of(m: int) -> Any:
        x = operands.x(m, dtype)
        return x if dense else lb.quantize(x, work.x)

    def take(m: int) -> Any:
        taken[m] = x = x_of(m)
        if name == "lowbit.matmul":
            return x, [w.T for w in weights]
        out = xp.empty((m, work.n), dtype)
        return x, [lb.plan(x, w.T, out=out, **options) for w in weights]

    def call(prepared: Any, i: int) -> Any:
        x, bound = prepared
        return lb.matmul(x, bound[i], **options) if name == "lowbit.matmul" else bound[i](x)

    def rows_of_x(m: int, rows: Array) -> Array:
        x = taken[m]
        return values(x, rows) if isinstance(x, lb.QArray) else host(x[xp.asarray(rows)])

    def check(answer: Any, m: int) -> float:
        meaning = meaning_of(lb.explain(taken[m], weights[0].T, **options), held, dtype)
        return share_of_bound(answer, rows_of_x, m, work.n, meaning)

    return Built(
        weight_bytes=weights[0].nbytes,
        copy=lambda: weights.append(weights[0].copy()),
        take=take,
        call=call,
        check=check,
        out_bytes=np.dtype(dtype).itemsize,
        host=name != "lowbit",
    )


def values(array: lb.QArray, rows: Array) -> Array:
    """float64 values of some rows, in the host's memory."""
    found: Array = array[rows].to_device("cpu").dequantize(np.float64)
    return found


def meaning_of(why: lb.Explanation, held: Kept, dtype: str) -> Meaning:
    """What the chosen kernel says of its arithmetic, as `lowbit.testing.error_bound` reads it."""
    kernel = next(k for k in registered() if k.name == why.kernel)
    roundings = kernel.roundings(why.problem)
    count, accumulator = roundings.count, roundings.accumulator
    return Meaning(
        held,
        roundings=count,
        accumulator=accumulator,
        relative=roundings.weight * (1 + lb.testing.gamma(count, accumulator)),
        out=dtype,
    )

"""lowbit itself, through its public functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.checking import Wrong
from harness.work import Array, Operands, Work, parts

import lowbit as lb
from peers import Built

NAMES = ("lowbit",)


def missing() -> str | None:
    """Never."""
    return None


def version() -> str:
    """The release; the instruction set stands with the machine."""
    return f"lowbit {lb.__version__}"


def refusal(name: str, work: Work) -> str | None:
    """None: every format and shape is taken."""
    return None


def build(name: str, operands: Operands, threads: int) -> Built:
    """Quantized once, prepared for each copy."""
    work = operands.work
    lb.set_num_threads(threads)
    first = lb.quantize(operands.weight, work.weight)
    transposed = [first.copy().prepare().T]
    options: dict[str, Any] = {"x_format": work.inner} if work.inner else {}
    if work.x == "bfloat16":
        options["out_dtype"] = "bfloat16"

    def take(x: Array) -> Any:
        if work.x in ("float32", "bfloat16"):
            return x.astype(work.x)
        return lb.quantize(x, work.x)

    def check(answer: Array, x: Array) -> float:
        taken = take(x)
        kernel = lb.explain(taken, transposed[0], **options).kernel
        worst = 0.0
        for part in parts(x.shape[0], work.n):
            try:
                share = lb.testing.assert_within_bound(
                    answer[np.ix_(part.rows, part.columns)],
                    taken[part.rows],
                    first[part.columns].T,
                    kernel=kernel,
                    **options,
                )
            except AssertionError as error:
                raise Wrong(str(error)) from error
            worst = max(worst, share)
        return worst

    return Built(
        weight_bytes=transposed[0].nbytes,
        copy=lambda: transposed.append(first.copy().prepare().T),
        take=take,
        call=lambda x, i: lb.matmul(x, transposed[i], **options),
        read=lambda y: y,
        check=check,
    )

"""`lowbit explain`: the choice for a problem that is only described."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import lowbit
from lowbit import checks, kernels
from lowbit.formats import Format
from lowbit.kernels import Problem
from lowbit.kernels.cpu import isa, pool
from lowbit.kernels.declare import ACTIVATIONS


def explain(
    m: int,
    n: int,
    k: int,
    *,
    weight: str,
    x: str = "float32",
    quantized: bool = False,
    out: str | None = None,
    bias: bool = False,
    activation: str | None = None,
    residual: bool = False,
    batch_invariant: bool = False,
    device: str | None = None,
    threads: int | None = None,
    kernel: str | None = None,
) -> lowbit.Explanation:
    """Judge x (m, k) times a weight (n, k); x is a format's name where it is quantized.

    Raises
    ------
    TypeError, ValueError
        A name is not known, or the kernel asked for refuses.
    """
    dtype = "float32" if quantized else checks.float_dtype(x, "--x").name
    problem = Problem(
        m,
        n,
        k,
        x=checks.as_format(x, "--x-format") if quantized else dtype,
        w=checks.as_format(weight, "--weight"),
        out=dtype if out is None else checks.float_dtype(out, "--out").name,
        bias=bias,
        activation=None
        if activation is None
        else checks.choice(activation, ACTIVATIONS, "--activation"),
        residual=dtype if residual else None,
        batch_invariant=batch_invariant,
        device=device or f"cpu:{isa.host().name}",
        threads=threads or pool.get_num_threads(),
    )
    chosen = kernels.choose(problem, kernel).kernel.name
    return lowbit.Explanation(problem, kernels.judge(problem), chosen)


def record(explanation: lowbit.Explanation) -> dict[str, Any]:
    """Return what --json prints."""
    problem = explanation.problem
    stated = {each.name: getattr(problem, each.name) for each in fields(problem)}
    moved, computed = explanation.floors
    return {
        "problem": {
            name: value.name if isinstance(value, Format) else value
            for name, value in stated.items()
        },
        "bytes": problem.bytes,
        "operations": problem.operations,
        "floors": {"move": moved, "compute": computed},
        "kernel": explanation.kernel,
        "rates": explanation.rates,
        "verdicts": [
            {
                "kernel": each.kernel.name,
                "refusal": each.refusal,
                "seconds": each.seconds,
                "source": None if each.refusal else explanation.source(each.kernel),
            }
            for each in explanation.verdicts
        ],
    }

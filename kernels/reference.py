"""The kernel that always works: what the bytes mean, multiplied in float64. Never fast."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowbit.formats import reference
from lowbit.formats.codes import rounded
from lowbit.formats.reference import Packed
from lowbit.kernels.declare import Array, Bind, Epilogue, Kernel, Problem, Roundings, Run
from lowbit.kernels.words16 import Words16

_erfc = np.frompyfunc(math.erfc, 1, 1)

# (relative, absolute). The argument of erfc or exp has a few roundings of float64, and a relative
# error of it counts 745 times before the result underflows.
ACTIVATION_ERROR = (2.0**-40, 2.0**-1000)


def activate(name: str | None, v: Array) -> Array:
    """The activation functions in float64; their definition.

    relu v if v > 0, else +0 (NaN stays); gelu v/2 (1 + erf(v/sqrt 2)); gelu_tanh its tanh form
    (Hendrycks and Gimpel, 2016); silu v / (1 + exp(-v)).
    """
    with np.errstate(all="ignore"):
        if name is None:
            return v
        if name == "relu":
            return np.where(v <= 0, 0.0, v)
        if name == "silu":
            return np.where(np.isneginf(v), -0.0, v / (1 + np.exp(-v)))
        if name == "gelu":
            tail = np.asarray(_erfc(-v / math.sqrt(2)), float)  # 1 + erf would cancel below -1
            return np.where(np.isneginf(v), -0.0, v / 2 * tail)
        if name == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
            # 1 + tanh(t) = 2 / (1 + exp(-2 t)), without its cancellation below 0
            return np.where(np.isneginf(v), -0.0, v / (1 + np.exp(-2 * inner)))
    raise ValueError(f"activation: {name!r} is not known")


def finish(product: Array, epilogue: Epilogue) -> Array:
    """activation(alpha * product + bias) + residual, in float64."""
    v = product * epilogue.alpha
    if epilogue.bias is not None:
        v = v + epilogue.bias.astype(np.float64)
    v = activate(epilogue.activation, v)
    return v if epilogue.residual is None else v + epilogue.residual.astype(np.float64)


def _values(operand: Any, along: bool) -> Array:
    """float64 (rows, K) of either operand."""
    if isinstance(operand, Words16):
        operand = operand.rows()
    if isinstance(operand, Packed):
        values = reference.dequantize(operand)
        return values if along else values.swapaxes(-1, -2)
    # einsum's order follows the strides, and the same numbers shall give the same bits.
    return np.ascontiguousarray(operand, np.float64)


def _build(problem: Problem) -> Bind:
    x_along, w_along = problem.x_along, problem.w_along

    def bind(w: Packed | Words16) -> Run:
        def run(x: Any, epilogue: Epilogue, out: Array) -> None:
            with np.errstate(all="ignore"):
                product = reference.matmul(_values(x, x_along), _values(w, w_along).T)
                out[...] = rounded(finish(product, epilogue), out.dtype)

        return run

    return bind


KERNELS = (
    Kernel(
        "reference",
        "any",
        accepts=lambda p: None,
        # On one core of a Granite Rapids server, whatever the number of threads.
        cost=lambda p: 70e-6 + 0.4e-9 * p.m * p.n * p.k + 10e-9 * (p.m + p.n) * p.k,
        build=_build,
        # Up to four roundings make each operand's value; then product, sums, alpha and bias.
        roundings=lambda p: Roundings(
            "float64", p.k + 12, "float64 sum of k, one final rounding", ACTIVATION_ERROR
        ),
        layouts=("words16", "rows"),
    ),
)

"""Products inside torch.compile and jax.jit: one registered operation, run when the graph runs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from lowbit import checks
from lowbit.array import QArray


def active(operand: Any) -> bool:
    """Whether a framework is recording operations on this operand instead of running them."""
    kind = type(operand)
    if kind is np.ndarray or kind is QArray:
        return False
    root = kind.__module__.partition(".")[0]
    if root == "torch":
        compiling: bool = sys.modules["torch"].compiler.is_compiling()
        return compiling
    if root in ("jax", "jaxlib"):
        return isinstance(operand, sys.modules["jax"].core.Tracer)
    return False


def matmul(x: Any, w: Any, *, x_scale: Any, out: Any, **options: Any) -> Any:
    """`lowbit.matmul` where x or w is being traced."""
    if x_scale is not None or out is not None:
        raise TypeError("x_scale= and out= are not taken inside a traced function")
    if not (isinstance(w, QArray) or isinstance(x, QArray)):
        raise TypeError(
            "matmul: neither operand is a QArray inside this traced function; let the function "
            "close over the QArray instead of taking it as an argument"
        )
    if isinstance(w, QArray) and isinstance(x, QArray):
        raise TypeError("matmul: both operands are QArrays; multiply them outside of the graph")
    for name in ("x_format", "out_dtype"):
        # Text goes through as it is: torch.compile would trace the parser of names.
        if options[name] is not None and not isinstance(options[name], str):
            options[name] = _word(options[name], name)
    left = isinstance(x, QArray)
    weight, dense = (x, w) if left else (w, x)
    if type(dense).__module__.partition(".")[0] == "torch":
        from lowbit import torch_ops

        return torch_ops.matmul(dense, weight, left, **options)
    from lowbit import jax_ops

    return jax_ops.matmul(dense, weight, left, **options)


def ordered(first: Any, second: Any) -> tuple[Any, Any]:
    """Operands of `@` as they stood in the traced source.

    torch.compile (2.13) records both ``x @ w`` and ``w @ x`` as ``Tensor.matmul(x, w)`` where w is
    no tensor. Only where the shapes allow one order is the meaning certain.
    """
    x, w = (second, first) if isinstance(first, QArray) else (first, second)
    after = x.shape[-1] == w.shape[-2 if w.ndim > 1 else -1]
    before = w.shape[-1] == x.shape[-2 if x.ndim > 1 else -1]
    if after and before:
        raise TypeError(
            "torch.compile does not tell x @ w from w @ x where the shapes allow both; write "
            "torch.matmul(x, w) or lowbit.matmul(x, w)"
        )
    return (x, w) if after else (w, x)


def _word(value: Any, argument: str) -> str:
    """Name of a format or of a dtype, also of torch's."""
    if argument == "x_format":
        return checks.as_format(value, argument).name
    text = str(value)
    return text[6:] if text.startswith("torch.") else checks.float_dtype(value, argument).name


def result_shape(dense: tuple[int, ...], weight: tuple[int, ...], left: bool) -> tuple[int, ...]:
    """Shape of the product as numpy.matmul has it; ValueError where the axes do not fit."""
    first, second = (weight, dense) if left else (dense, weight)
    rows = first if len(first) > 1 else (1, *first)
    columns = second if len(second) > 1 else (*second, 1)
    if rows[-1] != columns[-2]:
        raise ValueError(f"matmul: shapes {first} and {second} do not multiply")
    lead = np.broadcast_shapes(rows[:-2], columns[:-2])
    return (
        *lead,
        *(rows[-2:-1] if len(first) > 1 else ()),
        *(columns[-1:] if len(second) > 1 else ()),
    )


def result_dtype(dense: str, weight: QArray, out_dtype: str | None) -> str:
    """Name of the product's dtype."""
    from lowbit.dispatch import promoted

    if out_dtype is not None:
        return checks.float_dtype(out_dtype, "out_dtype").name
    return promoted(checks.float_dtype(dense, "x"), weight.dtype).name

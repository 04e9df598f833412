"""torch.ops.lowbit.matmul: the product as a custom operation that torch.compile keeps whole.

Imported only while torch traces. The graph holds the weight's key, which a guard watches; the
weight itself stays with whoever holds the QArray.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library

from lowbit import checks, products, tracing
from lowbit.array import QArray, contents


def _weight(key: int, transposed: bool, vector: bool) -> QArray:
    found = contents.get(int(key))
    if found is None:
        raise RuntimeError(
            "the QArray that this compiled function multiplies with no longer exists; keep it "
            "alive as long as the function"
        )
    return QArray._of(
        found.parts,
        found.dtype,
        transposed=transposed,
        vector=vector,
        columns=found.columns,
        divisor=found.divisor,
        content=found,
    )


@library.custom_op("lowbit::matmul", mutates_args=())
def _matmul(
    x: torch.Tensor,
    key: int,
    transposed: bool,
    vector: bool,
    left: bool,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    alpha: float,
    activation: str | None,
    x_format: str | None,
    out_dtype: str | None,
    batch_invariant: bool,
    kernel: str | None,
) -> torch.Tensor:
    weight = _weight(key, transposed, vector)
    first, second = (weight, x) if left else (x, weight)
    result: torch.Tensor = products.matmul(
        first,
        second,
        bias=bias,
        residual=residual,
        alpha=alpha,
        activation=activation,
        x_format=x_format,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        kernel=kernel,
    )
    return result


@_matmul.register_fake
def _(
    x: torch.Tensor,
    key: int,
    transposed: bool,
    vector: bool,
    left: bool,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    alpha: float,
    activation: str | None,
    x_format: str | None,
    out_dtype: str | None,
    batch_invariant: bool,
    kernel: str | None,
) -> torch.Tensor:
    weight = _weight(key, transposed, vector)
    if x_format is not None:
        checks.as_format(x_format, "x_format")
    shape = tracing.result_shape(tuple(x.shape), weight.shape, left)
    name = tracing.result_dtype(str(x.dtype).removeprefix("torch."), weight, out_dtype)
    return x.new_empty(shape, dtype=getattr(torch, name))


def matmul(x: Any, weight: QArray, left: bool, **options: Any) -> Any:
    """Record the operation."""
    return torch.ops.lowbit.matmul(
        x,
        weight._content.key,
        weight._transposed,
        weight._vector,
        left,
        options["bias"],
        options["residual"],
        float(options["alpha"]),
        options["activation"],
        options["x_format"],
        options["out_dtype"],
        options["batch_invariant"],
        options["kernel"],
    )

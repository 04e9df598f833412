"""einsum with one QArray: where it is a matrix product, it runs as one."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.array import QArray
from lowbit.products import matmul


def einsum(subscripts: Any, *operands: Any, out: Any = None) -> Any:
    """Contract two operands over one label.

    Parameters
    ----------
    subscripts : str
        Such as "bmk,nk->bmn": two inputs and an output without an ellipsis; a QArray's labels end
        with its two matrix axes, and labels before them are shared batches.
    *operands : array_like and QArray
    out : array, optional

    Returns
    -------
    array
    """
    if not isinstance(subscripts, str) or len(operands) != 2:
        raise TypeError("einsum of a QArray takes subscripts as text and two operands")
    left, right, result = _labels(subscripts)
    held: list[Any] = [o if hasattr(o, "ndim") else np.asarray(o) for o in operands]
    a, b = held
    if not isinstance(b, QArray):
        a, b, left, right = b, a, right, left
    if len(left) != a.ndim or len(right) != b.ndim:
        raise ValueError(f"einsum: {subscripts!r} does not fit shapes {a.shape} and {b.shape}")
    if any(c not in left + right for c in result):
        raise ValueError(f"einsum {subscripts!r}: the output has a label that no operand has")
    shared = [c for c in right if c in left]
    summed = [c for c in shared if c not in result]
    batch = [c for c in shared if c in result]
    if len(summed) != 1 or any(c not in result for c in left + right if c not in summed):
        raise TypeError(f"einsum {subscripts!r} of a QArray: exactly one shared label is summed")
    if right[: len(batch)] != "".join(batch) or len(right) - len(batch) != min(2, b.ndim):
        raise TypeError(
            f"einsum {subscripts!r}: a QArray's labels are shared batch labels, then its two "
            "matrix axes; .transpose it first or .dequantize()"
        )
    k = summed[0]
    matrix = right[len(batch) :]
    weight = b if matrix[0] == k or b._vector else b.mT
    kept = [c for c in left if c not in batch and c != k]
    x = _moved(a, left, [*batch, *kept, k])
    if batch and len(kept) != 1:
        x = _merged(x, len(batch), len(kept))
    product = matmul(x, weight)
    columns = [c for c in matrix if c != k]
    if batch and len(kept) != 1:
        product = product.reshape(*_shape(a, left, batch + kept), *product.shape[-len(columns) :])
    labels = [*batch, *kept, *columns]
    answer = _moved(product, "".join(labels), list(result))
    if out is None:
        return answer
    out[...] = answer
    return out


def _labels(subscripts: str) -> tuple[str, str, str]:
    text = subscripts.replace(" ", "")
    inputs, arrow, result = text.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or any(len(set(p)) != len(p) for p in (*parts, result)):
        raise TypeError(f"einsum {subscripts!r} of a QArray: two inputs, no ellipsis, no diagonals")
    if not arrow:
        every = "".join(parts)
        result = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    return parts[0], parts[1], result


def _moved(a: Any, labels: str, order: list[str]) -> Any:
    axes = [labels.index(c) for c in order]
    if axes == list(range(len(axes))):
        return a
    if isinstance(a, QArray):
        return a.transpose(axes)
    return a.permute(axes) if hasattr(a, "permute") else a.transpose(axes)


def _merged(x: Any, batch: int, kept: int) -> Any:
    """One row axis where the other operand keeps several labels, or none."""
    lead = x.shape[:batch]
    rows = 1
    for length in x.shape[batch : batch + kept]:
        rows *= length
    return x.reshape(*lead, rows, x.shape[-1])


def _shape(a: Any, labels: str, wanted: list[str]) -> list[int]:
    return [a.shape[labels.index(c)] for c in wanted]

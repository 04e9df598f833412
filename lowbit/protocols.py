"""What NumPy and PyTorch functions do with a QArray among their arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit import arithmetic, einsums, shaping, tracing
from lowbit.array import QArray
from lowbit.products import linear, matmul


def array_ufunc(ufunc: np.ufunc, method: str, inputs: tuple[Any, ...], kwargs: Any) -> Any:
    """NumPy's ufuncs: matmul, negative and exact multiplications; the rest would densify."""
    out = kwargs.pop("out", None)
    if method == "__call__" and not kwargs:
        if ufunc is np.matmul:
            return matmul(*inputs, out=None if out is None else out[0])
        if out is None and ufunc is np.negative:
            return -inputs[0]
        if out is None and ufunc is np.positive:
            return inputs[0]
        if out is None and ufunc is np.multiply:
            left, right = inputs
            return left * right if isinstance(left, QArray) else right * left
        if out is None and ufunc is np.true_divide and isinstance(inputs[0], QArray):
            return inputs[0] / inputs[1]
    if ufunc is np.matmul and method == "__call__":
        raise TypeError(
            f"numpy.matmul of a QArray takes out= only, got {', '.join(kwargs)}=; in place of "
            "x @= w write x = x @ w"
        )
    if ufunc in (np.equal, np.not_equal):
        raise TypeError("== would need the values; lowbit.array_equal compares two arrays whole")
    raise TypeError(
        f"numpy.{ufunc.__name__} would need the values of a QArray; call .dequantize() first"
    )


def _concatenate(arrays: Any, axis: int = 0) -> QArray:
    return shaping.concatenate(arrays, axis)


def _swapaxes(a: QArray, axis1: int, axis2: int) -> QArray:
    return a.swapaxes(axis1, axis2)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.linalg.matmul: lambda x1, x2, /: matmul(x1, x2),
    np.dot: lambda a, b, out=None: _dot(a, b, out),
    np.einsum: lambda subscripts, *operands, out=None, optimize=False: einsums.einsum(
        subscripts, *operands, out=out
    ),
    np.concatenate: _concatenate,
    np.vstack: lambda tup: shaping.concatenate([_row(a) for a in tup]),
    np.stack: shaping.stack,
    np.split: lambda ary, indices_or_sections, axis=0: shaping.split(
        ary, indices_or_sections, axis
    ),
    np.array_split: lambda ary, indices_or_sections, axis=0: shaping.split(
        ary, indices_or_sections, axis, exact=False
    ),
    np.transpose: lambda a, axes=None: a.transpose(axes),
    np.matrix_transpose: lambda x, /: x.mT,
    np.swapaxes: _swapaxes,
    np.reshape: lambda a, /, shape, order="C": _reshape(a, shape, order),
    np.copy: lambda a: a.copy(),
    np.shape: lambda a: a.shape,
    np.ndim: lambda a: a.ndim,
    np.size: lambda a, axis=None: a.size if axis is None else a.shape[axis],
    np.array_equal: lambda a1, a2: arithmetic.array_equal(a1, a2),
    np.inner: lambda a, b: _inner(a, b),
}


def _row(a: Any) -> Any:
    return a.reshape(1, -1) if isinstance(a, QArray) and a.ndim == 1 else a


def _reshape(a: QArray, shape: Any, order: str) -> QArray:
    if order != "C":
        raise TypeError(f"numpy.reshape of a QArray keeps rows together: order='C', got {order!r}")
    return a.reshape(shape)


def _dot(a: Any, b: Any, out: Any = None) -> Any:
    if np.ndim(a) > 1 and np.ndim(b) > 2:
        raise TypeError("numpy.dot with a stack pairs every matrix with every other; use matmul")
    return matmul(a, b, out=out)


def _inner(a: Any, b: Any) -> Any:
    if np.ndim(b) > 2:
        raise TypeError("numpy.inner with a stack pairs every row with every other; use matmul")
    return matmul(a, b) if np.ndim(b) < 2 else linear(a, b)


def array_function(func: Any, args: Any, kwargs: Any) -> Any:
    """NumPy's other functions."""
    name = f"{func.__module__}.{func.__name__}"
    handler = _FUNCTIONS.get(func)
    if handler is None:
        raise TypeError(f"{name} would need the values of a QArray; call .dequantize() first")
    try:
        return handler(*args, **kwargs)
    except TypeError as error:
        if "keyword argument" in str(error) or "positional argument" in str(error):
            raise TypeError(f"{name} of a QArray does not take these arguments: {error}") from None
        raise


_TORCH_PRODUCTS = ("matmul", "mm", "bmm", "mv", "dot", "__matmul__")
# What torch calls the operands of these, in order.
_TORCH_OPERANDS = ("input", "other", "mat2", "vec", "tensor")


def torch_function(func: Any, args: Any, kwargs: Any) -> Any:
    """PyTorch's functions, told apart by name since torch is not imported here."""
    name = getattr(func, "__name__", "")
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling() and func is torch.Tensor.matmul:
        args = tracing.ordered(*args)
    if name in _TORCH_PRODUCTS:
        named = [kwargs.pop(word) for word in _TORCH_OPERANDS if word in kwargs]
        return matmul(*args, *named, out=_only_out(name, kwargs))
    if name == "__rmatmul__":
        return matmul(args[1], args[0])
    if name == "linear":
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        return linear(given["input"], given["weight"], bias=given.get("bias"))
    if name == "einsum":
        return einsums.einsum(*args)
    raise TypeError(f"torch.{name} would need the values of a QArray; take them by w.dequantize()")


def _only_out(name: str, kwargs: Any) -> Any:
    out = kwargs.pop("out", None)
    if kwargs:
        raise TypeError(f"torch.{name} of a QArray takes out= only, got {', '.join(kwargs)}=")
    return out

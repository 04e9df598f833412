"""The product at the border: what comes in is checked and made alike, then dispatched."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import checks, interop, tracing
from lowbit.array import QArray
from lowbit.dispatch import PLAIN, Options, weight_left, weight_right
from lowbit.formats import Format
from lowbit.kernels import Epilogue
from lowbit.kernels.declare import ACTIVATIONS
from lowbit.quantizing import quantize

Array = npt.NDArray[Any]


def matmul(
    x: Any,
    w: Any,
    *,
    alpha: float = 1.0,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    x_format: Any = None,
    x_scale: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
    kernel: str | None = None,
) -> Any:
    """Multiply: activation(alpha * (x @ w) + bias) + residual.

    Parameters
    ----------
    x : array_like or QArray, (..., M, K) or (K,)
    w : array_like or QArray, (..., K, N) or (K,)
        At least one of the two is a QArray; leading axes broadcast as in numpy.matmul. A weight
        quantized as (N, K) comes in as ``w.T``.
    alpha : float
    bias : array_like of shape (N,), optional
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        "gelu" is the erf form.
    residual : array_like, optional
        Broadcasts to the result.
    x_format : Format or str, optional
        Quantize x on the way in ("int8_row" makes W4A16 into W4A8); left out, x stays as it is.
    x_scale : array_like, optional
        Static scales for x_format.
    out : array, optional
        Where to write the result; returned.
    out_dtype : dtype-like, optional
        float32, float16, bfloat16 or float64; left out, the promotion of both dtypes.
    batch_invariant : bool
        A row's bits do not depend on how many rows there are.
    kernel : str, optional
        Name of the kernel to use, or an error that says why it cannot.

    Returns
    -------
    array
        In the framework, and on the device, of the dense operand; NumPy where both are QArrays.

    Raises
    ------
    TypeError
        Neither operand is a QArray, or one is not floating-point.
    ValueError
        Shapes do not fit, or the forced kernel refuses.

    Notes
    -----
    The value is the exact product of the dequantized operands within the bound of
    `lowbit.testing.error_bound`. Sums of integers are exact.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(3, 32, dtype=np.float32), "int8_row")
    >>> lb.matmul(np.arange(32, dtype=np.float32)[None], w.T, alpha=2, bias=np.ones(3))
    array([[1., 3., 5.]], dtype=float32)
    """
    if tracing.active(x) or tracing.active(w):
        return tracing.matmul(
            x,
            w,
            alpha=alpha,
            bias=bias,
            activation=activation,
            residual=residual,
            x_format=x_format,
            x_scale=x_scale,
            out=out,
            out_dtype=out_dtype,
            batch_invariant=batch_invariant,
            kernel=kernel,
        )
    left, right, origin = operands_of(x, w)
    options = PLAIN
    if activation is not None or out_dtype is not None or batch_invariant or kernel is not None:
        if activation is not None:
            checks.choice(activation, ACTIVATIONS, "activation")
        wanted = None if out_dtype is None else checks.float_dtype(out_dtype, "out_dtype")
        options = Options(wanted, activation, bool(batch_invariant), kernel)
    target = None if out is None else _target(out)
    if target is not None:
        native = target.dtype.newbyteorder("=")
        if options.out_dtype not in (None, native):
            raise ValueError(f"out has dtype {target.dtype}, out_dtype asks {options.out_dtype}")
        options = Options(native, activation, bool(batch_invariant), kernel)
    if isinstance(right, QArray) and not isinstance(left, QArray):
        narrow = left.dtype
        left, right = adapt(left, right)
        if left.dtype != narrow and options.out_dtype is None:
            # Dividing x took float32, which is nobody's business outside.
            options = replace(options, out_dtype=promoted(narrow, right.dtype))
    if x_format is not None:
        left = quantized(left, checks.as_format(x_format, "x_format"), x_scale)
    elif x_scale is not None:
        raise ValueError("x_scale: static scales go with x_format=")
    factor = 1.0 if type(alpha) is float and alpha == 1 else checks.finite_scalar(alpha, "alpha")
    result = _product(left, right, factor, bias, residual, options)
    if target is None:
        return interop.from_numpy(result, origin)
    if target.shape != result.shape:
        raise ValueError(f"out: want shape {result.shape}, got {target.shape}")
    target[...] = result
    interop.written(out)
    return out


def linear(x: Any, w: Any, **options: Any) -> Any:
    """Multiply by the transpose: x @ w.T, for weights stored as (N, K).

    Parameters
    ----------
    x : array_like or QArray, (..., M, K)
    w : QArray or array_like, (..., N, K)
    **options
        Those of `matmul`.

    Returns
    -------
    array
        (..., M, N)

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(2, 32, dtype=np.float32), "int4_g32")
    >>> lb.linear(np.ones((1, 32), np.float32), w, activation="relu")
    array([[1., 1.]], dtype=float32)
    """
    if isinstance(w, QArray):
        return matmul(x, w if w._vector else w.mT, **options)
    dense = w if hasattr(w, "ndim") else interop.to_numpy(w, "w")[0]
    return matmul(x, dense.swapaxes(-1, -2) if dense.ndim > 1 else dense, **options)


def operands_of(x: Any, w: Any) -> tuple[Array | QArray, Array | QArray, interop.Origin]:
    """Both operands as NumPy arrays or QArrays, and where the result goes."""
    origin = interop.NUMPY
    sides: list[Array | QArray] = []
    for operand, argument in ((x, "x"), (w, "w")):
        if isinstance(operand, QArray):
            sides.append(operand)
            continue
        dense, origin = interop.to_numpy(operand, argument)
        if dense.dtype.kind in "iu":
            raise TypeError(
                f"{argument}: plain integers ({dense.dtype.name}) have no scale; quantize "
                "floating-point numbers, or cast with .astype(np.float32)"
            )
        checks.floating(dense, argument)
        if dense.ndim == 0:
            raise ValueError(f"{argument}: want at least one axis, got a 0-d array")
        sides.append(dense)
    if not any(isinstance(s, QArray) for s in sides):
        raise TypeError("matmul: neither operand is a QArray; quantize one, or use numpy.matmul")
    return sides[0], sides[1], origin


def _target(out: Any) -> Array:
    if not isinstance(out, np.ndarray) and not hasattr(type(out), "__dlpack__"):
        raise TypeError(f"out: want an array to write into, got {type(out).__name__}")
    array, _ = interop.to_numpy(out, "out")
    checks.floating(array, "out")
    if not array.flags.writeable:
        raise ValueError("out: the array is read-only")
    return array


def quantized(left: Array | QArray, fmt: Format, scale: Any) -> QArray:
    """The left operand in the format that `x_format` asks for."""
    if isinstance(left, QArray):
        raise TypeError(
            f"x_format: x is quantized already, as {left.format.name}; leave x_format out"
        )
    return quantize(left, fmt, scale=scale)


def adapt(x: Array, w: QArray) -> tuple[Array, QArray]:
    """Move a weight's divisor and column permutation over to x, where both meet K."""
    if (w._divisor is None and w._columns is None) or not w._transposed or x.ndim == 0:
        return x, w
    if x.shape[-1] == w.shape[-2]:
        if w._divisor is not None:
            x = x.astype(np.promote_types(x.dtype, np.float32)) / w._divisor
        if w._columns is not None:
            x = x[..., w._columns]
    return x, w._with(columns=None, divisor=None)


@cache
def promoted(left: np.dtype[Any], right: np.dtype[Any]) -> np.dtype[Any]:
    """NumPy's promotion; float16 with bfloat16 is float32."""
    if left == right:
        return left.newbyteorder("=")
    if {left.name, right.name} == {"float16", "bfloat16"}:
        return np.dtype(np.float32)
    return np.promote_types(left, right).newbyteorder("=")


def _product(
    left: Array | QArray,
    right: Array | QArray,
    alpha: float,
    bias: Any,
    residual: Any,
    options: Options,
) -> Array:
    """(..., M, N) in NumPy, axes of one-dimensional operands dropped."""
    dtype = options.out_dtype or promoted(left.dtype, right.dtype)
    given = left, right
    drop_rows, drop_columns = left.ndim == 1, right.ndim == 1
    if drop_rows:
        left = left._view(transposed=False) if isinstance(left, QArray) else left[None]
    if drop_columns:
        if isinstance(right, QArray):
            right = right._view(transposed=True)
        else:
            right = right[:, None]
    if left.shape[-1] != right.shape[-2]:
        raise ValueError(
            f"matmul: x has {left.shape[-1]} columns, w has {right.shape[-2]} rows; shapes "
            f"{given[0].shape} and {given[1].shape}{_remedy(left, right)}"
        )
    lead = right.shape[:-2]
    if lead or isinstance(left, QArray):
        lead = _broadcast(left.shape[:-2], lead)
    else:
        lead = left.shape[:-2]
    shape = (*lead, left.shape[-2], right.shape[-1])
    after = _epilogue(
        alpha, bias, residual, options.activation, dtype, shape, drop_rows, drop_columns
    )
    out = interop.empty(shape, dtype)
    if isinstance(right, QArray):
        weight_right(left, right, after, out, options)
    else:
        assert isinstance(left, QArray)
        weight_left(left, right, after, out, options)
    if drop_rows or drop_columns:
        kept = [*lead, *([] if drop_rows else [shape[-2]]), *([] if drop_columns else [shape[-1]])]
        return out.reshape(kept)
    return out


def _remedy(left: Array | QArray, right: Array | QArray) -> str:
    if left.shape[-1] != right.shape[-1]:
        return ""
    return ". A weight stored as (N, K) comes in as w.T, or use lowbit.linear"


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(left, right)
    except ValueError:
        raise ValueError(f"matmul: leading axes {left} and {right} do not broadcast") from None


def _epilogue(
    alpha: float,
    bias: Any,
    residual: Any,
    activation: str | None,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    drop_rows: bool,
    drop_columns: bool,
) -> Epilogue:
    if bias is None and residual is None:
        return Epilogue(alpha, None, activation, None)
    held: list[Array | None] = []
    for given, argument in ((bias, "bias"), (residual, "residual")):
        if given is None:
            held.append(None)
            continue
        array, _ = interop.to_numpy(given, argument)
        if array.dtype.kind not in "iu":
            checks.floating(array, argument)
        held.append(array)
    if held[0] is not None:
        wanted = () if drop_columns else shape[-1:]
        if held[0].shape not in (wanted, shape[-1:]):
            raise ValueError(f"bias: want shape {shape[-1:]}, got {held[0].shape}")
        wide = np.float64 if dtype == np.float64 else np.float32
        held[0] = np.ascontiguousarray(held[0].reshape(shape[-1:]), wide)
    if held[1] is not None:
        if drop_columns:
            held[1] = held[1][..., None]
        if drop_rows and held[1].ndim > 1:
            held[1] = held[1][..., None, :]
        try:
            held[1] = np.broadcast_to(held[1], shape)
            held[1] = held[1].astype(residual_dtype(held[1], dtype), copy=False)
        except ValueError:
            raise ValueError(
                f"residual: {held[1].shape} does not broadcast to the result, {shape}"
            ) from None
    return Epilogue(alpha, held[0], activation, held[1])


def residual_dtype(residual: Array, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What a residual is added as: its own dtype, or for integers and float64 that of the sum."""
    if residual.dtype.kind in "iu" or residual.dtype.itemsize == 8:
        return np.dtype(np.float64 if dtype == np.float64 else np.float32)
    return residual.dtype

"""The product: operands made alike, the problem stated, the chosen kernel run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import checks, interop, kernels, tracing
from lowbit.array import QArray
from lowbit.formats import Format, reference
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue, Problem, Run
from lowbit.kernels.cpu import isa, operands, pool
from lowbit.kernels.declare import ACTIVATIONS
from lowbit.kernels.reference import finish
from lowbit.kernels.words16 import Words16
from lowbit.quantizing import quantize

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What a call asks for beyond its operands."""

    out_dtype: np.dtype[Any] | None = None
    activation: str | None = None
    batch_invariant: bool = False
    kernel: str | None = None


PLAIN = Options()
_MOST_PLANS = 64  # of one weight: as many row counts and options as are remembered


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
    left, right, origin = _operands(x, w)
    options = PLAIN
    if activation is not None or out_dtype is not None or batch_invariant or kernel is not None:
        if activation is not None:
            checks.choice(activation, ACTIVATIONS, "activation")
        wanted = None if out_dtype is None else checks.float_dtype(out_dtype, "out_dtype")
        options = Options(wanted, activation, bool(batch_invariant), kernel)
    target = None if out is None else _target(out)
    if target is not None:
        if options.out_dtype not in (None, target.dtype):
            raise ValueError(f"out has dtype {target.dtype}, out_dtype asks {options.out_dtype}")
        options = Options(target.dtype, activation, bool(batch_invariant), kernel)
    if isinstance(right, QArray) and not isinstance(left, QArray):
        left, right = _adapt(left, right)
    if x_format is not None:
        left = _quantized(left, checks.as_format(x_format, "x_format"), x_scale)
    elif x_scale is not None:
        raise ValueError("x_scale: static scales go with x_format=")
    factor = 1.0 if alpha == 1.0 else checks.finite_scalar(alpha, "alpha")
    result = _product(left, right, factor, bias, residual, options)
    if target is None:
        return interop.from_numpy(result, origin)
    if target.shape != result.shape:
        raise ValueError(f"out: want shape {result.shape}, got {target.shape}")
    target[...] = result
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
    transposed = w.mT if hasattr(w, "mT") else np.asarray(w).swapaxes(-1, -2)
    return matmul(x, transposed, **options)


def _operands(x: Any, w: Any) -> tuple[Array | QArray, Array | QArray, interop.Origin]:
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
    array, _ = interop.to_numpy(out, "out")
    checks.floating(array, "out")
    if not array.flags.writeable:
        raise ValueError("out: the array is read-only")
    return array


def _quantized(left: Array | QArray, fmt: Format, scale: Any) -> QArray:
    if isinstance(left, QArray):
        raise TypeError(
            f"x_format: x is quantized already, as {left.format.name}; leave x_format out"
        )
    return quantize(left, fmt, scale=scale)


def _adapt(x: Array, w: QArray) -> tuple[Array, QArray]:
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


@cache
def _device() -> str:
    return f"cpu:{isa.host().name}"


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
            f"{left.shape} and {right.shape}"
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
        _right(left, right, after, out, options)
    else:
        assert isinstance(left, QArray)
        _left(left, right, after, out, options)
    if drop_rows or drop_columns:
        kept = [*lead, *([] if drop_rows else [shape[-2]]), *([] if drop_columns else [shape[-1]])]
        return out.reshape(kept)
    return out


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
            if held[1].dtype.kind in "iu" or held[1].dtype.name == "float64":
                held[1] = held[1].astype(np.float64 if dtype == np.float64 else np.float32)
        except ValueError:
            raise ValueError(
                f"residual: {held[1].shape} does not broadcast to the result, {shape}"
            ) from None
    return Epilogue(alpha, held[0], activation, held[1])


def _right(left: Array | QArray, w: QArray, after: Epilogue, out: Array, options: Options) -> None:
    """The weight is on the right: the kernels' own orientation."""
    if _rearranged(left) or _rearranged(w):
        _exact(left, w, after, out)
        return
    parts = w._parts
    if isinstance(left, QArray) and left.ndim > 2 and len(parts.shape) == 2 and _flattens(left):
        rows, columns = math.prod(out.shape[:-1]), out.shape[-1]
        left, after = left.reshape(rows, left.shape[-1]), _flat(after, rows, columns)
        out = out.reshape(rows, columns)
    x_along = not (isinstance(left, QArray) and left._transposed)
    x: Any = left._rows() if isinstance(left, QArray) else left
    if len(parts.shape) == 2:
        rows, columns = out.shape[-2:]
        if len(x.shape) > 2 and not isinstance(left, QArray):
            rows = math.prod(out.shape[:-1])
            x = x.reshape(rows, x.shape[-1])
            after = _flat(after, rows, columns)
            out = out.reshape(rows, columns)
        if len(x.shape) == 2:
            plans = w._content.plans
            _matrix(x, x_along, parts, w._transposed, after, out, options, plans)
            return
    for index in np.ndindex(out.shape[:-2]):
        _matrix(
            _lead(x, index),
            x_along,
            _lead(parts, index),
            w._transposed,
            _at(after, index),
            out[index],
            options,
            {},
        )


def _flattens(left: QArray) -> bool:
    """Every row has scales of its own, so a stack of matrices is one tall matrix."""
    fmt = left.format
    return not left._transposed and fmt.scale.block[0] == 1 and not fmt.tensor_scale


def _rearranged(operand: Array | QArray) -> bool:
    return isinstance(operand, QArray) and (
        operand._columns is not None or operand._divisor is not None
    )


def _exact(left: Array | QArray, right: Array | QArray, after: Epilogue, out: Array) -> None:
    """A product that no kernel describes: float64 values, one rounding at the end."""
    values = [s.dequantize(np.float64) if isinstance(s, QArray) else s for s in (left, right)]
    out[...] = finish(reference.matmul(values[0], values[1]), after)


def _flat(after: Epilogue, rows: int, columns: int) -> Epilogue:
    if after.residual is None:
        return after
    flat = after.residual.reshape(rows, columns)
    return Epilogue(after.alpha, after.bias, after.activation, flat)


def _at(after: Epilogue, index: tuple[int, ...]) -> Epilogue:
    if after.residual is None:
        return after
    return Epilogue(after.alpha, after.bias, after.activation, after.residual[index])


def _lead(operand: Any, index: tuple[int, ...]) -> Any:
    """One matrix of an operand whose leading axes broadcast."""
    lead = operand.shape[:-2]
    if not lead:
        return operand
    own = index[len(index) - len(lead) :]
    own = tuple(0 if length == 1 else i for i, length in zip(own, lead, strict=True))
    if isinstance(operand, Words16):
        return operand[own]
    if isinstance(operand, Packed):
        return reference.take(operand, own, slice(0, operand.shape[-2]))
    return operand[own]


def _left(w: QArray, right: Array, after: Epilogue, out: Array, options: Options) -> None:
    """The weight is on the left: the kernels compute the transpose, the epilogue follows."""
    if _rearranged(w):
        _exact(w, right, after, out)
        return
    turned = right.swapaxes(-1, -2)
    plain = Epilogue(1.0)
    wide = np.dtype(np.float64 if out.dtype == np.float64 else np.float32)
    for index in np.ndindex(out.shape[:-2]):
        product = interop.empty((out.shape[-1], out.shape[-2]), wide)
        _matrix(
            _lead(turned, index),
            True,
            _lead(w._parts, index),
            not w._transposed,
            plain,
            product,
            Options(wide, None, options.batch_invariant, options.kernel),
            {},
        )
        one = _at(after, index)
        if one == plain:
            out[index] = product.T
        else:
            out[index] = finish(product.T.astype(np.float64), one)


def problem(
    x: Any, x_along: bool, w: Any, w_along: bool, after: Epilogue, out: str, options: Options
) -> Problem:
    """State a product of two matrices: w stored (N, K) where w_along, else (K, N)."""
    stored = w.shape
    n, k = stored if w_along else stored[::-1]
    return Problem(
        x.shape[0] if x_along else x.shape[1],
        n,
        k,
        x.format if isinstance(x, Packed) else x.dtype.name,
        w.format,
        out,
        after.bias is not None,
        after.activation,
        None if after.residual is None else after.residual.dtype.name,
        x_along,
        w_along,
        "words16" if isinstance(w, Words16) else "rows",
        options.batch_invariant,
        _device(),
        pool.get_num_threads(),
    )


def _matrix(
    x: Any,
    x_along: bool,
    w: Any,
    w_along: bool,
    after: Epilogue,
    out: Array,
    options: Options,
    plans: dict[Any, Run],
) -> None:
    """One product of two matrices into `out`; `plans` remembers kernels bound to this weight."""
    if isinstance(w, Words16) and not w_along:
        w, plans = w.rows(), {}
    residual = after.residual
    if residual is not None and not (
        residual.dtype.isnative
        and residual.flags.aligned
        and residual.strides[-1] == residual.itemsize
    ):
        residual = np.ascontiguousarray(residual, residual.dtype.newbyteorder("="))
        after = Epilogue(after.alpha, after.bias, after.activation, residual)
    key = (
        x.shape,
        x.format if isinstance(x, Packed) else x.dtype,
        x_along,
        w_along,
        out.dtype,
        after.bias is None,
        after.activation,
        None if residual is None else residual.dtype,
        options,
        pool.get_num_threads(),
    )
    run = plans.get(key)
    if run is None:
        stated = problem(x, x_along, w, w_along, after, out.dtype.name, options)
        held = operands.contiguous_parts(w)
        run = kernels.prepared(stated, options.kernel)(held)
        if held is w:  # else a plan would keep a copy of the weight
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            plans[key] = run
    run(x, after, out)

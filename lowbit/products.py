"""The product at the border: what comes in is checked and made alike, then dispatched."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import checks, interop, tracing
from lowbit import device as places
from lowbit.array import QArray
from lowbit.binding import BARE, Product, find, key_of
from lowbit.dispatch import (
    PLAIN,
    Options,
    adapted,
    promoted,
    rearranged,
    residual_dtype,
)
from lowbit.formats import Format
from lowbit.kernels import Epilogue
from lowbit.kernels.declare import ACTIVATIONS
from lowbit.quantizing import quantize_on_the_way

Array = npt.NDArray[Any]

_host_mark = places.HOST.mark  # looked up once


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
        On a GPU nothing waits for that where scales are float or there is a tensor scale: what
        `quantize` refuses then makes the result NaN.
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
        In the framework, and on the device, of the dense operand; of NumPy or CuPy where both are
        QArrays.

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
    kind = type(x)
    if (
        (kind is np.ndarray or kind is places.gpu_array)
        and type(w) is QArray
        and residual is None
        and x_format is None
        and x_scale is None
        and out is None
        and out_dtype is None
        and batch_invariant is False
        and kernel is None
        and (activation is None or type(activation) is str)
    ):
        # What multiplied before has passed the checks of operands below, which look at nothing
        # but shapes, dtypes and options.
        plain = bias is None and activation is None
        options = PLAIN if plain else Options(activation=activation, bias=bias is not None)
        mark = _host_mark() if kind is np.ndarray else -1 - x.data.device_id
        product = w._content.plans.get(key_of(x.shape, x.dtype, w, options, mark))
        if product is not None:
            after = BARE
            if not plain or type(alpha) is not float or alpha != 1:
                added = None if bias is None else numbers(bias, "bias")
                factor = checks.finite_scalar(alpha, "alpha")
                after = epilogue(factor, added, None, activation, product)
            return product(x, after)
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
    target = None if out is None else writable(out)
    added = None if bias is None else numbers(bias, "bias")
    rest = None if residual is None else numbers(residual, "residual")
    options = options_of(
        left, added, activation, rest, x_format, x_scale, target, out_dtype, batch_invariant, kernel
    )
    if x_scale is not None:
        # Scales are not part of what is remembered, so x meets them here.
        narrow = left.dtype
        if isinstance(right, QArray) and not isinstance(left, QArray):
            left, right = adapt(left, right)
        assert options.x_format is not None
        with interop.stream(origin, right._place if isinstance(right, QArray) else places.HOST):
            left = quantized(left, options.x_format, x_scale)
        if options.out_dtype is None:
            # Dividing x took float32, which is nobody's business outside.
            options = options._replace(out_dtype=promoted(narrow, right.dtype))
        options = options._replace(x_format=None)
    w_side = right if isinstance(right, QArray) else left
    assert isinstance(w_side, QArray)
    with interop.stream(origin, w_side._place):
        product = find(left, right, options)
        factor = checks.finite_scalar(alpha, "alpha")
        after = epilogue(factor, added, rest, activation, product)
        varied = left if isinstance(right, QArray) else right
        if target is None:
            return product.answer(varied, after, origin)
        places.on(product.place, target, "out")
        fits(target, product)
        product.into(target, varied, after)
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
    dense = w if hasattr(w, "ndim") else interop.read(w, "w")[0]
    return matmul(x, dense.swapaxes(-1, -2) if dense.ndim > 1 else dense, **options)


def operands_of(x: Any, w: Any) -> tuple[Array | QArray, Array | QArray, interop.Origin]:
    """Both operands as NumPy arrays or QArrays, and where the result goes."""
    origin = interop.NUMPY
    sides: list[Array | QArray] = []
    for operand, argument in ((x, "x"), (w, "w")):
        if isinstance(operand, QArray):
            sides.append(operand)
            continue
        dense, origin = interop.read(operand, argument)
        if dense.dtype.kind in "iu":
            raise TypeError(
                f"{argument}: plain integers ({dense.dtype.name}) have no scale; quantize "
                "floating-point numbers, or cast with .astype(np.float32)"
            )
        checks.floating(dense, argument)
        if dense.ndim == 0:
            raise ValueError(f"{argument}: want at least one axis, got a 0-d array")
        sides.append(dense)
    left, right = sides
    w_side, x_side = (right, left) if isinstance(right, QArray) else (left, right)
    if not isinstance(w_side, QArray):
        raise TypeError("matmul: neither operand is a QArray; quantize one, or use numpy.matmul")
    held = x_side._parts.codes if isinstance(x_side, QArray) else x_side
    places.on(w_side._place, held, "x")
    return left, right, origin


def options_of(
    x: Array | QArray,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    x_format: Any,
    x_scale: Any,
    target: Array | None,
    out_dtype: Any,
    batch_invariant: bool,
    kernel: str | None,
) -> Options:
    """What a call asks for, checked."""
    if activation is not None:
        checks.choice(activation, ACTIVATIONS, "activation")
    if not (kernel is None or isinstance(kernel, str)):
        raise ValueError(f"kernel={kernel!r} is not known; want a name that lowbit.explain lists")
    wanted = None if out_dtype is None else checks.float_dtype(out_dtype, "out_dtype")
    if target is not None:
        native = target.dtype.newbyteorder("=")
        if wanted not in (None, native):
            raise ValueError(f"out has dtype {target.dtype}, out_dtype asks {wanted}")
        wanted = native
    fmt = None
    if x_format is not None:
        fmt = checks.as_format(x_format, "x_format")
        dense(x)
    elif x_scale is not None:
        raise ValueError("x_scale: static scales go with x_format=")
    return Options(
        wanted,
        activation,
        bool(batch_invariant),
        kernel,
        bias is not None,
        None if residual is None else residual.dtype,
        fmt,
    )


def numbers(given: Any, argument: str) -> Array:
    """A bias or a residual: floating-point numbers, or integers."""
    array, _ = interop.read(given, argument)
    if array.dtype.kind not in "iu":
        checks.floating(array, argument)
    return array


def writable(out: Any, *, kept: bool = False) -> Array:
    """Where results are to go; `kept` as `interop.read` has it."""
    if not isinstance(out, np.ndarray) and not hasattr(type(out), "__dlpack__"):
        raise TypeError(f"out: want an array to write into, got {type(out).__name__}")
    array, _ = interop.read(out, "out", kept=kept)
    checks.floating(array, "out")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError("out: the array is read-only")
    return array


def fits(target: Array, product: Product) -> None:
    """Refuse an out of another shape than the result's."""
    if target.shape != product.kept:
        raise ValueError(f"out: want shape {product.kept}, got {target.shape}")


def dense(x: Array | QArray) -> Array:
    """An x that can be quantized on the way in."""
    if isinstance(x, QArray):
        raise TypeError(f"x_format: x is quantized already, as {x.format.name}; leave x_format out")
    return x


def quantized(left: Array | QArray, fmt: Format, scale: Any) -> QArray:
    """The left operand in the format that `x_format` asks for."""
    return quantize_on_the_way(dense(left), fmt, scale)


def adapt(x: Array, w: QArray) -> tuple[Array, QArray]:
    """Move a weight's divisor and column permutation over to x, where both meet K."""
    if not rearranged(w) or not w._transposed or x.ndim == 0:
        return x, w
    if x.shape[-1] == w.shape[-2]:
        x = adapted(x, w._columns, w._divisor)
    return x, w._with(columns=None, divisor=None)


def epilogue(
    alpha: float,
    bias: Array | None,
    residual: Array | None,
    activation: str | None,
    product: Product,
) -> Epilogue:
    """The operands of what follows the product, in the shapes and dtypes that kernels take."""
    if bias is None and residual is None:
        bare = alpha == 1 and activation is None
        return BARE if bare else Epilogue(alpha, None, activation, None)
    stated, place = product.stated, product.place
    shape, (drop_rows, drop_columns) = stated.shape, stated.dropped
    if bias is not None:
        places.on(place, bias, "bias")
        wanted = () if drop_columns else shape[-1:]
        if bias.shape not in (wanted, shape[-1:]):
            raise ValueError(f"bias: want shape {shape[-1:]}, got {bias.shape}")
        wide = np.float64 if stated.dtype == np.float64 else np.float32
        bias = place.xp.ascontiguousarray(bias.reshape(shape[-1:]), wide)
    if residual is not None:
        places.on(place, residual, "residual")
        if drop_columns:
            residual = residual[..., None]
        if drop_rows and residual.ndim > 1:
            residual = residual[..., None, :]
        try:
            spread: Array = place.xp.broadcast_to(residual, shape)
        except ValueError:
            raise ValueError(
                f"residual: {residual.shape} does not broadcast to the result, {shape}"
            ) from None
        residual = spread.astype(residual_dtype(spread.dtype, stated.dtype.name), copy=False)
    return Epilogue(alpha, bias, activation, residual)

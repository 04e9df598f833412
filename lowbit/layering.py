"""Layers that end in a quantization: silu(gate) * up, and rmsnorm with its residual.

Where a GPU has one kernel for both steps, it runs; all else is left to `layer_rows`, on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lowbit import checks, cuda_interop, device, interop, layer_rows
from lowbit.array import QArray

Array = npt.NDArray[Any]

# Of a mean square and eps: what is no larger than half of float32's last step cannot overflow it.
_MOST_EPS = 1e30


def quantize_silu_mul(gate: Any, up: Any, format: Any) -> QArray:
    """Round silu(gate) * up to a format: a gated layer's input of its last product.

    Parameters
    ----------
    gate, up : array_like, (..., rows, columns) or (columns,)
        float32, float16, bfloat16 or float64 of NumPy, CuPy, PyTorch, JAX or DLPack, of one shape
        and dtype, on one device. Halves of one array will do: memory is read as it is.
    format : Format or str
        As `quantize` takes it.

    Returns
    -------
    QArray
        On the device of `gate`, with its logical dtype T: ``lb.quantize(T(T(silu(gate)) * up),
        format)``, where T rounds to that dtype and all between is float32 (float64 for float64).

    Raises
    ------
    TypeError
        An operand is not floating-point, is quantized already, or has another dtype.
    ValueError
        Shapes differ, or the product is NaN or infinite; the message says where, and why.
    BufferError
        The operands are on two devices.

    Notes
    -----
    On a GPU this is one kernel that reads both once, for formats whose scales do not look beyond a
    row. Its silu is within 5 * 2**-24 of the exact one and may round otherwise than the host's,
    which computes it in float64. The call waits until every number has been looked at.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> gate, up = np.array([[0.0, 40.0]], np.float32), np.array([[1.0, 0.5]], np.float32)
    >>> lb.quantize_silu_mul(gate, up, "int8_row").dequantize()
    array([[ 0., 20.]], dtype=float32)
    """
    fmt = checks.as_format(format, "format")
    first, origin = _read(gate, "gate", "quantize_silu_mul")
    second, _ = _read(up, "up", "quantize_silu_mul")
    place = device.of(first)
    _alike(second, "up", first, "gate", place)
    with interop.stream(origin, place):
        parts = place.quantize_silu_mul(fmt, layer_rows.matrix(first), layer_rows.matrix(second))
        if parts is None:
            # Also where a kernel met what has to be refused: this counts and places it.
            parts = layer_rows.quantize(
                fmt, layer_rows.SiluMul(place.get(first), place.get(second))
            )
            if place is not device.HOST:
                parts = device.changed(parts, place.put)
    return QArray._of(parts, first.dtype.newbyteorder("="), vector=first.ndim == 1)


@overload
def quantize_rmsnorm(
    x: Any, weight: Any, format: Any, *, eps: float = ..., residual: None = None
) -> QArray: ...
@overload
def quantize_rmsnorm(
    x: Any, weight: Any, format: Any, *, eps: float = ..., residual: Any
) -> tuple[QArray, Any]: ...
def quantize_rmsnorm(
    x: Any, weight: Any, format: Any, *, eps: float = 1e-6, residual: Any = None
) -> QArray | tuple[QArray, Any]:
    """Divide rows by the root of their mean square, multiply by a weight, round to a format.

    Parameters
    ----------
    x : array_like, (..., rows, columns) or (columns,)
        float32, float16, bfloat16 or float64 of NumPy, CuPy, PyTorch, JAX or DLPack.
    weight : array_like, (columns,)
        Of any of these dtypes, on x's device. It is multiplied in float32 (float64 for float64 x).
    format : Format or str
        As `quantize` takes it.
    eps : float
        Added to the mean square: 0 to 1e30.
    residual : array_like, optional
        Of x's shape and dtype, on its device: added to x before.

    Returns
    -------
    QArray
        On the device of x, with its logical dtype T: ``lb.quantize(T(T(h / sqrt(mean(h**2) +
        eps)) * weight), format)`` with ``h = T(x + residual)``, where T rounds to that dtype and
        all between is float32 (float64 for float64).
    updated : array
        h in the framework of x, only where there is a residual: the residual of the next layer.

    Raises
    ------
    TypeError
        An operand is not floating-point or is quantized already, or the residual has another dtype.
    ValueError
        Shapes do not fit, or a result is NaN or infinite; the message says where, and why.
    BufferError
        The operands are on two devices.

    Notes
    -----
    A row's sum of squares has one order, which depends on the number of columns alone: host and GPU
    give the same bits. On a GPU this is one kernel that reads a row once, for formats whose scales
    do not look beyond a row and rows of up to 32768 columns (16384 of float32). The call waits
    until every number has been looked at.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> x = np.array([[3.0, -3.0]], np.float32)
    >>> w, h = lb.quantize_rmsnorm(x, np.ones(2, np.float32), "int8_row", residual=x, eps=0)
    >>> w.dequantize(), h
    (array([[ 1., -1.]], dtype=float32), array([[ 6., -6.]], dtype=float32))
    """
    fmt = checks.as_format(format, "format")
    rows, origin = _read(x, "x", "quantize_rmsnorm")
    gain, _ = _read(weight, "weight", "quantize_rmsnorm")
    place = device.of(rows)
    device.on(place, gain, "weight", "x")
    if gain.shape != rows.shape[-1:]:
        raise ValueError(
            f"weight: want shape {rows.shape[-1:]}, a number for each column of x, got {gain.shape}"
        )
    small = checks.finite_scalar(eps, "eps")
    if not 0 <= small <= _MOST_EPS:
        raise ValueError(f"eps: want a number from 0 to {_MOST_EPS:g}, got {small:g}")
    other = None
    if residual is not None:
        other, _ = _read(residual, "residual", "quantize_rmsnorm")
        _alike(other, "residual", rows, "x", place)
    dtype = rows.dtype.newbyteorder("=")
    with interop.stream(origin, place):
        tensor, updated = (
            (None, None) if other is None else _result(rows.shape, dtype, origin, place)
        )
        parts = place.quantize_rmsnorm(
            fmt,
            layer_rows.matrix(rows),
            gain,
            small,
            None if other is None else layer_rows.matrix(other),
            None if updated is None else layer_rows.matrix(updated),
        )
        if parts is None:
            here = updated
            if updated is not None and place is not device.HOST:
                here = np.empty(rows.shape, dtype)
            held = None if other is None else place.get(other)
            layer = layer_rows.Rmsnorm(place.get(rows), place.get(gain), small, held, here)
            parts = layer_rows.quantize(fmt, layer)
            if place is not device.HOST:
                parts = device.changed(parts, place.put)
                if updated is not None and here is not None:
                    updated[...] = place.put(here)
    array = QArray._of(parts, dtype, vector=rows.ndim == 1)
    if updated is None:
        return array
    return array, interop.from_numpy(updated, origin) if tensor is None else tensor


def _read(given: Any, argument: str, call: str) -> tuple[Array, interop.Origin]:
    """Numbers to compute with, where they are."""
    if isinstance(given, QArray):
        raise TypeError(f"{call}: {argument} is quantized already; .dequantize() it first")
    values, origin = interop.read(given, argument)
    return checks.data(values, argument), origin


def _alike(x: Array, argument: str, other: Array, name: str, place: device.Place) -> None:
    device.on(place, x, argument, name)
    if x.shape != other.shape:
        raise ValueError(f"{argument}: want {name}'s shape {other.shape}, got {x.shape}")
    if x.dtype.newbyteorder("=") != other.dtype.newbyteorder("="):
        raise TypeError(
            f"{argument}: want {name}'s dtype {other.dtype.name}, got {x.dtype.name}; cast one of "
            "the two"
        )


def _result(
    shape: tuple[int, ...], dtype: np.dtype[Any], origin: interop.Origin, place: device.Place
) -> tuple[Any, Array]:
    """A tensor for torch on a GPU, else None; and the memory to write to."""
    if origin.framework == "torch" and place is not device.HOST:
        return cuda_interop.torch_result(shape, dtype, origin.device)
    empty: Callable[..., Array] = interop.empty if place is device.HOST else place.xp.empty
    return None, empty(shape, dtype)

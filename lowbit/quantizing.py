"""Making arrays: from numbers, or from ready parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import checks, device, interop
from lowbit.array import QArray
from lowbit.formats import Element, Format, names, reference
from lowbit.formats.declare import Named
from lowbit.formats.declare import codebook as table

Array = npt.NDArray[Any]


def format(name: Any) -> Format:
    """Return the format that a name stands for.

    Parameters
    ----------
    name : str or Format
        ``element[_block][_asym][_scaletype]``, such as ``int4_g128``, ``uint4_g64_asym``,
        ``int8_row``, ``fp8_128x128``, ``int4_g128_bf16``, ``mxfp4``; see the page on formats.

    Returns
    -------
    Format
        Its ``name`` is the spelling that this function reads back.

    Raises
    ------
    ValueError
        The base or a word after it is unknown; the message lists what is known.

    Examples
    --------
    >>> import lowbit as lb
    >>> lb.format("int4_g96").name
    'int4_g96'
    >>> lb.format("fp8_128x128").name
    'float8_e4m3fn_128x128'
    """
    return checks.as_format(name, "format")


def constructor(base: str) -> Callable[..., Format]:
    """Return the function behind ``lowbit.int4`` and its kin."""

    def build(**parts: Any) -> Format:
        return names.make(base, **parts)

    build.__name__ = build.__qualname__ = base
    build.__doc__ = (
        f"Return the {base} format: keywords group, block, asym, zero, bias and scale, as "
        f"``lowbit.formats.names.make`` takes them."
    )
    return build


def codebook(name: str, values: Any, *, group: int | None = 64, **parts: Any) -> Format:
    """Declare a format whose codes look up a table.

    Parameters
    ----------
    name : str
        Lower-case; from now on ``lowbit.format`` reads it, so ``name_g32`` works too.
    values : sequence of float
        2, 4, 8 ... 256 numbers in code order, rounded to float32.
    group : int or None
        Columns that share a scale; None is whole rows.
    **parts
        block, scale: as the other constructors take them.

    Returns
    -------
    Format

    Examples
    --------
    >>> import lowbit as lb
    >>> lb.codebook("ternary", [0, 1, -1, 0], group=32).name
    'ternary_g32'
    """
    element = table(name, values)
    names.register(Named(name, _rows_of(element), "user codebook"))
    if group is None and "block" not in parts:
        parts["block"] = "row"
    return names.make(name, group=None if "block" in parts else group, **parts)


def _rows_of(element: Element) -> Format:
    return replace(names.get("int8_row"), element=element)


def quantize(
    x: Any,
    format: Any,
    *,
    axis: int = -1,
    scale: Any = None,
    zero: Any = None,
    method: str = "absmax",
    rounding: str = "even",
    overflow: str = "saturate",
    nonfinite: str = "raise",
    seed: int | None = None,
    out: QArray | None = None,
) -> QArray:
    """Round an array of numbers to a format.

    Parameters
    ----------
    x : array_like, (..., rows, columns) or (columns,)
        float32, float16, bfloat16 or float64 of NumPy, CuPy, PyTorch, JAX or DLPack. The parts
        are where x is: on its GPU, or on the host.
    format : Format or str
        ``"int4_g128"``, ``lb.int4(group=128)``, ...
    axis : int
        The contraction axis, along which groups run: the last, or the last but one (the array is
        then stored as its transpose).
    scale : array_like, optional
        Static scales instead of those the data ask for: one number, or one a block. For NVFP4 it
        is the tensor scale.
    zero : array_like, optional
        Static zero points, with `scale`.
    method : str
        How scales follow from the data: "absmax" (the format's own rule), "fullrange",
        "signed_max", "mse"; for E8M0 scales "floor" (OCP), "ceil", "rceil", "even".
    rounding : {"even", "stochastic"}
        To nearest, ties to the even code; or at random in proportion, with `seed`.
    overflow : {"saturate", "nan", "raise"}
        For values beyond the largest one after scaling.
    nonfinite : {"raise", "nan"}
        For NaN and infinities in x; "nan" keeps NaN where the element has a code for it, and
        treats infinities by `overflow`.
    seed : int, optional
        Of the stochastic rounding; needed then.
    out : QArray, optional
        An array of the same format and shape whose memory is written.

    Returns
    -------
    QArray
        With the logical dtype of x.

    Raises
    ------
    TypeError
        x is not floating-point, or lives where it cannot be read.
    ValueError
        x holds NaN or infinities, or a policy is unknown; the message says which and what to do.

    Notes
    -----
    scale = amax / qmax in float32 (float64 for float64 x), rounded to the scale's type; an
    all-zero block has scale 1. code = nearest(x / scale + zero).

    On a GPU the call waits until every number has been looked at. float64, and the policies
    "stochastic", "mse", overflow= and nonfinite= other than their defaults, are computed on the
    host there and back: the same codes, slowly.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.array([[1.0, -2.0, 3.5]], np.float32), "int4_g32")
    >>> w.dequantize()
    array([[ 1. , -2. ,  3.5]], dtype=float32)
    """
    fmt = checks.as_format(format, "format")
    if isinstance(x, QArray):
        raise TypeError("quantize: x is quantized already; .dequantize() it first")
    values, origin = interop.read(x, "x")
    checks.data(values, "x")
    checks.choice(rounding, ("even", "stochastic"), "rounding")
    checks.choice(overflow, ("saturate", "nan", "raise"), "overflow")
    checks.choice(nonfinite, ("raise", "nan"), "nonfinite")
    if rounding == "stochastic" and seed is None:
        raise ValueError("rounding='stochastic' needs seed=, so that a result can be repeated")
    if nonfinite == "nan" and fmt.element.nan_code is None:
        raise ValueError(f"nonfinite='nan': {fmt.element.name} has no NaN code; clean the data")
    if overflow == "nan" and fmt.element.nan_code is None:
        raise ValueError(f"overflow='nan': {fmt.element.name} has no NaN code; saturate or raise")
    if zero is not None and scale is None:
        raise ValueError("zero: static zero points come with scale=")
    transposed = checks.contraction_axis(axis, values.ndim)
    vector = values.ndim == 1
    stored = values[None] if vector else values.swapaxes(-1, -2) if transposed else values
    scale = _static(scale, fmt, stored.shape, "scale")
    zero = _static(zero, fmt, stored.shape, "zero")
    place = device.of(values)
    with interop.stream(origin, place):
        parts = place.quantize(
            fmt, stored, method=method, rounding=rounding, overflow=overflow, scale=scale, zero=zero
        )
        here = stored if parts is not None else place.get(stored)
    if parts is None:
        # Also where a kernel met what has to be refused: this counts and places it.
        parts = reference.quantize(
            fmt,
            here,
            method=method,
            scale=scale,
            zero=zero,
            overflow=overflow,  # type: ignore[arg-type]
            nonfinite=nonfinite,
            rounding=rounding,
            seed=seed,
            place=lambda i: i[1:] if vector else (*i[:-2], i[-1], i[-2]) if transposed else i,
        )
        if place is not device.HOST:
            parts = device.changed(parts, place.put)
    dtype = values.dtype.newbyteorder("=")
    result = QArray._of(parts, dtype, transposed=transposed, vector=vector)
    return result if out is None else _write(result, out)


def quantize_on_the_way(x: Array, fmt: Format, scale: Any) -> QArray:
    """`quantize` of a product's x: on a GPU without waiting, if the format allows.

    Numbers that are not finite, or that the format refuses, then make the result NaN.
    """
    place, vector = device.of(x), x.ndim == 1
    if isinstance(place, device.Gpu):
        stored = x[None] if vector else x
        static = _static(scale, fmt, stored.shape, "scale")
        parts = place.quantize_later(fmt, stored, static)
        if parts is not None:
            return QArray._of(parts, x.dtype, vector=vector)
    return quantize(x, fmt, scale=scale)


def _static(given: Any, fmt: Format, shape: tuple[int, ...], argument: str) -> Array | None:
    if given is None:
        return None
    array, _ = interop.to_numpy(given, argument)
    array = array.astype(np.float64)
    checks.finite_array(array, argument)
    if argument == "scale" and (array == 0).any():
        raise ValueError("scale: a static scale of 0 cannot divide")
    if argument == "zero" and isinstance(fmt.zero, Element):
        outside = (array != np.rint(array)) | (array < fmt.zero.min) | (array > fmt.zero.max)
        if outside.any():
            raise ValueError(
                f"zero: {fmt.name} wants whole numbers in [{fmt.zero.min:g}, {fmt.zero.max:g}]"
            )
    if argument == "zero" and fmt.zero is None:
        raise ValueError(f"zero: {fmt.name} has no zero points")
    wanted = (*shape[:-2], *fmt.grid((shape[-2], shape[-1])))
    if argument == "scale" and fmt.tensor_scale:
        wanted = shape[:-2]
    try:
        np.broadcast_to(array, wanted)
    except ValueError:
        raise ValueError(
            f"{argument}: want one number or shape {wanted} for {fmt.name}, got {array.shape}"
        ) from None
    return array


def _write(result: QArray, out: QArray) -> QArray:
    """Copy fresh parts into the memory of an array of the same make."""
    if not isinstance(out, QArray):
        raise TypeError(f"out: want a QArray, got {type(out).__name__}")
    if (out.format, out.shape, out.dtype, out.layout, out._transposed) != (
        result.format,
        result.shape,
        result.dtype,
        "rows",
        result._transposed,
    ):
        raise ValueError(f"out: want {result!r}, got {out!r}")
    if out._columns is not None or out._divisor is not None:
        raise ValueError("out: it permutes or divides columns, which fresh codes do not")
    device.on(out._place, result._parts.codes, "x", "out")
    held, fresh = out._rows(), result._rows()
    for name in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        target = getattr(held, name)
        if isinstance(target, np.ndarray) and not target.flags.writeable:
            raise ValueError(f"out: its {name} are read-only")
    for name in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        if getattr(held, name) is not None:
            getattr(held, name)[...] = getattr(fresh, name)
    return out


def dequantize(w: QArray, dtype: npt.DTypeLike | None = None) -> Array:
    """Return the values of a QArray: see `QArray.dequantize`.

    Parameters
    ----------
    w : QArray
    dtype : dtype-like, optional
        float64, float32, float16 or bfloat16; the logical dtype if left out.

    Returns
    -------
    ndarray
        Of NumPy, or of CuPy on the GPU that w is on.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> lb.dequantize(lb.quantize(np.ones((1, 2), np.float32), "int8_row"))
    array([[1., 1.]], dtype=float32)
    """
    if not isinstance(w, QArray):
        raise TypeError(f"w: want a QArray, got {type(w).__name__}")
    return w.dequantize(dtype)


def from_parts(
    format: Any,
    codes: Any,
    scales: Any,
    *,
    zeros: Any = None,
    biases: Any = None,
    tensor_scale: Any = None,
    shape: tuple[int, ...] | None = None,
    dtype: npt.DTypeLike = np.float32,
    columns: Any = None,
    divisor: Any = None,
) -> QArray:
    """Assemble an array from ready parts, without copying them.

    Parameters
    ----------
    format : Format or str
    codes : array_like
        (..., rows, bytes) uint8 bit streams, or (..., rows, columns) of an 8-bit element's dtype.
    scales : array_like
        One a block: (..., row blocks, column blocks), of the scale's dtype (codes of a scale
        element as uint8 or in its own dtype). Any finite number, negative and zero included.
    zeros, biases : array_like, optional
        As many as scales, where the format has them.
    tensor_scale : array_like, optional
        float32, one for each matrix, where the format has it.
    shape : tuple of int, optional
        Logical shape; needed where a row's last byte is not full.
    dtype : dtype-like
        Of the numbers that the array stands for.
    columns : array_like of int, optional
        Permutation: stored column j holds logical column columns[j].
    divisor : array_like of float, optional
        Each logical column's values are divided by its entry.

    Returns
    -------
    QArray

    Raises
    ------
    TypeError, ValueError
        A part is missing or superfluous, has the wrong dtype or shape, is not finite, or has
        bits set behind the last column.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.from_parts("int4_g32", np.array([[0x21]], np.uint8), np.ones((1, 1), np.float32))
    >>> w.dequantize()
    array([[1., 2.]], dtype=float32)
    """
    from lowbit import assembling

    return assembling.assemble(
        checks.as_format(format, "format"),
        codes,
        scales,
        zeros=zeros,
        biases=biases,
        tensor_scale=tensor_scale,
        shape=shape,
        dtype=checks.float_dtype(dtype, "dtype"),
        columns=columns,
        divisor=divisor,
    )

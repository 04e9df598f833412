"""Ready parts become an array only after every one of them has been checked."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from lowbit import checks, device, interop
from lowbit.array import QArray
from lowbit.formats import Element, Format, codes, reference, scaling
from lowbit.formats.reference import Array, Packed


def assemble(
    fmt: Format,
    given_codes: Any,
    given_scales: Any,
    *,
    zeros: Any,
    biases: Any,
    tensor_scale: Any,
    shape: tuple[int, ...] | None,
    dtype: np.dtype[Any],
    columns: Any,
    divisor: Any,
) -> QArray:
    """See `lowbit.from_parts`."""
    found, origin = interop.read(given_codes, "codes", kept=True)
    with interop.stream(origin, device.of(found)):
        return _assembled(
            fmt,
            found,
            shape,
            dtype,
            {
                "scales": given_scales,
                "zeros": zeros,
                "biases": biases,
                "tensor_scale": tensor_scale,
                "columns": columns,
                "divisor": divisor,
            },
        )


def _assembled(
    fmt: Format,
    given_codes: Array,
    shape: tuple[int, ...] | None,
    dtype: np.dtype[Any],
    given: dict[str, Any],
) -> QArray:
    held, shape = _codes(fmt, given_codes, shape)
    more: dict[str, Any] = {}
    for argument, part in given.items():
        more[argument] = part
        if part is not None:
            more[argument], _ = interop.read(part, argument, kept=True)
            device.on(device.of(held), more[argument], argument, "codes")
    vector = len(shape) == 1
    matrix = (1, *shape) if vector else shape
    held = held[None] if vector else held
    grid = (*matrix[:-2], *fmt.grid((matrix[-2], matrix[-1])))
    scales = _scales(fmt, more["scales"], grid)
    parts = Packed(
        fmt,
        matrix,
        held,
        scales,
        _blocks(fmt, more["zeros"], grid, "zeros", fmt.zero is not None),
        _blocks(fmt, more["biases"], grid, "biases", fmt.bias),
        _tensor_scale(fmt, more["tensor_scale"], matrix[:-2]),
    )
    columns = _columns(more["columns"], matrix[-1])
    divisor = _divisor(more["divisor"], matrix[-1])
    return QArray._of(parts, dtype, vector=vector, columns=columns, divisor=divisor)


def _codes(
    fmt: Format, array: Array, shape: tuple[int, ...] | None
) -> tuple[Array, tuple[int, ...]]:
    element = fmt.element
    own = np.dtype(element.storage) if element.bits == 8 else np.dtype(np.uint8)
    if array.dtype not in (own, np.dtype(np.uint8)):
        raise TypeError(f"codes: {fmt.name} wants {own.name}, got {array.dtype.name}")
    if array.ndim == 0:
        raise ValueError("codes: want at least one axis, got a 0-d array")
    if shape is None:
        full = array.shape[-1] * 8
        if full % element.bits:
            raise ValueError(
                f"codes: rows of {array.shape[-1]} bytes hold no whole number of "
                f"{element.bits}-bit codes; pass shape="
            )
        shape = (*array.shape[:-1], full // element.bits)
    try:
        shape = tuple(operator.index(length) for length in shape)
    except TypeError:
        raise TypeError(f"shape: want a tuple of whole numbers, got {shape!r}") from None
    wanted = (*shape[:-1], fmt.row_bytes(shape[-1])) if shape else ()
    if array.shape != wanted:
        raise ValueError(
            f"codes: {fmt.name} of shape {shape} has codes of shape {wanted}, got {array.shape}"
        )
    array = array.view(np.uint8)
    spare = shape[-1] * element.bits % 8
    if spare and array.size:
        dirty = array[..., -1] >> np.uint8(spare)
        if dirty.any():
            raise ValueError(
                f"codes: {int((dirty != 0).sum())} rows have bits set behind column "
                f"{shape[-1] - 1}; they must be 0"
            )
    return array, shape


def _scales(fmt: Format, given: Any, grid: tuple[int, ...]) -> Array:
    array = _shaped(given, grid, "scales", fmt)
    kind = fmt.scale.element
    if isinstance(kind, Element):
        if array.dtype not in (np.dtype(np.uint8), np.dtype(kind.storage)):
            raise TypeError(f"scales: {fmt.name} wants {kind.storage}, got {array.dtype.name}")
        array = array.view(np.uint8)
        checks.finite_array(codes.decode(kind, device.of(array).get(array)), "scales")
        return array
    if array.dtype != scaling.float_dtype(kind):
        raise TypeError(f"scales: {fmt.name} wants {kind}, got {array.dtype.name}")
    checks.finite_array(array, "scales")
    return array


def _shaped(given: Any, grid: tuple[int, ...], argument: str, fmt: Format) -> Array:
    array, _ = interop.read(given, argument, kept=True)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.shape != grid:
        # A vector's blocks may come without the axis of rows; a tensor scale as one number.
        if array.size == int(np.prod(grid)) and array.shape in (grid[1:], ()):
            return array.reshape(grid)
        raise ValueError(f"{argument}: {fmt.name} has {grid} blocks here, got {array.shape}")
    return array


def _blocks(
    fmt: Format, given: Any, grid: tuple[int, ...], argument: str, wanted: bool
) -> Array | None:
    if not wanted:
        if given is not None:
            raise ValueError(f"{argument}: {fmt.name} has none; choose a format that does")
        return None
    if given is None:
        raise ValueError(f"{argument}: {fmt.name} needs them")
    array = _shaped(given, grid, argument, fmt)
    if argument == "biases":
        kind = fmt.scale.element
        assert isinstance(kind, str)
        dtype = scaling.float_dtype(kind)
    else:
        dtype = reference.zero_dtype(fmt)
    if array.dtype != dtype:
        raise TypeError(f"{argument}: {fmt.name} wants {dtype.name}, got {array.dtype.name}")
    checks.finite_array(array, argument)
    if isinstance(fmt.zero, Element):
        outside = (array < fmt.zero.min) | (array > fmt.zero.max)
        if outside.any():
            raise ValueError(
                f"zeros: {int(outside.sum())} are outside [{fmt.zero.min:g}, {fmt.zero.max:g}] "
                f"of {fmt.zero.name}"
            )
    return array


def _tensor_scale(fmt: Format, given: Any, lead: tuple[int, ...]) -> Array | None:
    if not fmt.tensor_scale:
        if given is not None:
            raise ValueError(f"tensor_scale: {fmt.name} has none")
        return None
    if given is None:
        raise ValueError(f"tensor_scale: {fmt.name} needs it, one float32 for each matrix")
    array, _ = interop.read(given, "tensor_scale", kept=True)
    checks.floating(array, "tensor_scale")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        array = array.astype(np.float32, copy=False)
    if array.shape != lead and array.size == int(np.prod(lead)):
        array = array.reshape(lead)
    if array.shape != lead:
        raise ValueError(f"tensor_scale: want shape {lead}, got {array.shape}")
    checks.finite_array(array, "tensor_scale")
    return array


def _columns(given: Any, length: int) -> Array | None:
    if given is None:
        return None
    array, _ = interop.read(given, "columns", kept=True)
    if array.dtype.kind not in "iu" or array.shape != (length,):
        raise ValueError(f"columns: want {length} integers, got {array.dtype.name} {array.shape}")
    array = array.astype(np.intp)
    if not np.array_equal(np.sort(device.of(array).get(array)), np.arange(length)):
        raise ValueError(f"columns: not a permutation of 0..{length - 1}")
    return array


def _divisor(given: Any, length: int) -> Array | None:
    if given is None:
        return None
    array, _ = interop.read(given, "divisor", kept=True)
    checks.floating(array, "divisor")
    if array.shape != (length,):
        raise ValueError(f"divisor: want shape ({length},), got {array.shape}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        array = array.astype(np.float32)
    checks.finite_array(array, "divisor")
    if (array == 0).any():
        raise ValueError("divisor: an entry is 0")
    return array

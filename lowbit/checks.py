"""The border: what comes in is checked once, with words that name argument, value and remedy."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lowbit import device, formats
from lowbit.formats import Format

Array = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS: dict[str, np.dtype[Any]] = {
    d.name: d for d in (*map(np.dtype, (np.float64, np.float32, np.float16)), BFLOAT16)
}
_FLOAT_TYPES = {d.type for d in _FLOATS.values()}  # whatever the byte order


def float_dtype(dtype: Any, argument: str) -> np.dtype[Any]:
    """The NumPy dtype of a logical or result dtype; takes torch's and jax's names too."""
    if dtype is float:
        return _FLOATS["float64"]
    name = str(dtype).rpartition(".")[2] if "torch." in str(dtype) else None
    if name is None:
        try:
            name = "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name
        except TypeError:
            name = str(dtype)
    if name not in _FLOATS:
        raise TypeError(f"{argument}: want one of {', '.join(_FLOATS)}, got {dtype!r}")
    return _FLOATS[name]


def as_format(value: Any, argument: str) -> Format:
    """A format from its name, a constructor or itself."""
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return formats.get(value)
    if callable(value):
        made = value()
        if isinstance(made, Format):
            return made
    raise TypeError(f"{argument}: want a format or its name, got {type(value).__name__}")


def data(x: Array, argument: str) -> Array:
    """Numbers to quantize: real, at least one axis, floating-point."""
    if x.ndim == 0:
        raise ValueError(f"{argument}: want at least one axis, got a 0-d array")
    if x.dtype.kind in "iu" or x.dtype.kind == "b":
        raise TypeError(
            f"{argument}: want floating-point numbers, got {x.dtype.name}. Cast with "
            ".astype(np.float32), or keep ready codes with lowbit.from_parts."
        )
    floating(x, argument)
    return x


def floating(x: Array, argument: str) -> None:
    """Refuse what is not float64, float32, float16 or bfloat16."""
    if x.dtype.type not in _FLOAT_TYPES:
        raise TypeError(
            f"{argument}: want float32, float16, bfloat16 or float64, got {x.dtype.name}"
        )


def contraction_axis(axis: int, ndim: int) -> bool:
    """Tell whether it is the last axis but one; the array is then stored as its transpose."""
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis: want an integer, got {type(axis).__name__}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis: {axis} is out of range for {ndim} axes")
    position = int(axis) % ndim - ndim
    if position == -1:
        return False
    if position == -2:
        return True
    raise ValueError(
        f"axis: scales are shared along one of the last two axes, got {axis} of {ndim}. "
        "Move it there first: np.moveaxis(x, axis, -1)."
    )


def choice(value: Any, legal: tuple[str, ...], argument: str) -> str:
    """One of some words."""
    if value not in legal:
        raise ValueError(f"{argument}: want one of {', '.join(legal)}, got {value!r}")
    return str(value)


def finite_scalar(value: Any, argument: str) -> float:
    """A finite real number."""
    if isinstance(value, (bool, np.bool_, complex, str)) or getattr(value, "ndim", 0) > 0:
        raise TypeError(f"{argument}: want a real number, got {value!r}")
    try:
        number = float(value)
    except TypeError:
        raise TypeError(f"{argument}: want a real number, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"{argument}: want a finite number, got {number}")
    return number


def finite_array(x: Array, argument: str) -> None:
    """Refuse NaN and infinities with their count and the first place."""
    wide = x.astype(np.float32) if x.dtype.kind == "V" or x.dtype == BFLOAT16 else x
    xp = device.of(x).xp
    bad = ~xp.isfinite(wide)
    if bad.any():
        first = tuple(int(i) for i in xp.argwhere(bad)[0])
        raise ValueError(
            f"{argument}: {int(bad.sum())} entries are NaN or infinite, first at {first}"
        )

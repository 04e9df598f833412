"""A QArray as pickle sees it; the memory of its parts travels out of band where asked (PEP 574)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from lowbit import checks
from lowbit.array import QArray
from lowbit.formats.reference import Array, Packed


def reduce(w: QArray) -> tuple[Any, ...]:
    """What `__reduce__` returns: the canonical parts, and how they are looked at."""
    device, w = w.device, w.to_device("cpu")
    p = w._rows()
    blocks = tuple(_plain(b) for b in (p.scales, p.zeros, p.biases))
    parts = (p.format, p.shape, p.codes, blocks, p.tensor_scale)
    view = (w.dtype.name, w._transposed, w._vector, w._columns, w._divisor)
    return restore, (parts, view) if device == "cpu" else (parts, view, device)


def restore(parts: tuple[Any, ...], view: tuple[Any, ...], device: str = "cpu") -> QArray:
    """Undo `reduce`; without the GPU that it was on, or CuPy, the array stays on the host."""
    fmt, shape, codes, blocks, tensor_scale = parts
    name, transposed, vector, columns, divisor = view
    scales, zeros, biases = (_own(b) for b in blocks)
    assert scales is not None
    w = QArray._of(
        Packed(fmt, shape, codes, scales, zeros, biases, tensor_scale),
        checks.float_dtype(name, "dtype"),
        transposed=transposed,
        vector=vector,
        columns=columns,
        divisor=divisor,
    )
    try:
        return w.to_device(device)
    except (BufferError, ValueError) as error:
        warnings.warn(f"a QArray pickled on {device} stays on the host here: {error}", stacklevel=2)
        return w


def _plain(part: Array | None) -> Array | None:
    """bfloat16 as uint16, since NumPy pickles out of band only dtypes of its own."""
    return part.view(np.uint16) if part is not None and part.dtype == checks.BFLOAT16 else part


def _own(part: Array | None) -> Array | None:
    return part.view(checks.BFLOAT16) if part is not None and part.dtype == np.uint16 else part

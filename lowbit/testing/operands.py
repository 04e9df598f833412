"""Quantized arrays of arbitrary parts, wider than what quantizing data would give."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit import checks
from lowbit.array import QArray
from lowbit.formats import Element, Format, codes, reference, scaling
from lowbit.quantizing import from_parts


def random_qarray(
    format: Format | str,
    rows: int,
    columns: int,
    *,
    seed: int = 0,
    spread: float = 2.0,
    nonfinite: bool = False,
) -> QArray:
    """Make an array of random parts: every code, scales of either sign and zero.

    Parameters
    ----------
    format : Format or str
    rows, columns : int
    seed : int
    spread : float
        Scales lie between 2**-spread and 2**spread.
    nonfinite : bool
        Codes of NaN and infinities too.

    Returns
    -------
    QArray

    Examples
    --------
    >>> import lowbit as lb
    >>> lb.testing.random_qarray("int4_g32_asym", 2, 40).shape
    (2, 40)
    """
    fmt = checks.as_format(format, "format")
    rng = np.random.default_rng(seed)
    values = np.array(fmt.element.values)
    legal = np.arange(len(values)) if nonfinite else np.flatnonzero(np.isfinite(values))
    chosen = legal[rng.integers(0, len(legal), (rows, columns))].astype(np.uint8)
    grid = fmt.grid((rows, columns))
    scales = np.exp2(rng.uniform(-spread, spread, grid))
    kind = fmt.scale.element
    if isinstance(kind, Element):
        held = codes.encode(kind, scales)
    else:
        scales *= rng.choice([1.0, -1.0, 0.0], grid, p=[0.7, 0.25, 0.05])
        held = scales.astype(scaling.float_dtype(kind))
    parts: dict[str, Any] = {}
    if isinstance(fmt.zero, Element):
        wanted = rng.integers(int(fmt.zero.min), int(fmt.zero.max) + 1, grid)
        parts["zeros"] = wanted.astype(reference.zero_dtype(fmt))
    elif fmt.zero is not None:
        parts["zeros"] = rng.uniform(-8, 8, grid).astype(reference.zero_dtype(fmt))
    if fmt.bias:
        parts["biases"] = rng.uniform(-2, 2, grid).astype(held.dtype)
    if fmt.tensor_scale:
        parts["tensor_scale"] = np.float32(rng.uniform(0.1, 3) * rng.choice([1, -1]))
    packed = codes.pack(chosen, fmt.element.bits)
    return from_parts(fmt, packed, held, shape=(rows, columns), **parts)

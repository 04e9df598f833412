"""The exact oracle: operands whose product is exact in float32, whatever the order of the sum.

Every term is a whole multiple of one power of two, and the terms of a sum are thinned out until
their absolute values add up to less than 2**24 of it: each partial sum of any of them is then a
float32. Any two kernels agree on such operands bit for bit, on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import checks, interop
from lowbit.array import QArray
from lowbit.formats import Element, Format, codes, reference, scaling
from lowbit.quantizing import from_parts
from lowbit.testing import magnitudes

Array = npt.NDArray[Any]

_DIGITS = 24  # of a float32
_LARGEST = 240  # whole numbers of a dense operand: eight bits suffice, which bfloat16 has
_WINDOW = 2  # scales differ by up to this power of two


@dataclass(frozen=True)
class ExactOperands:
    """Operands of `lowbit.matmul` and the one right answer."""

    x: Any
    """(M, K), an array or a QArray."""
    w: QArray
    """(N, K); multiply by ``w.T``."""
    expected: Array
    """float64; rounding it to the result's dtype gives the right bits."""
    options: dict[str, Any] = field(default_factory=dict)
    """alpha, bias and residual that belong to `expected`."""

    def check(self, result: Any) -> None:
        """Raise AssertionError unless a result equals `expected`, rounded once to its dtype."""
        got, _ = interop.to_numpy(result, "result")
        with np.errstate(over="ignore"):
            wanted = self.expected.astype(got.dtype)
        if got.shape != wanted.shape:
            raise AssertionError(f"want shape {wanted.shape}, got {got.shape}")
        wrong = ~(got == wanted)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{int(wrong.sum())} of {wrong.size} entries are not exact, first at {at}: "
                f"{float(got[at])!r} instead of {float(wanted[at])!r}"
            )


def exact_operands(
    m: int,
    n: int,
    k: int,
    w_format: Format | str,
    x: Format | str | Any = "float32",
    *,
    alpha: float = 1.0,
    bias: bool = False,
    residual: str | None = None,
    single: bool = False,
    seed: int = 0,
) -> ExactOperands:
    """Make operands whose product is exact in float32 for any kernel.

    Parameters
    ----------
    m, n, k : int
        Axes of the product, each 0 or more.
    w_format : Format or str
        Of w.
    x : Format, str or dtype
        A format, or the dtype of a dense x.
    alpha : float
        A power of two, for the sums to stay exact.
    bias : bool
        Add one.
    residual : {"float32", "float16", "bfloat16"}, optional
        Add one of this dtype.
    single : bool
        One term a row of x, but every finite code of w: checks what codes stand for. Otherwise
        many terms with those codes that share a grid.
    seed : int

    Returns
    -------
    ExactOperands

    Examples
    --------
    >>> import lowbit as lb
    >>> case = lb.testing.exact_operands(3, 5, 70, "int4_g32", bias=True)
    >>> case.check(lb.matmul(case.x, case.w.T, **case.options))
    """
    if math.frexp(abs(alpha))[0] != 0.5:
        raise ValueError(f"alpha: want a power of two, got {alpha}")
    rng = np.random.default_rng(seed)
    fmt = checks.as_format(w_format, "w_format")
    w, w_unit = _quantized(rng, fmt, n, k, single=single)
    left: Any
    if isinstance(x, Format) or (isinstance(x, str) and x not in _DTYPES):
        full, x_unit = _quantized(rng, checks.as_format(x, "x"), m, k, single=single, small=True)
        kept = _thinned(rng, full.dequantize(np.float64), x_unit, w, w_unit, single)
        left = _zeroed(full, ~kept)
        values = left.dequantize(np.float64)
    else:
        x_unit = 2.0 ** int(rng.integers(-3, 2))
        cap = 1 if single else int(rng.choice([1, 3, 15, _LARGEST]))
        values = rng.integers(-cap, cap + 1, (m, k)) * x_unit
        values *= _thinned(rng, values, x_unit, w, w_unit, single)
        left = values.astype(checks.float_dtype(x, "x"))
    unit = abs(alpha) * x_unit * w_unit
    expected = alpha * np.einsum("mk,nk->mn", values, w.dequantize(np.float64))
    options: dict[str, Any] = {"alpha": alpha}
    if bias:
        most = 0 if single else 2 ** (_DIGITS - 2)
        options["bias"] = (rng.integers(-most, most + 1, n) * unit).astype(np.float32)
        expected = expected + options["bias"].astype(np.float64)
    if residual is not None:
        most = 0 if single else 200
        rest = rng.integers(-most, most + 1, (m, n)) * unit
        options["residual"] = rest.astype(checks.float_dtype(residual, "residual"))
        expected = expected + options["residual"].astype(np.float64)
    return ExactOperands(left, w, expected, options)


_DTYPES = ("float32", "float16", "bfloat16", "float64")


def _quantized(
    rng: np.random.Generator,
    fmt: Format,
    rows: int,
    columns: int,
    *,
    single: bool,
    small: bool = False,
) -> tuple[QArray, float]:
    """Ready parts, and a power of two that every value is a whole multiple of."""
    if single:
        legal, step = _alone(fmt, small), 1.0
    else:
        legal, step = _grid(rng, fmt, 15 if small else 256)
    chosen = rng.choice(legal, (rows, columns)).astype(np.uint8)
    grid = fmt.grid((rows, columns))
    scales, lowest = _scales(rng, fmt, grid)
    zeros = biases = None
    if fmt.zero is not None:
        low, high = fmt.element.min, fmt.element.max
        if not isinstance(fmt.zero, str):
            low, high = max(low, fmt.zero.min), min(high, fmt.zero.max)
        if small:
            most = 0 if single else 7
            low, high = max(low, -most), min(high, most)
        dtype = reference.zero_dtype(fmt)
        zeros = rng.integers(int(low), int(high) + 1, grid).astype(dtype)
    if fmt.bias:
        steps = rng.integers(-8, 9, grid) * (0 if small or not fmt.element.integral else 1)
        addends = steps * (np.abs(_numbers(fmt, scales)) if single else lowest * step)
        biases = addends.astype(scaling.float_dtype(str(fmt.scale.element)))
    second = 2.0 ** int(rng.integers(-3, 1)) if fmt.tensor_scale else None
    array = from_parts(
        fmt,
        codes.pack(chosen, fmt.element.bits),
        scales,
        zeros=zeros,
        biases=biases,
        tensor_scale=None if second is None else np.float32(second),
        shape=(rows, columns),
    )
    return array, step * lowest * (second or 1.0)


def _alone(fmt: Format, small: bool) -> Array:
    """Codes that one product is exact with: all of w's, powers of two of x's."""
    values = np.array(fmt.element.values)
    legal = np.isfinite(values)
    if small:
        fraction = np.abs(np.frexp(np.where(legal, values, 3.0))[0])
        legal = (fraction == 0.5) | (fraction == 0)
    return np.flatnonzero(legal)


def _grid(rng: np.random.Generator, fmt: Format, most: int) -> tuple[Array, float]:
    """Codes whose values are whole multiples, at most `most`, of one power of two."""
    values = np.array(fmt.element.values)
    finite = np.flatnonzero(np.isfinite(values))
    found = []
    for exponent in {_lowest_bit(float(v)) for v in values[finite] if v}:
        whole = values[finite] / 2.0**exponent
        legal = finite[(whole == np.rint(whole)) & (np.abs(whole) <= most)]
        if len(np.unique(values[legal])) > 1:
            found.append((exponent, legal))
    if fmt.element.integral or not found:
        # Zero points are whole numbers, and so is what they are taken from.
        found = [f for f in found if f[0] == 0] or [(0, finite[values[finite] == 0])]
    exponent, legal = found[int(rng.integers(len(found)))]
    return legal, 2.0**exponent


def _lowest_bit(value: float) -> int:
    fraction, exponent = math.frexp(value)
    whole = int(math.ldexp(fraction, 53))
    return exponent - 53 + ((whole & -whole).bit_length() - 1)


def _scales(rng: np.random.Generator, fmt: Format, grid: tuple[int, int]) -> tuple[Array, float]:
    """Powers of two, of either sign and 0 where the scale's type has them, and the least one."""
    lowest = int(rng.integers(-3, 1))
    numbers = 2.0 ** rng.integers(lowest, lowest + _WINDOW + 1, grid)
    kind = fmt.scale.element
    if isinstance(kind, Element):
        return codes.encode(kind, numbers, overflow="raise"), 2.0**lowest
    numbers *= rng.choice([1.0, 1.0, 1.0, -1.0], grid)
    numbers *= rng.random(grid) < 0.97
    return numbers.astype(scaling.float_dtype(kind)), 2.0**lowest


def _numbers(fmt: Format, scales: Array) -> Array:
    return scaling.decode_scales(fmt, scales).astype(np.float64)


def _thinned(
    rng: np.random.Generator, x: Array, x_unit: float, w: QArray, w_unit: float, single: bool
) -> Array:
    """Mask of the entries of x that may stay."""
    if x.size == 0:
        return np.ones(x.shape, bool)
    order = np.argsort(rng.random(x.shape), axis=1)
    if single:
        terms = (x != 0).astype(np.float64)
        budget = 1.0
    else:
        pieces = magnitudes.pieces(w)
        # In units, with what a zero point and a block's addend may reach on their own.
        most = np.maximum(pieces.values, pieces.plain * pieces.scales) * pieces.tensor_scale
        terms = np.abs(x) / x_unit * np.max(most / w_unit, axis=0, initial=0)
        budget = 2.0 ** (_DIGITS - 1)
    reached = np.cumsum(np.take_along_axis(terms, order, 1), axis=1)
    kept = np.empty(x.shape, bool)
    np.put_along_axis(kept, order, reached <= budget, 1)
    return kept


def _zeroed(x: QArray, where: Array) -> QArray:
    """The same with some values replaced by 0."""
    fmt, parts = x.format, x._rows()
    if parts.zeros is None:
        targets: Any = np.zeros(())
    else:
        targets = reference.spread(parts.zeros.astype(np.float64), fmt.scale.block, parts.matrix)
    zero = codes.encode(fmt.element, np.broadcast_to(targets, parts.shape))
    chosen = np.where(where, zero, reference.element_codes(parts))
    return from_parts(
        fmt,
        codes.pack(chosen, fmt.element.bits),
        parts.scales,
        zeros=parts.zeros,
        biases=parts.biases,
        tensor_scale=parts.tensor_scale,
        shape=parts.shape,
    )

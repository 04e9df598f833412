"""The gamma oracle: how far a product may lie from the exact one, derived, never tuned.

What a kernel returns for one output, with c = value(code) - zero, scales s, blocks j of columns:

    g_j = sum over k in j of x_k c_k                        fma, or exact in integers
    P   = sum over j of sx_j (sw_j g_j) + (sum of x in j) b_j
    y   = round(activation(A P + bias) + residual),         A = alpha * tensor scales

Standard model (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2.2 and 3.1):
every operation gives (exact)(1 + d) + h with |d| <= u and |h| <= eta / 2, where eta is the
smallest subnormal number; h is 0 unless the result is subnormal. A product x_k c_k meets at most
`Roundings.count` roundings on its way into A P + bias, hence

    e = gamma(count) S + U,   S = |A| sum |x| (|s c| + |b|) + |bias|,   gamma(n) = n u / (1 - n u)

    U = (1 + gamma) eta / 2 (|A| sum (|sx sw| + |sx| + 2) + P's own S + 2)

where U lets every operation underflow: an error made in g is still multiplied by the scales, one
made in A meets the whole sum. Where w's values are rounded to a narrower type first, by d_w of
them, 1 + gamma becomes (1 + gamma)(1 + d_w); where an instruction takes subnormal numbers for
zero, eta / 2 is the most that a product then loses. Then activations of Lipschitz constant L,
computed within (relative, absolute) errors (r, t), and the residual's conversion and addition give

    e' = L e + r (|f| + L e) + t,    e'' = e' + u (|f| + e' + 2 |residual|) + eta

and rounding to the result's dtype is monotone: round(exact - e'') <= y <= round(exact + e'').
Where an intermediate number could exceed the accumulator's range, nothing is promised. The
reference itself is computed in float64; its error, of the same form, is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lowbit import checks, dispatch, interop, products
from lowbit.array import QArray
from lowbit.explaining import explain
from lowbit.formats import codes
from lowbit.kernels import Roundings
from lowbit.kernels.reference import ACTIVATION_ERROR, activate
from lowbit.testing import magnitudes

Array = npt.NDArray[Any]

# Largest slope: of gelu at sqrt(2) 1.1290, of its tanh form 1.1290, of silu at 2.4 1.0999.
LIPSCHITZ = {None: 1.0, "relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}


def gamma(count: int, dtype: Any) -> float:
    """n u / (1 - n u): the largest relative effect of n roundings to nearest in a dtype."""
    share = count * unit(dtype)
    if share >= 1:
        raise ValueError(f"gamma: {count} roundings in {np.dtype(dtype)} leave no bound")
    return share / (1 - share)


def unit(dtype: Any) -> float:
    """Unit roundoff: half of the gap above 1."""
    return float(_finfo(dtype).eps) / 2


def smallest(dtype: Any) -> float:
    """The smallest subnormal number."""
    return float(_finfo(dtype).smallest_subnormal)


def largest(dtype: Any) -> float:
    """The largest finite number."""
    return float(_finfo(dtype).max)


def _finfo(dtype: Any) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Exact:
    """What `matmul` should give, and how far it may be from that before its last rounding."""

    value: Array
    """float64, as exact as float64 is."""
    error: Array
    """float64, at least the distance of the unrounded result from the exact one; inf where an
    intermediate number may overflow."""
    dtype: np.dtype[Any]
    """Of the result."""
    strict: bool
    """Infinities and NaN have to come out as they do in exact arithmetic, not as each other."""

    @property
    def low(self) -> Array:
        """Smallest result allowed, in the result's dtype."""
        return self._rounded(self.value - self.error)

    @property
    def high(self) -> Array:
        """Largest result allowed, in the result's dtype."""
        return self._rounded(self.value + self.error)

    def _rounded(self, limit: Array) -> Array:
        with np.errstate(all="ignore"):
            # Once: a limit that is rounded twice can exclude a right result.
            return codes.rounded(limit, self.dtype).astype(np.float64)


def error_bound(x: Any, w: Any, **options: Any) -> Array:
    """Bound ``abs(lowbit.matmul(x, w) - exact)``, entry by entry.

    Parameters
    ----------
    x, w : array_like or QArray
        As for `lowbit.matmul`.
    **options
        Those of `lowbit.matmul`: alpha, bias, activation, residual, x_format, x_scale,
        out_dtype, batch_invariant, kernel. The bound is that of the kernel which they choose.

    Returns
    -------
    ndarray of float64
        inf where an intermediate number or the result may overflow.

    Notes
    -----
    "Exact" is the product of the dequantized operands in exact arithmetic; with ``x_format`` the
    dequantized x is that after quantization. The derivation stands at the top of
    ``lowbit/testing/bounds.py`` and on the page about the error bound.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(2, 32, dtype=np.float32), "int8_row")
    >>> x = np.full((1, 32), 0.1, np.float32)
    >>> bool((lb.testing.error_bound(x, w.T) < 1e-6).all())
    True
    """
    found = exact(x, w, **options)
    with np.errstate(all="ignore"):
        above = np.abs(found.value) + found.error
        bound = found.error + unit(found.dtype) * above + smallest(found.dtype) / 2
        return np.where(above >= largest(found.dtype), np.inf, bound)


def assert_within_bound(result: Any, x: Any, w: Any, **options: Any) -> float:
    """Check a result of `lowbit.matmul` against the exact product.

    Parameters
    ----------
    result : array
        What ``lowbit.matmul(x, w, **options)`` gave.
    x, w : array_like or QArray
    **options
        Those that the result was computed with.

    Returns
    -------
    float
        The largest share of the bound that an entry uses; 0 for an empty result.

    Raises
    ------
    AssertionError
        Shape or dtype differ, or an entry lies outside of its bound; the message names the worst.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(2, 32, dtype=np.float32), "int4_g32")
    >>> x = np.full((1, 32), 0.1, np.float32)
    >>> lb.testing.assert_within_bound(x @ w.T, x, w.T) <= 1
    True
    """
    return compare(result, exact(x, w, **options))


def compare(result: Any, found: Exact) -> float:
    """`assert_within_bound` with the expectation at hand."""
    got, _ = interop.to_numpy(result, "result")
    if got.shape != found.value.shape or got.dtype != found.dtype:
        raise AssertionError(
            f"want {found.dtype.name} {found.value.shape}, got {got.dtype.name} {got.shape}"
        )
    number = got.astype(np.float64)
    free = np.isinf(found.error)
    whole = np.isfinite(found.value)
    with np.errstate(all="ignore"):
        inside = (found.low <= number) & (number <= found.high)
        same = (number == found.value) | (np.isnan(number) & np.isnan(found.value))
    special = same if found.strict else ~np.isfinite(number)
    right = np.where(whole, inside, special) | free
    if not right.all():
        at = tuple(int(i) for i in np.argwhere(~right)[0])
        raise AssertionError(
            f"{int((~right).sum())} of {right.size} entries are outside of the bound, first at "
            f"{at}: {number[at]!r}, exact {found.value[at]!r} +- {found.error[at]:.3g}, allowed "
            f"{found.low[at]!r} to {found.high[at]!r}"
        )
    measured = whole & ~free & np.isfinite(number)
    value = found.value[measured]
    distance = np.abs(number[measured] - value)
    allowed = np.maximum(found.high[measured] - value, value - found.low[measured])
    return float(np.max(distance / np.where(allowed > 0, allowed, 1), initial=0.0))


@dataclass(frozen=True)
class _Path:
    """How `matmul` gets from the operands to the result."""

    inner: Roundings
    outer: Roundings
    """Of the steps after the sum, where they are computed apart from it."""
    divided: str | None
    """dtype in which x is divided by the weight's divisor first."""
    dtype: np.dtype[Any]
    apart: bool
    """The sum is rounded to the accumulator's dtype before alpha and the rest are applied."""


def exact(
    x: Any,
    w: Any,
    *,
    alpha: float = 1.0,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    x_format: Any = None,
    x_scale: Any = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
    kernel: str | None = None,
) -> Exact:
    """Compute what `matmul` should give and how far it may be from it.

    Parameters
    ----------
    x, w, alpha, bias, activation, residual, x_format, x_scale, out_dtype, batch_invariant, kernel
        As for `lowbit.matmul`.

    Returns
    -------
    Exact
    """
    explanation = explain(
        x,
        w,
        bias=bias,
        activation=activation,
        residual=residual,
        x_format=x_format,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        kernel=kernel,
    )
    chosen = next(v.kernel for v in explanation.verdicts if v.kernel.name == explanation.kernel)
    inner = outer = chosen.roundings(chosen.asked(explanation.problem))
    left, right, _ = products.operands_of(x, w)
    dtype = dispatch.promoted(left.dtype, right.dtype)
    if out_dtype is not None:
        dtype = checks.float_dtype(out_dtype, "out_dtype")
    divided = None
    if isinstance(right, QArray) and not isinstance(left, QArray):
        if right.divisor is not None and x_format is None:
            divided = np.promote_types(left.dtype, np.float32).name
        narrow, _ = products.adapt(left, right)
        left, right = products.adapt(left.astype(np.float64), right)
        if x_format is not None:
            left = products.quantized(narrow, checks.as_format(x_format, "x_format"), x_scale)
    apart = not isinstance(right, QArray)
    if apart:
        outer = Roundings("float64", 4, activation=ACTIVATION_ERROR)
    if any(dispatch.rearranged(operand) for operand in (left, right)):
        inner = outer = Roundings("float64", left.shape[-1] + 12, activation=ACTIVATION_ERROR)
    path = _Path(inner, outer, divided, dtype, apart)
    after = [None if v is None else interop.to_numpy(v, "")[0] for v in (bias, residual)]
    if after[0] is not None and right.ndim == 1:
        after[0] = after[0].reshape(())
    with np.errstate(all="ignore"):
        return _bounded(
            magnitudes.sums(left, right), path, float(alpha), after[0], activation, after[1]
        )


def _bounded(
    found: magnitudes.Sums,
    path: _Path,
    alpha: float,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
) -> Exact:
    inner, outer = path.inner, path.outer
    eta = max(smallest(inner.accumulator), 2 * inner.flushed)
    growth = gamma(inner.count + path.apart, inner.accumulator)
    growth += inner.weight * (1 + growth)
    addend = np.zeros(()) if bias is None else bias.astype(np.float64)
    # The sum before and after alpha: a kernel multiplies both factors first, or rounds between.
    factors = [abs(alpha) * found.tensor_scale]
    factors += [found.tensor_scale] if path.apart else []
    value, size = found.value * alpha + addend, factors[0] * found.size + np.abs(addend)
    under = factors[0] * (found.scales + 2 * found.depth) + (1 + abs(alpha)) * (found.size + 2)
    error = growth * size + (1 + growth) * eta / 2 * under
    if path.divided is not None:
        error = error + factors[0] * (1 + growth) * (
            unit(path.divided) * found.size + smallest(path.divided) / 2 * found.weights
        )
    if path.dtype != np.float64:
        error = error + unit(np.float32) * np.abs(addend) + smallest(np.float32) / 2
    # The reference's own: sums, products and four roundings of each operand's value.
    error = error + gamma(found.depth + 12, np.float64) * size
    reached = [found.highest, size, *factors, *(f * found.size for f in factors)]
    beyond = np.maximum.reduce(np.broadcast_arrays(*reached)) * (1 + growth) + error
    lost = beyond >= largest(inner.accumulator)

    if activation is not None:
        value = activate(activation, value)
        relative = outer.activation[0] + ACTIVATION_ERROR[0]
        slope = LIPSCHITZ[activation]
        error = slope * error + relative * (np.abs(value) + slope * error)
        error = error + outer.activation[1] + ACTIVATION_ERROR[1]
    if residual is not None:
        rest = residual.astype(np.float64)
        value = value + rest
        u, eta = unit(outer.accumulator), smallest(outer.accumulator)
        if path.dtype != np.float64:
            error = error + unit(np.float32) * np.abs(rest) + smallest(np.float32) / 2
        error = error + u * (np.abs(value) + error + np.abs(rest)) + eta
        # The reference's own addition.
        error = error + unit(np.float64) * np.abs(value)
        lost = lost | (np.abs(rest) >= largest(outer.accumulator))
    whole = np.isfinite(value)
    lost = lost | (whole & (np.abs(value) + error >= largest(outer.accumulator)))
    error = np.where(lost, np.inf, np.where(whole, error, 0.0))
    vanished = any(np.any((f > 0) & (f < smallest(inner.accumulator))) for f in factors)
    return Exact(value, error, path.dtype, not found.biased and not vanished and not inner.flushed)

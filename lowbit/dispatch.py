"""From two operands to a kernel: orientation, leading axes, the stated problem, bound kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import interop, kernels
from lowbit.array import QArray
from lowbit.formats import Format, reference
from lowbit.formats.codes import rounded
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue, Problem, Run, Verdict
from lowbit.kernels.cpu import isa, operands, pool
from lowbit.kernels.reference import finish
from lowbit.kernels.words16 import Words16

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What a call asks for beyond its operands."""

    out_dtype: np.dtype[Any] | None = None
    activation: str | None = None
    batch_invariant: bool = False
    kernel: str | None = None


PLAIN = Options()
REARRANGED = "permuted or divided columns that x cannot undo; the reference takes the values"
_MOST_PLANS = 64  # of one weight: as many row counts and options as are remembered


@cache
def device() -> str:
    """Backend and instruction set of this machine."""
    return f"cpu:{isa.host().name}"


def weight_right(
    left: Array | QArray, w: QArray, after: Epilogue, out: Array, options: Options
) -> None:
    """The weight is on the right: the kernels' own orientation."""
    if rearranged(left) or rearranged(w):
        _exact(left, w, after, out, options)
        return
    parts = w._parts
    stacked = isinstance(left, QArray) and left.ndim > 2 and len(parts.shape) == 2
    if stacked and isinstance(left, QArray) and not left._transposed and flattens(left.format):
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


def flattens(fmt: Format) -> bool:
    """Every row has scales of its own, so a stack of matrices is one tall matrix."""
    return fmt.scale.block[0] == 1 and not fmt.tensor_scale


def rearranged(operand: Array | QArray) -> bool:
    """Whether a column permutation or a divisor stands between the parts and the values."""
    return isinstance(operand, QArray) and (
        operand._columns is not None or operand._divisor is not None
    )


def reference_alone() -> list[Verdict]:
    """What the kernels say where x cannot undo a permutation or a divisor of columns."""
    verdicts = [
        Verdict(k, None if k.name == "reference" else REARRANGED, None)
        for k in kernels.registered()
    ]
    return sorted(verdicts, key=lambda v: v.refusal is not None)


def _exact(
    left: Array | QArray, right: Array | QArray, after: Epilogue, out: Array, options: Options
) -> None:
    """A product that no kernel describes: float64 values, one rounding at the end."""
    if options.kernel is not None:
        kernels.pick(reference_alone(), options.kernel)
    values = [s.dequantize(np.float64) if isinstance(s, QArray) else s for s in (left, right)]
    out[...] = rounded(finish(reference.matmul(values[0], values[1]), after), out.dtype)


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


def weight_left(w: QArray, right: Array, after: Epilogue, out: Array, options: Options) -> None:
    """The weight is on the left: the kernels compute the transpose, the epilogue follows."""
    if rearranged(w):
        _exact(w, right, after, out, options)
        return
    turned = right.swapaxes(-1, -2)
    plain = Epilogue(1.0)
    for index in np.ndindex(out.shape[:-2]):
        x, parts, along = _lead(turned, index), _lead(w._parts, index), not w._transposed
        wide = sum_dtype(problem(x, True, parts, along, plain, "float32", options), options.kernel)
        product = interop.empty((out.shape[-1], out.shape[-2]), wide)
        _matrix(x, True, parts, along, plain, product, options, {})
        one = _at(after, index)
        if one.alpha == 1 and one.bias is None and not one.activation and one.residual is None:
            out[index] = rounded(product.T, out.dtype)
        else:
            out[index] = rounded(finish(product.T.astype(np.float64), one), out.dtype)


@lru_cache(maxsize=4096)
def sum_dtype(stated: Problem, kernel: str | None) -> np.dtype[Any]:
    """What the kernel of a product adds up in: the dtype to wait for an epilogue in."""
    return np.dtype(kernels.choose(stated, kernel).kernel.roundings(stated).accumulator)


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
        bias=after.bias is not None,
        activation=after.activation,
        residual=None if after.residual is None else after.residual.dtype.name,
        x_along=x_along,
        w_along=w_along,
        layout="words16" if isinstance(w, Words16) else "rows",
        batch_invariant=options.batch_invariant,
        device=device(),
        threads=pool.get_num_threads(),
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

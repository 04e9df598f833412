"""From two operands to the problem that kernels are asked: orientation, leading axes, dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit import device as places
from lowbit import kernels
from lowbit.array import QArray
from lowbit.formats import Format
from lowbit.formats.reference import Packed
from lowbit.kernels import Problem, Verdict
from lowbit.kernels.words16 import Words16

Array = npt.NDArray[Any]
Operand = Array | QArray


class Options(NamedTuple):
    """What a call asks for beyond its operands' values; part of the key of a bound product."""

    out_dtype: np.dtype[Any] | None = None
    activation: str | None = None
    batch_invariant: bool = False
    kernel: str | None = None
    bias: bool = False
    residual: np.dtype[Any] | None = None
    """dtype in which it comes."""
    x_format: Format | None = None
    """To quantize a dense x to."""


PLAIN = Options()
REARRANGED = "permuted or divided columns that x cannot undo; the reference takes the values"
EACH = "every matrix of the stack by itself"
TOGETHER = "all matrices of the stack in one launch"


@cache
def device() -> str:
    """Backend and instruction set of this machine."""
    return places.host_problem()


@dataclass(frozen=True, slots=True)
class Stated:
    """A product before any kernel is chosen: a problem of kernels, and how results lie."""

    problem: Problem
    shape: tuple[int, ...]
    """Of the result, with the axes that one-dimensional operands lack."""
    dropped: tuple[bool, bool]
    """Whether the axes of rows and of columns go away in the end."""
    dtype: np.dtype[Any]
    turned: bool = False
    """The weight is on the left: kernels compute the transpose, the epilogue follows."""
    exact: bool = False
    """No kernel describes it: the reference multiplies float64 values."""
    adapted: bool = False
    """x is divided and permuted first, as the weight's columns ask."""
    flat: bool = False
    """All rows of x are those of one matrix."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Shape of the result; `shape` itself where nothing is dropped."""
        rows, columns = self.dropped
        if not rows and not columns:
            return self.shape
        last = [self.shape[-2:][i] for i, gone in enumerate((rows, columns)) if not gone]
        return (*self.shape[:-2], *last)

    def note(self, together: bool) -> str:
        """What `explain` adds in words; `together`: one launch computes every matrix."""
        if self.turned:
            return "computed as the transpose of w.T @ x.T"
        if self.adapted:
            return "x is divided and permuted first, as the weight's columns ask"
        return "" if self.flat else TOGETHER if together else EACH


def state(left: Operand, right: Operand, options: Options) -> Stated:
    """Describe left @ right; of the operands, one a QArray, no value is looked at."""
    rows = left.shape if left.ndim > 1 else (1, *left.shape)
    columns = right.shape if right.ndim > 1 else (*right.shape, 1)
    if rows[-1] != columns[-2]:
        remedy = ""
        if rows[-1] == columns[-1]:
            remedy = ". A weight stored as (N, K) comes in as w.T, or use lowbit.linear"
        raise ValueError(
            f"matmul: x has {rows[-1]} columns, w has {columns[-2]} rows; shapes "
            f"{left.shape} and {right.shape}{remedy}"
        )
    try:
        lead = np.broadcast_shapes(rows[:-2], columns[:-2])
    except ValueError:
        raise ValueError(
            f"matmul: leading axes {rows[:-2]} and {columns[:-2]} do not broadcast"
        ) from None
    shape = (*lead, rows[-2], columns[-1])
    dtype = options.out_dtype or promoted(left.dtype, right.dtype)
    dropped = left.ndim == 1, right.ndim == 1
    if isinstance(right, QArray):
        return _state_right(left, right, shape, dropped, dtype, options)
    assert isinstance(left, QArray)
    along = left._vector or not left._transposed
    plain = Options(batch_invariant=options.batch_invariant)
    problem = _problem(shape[-1], rows[-1], right.dtype.name, left, along, plain, "float32")
    problem = replace(problem, out=sum_dtype(problem, options.kernel).name)
    exact = rearranged(left)
    return Stated(problem, shape, dropped, dtype, turned=True, exact=exact, flat=len(shape) == 2)


def _state_right(
    left: Operand,
    w: QArray,
    shape: tuple[int, ...],
    dropped: tuple[bool, bool],
    dtype: np.dtype[Any],
    options: Options,
) -> Stated:
    """The weight is on the right: the kernels' own orientation."""
    kind: Format | str
    adapted, along = False, True
    if isinstance(left, QArray):
        kind, along = left.format, left._vector or not left._transposed
    else:
        adapted = rearranged(w) and w._transposed
        kind = options.x_format or adapted_dtype(left.dtype, w if adapted else None).name
    matrices = left.ndim < 3 or isinstance(kind, str) or (along and flattens(kind))
    flat = len(w._parts.shape) == 2 and matrices
    rows = math.prod(shape[:-1]) if flat else shape[-2]
    problem = _problem(
        rows, left.shape[-1], kind, w, w._transposed or w._vector, options, dtype.name, along
    )
    if not flat and _alike(left, w):
        problem = replace(problem, batches=math.prod(shape[:-2]))
    exact = rearranged(left) or (rearranged(w) and not adapted)
    return Stated(problem, shape, dropped, dtype, exact=exact, adapted=adapted, flat=flat)


def _alike(x: Operand, w: QArray) -> bool:
    """Whether x has a matrix for each of w's, which follow each other in memory."""
    lead = w._parts.shape[:-2]
    # A stack of none is for nobody to compute, and would cost nothing.
    if x.shape[:-2] != lead or 0 in lead or not isinstance(w._parts, Packed):
        return False
    return len(lead) == 1 or w._parts.codes.flags.c_contiguous


def _problem(
    m: int,
    k: int,
    kind: Format | str,
    w: QArray,
    w_along: bool,
    options: Options,
    out: str,
    x_along: bool = True,
) -> Problem:
    rows, columns = w._parts.shape[-2:]
    place = w._place
    residual = None
    if options.residual is not None:
        residual = residual_dtype(options.residual, out).name
    return Problem(
        m,
        rows if w_along else columns,
        k,
        kind,
        w.format,
        out,
        bias=options.bias,
        activation=options.activation,
        residual=residual,
        x_along=x_along,
        w_along=w_along,
        layout=w.layout if w_along and Words16.meets(w.format, kind, k) else "rows",
        batch_invariant=options.batch_invariant,
        device=place.problem(w._parts.codes) if isinstance(place, places.Gpu) else device(),
        threads=place.threads(),
    )


@cache
def promoted(left: np.dtype[Any], right: np.dtype[Any]) -> np.dtype[Any]:
    """NumPy's promotion; float16 with bfloat16 is float32."""
    if left == right:
        return left.newbyteorder("=")
    if {left.name, right.name} == {"float16", "bfloat16"}:
        return np.dtype(np.float32)
    return np.promote_types(left, right).newbyteorder("=")


def residual_dtype(residual: np.dtype[Any], out: str) -> np.dtype[Any]:
    """What a residual is added as: its own dtype, or for integers and float64 that of the sum."""
    if residual.kind in "iu" or residual.itemsize == 8:
        return np.dtype(np.float64 if out == "float64" else np.float32)
    return residual


@lru_cache(maxsize=4096)
def sum_dtype(stated: Problem, kernel: str | None) -> np.dtype[Any]:
    """What the kernel of a product adds up in: the dtype to wait for an epilogue in."""
    return np.dtype(kernels.choose(stated, kernel).kernel.roundings(stated).accumulator)


def flattens(fmt: Format) -> bool:
    """Every row has scales of its own, so a stack of matrices is one tall matrix."""
    return fmt.scale.block[0] == 1 and not fmt.tensor_scale


def rearranged(operand: Operand) -> bool:
    """Whether a column permutation or a divisor stands between the parts and the values."""
    return isinstance(operand, QArray) and (
        operand._columns is not None or operand._divisor is not None
    )


def adapted(x: Array, columns: Array | None, divisor: Array | None) -> Array:
    """Move a weight's divisor and column permutation over to x, where both meet K."""
    if divisor is not None:
        x = x.astype(np.promote_types(x.dtype, np.float32)) / divisor
    return x if columns is None else x[..., columns]


def adapted_dtype(x: np.dtype[Any], w: QArray | None) -> np.dtype[Any]:
    """Of x after `adapted`, where the weight asks for that."""
    if w is None or w._divisor is None:
        return x
    return np.promote_types(x, np.float32)


def reference_alone() -> list[Verdict]:
    """What the kernels say where x cannot undo a permutation or a divisor of columns."""
    verdicts = [
        Verdict(k, None if k.name == "reference" else REARRANGED, None)
        for k in kernels.registered()
    ]
    return sorted(verdicts, key=lambda v: v.refusal is not None)

"""Whether an answer is right: a derived bound for what a contender says it computes.

A contender multiplies numbers of its own: w' as it holds the weights, and x' if it quantizes x
on the way in. With u the unit roundoff of its sums, it may be this far from x' @ w'.T:

    dx |w'|.T + (gamma(roundings) + relative) |x'| size(w').T + out |y|

size(w') is |w'|, or more where a contender takes w' apart into a difference of larger numbers.
dx is what is not known about x': one step where x lies so near to the middle between two codes
that rounding decides, and else the roundings of the scale. gamma(n) = n u / (1 - n u) bounds
n roundings of each product on its way into the sum, in any order of summation (Higham, Accuracy
and Stability of Numerical Algorithms, 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.work import Array, Part, parts

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the gap above 1, bfloat16's doubled: some contenders cut instead of rounding."""


class Wrong(Exception):
    """An answer lies outside of its bound."""


@dataclass(frozen=True)
class Dynamic:
    """x' = clip(round(x / s), -128, 127) s with s = max |x| / levels over each group of a row."""

    group: int
    scale: str = "float32"
    """dtype that s is stored in; codes come from s before that rounding."""
    levels: float = 127.0

    def quantize(self, x: Array) -> tuple[Array, Array]:
        """x' and the largest distance that another's x' may have from it."""
        rows, k = x.shape
        padded = np.zeros((rows, -(-k // self.group) * self.group))
        padded[:, :k] = x
        groups = padded.reshape(rows, -1, self.group)
        step = np.abs(groups).max(-1, keepdims=True) / self.levels
        ratio = np.divide(groups, step, out=np.zeros_like(groups), where=step > 0)
        stored = step.astype(self.scale).astype(np.float64)
        # The quotient has a few float32 roundings, of numbers up to `levels`.
        undecided = np.abs(np.abs(ratio % 1) - 0.5) < 4 * self.levels * UNIT["float32"]
        values = np.clip(np.rint(ratio), -128, 127) * stored
        unsure = undecided * stored + 2 * np.maximum(UNIT[self.scale], UNIT["float32"]) * np.abs(
            values
        )
        return values.reshape(rows, -1)[:, :k], unsure.reshape(rows, -1)[:, :k]


@dataclass(frozen=True)
class Meaning:
    """What a contender says it computes, and with which roundings."""

    weight: Callable[[Array], Array]
    """w' in float64: the rows asked for."""
    roundings: int
    """Of a product on its way into the sum, at most."""
    accumulator: str = "float32"
    size: Callable[[Array], Array] | None = None
    """What the roundings act on, for the rows asked for, where that is more than |w'|."""
    relative: float = 0.0
    """Relative error of a product besides: operands rounded inside."""
    out: str = "float32"
    """dtype of the answer."""
    dynamic: Dynamic | None = None
    """How x is quantized on the way in."""

    def bound(self, x: Array, columns: Array) -> tuple[Array, Array]:
        """x' @ w'[columns].T and how far an answer may be from it."""
        exact, unsure = x.astype(np.float64), np.zeros(())
        if self.dynamic is not None:
            exact, unsure = self.dynamic.quantize(exact)
        weight = self.weight(columns).astype(np.float64)
        value = exact @ weight.T
        parts = np.abs(weight) if self.size is None else self.size(columns)
        size = np.abs(exact) @ parts.T
        share = self.roundings * UNIT[self.accumulator]
        if share >= 1:
            raise ValueError(f"{self.roundings} roundings in {self.accumulator} leave no bound")
        error = (share / (1 - share) + self.relative) * size
        if self.dynamic is not None:
            error = error + unsure @ np.abs(weight).T
        if self.out != "int32":
            error = error + UNIT[self.out] * (np.abs(value) + error)
        return value, error


def share_of_bound(answer: Array, x: Array, n: int, meaning: Meaning) -> float:
    """Largest share of its bound that a checked entry uses.

    Raises
    ------
    Wrong
        An entry lies outside, is no number, or the shape is another.
    """
    if answer.shape != (x.shape[0], n):
        raise Wrong(f"want an answer of shape {(x.shape[0], n)}, got {answer.shape}")
    worst = 0.0
    for part in parts(x.shape[0], n):
        value, error = meaning.bound(x[part.rows], part.columns)
        got = answer[np.ix_(part.rows, part.columns)].astype(np.float64)
        worst = max(worst, compare(got, value, error, part))
    return worst


def compare(got: Array, value: Array, error: Array, part: Part) -> float:
    with np.errstate(invalid="ignore"):
        distance = np.abs(got - value)
    outside = ~(distance <= error)
    if outside.any():
        i, j = (int(at) for at in np.argwhere(outside)[0])
        raise Wrong(
            f"{int(outside.sum())} of {outside.size} checked entries are outside of the bound, "
            f"first y[{part.rows[i]}, {part.columns[j]}] = {got[i, j]:.6g}, "
            f"want {value[i, j]:.6g} +- {error[i, j]:.3g}"
        )
    return float(np.max(distance / np.where(error > 0, error, 1), initial=0.0))

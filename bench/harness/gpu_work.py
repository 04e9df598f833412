"""Operands on the GPU, and the part of an answer that is compared with the exact product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  (names bfloat16 to NumPy)
import numpy as np

from harness.checking import Meaning, compare
from harness.work import FEW, Array, Part, Work

SPARSE = 64
"""One column of so many is checked with few rows of x."""
MOST_ROWS = 256
"""Rows of x that are checked with few columns; of more rows, one of each so many."""


@dataclass(frozen=True)
class Operands:
    """The numbers that every contender starts from, made where they are used.

    `xp` is CuPy; NumPy will do where only what is computed matters.
    """

    work: Work
    rows: int
    """Most rows of x that are asked for; fewer rows are the first of them."""
    xp: Any = field(repr=False)
    seed: int = 0

    def weight(self) -> Any:
        """float32 (n, k), made anew at each call: it is large, and wanted once."""
        return self._normal(self.seed, self.work.n, self.work.k)

    def x(self, rows: int, dtype: str) -> Any:
        """(rows, k) of a float dtype."""
        return self._normal(self.seed + 1, self.rows, self.work.k)[:rows].astype(dtype)

    def _normal(self, seed: int, rows: int, columns: int) -> Any:
        # CuPy's seeds are single numbers; the shape is part of it so that no two are alike.
        generator = self.xp.random.default_rng(seed + 1009 * rows + 1_000_003 * columns)
        return generator.standard_normal((rows, columns), dtype=self.xp.float32)


def host(array: Any) -> Array:
    """An array of CuPy, PyTorch or NumPy in the host's memory."""
    if hasattr(array, "detach"):
        numbers: Array = array.detach().float().cpu().numpy()
        return numbers
    return array.get() if hasattr(array, "get") else np.asarray(array)


def spots(m: int, n: int, seed: int = 0) -> tuple[Part, Part]:
    """Which entries of an answer (m, n) are checked.

    A random column out of each `SPARSE` with a few rows, and a random row out of at most
    `MOST_ROWS` equal runs with a few columns. Columns depend on n alone: contenders keep what
    they mean.
    """
    columns_of, rows_of = np.random.default_rng(seed), np.random.default_rng([seed, m])
    starts = np.arange(0, n, SPARSE)
    dense = np.minimum(starts + columns_of.integers(0, SPARSE, starts.size), n - 1)
    few_columns = np.unique(np.r_[0, n - 1, columns_of.integers(0, n, FEW)])
    step = -(-m // MOST_ROWS)
    starts = np.arange(0, m, step)
    many = np.minimum(starts + rows_of.integers(0, step, starts.size), m - 1)
    few_rows = np.unique(np.r_[0, m - 1, rows_of.integers(0, m, FEW)])
    return (
        Part(few_rows, np.unique(np.r_[dense, few_columns])),
        Part(np.unique(np.r_[0, many, m - 1]), few_columns),
    )


class Kept:
    """Weights of some rows in float64, fetched once for each set of rows."""

    def __init__(self, fetch: Callable[[Array], Array]) -> None:
        self._fetch, self._known = fetch, dict[bytes, Array]()

    def __call__(self, rows: Array) -> Array:
        """float64 (rows, k)."""
        key = rows.tobytes()
        if key not in self._known:
            self._known[key] = self._fetch(rows).astype(np.float64)
        return self._known[key]


def share_of_bound(
    answer: Any,
    x: Callable[[int, Array], Array],
    m: int,
    n: int,
    meaning: Meaning,
) -> float:
    """Largest share of its bound that a checked entry uses.

    Parameters
    ----------
    answer : array of CuPy, PyTorch or NumPy, (m, n)
    x : callable
        (m, rows) to those rows of the x that has m, in the host's memory.
    m, n : int
    meaning : Meaning
    """
    if tuple(answer.shape) != (m, n):
        raise ValueError(f"want an answer of shape {(m, n)}, got {tuple(answer.shape)}")
    worst = 0.0
    for part in spots(m, n):
        value, error = meaning.bound(x(m, part.rows), part.columns)
        got = host(_picked(answer, part)).astype(np.float64)
        worst = max(worst, compare(got, value, error, part))
    return worst


def _picked(answer: Any, part: Part) -> Any:
    """answer[rows][:, columns], on the answer's own device: all of it would take long to fetch."""
    rows, columns = part.rows, part.columns
    if hasattr(answer, "detach"):
        import torch

        rows, columns = (torch.from_numpy(i).to(answer.device) for i in (rows, columns))
    elif hasattr(answer, "get"):
        import cupy

        rows, columns = cupy.asarray(rows), cupy.asarray(columns)
    return answer[rows][:, columns]

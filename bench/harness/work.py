"""What is computed: y = x @ w.T, its seeded operands, and the part of y that is checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes  # noqa: F401  (names bfloat16 to NumPy)
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Work:
    """y (m, n) = x (m, k) @ w (n, k).T; how many rows x has is said with each call."""

    n: int
    k: int
    weight: str
    """lowbit's name of the format that w is in, or comes closest to."""
    x: str = "float32"
    """dtype that x comes in; the name of a lowbit format where it comes quantized."""
    inner: str | None = None
    """lowbit's name of the format that x is quantized to on the way in."""

    def __str__(self) -> str:
        inner = f" as {self.inner}" if self.inner else ""
        return f"{self.weight} ({self.n}, {self.k}) x {self.x}{inner}"

    @property
    def dense(self) -> bool:
        """Whether w is not quantized at all."""
        return self.weight in ("float32", "float16", "bfloat16")

    @property
    def integer(self) -> bool:
        """Whether int8 is multiplied with integers."""
        return self.x.startswith("int8") or (self.inner or "").startswith("int8")

    @property
    def group(self) -> int:
        """Columns that share a scale; all of them where the format has no groups."""
        word = next((w for w in self.weight.split("_") if w[0] == "g" and w[1:].isdecimal()), None)
        return int(word[1:]) if word else self.k


@dataclass(frozen=True)
class Operands:
    """The float32 numbers that every contender starts from, the same in every process."""

    work: Work
    rows: int
    """Most rows of x that are asked for; fewer rows are the first of them."""
    seed: int = 0

    @cached_property
    def weight(self) -> Array:
        """w before quantization."""
        rng = np.random.default_rng([self.seed, self.work.n, self.work.k])
        return rng.standard_normal((self.work.n, self.work.k), np.float32)

    @cached_property
    def x(self) -> Array:
        """x, exact in bfloat16 where it comes in bfloat16."""
        rng = np.random.default_rng([self.seed + 1, self.rows, self.work.k])
        x = rng.standard_normal((self.rows, self.work.k), np.float32)
        return x.astype("bfloat16").astype(np.float32) if self.work.x == "bfloat16" else x


@dataclass(frozen=True)
class Part:
    """Entries y[rows][:, columns]."""

    rows: Array
    columns: Array


FEW = 16


def parts(m: int, n: int, seed: int = 0) -> tuple[Part, Part]:
    """Which entries of y are checked: each row, and each 16 columns, is met by both parts.

    A kernel's mistakes come in panels of columns, rows of a tile and ragged ends. The first part
    has few rows, and a random column out of each 16; the second has all rows, and few columns.
    """
    rng = np.random.default_rng(seed)
    rows = np.unique(np.r_[0, m - 1, rng.integers(0, m, FEW)])
    starts = np.arange(0, n, FEW)
    dense = np.minimum(starts + rng.integers(0, FEW, starts.size), n - 1)
    few = np.unique(np.r_[0, n - 1, rng.integers(0, n, FEW)])
    return Part(rows, np.unique(np.r_[dense, few])), Part(np.arange(m), few)

"""What a kernel promises. Declaring one costs nothing; `build` compiles, and only when chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.formats import Format

Array = npt.NDArray[Any]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
ACTIVATION_ERROR = {
    None: (0.0, 0.0),
    "relu": (0.0, 0.0),
    "gelu": (8 * 2.0**-24, 2.0**-140),
    "gelu_tanh": (5 * 2.0**-24, 2.0**-140),
    "silu": (5 * 2.0**-24, 2.0**-140),
}
"""name: (relative, absolute); |computed - exact| <= relative * |exact| + absolute, for every
float32 argument. Measured over all of 2**-30 <= |x| < 2**8, where the worst were 7.7, 4.1 and 4.1
times 2**-24, and over every 509th elsewhere (float64 erfc and exp of torch)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything dispatch may look at: out = activation(alpha * (x @ w.T) + bias) + residual.

    Hashable, so a choice can be cached and replayed on a machine that one does not own.
    """

    m: int
    n: int
    k: int
    x: Format | str
    """Format of the left operand, or the dtype of a dense one."""
    w: Format
    out: str = "float32"
    bias: bool = False
    activation: str | None = None
    residual: str | None = None
    """dtype of the residual."""
    x_along: bool = True
    """The blocks of x's scales lie along the contraction axis (always so for dense x)."""
    w_along: bool = True
    layout: str = "rows"
    """Arrangement that w is held in."""
    batch_invariant: bool = False
    """A row's bits must not depend on m."""
    device: str = "cpu:generic"
    """Backend, then its instruction set."""
    threads: int = 1
    batches: int = 1
    """Matrices of a stack, of both operands and of the result: as many products of this shape."""

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k * self.batches

    @property
    def bytes(self) -> int:
        """Bytes that have to move at least once: both operands and the result."""
        moved = format_bytes(self.w, self.n, self.k) + self.m * self.n * itemsize(self.out)
        if isinstance(self.x, str):
            moved += self.m * self.k * itemsize(self.x)
        else:
            moved += format_bytes(self.x, self.m, self.k)
        return moved * self.batches


@dataclass(frozen=True, slots=True)
class Epilogue:
    """The operands of what follows the product; None where a step is absent."""

    alpha: float = 1.0
    bias: Array | None = None
    """float32 (N,); float64 where the result is."""
    activation: str | None = None
    residual: Array | None = None
    """(M, N) of the result's dtype or float32."""


Run = Callable[[Any, Epilogue, Array], None]
"""run(x, epilogue, out): x an ndarray (M, K) or its parts, out (M, N).

Of a stack, with a third axis before these.
"""

Bind = Callable[[Any], Run]
"""bind(w): whatever follows from the weight's parts alone, done once."""


class Outcome(Enum):
    """What a run that quantizes x has to say."""

    NOT_FINITE = "x holds NaN or infinities"


NOT_FINITE = Outcome.NOT_FINITE
"""Given back instead of a result: the caller quantizes x in the reference, which says where."""

FusedRun = Callable[[Array, Epilogue, Array], Outcome | None]
"""run(x, epilogue, out) with a dense x (M, K): C-contiguous, aligned, of native byte order.

Codes and scales, and so the result, are those of `lowbit.quantize(x, problem.x)` with its
defaults, bit for bit. What `out` holds with NOT_FINITE does not matter.
"""

FusedBind = Callable[[Any], FusedRun]
"""bind(w), as `Bind`."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute a product."""

    name: str
    device: str
    """Backend: "cpu" or "cuda"."""
    accepts: Callable[[Problem], str | None]
    """None is yes; a string is the reason for no."""
    cost: Callable[[Problem], float]
    """Seconds, estimated."""
    build: Callable[[Problem], Bind]
    roundings: Callable[[Problem], Roundings]
    """The arithmetic that the published error bound is derived from."""
    layouts: tuple[str, ...] = ("rows",)
    """Arrangements of w that it reads; the last one is the one it likes best."""
    describe: Callable[[Problem], str] | None = None
    """For an accepted problem: tiles and schedule, for `explain`."""
    stacks: bool = False
    """It computes all matrices of a stack at once; others are never asked for more than one."""
    by_name: bool = False
    """Never chosen unless it is asked for."""
    fused: Callable[[Problem, str], FusedBind | None] | None = None
    """fused(problem, dtype): for an accepted problem whose x is a format, the same product from a
    dense x of this dtype, quantized inside; None where it does not do that."""

    def asked(self, p: Problem) -> Problem:
        """What it is asked of a stack: all of it, or one matrix."""
        return p if self.stacks or p.batches == 1 else replace(p, batches=1)


@dataclass(frozen=True)
class Roundings:
    """Roundings that a term of the sum meets, for the bound abs(C - exact) <= gamma(count) S.

    S = sum of abs(x) abs(w); gamma(n) = n u / (1 - n u) with u of `accumulator` (Higham, Accuracy
    and Stability of Numerical Algorithms, 2nd ed., 3.1 to 3.5).
    """

    accumulator: str
    """float32 or float64."""
    count: int
    """Roundings on the way of one product x[k] * w[k] into alpha * sum + bias, scales included."""
    note: str = ""
    """The order of the sum, in words."""
    activation: tuple[float, float] = (0.0, 0.0)
    """Relative and absolute error of the activation function, beside that of its argument."""
    weight: float = 0.0
    """Relative error of w's values, where they are rounded to a narrower type first."""
    flushed: float = 0.0
    """Most that a product loses where subnormal numbers are taken for zero."""


@dataclass(frozen=True)
class Verdict:
    """What one kernel says to a problem."""

    kernel: Kernel
    refusal: str | None
    seconds: float | None


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[dtype]


def format_bytes(fmt: Format, rows: int, columns: int) -> int:
    """Bytes of a quantized matrix: codes, scales, zero points, biases, second-level scale."""
    blocks = int(np.prod(fmt.grid((rows, columns)), dtype=object))
    total = rows * fmt.row_bytes(columns) + blocks * _scale_bytes(fmt.scale.element)
    if fmt.zero is not None:
        total += blocks * _scale_bytes(fmt.zero)
    if fmt.bias:
        total += blocks * _scale_bytes(fmt.scale.element)
    return total + (4 if fmt.tensor_scale else 0)


def _scale_bytes(kind: Any) -> int:
    return itemsize(kind) if isinstance(kind, str) else 1

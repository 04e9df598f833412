"""Why a kernel was chosen: every verdict, bytes, operations and the two floors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lowbit import device
from lowbit.kernels import Kernel, Problem, Verdict, cost, judge, pick

if TYPE_CHECKING:
    from lowbit.dispatch import Stated


_FLOATS = {"float8_e4m3fn": 8, "float8_e5m2": 8, "float4_e2m1fn": 4}
"""Bits that tensor cores multiply an element's values in, where they are not 16."""


@dataclass(frozen=True)
class Explanation:
    """The choice for one problem.

    Attributes
    ----------
    problem : Problem
    verdicts : list of Verdict
        The usable kernels first, the cheapest first.
    kernel : str
        Name of the chosen one.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(8, 64, dtype=np.float32), "int8_row").T
    >>> why = lb.explain(np.ones((1, 64)), w)
    >>> why.kernel, why.problem.operations
    ('reference', 1024)
    >>> next(v.refusal for v in why.verdicts if v.kernel.name == "matmul.cpu.fma")
    'computes in float32, float64 was asked for'
    """

    problem: Problem
    verdicts: list[Verdict] = field(repr=False)
    kernel: str
    note: str = ""

    @property
    def floors(self) -> tuple[float, float]:
        """Seconds that the bytes and the operations take at the machine's rates."""
        p = self.problem
        rates = device.limits(p.device, p.threads)
        if isinstance(p.x, str):
            narrow = p.x == "bfloat16"
            operations = rates.bfloat_operations if narrow else rates.float_operations
        elif p.x.element.integral and p.w.element.integral:
            operations = rates.integer_operations
        else:
            bits = max(_FLOATS.get(side.element.name, 16) for side in (p.x, p.w))
            operations = {
                4: rates.float4_operations,
                8: rates.float8_operations,
                16: rates.bfloat_operations,
            }[bits]
        return p.bytes / rates.bandwidth, p.operations / operations

    @property
    def rates(self) -> str:
        """The word "measured" if `lowbit bench --tune` was here, else "estimated"."""
        p = self.problem
        return device.limits(p.device, p.threads).word

    def source(self, kernel: Kernel) -> str:
        """Where a kernel's seconds come from: "measured" or "estimated" rates."""
        return self.rates if kernel.device == "cpu" else "estimated"

    def __str__(self) -> str:
        p = self.problem
        x = p.x if isinstance(p.x, str) else p.x.name
        moved, computed = self.floors
        floor = max(moved, computed)
        chosen = next(v for v in self.verdicts if v.kernel.name == self.kernel)
        lead = "" if p.batches == 1 else f"{p.batches}, "
        weight = f"({lead}{p.k}, {p.n}) {p.w.name}"
        if p.w_along:
            weight = f"({lead}{p.n}, {p.k}) {p.w.name}.{'mT' if lead else 'T'}"
        pair = f"({lead}{p.m}, {p.k}) {x} @ {weight} -> {p.out}"
        share = 100 * floor / (chosen.seconds or floor)
        floors = f"{time_text(moved)} to move, {time_text(computed)} to compute"
        one = chosen.kernel.asked(p)
        lines = [
            f"{pair} on {p.device}, {p.threads} threads",
            f"{p.bytes:,} bytes, {p.operations:,} operations",
            f"floors ({self.rates} machine): {floors}",
            f"expected share of the floor: {share:.0f} % (costs are {self.source(chosen.kernel)})",
            f"rounding: {chosen.kernel.roundings(one).note}",
        ]
        if chosen.kernel.describe is not None and chosen.refusal is None:
            lines.append(f"{chosen.kernel.name}: {chosen.kernel.describe(one)}")
        for v in self.verdicts:
            mark = "->" if v.kernel.name == self.kernel else "  "
            said = f"no: {v.refusal}"
            if v.seconds is not None:
                said = f"{time_text(v.seconds)} ({self.source(v.kernel)})"
            lines.append(f"{mark} {v.kernel.name:<16} {said}")
        if self.kernel == "reference":
            lines.append("the reference kernel is slow: it widens every value to float64")
            if not p.device.startswith("cpu"):
                lines.append("and runs on the host: operands are copied there, the result back")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def time_text(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def explain(
    x: Any,
    w: Any,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    x_format: Any = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
    kernel: str | None = None,
) -> Explanation:
    """Say which kernel `matmul` would run and why, without running it.

    Parameters
    ----------
    x, w, bias, activation, residual, x_format, out_dtype, batch_invariant, kernel
        As for `matmul`: a weight stored as (N, K) comes in as ``w.T``. Only shapes, dtypes and
        formats are read, so zeros will do.

    Returns
    -------
    Explanation
        ``str`` of it prints verdicts, bytes, operations and floors; ``kernel`` is the name.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(64, dtype=np.float32), "int4_g32", axis=0)
    >>> lb.explain(np.ones((1, 64), np.float32), w).problem.k
    64
    """
    from lowbit import dispatch, products

    left, right, _ = products.operands_of(x, w)
    shapes = left.shape, right.shape
    if shapes[0][-1] != shapes[1][-2 if right.ndim > 1 else -1]:
        raise ValueError(f"explain: shapes {shapes[0]} and {shapes[1]} do not multiply")
    options = products.options_of(
        left,
        None if bias is None else products.numbers(bias, "bias"),
        activation,
        None if residual is None else products.numbers(residual, "residual"),
        x_format,
        None,
        None,
        out_dtype,
        batch_invariant,
        kernel,
    )
    return explained(dispatch.state(left, right, options), kernel)


def explained(stated: Stated, kernel: str | None) -> Explanation:
    """What the kernels say to a stated product, and which of them runs."""
    from lowbit import dispatch

    problem = stated.problem
    verdicts = judge(problem)
    if stated.exact:
        verdicts = [
            replace(v, seconds=None if v.refusal else cost(v.kernel, problem))
            for v in dispatch.reference_alone()
        ]
    chosen = pick(verdicts, kernel).kernel
    note = stated.note(together=chosen.asked(problem).batches > 1)
    return Explanation(problem, verdicts, chosen.name, note)

"""Why a kernel was chosen: every verdict, bytes, operations and the two floors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lowbit import checks, interop
from lowbit.array import QArray
from lowbit.formats import Format
from lowbit.kernels import Problem, Verdict, judge, pick
from lowbit.kernels.cpu import machine
from lowbit.kernels.declare import ACTIVATIONS


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
        """Seconds that the bytes and the operations take at the machine's estimated rates."""
        p = self.problem
        rates = machine.estimate(p.device, p.threads)
        integer = isinstance(p.x, Format) and p.x.element.integral and p.w.element.integral
        return p.bytes / rates.bandwidth, p.operations / (
            rates.integer_operations if integer else rates.float_operations
        )

    def __str__(self) -> str:
        p = self.problem
        x = p.x if isinstance(p.x, str) else p.x.name
        moved, computed = self.floors
        floor = max(moved, computed)
        chosen = next(v for v in self.verdicts if v.kernel.name == self.kernel)
        weight = f"({p.n}, {p.k}) {p.w.name}.T" if p.w_along else f"({p.k}, {p.n}) {p.w.name}"
        pair = f"({p.m}, {p.k}) {x} @ {weight} -> {p.out}"
        share = 100 * floor / (chosen.seconds or floor)
        lines = [
            f"{pair} on {p.device}, {p.threads} threads",
            f"{p.bytes:,} bytes, {p.operations:,} operations",
            f"floors (estimated machine): {_time(moved)} to move, {_time(computed)} to compute",
            f"expected share of the floor: {share:.0f} % (costs are estimated)",
            f"rounding: {chosen.kernel.roundings(p).note}",
        ]
        for v in self.verdicts:
            mark = "->" if v.kernel.name == self.kernel else "  "
            said = f"no: {v.refusal}" if v.seconds is None else f"{_time(v.seconds)} (estimated)"
            lines.append(f"{mark} {v.kernel.name:<16} {said}")
        if self.kernel == "reference":
            lines.append("the reference kernel is slow: it widens every value to float64")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def _time(seconds: float) -> str:
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
    from lowbit.kernels.cpu import pool

    left, right, _ = products.operands_of(x, w)
    dtype = products.promoted(left.dtype, right.dtype)
    note = ""
    if isinstance(right, QArray) and not isinstance(left, QArray):
        if dispatch.rearranged(right) and right._transposed:
            note = "x is divided and permuted first, as the weight's columns ask"
        left, right = products.adapt(left, right)
    shapes = [s.shape for s in (left, right)]
    n = 1 if len(shapes[1]) == 1 else shapes[1][-1]
    k = shapes[0][-1]
    if k != shapes[1][-2 if len(shapes[1]) > 1 else -1]:
        raise ValueError(f"explain: shapes {shapes[0]} and {shapes[1]} do not multiply")
    if out_dtype is not None:
        dtype = checks.float_dtype(out_dtype, "out_dtype")
    if activation is not None:
        checks.choice(activation, ACTIVATIONS, "activation")
    x_kind: Format | str = left.format if isinstance(left, QArray) else left.dtype.name
    if x_format is not None:
        x_kind = checks.as_format(x_format, "x_format")
        if isinstance(left, QArray):
            products.quantized(left, x_kind, None)  # says why not
    x_along = not (isinstance(left, QArray) and left._transposed and left.ndim > 1)
    m = shapes[0][-2] if len(shapes[0]) > 1 else 1
    if len(shapes[0]) > 2 and len(shapes[1]) <= 2 and isinstance(right, QArray):
        if isinstance(x_kind, str) or (x_along and dispatch.flattens(x_kind)):
            m = int(np.prod(shapes[0][:-1]))
        else:
            note = note or "every matrix of the stack by itself"
    elif max(map(len, shapes)) > 2:
        note = note or "every matrix of the stack by itself"
    rest = None
    if residual is not None:
        given, _ = interop.to_numpy(residual, "residual")
        rest = products.residual_dtype(given, dtype).name
    epilogue = (bias is not None, activation, rest)
    if isinstance(right, QArray):
        w_kind = right.format
        w_along, held = right._transposed or right.ndim == 1, right.layout
    else:
        assert isinstance(left, QArray)
        # The kernels compute the transpose; the epilogue follows in NumPy.
        m, n, x_kind, w_kind = n, m, right.dtype.name, left.format
        w_along, x_along, held = x_along, True, left.layout
        epilogue, note = (False, None, None), "computed as the transpose of w.T @ x.T"
        dtype = np.dtype(np.float32)
    stated = Problem(
        m,
        n,
        k,
        x_kind,
        w_kind,
        dtype.name,
        bias=epilogue[0],
        activation=epilogue[1],
        residual=epilogue[2],
        x_along=x_along,
        w_along=w_along,
        layout=held if w_along else "rows",
        batch_invariant=batch_invariant,
        device=dispatch.device(),
        threads=pool.get_num_threads(),
    )
    if not isinstance(right, QArray):
        stated = replace(stated, out=dispatch.sum_dtype(stated, kernel).name)
    verdicts = judge(stated)
    if dispatch.rearranged(left) or dispatch.rearranged(right):
        verdicts = [
            replace(v, seconds=None if v.refusal else v.kernel.cost(stated))
            for v in dispatch.reference_alone()
        ]
    return Explanation(stated, verdicts, pick(verdicts, kernel).kernel.name, note)

"""lowbit's layers that end in a quantization: silu(gate) * up, and rmsnorm(x + residual)."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.checking import UNIT, Wrong
from harness.gpu_work import MOST_ROWS, Operands, host
from harness.work import Array, Work

import lowbit as lb
from lowbit.formats import reference
from lowbit.kernels import layers
from lowbit.kernels.cuda import fused
from lowbit.kernels.declare import ACTIVATION_ERROR
from peers.gpu import Built
from peers.gpu.conversions import parts_bytes, same

NAMES = ("lowbit.silu_mul", "lowbit.rmsnorm")
EPSILON = 1e-6


def missing() -> str | None:
    """Never."""
    return None


def version() -> str:
    """The release."""
    return f"lowbit {lb.__version__}"


def refusal(name: str, work: Work) -> str | None:
    """Formats whose scales belong to parts of one row."""
    fmt = lb.format(work.weight)
    if fmt.tensor_scale or fmt.scale.block[0] != 1:
        return f"{work.weight} shares a scale between rows, which are read one at a time"
    if fmt.zero is not None or fmt.bias:
        return f"{work.weight} has zero points, and the check here knows scales only"
    return None


def build(name: str, operands: Operands) -> Built:
    """One of the two, on (n, k) numbers of the work's dtype."""
    return (_silu_mul if name.endswith(".silu_mul") else _rmsnorm)(operands)


def _silu_mul(operands: Operands) -> Built:
    work = operands.work
    fmt = lb.format(work.weight)

    def pair() -> tuple[Any, Any]:
        return operands.weight().astype(work.x), operands.x(work.n, work.x)

    sets = [pair()]
    moved = 2 * sets[0][0].nbytes + parts_bytes(fused.silu_mul_quantize(*sets[0], fmt).parts)

    def check(answer: Any, m: int) -> float:
        rows = rows_of(work.n)
        got = _settled(answer, rows)
        gate, up = (host(each[operands.xp.asarray(rows)]) for each in sets[0])
        wide = gate.astype(np.float64)
        exact = wide / (1 + np.exp(-wide)) * up.astype(np.float64)
        # silu itself, its rounding to x's dtype, the product's.
        relative = (1 + ACTIVATION_ERROR["silu"][0]) * (1 + UNIT[work.x]) ** 2 - 1
        return share_of_steps(got, exact, relative)

    return Built(
        weight_bytes=moved,
        copy=lambda: sets.append(pair()),
        take=lambda m: None,
        call=lambda _, i: fused.silu_mul_quantize(*sets[i], fmt),
        check=check,
        moved=lambda m: moved,
    )


def _rmsnorm(operands: Operands) -> Built:
    work, xp = operands.work, operands.xp
    fmt = lb.format(work.weight)

    def three() -> tuple[Any, Any, Any]:
        x, residual = operands.weight().astype(work.x), operands.x(work.n, work.x)
        return x, residual, operands.x(1, work.x)[0]

    sets = [three()]

    def call(_: None, i: int) -> Any:
        x, residual, weight = sets[i]
        return fused.rmsnorm_quantize(x, weight, EPSILON, fmt, residual)

    pending, updated = call(None, 0)
    moved = 2 * sets[0][0].nbytes + updated.nbytes + parts_bytes(pending.parts)

    def check(answer: Any, m: int) -> float:
        rows = rows_of(work.n)
        at = xp.asarray(rows)
        x, residual, weight = sets[0]
        normal, total = layers.rmsnorm(host(x[at]), host(weight), EPSILON, host(residual[at]))
        got, wanted = _settled(answer[0], rows), lb.quantize(normal, work.weight)
        same("codes", got.codes, wanted.codes)
        same("scales", got.scales, wanted.scales)
        same("residual", host(answer[1][at]), total)
        return 0.0

    return Built(
        weight_bytes=moved,
        copy=lambda: sets.append(three()),
        take=lambda m: None,
        call=call,
        check=check,
        moved=lambda m: moved,
    )


def rows_of(n: int) -> Array:
    """The rows that are checked: all of them would take the host longer than the GPU."""
    step = -(-n // MOST_ROWS)
    return np.unique(np.r_[np.arange(0, n, step), n - 1])


def _settled(pending: Any, rows: Array) -> reference.Packed:
    """Some rows of the parts, in the host's memory."""
    parts = pending.settled()
    if parts is None:
        raise Wrong("the kernels left the numbers to the reference")
    codes, scales = (np.ascontiguousarray(host(p)[rows]) for p in (parts.codes, parts.scales))
    return reference.Packed(parts.format, (len(rows), parts.shape[-1]), codes, scales)


def share_of_steps(got: reference.Packed, exact: Array, relative: float) -> float:
    """Largest share of its bound that a value uses: half a step of the element, and `relative`.

    Raises
    ------
    Wrong
        A value lies further away.
    """
    values = np.array(sorted({v for v in got.format.element.values if np.isfinite(v)}))
    width = got.format.scale.block[1] or exact.shape[1]
    scales = np.repeat(got.scales.astype(np.float64), width, axis=1)[:, : exact.shape[1]]
    unsure = relative * np.abs(exact)

    def step(at: Array) -> Array:
        place = np.clip(np.searchsorted(values, at), 1, len(values) - 1)
        found: Array = values[place] - values[place - 1]
        return found

    low, high = (exact - unsure) / scales, (exact + unsure) / scales
    # The scale and the quotient are float32 numbers: two roundings.
    bound = scales * np.maximum(step(low), step(high)) / 2 + unsure + 2**-22 * np.abs(exact)
    distance = np.abs(reference.dequantize(got) - exact)
    if not (distance <= bound).all():
        i, j = (int(at) for at in np.argwhere(~(distance <= bound))[0])
        raise Wrong(f"y[{i}, {j}] is {distance[i, j]:.3g} off, allowed are {bound[i, j]:.3g}")
    return float((distance / np.where(bound > 0, bound, 1)).max(initial=0.0))

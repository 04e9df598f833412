"""Runs of columns between changes of a scale: what kernels of every backend sum up at a time."""

from __future__ import annotations

import math

from lowbit.kernels.declare import ACTIVATION_ERROR, Problem, Roundings

# alpha * tensor scales is a product of float64 rounded once, the bias is rounded to float32, and
# one fma joins the three.
FINAL_ROUNDINGS = 3


def segment_of(problem: Problem) -> int:
    """Columns between any two changes of a scale; K where nothing changes."""
    widths = [problem.w.scale.block[1]]
    if not isinstance(problem.x, str):
        widths.append(problem.x.scale.block[1])
    found = [w for w in widths if w is not None and w < problem.k]
    return math.gcd(*found) if found else problem.k


def blocks_of(block: int | None, segment: int, k: int) -> int:
    """Segments that share one scale of this block width."""
    return -(-k // segment) if block is None or block >= k else block // segment


def refuse_common(p: Problem) -> str | None:
    """What no generated kernel takes."""
    if not p.w_along:
        return "the scales of w lie across the contraction axis"
    if not p.x_along:
        return "the scales of x lie across the contraction axis"
    if p.x == "float64" or p.out == "float64":
        return "computes in float32, float64 was asked for"
    if p.m == 0 or p.n == 0 or p.k == 0:
        return "an axis is empty, there is nothing to compute"
    if not math.isfinite(p.w.element.values[0]):
        return f"{p.w.element.name} has no finite value at code 0, which pads its rows"
    return None


def integer_roundings(p: Problem, segment: int) -> Roundings:
    """The arithmetic of exact integer sums that meet their scales a segment at a time."""
    # int32 to float32, w_scale * that, one fma each segment.
    return Roundings(
        "float32",
        2 + -(-p.k // segment) + FINAL_ROUNDINGS,
        "exact integer sums, then segments ascending by fma",
        ACTIVATION_ERROR[p.activation],
    )

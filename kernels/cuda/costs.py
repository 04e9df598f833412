"""Seconds of a product, estimated from bytes, operations and how full the GPU is."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.formats import Format
from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda.product import Spec
from lowbit.kernels.declare import Problem

LAUNCH = 3e-6


@dataclass(frozen=True)
class Rates:
    """Of one generation, as its data sheets have them; not measured."""

    bandwidth: float
    """Bytes of device memory a second."""
    products: float
    """Multiplications and additions a second and multiprocessor by mma, 16-bit operands."""
    decoded: float
    """Codes a second and multiprocessor."""
    dense: float
    """Operations a second of the vendor's 16-bit products."""


RATES = {
    80: Rates(1.5e12, 2.5e12, 60e9, 250e12),
    89: Rates(0.8e12, 1.1e12, 90e9, 130e12),
    90: Rates(3.0e12, 3.0e12, 90e9, 700e12),
    100: Rates(6.0e12, 4.2e12, 100e9, 1500e12),
    120: Rates(1.5e12, 1.1e12, 100e9, 200e12),
}
"""By the lowest capability that they hold for."""


def rates(capability: int) -> Rates:
    """Those of the nearest generation that is not newer."""
    return RATES[max((c for c in RATES if c <= capability), default=min(RATES))]


def seconds(p: Problem, spec: Spec, shares: int) -> float:
    """Estimate: the slowest of memory, tensor cores and decoding, in whole waves of blocks."""
    device = launch.parse(p.device)
    found, tile = rates(device.capability), spec.tile
    across, down = -(-p.n // tile.rows), -(-p.m // tile.columns)
    blocks = across * down * shares
    waves = -(-blocks // device.processors)
    columns = -(-p.k // (shares * tile.depth)) * tile.depth
    terms = {"float32": 3, "float16": 1 if spec.operand == "Half" else 2}.get(str(p.x), 1)
    if isinstance(p.x, Format):
        terms = 1
    rate = found.products * (2 if spec.operand == "Byte" else 1)
    multiplied = 2 * tile.rows * tile.columns * columns * terms / rate
    decoded = tile.rows * tile.threads // (32 * spec.tile.w_warps) * columns / found.decoded
    decoded *= 4 if spec.method == "folded" else 1
    share = min(1.0, blocks / device.processors)  # of the multiprocessors, which share the memory
    moved = p.bytes / (found.bandwidth * share)
    return LAUNCH + max(moved, waves * max(multiplied, decoded))

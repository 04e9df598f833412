"""What a CPU can do at best: estimates until a machine has been measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lowbit.kernels.cpu import isa as isas


@dataclass(frozen=True)
class Rates:
    """Upper limits of a machine, per second."""

    bandwidth: float
    """Bytes read from memory."""
    float_operations: float
    """float32 multiplications and additions."""
    integer_operations: float
    """8-bit multiplications and additions."""


@cache
def estimate(device: str, threads: int) -> Rates:
    """Nominal rates: 3 GHz, one full vector FMA a cycle, 15 GB/s a core and 60 in all."""
    name = device.partition(":")[2]
    lanes = next((isa.lanes for isa in isas.RECORDS if isa.name == name), 4)
    dot = next((isa.dot for isa in isas.RECORDS if isa.name == name), "widen")
    widening = {"vpdpbusd512": 4.0, "sdot": 4.0, "pmaddwd": 1.0}.get(dot, 0.5)
    floats = threads * 3e9 * 2 * lanes
    return Rates(min(15e9 * threads, 60e9), floats, floats * widening)

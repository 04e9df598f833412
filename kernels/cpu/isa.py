"""Instruction sets as data: what generated code may use, and what this machine can execute."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Isa:
    """A fixed target of code generation.

    It never says "whatever this machine has": an object made for a record runs wherever the
    record runs, and gives the same bits there.
    """

    name: str
    triple: str
    """LLVM's name of architecture and system; empty is the machine's own."""
    cpu: str
    features: str
    lanes: int
    """float32 lanes of a vector register."""
    registers: int
    """Vector registers."""
    dot: str
    """How four int8 products are summed: vpdpbusd512, pmaddwd, sdot or widen."""
    permute: str
    """How a table of 16 floats is looked up: vpermps512, vpermps256x2 or load."""
    pdep: bool
    """BMI2's pdep is there and fast."""
    needs: tuple[str, ...] = ()
    """Flags of /proc/cpuinfo without which the code must not be executed."""


_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

RECORDS: tuple[Isa, ...] = (
    Isa(
        name="avx512vnni",
        triple="x86_64-unknown-linux-gnu",
        cpu="x86-64-v4",
        # LLVM tunes x86-64-v4 for early Skylake, where 512 bits cost clock rate.
        features="-prefer-256-bit,+avx512vnni",
        lanes=16,
        registers=32,
        dot="vpdpbusd512",
        permute="vpermps512",
        pdep=True,
        needs=(*_V4, "avx512_vnni"),
    ),
    Isa(
        name="avx2",
        triple="x86_64-unknown-linux-gnu",
        cpu="x86-64-v3",
        features="",
        lanes=8,
        registers=16,
        dot="pmaddwd",
        permute="vpermps256x2",
        # Microcoded on AMD before Zen 3: hundreds of cycles.
        pdep=False,
        needs=_V3,
    ),
    Isa(
        name="neon",
        triple="aarch64-unknown-linux-gnu",
        cpu="generic",
        features="+neon,+dotprod",
        lanes=4,
        registers=32,
        dot="sdot",
        permute="load",
        pdep=False,
        needs=("asimd", "asimddp"),
    ),
    Isa(
        name="generic",
        triple="",
        cpu="generic",
        features="",
        lanes=4,
        registers=16,
        dot="widen",
        permute="load",
        pdep=False,
    ),
)


@cache
def runnable() -> tuple[Isa, ...]:
    """Return the records this machine can execute, best first; "generic" is always the last."""
    flags = _flags()
    system = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return tuple(
        isa
        for isa in RECORDS
        if not isa.triple
        or (isa.triple == f"{system}-unknown-linux-gnu" and flags.issuperset(isa.needs))
    )


def host() -> Isa:
    """Return the record that kernels are compiled for; LOWBIT_ISA=name forces another one."""
    name = os.environ.get("LOWBIT_ISA")
    if not name:
        return runnable()[0]
    for isa in runnable():
        if isa.name == name:
            return isa
    legal = ", ".join(isa.name for isa in runnable())
    raise ValueError(f"LOWBIT_ISA: {name!r} does not run on this machine; {legal} do.")


def _flags() -> frozenset[str]:
    # The kernel lists a flag only where it also saves the registers of that set.
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()

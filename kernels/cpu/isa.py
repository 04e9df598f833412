"""Instruction sets as data: what generated code may use, and what this machine can execute."""

from __future__ import annotations

import ctypes
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
    """How int8 products are summed: vpdpbusd512, vpdpbusd256, pmaddubsw, smmla, sdot or widen."""
    permute: str
    """How a table of 16 floats is looked up: vpermps512, vpermps256x2, tbl4 or load."""
    pdep: bool
    """BMI2's pdep is there and fast."""
    bf16: bool = False
    """Pairs of bfloat16 are multiplied and summed in float32 (vdpbf16ps)."""
    vbmi: bool = False
    """Tables of 64 or 128 bytes are looked up by one instruction (vpermb, vpermi2b)."""
    amx: bool = False
    """Tiles of 16 rows are multiplied as a whole, int8 and bfloat16."""
    needs: tuple[str, ...] = ()
    """Flags of /proc/cpuinfo without which the code must not be executed."""


_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

_VNNI = (*_V4, "avx512_vnni")
_X86 = "x86_64-unknown-linux-gnu"
_ARM = "aarch64-unknown-linux-gnu"
# LLVM tunes x86-64-v4 for early Skylake, where 512 bits cost clock rate.
_WIDE = "-prefer-256-bit,+avx512vnni"


def _avx512(name: str, features: str = "", needs: tuple[str, ...] = (), **more: bool) -> Isa:
    return Isa(
        name=name,
        triple=_X86,
        cpu="x86-64-v4",
        features=_WIDE + features,
        lanes=16,
        registers=32,
        dot="vpdpbusd512",
        permute="vpermps512",
        pdep=True,
        needs=(*_VNNI, *needs),
        **more,
    )


def _avx2(
    name: str, dot: str, *, features: str = "", needs: tuple[str, ...] = (), pdep: bool
) -> Isa:
    return Isa(
        name=name,
        triple=_X86,
        cpu="x86-64-v3",
        features=features,
        lanes=8,
        registers=16,
        dot=dot,
        permute="vpermps256x2",
        pdep=pdep,
        needs=(*_V3, *needs),
    )


def _neon(name: str, dot: str, features: str, needs: tuple[str, ...]) -> Isa:
    return Isa(
        name=name,
        triple=_ARM,
        cpu="generic",
        features=features,
        lanes=4,
        registers=32,
        dot=dot,
        permute="tbl4",
        pdep=False,
        needs=needs,
    )


_AMX = ("amx_tile", "amx_int8", "amx_bf16")
_BF16, _BF16_NEEDS = ",+avx512bf16,+avx512vbmi", ("avx512_bf16", "avx512vbmi")

RECORDS: tuple[Isa, ...] = (
    _avx512(
        "amx",
        _BF16 + ",+amx-tile,+amx-int8,+amx-bf16",
        (*_BF16_NEEDS, *_AMX),
        bf16=True,
        vbmi=True,
        amx=True,
    ),
    _avx512("avx512bf16", _BF16, _BF16_NEEDS, bf16=True, vbmi=True),
    _avx512("avx512vnni"),
    _avx2("avxvnni", "vpdpbusd256", features="+avxvnni", needs=("avx_vnni",), pdep=True),
    # pdep is microcoded on AMD before Zen 3: hundreds of cycles.
    _avx2("avx2", "pmaddubsw", pdep=False),
    _neon("neoni8mm", "smmla", "+neon,+dotprod,+i8mm", ("asimd", "asimddp", "i8mm")),
    _neon("neon", "sdot", "+neon,+dotprod", ("asimd", "asimddp")),
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
    # Once tiles are permitted, the system refuses small stacks for signals: who names another
    # record is not asked for.
    wanted = os.environ.get("LOWBIT_ISA") or "amx"
    if flags.issuperset(_AMX) and not (wanted == "amx" and _tiles_permitted()):
        flags -= set(_AMX)
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


def _tiles_permitted() -> bool:
    """Ask Linux for the use of tile registers, for every thread of this process.

    They take 8 kB a thread, so the system wants to be asked (arch_prctl, since Linux 5.16).
    """
    request_permission, tile_data = 0x1023, 18
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(system_call(158, request_permission, tile_data) == 0)


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

"""What the machine code of a kernel holds, read with NVIDIA's disassemblers; no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache

from lowbit.kernels.cuda import compile
from lowbit.kernels.cuda.compile import Cubin

# CUDA C++ Programming Guide, technical specifications by compute capability: KiB of shared memory,
# warps and blocks of a multiprocessor. All have 65,536 registers.
LIMITS = {
    "sm_80": (164, 64, 32),
    "sm_86": (100, 48, 16),
    "sm_89": (100, 48, 24),
    "sm_90a": (228, 64, 32),
    "sm_100a": (228, 64, 32),
    "sm_120": (100, 48, 24),
    "sm_120a": (100, 48, 24),
}
RESERVED = 1024  # bytes of shared memory that CUDA takes for each block
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?!@!PT)(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Usage:
    """What a thread and a block of one kernel take."""

    registers: int
    stack: int
    """Bytes of a thread; spilled registers lie there."""
    local: int
    shared: int
    """Static bytes of a block."""

    def faults(self) -> list[str]:
        """What no kernel may have, in words."""
        found = {"stack, spilled registers or arrays": self.stack, "local memory": self.local}
        return [f"{size} bytes of {what}" for what, size in found.items() if size]


@cache
def tool(name: str) -> str | None:
    """Return the path of a tool: of NVIDIA's package, else of a CUDA toolkit."""
    packaged = (root / "cu13" / "bin" / name for root in compile.wheels())
    found = next((path for path in packaged if path.exists()), None)
    return str(found) if found else shutil.which(name)


def missing() -> str | None:
    """Say what is not there to disassemble with, or None."""
    lacking = [f"nvidia-cuda-{name}" for name in ("nvdisasm", "cuobjdump") if tool(name) is None]
    return f"pip install {' '.join(lacking)}, or a CUDA toolkit" if lacking else None


def usage(cubin: Cubin, arch: str) -> Usage:
    """Read what the compiler has noted."""
    noted = _run("cuobjdump", "--dump-resource-usage", cubin)
    numbers = re.search(rf"Function {re.escape(cubin.name)}:\s*\n(.*)", noted)
    assert numbers is not None, noted
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", numbers[1])}
    # From Hopper on the number holds what CUDA takes for itself.
    hidden = RESERVED if found["SHARED"] and int(arch.strip("sm_a")) >= 90 else 0
    return Usage(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"] - hidden)


def disassembled(cubin: Cubin) -> Counter[str]:
    """Return a kernel's instructions: full names with modifiers, how often each stands there."""
    listing = _run("nvdisasm", "--print-code", cubin)
    parts = [p for p in re.split(r"\n\.text\.", listing)[1:] if p.split(":", 1)[0] == cubin.name]
    assert len(parts) == 1, f"{len(parts)} sections of {cubin.name}"
    return opcodes(parts[0])


def opcodes(listing: str) -> Counter[str]:
    """Count instructions; those that never run (@!PT) fill gaps and count for nothing."""
    return Counter(_INSTRUCTION.findall(listing))


def count(found: Counter[str], pattern: str) -> int:
    """Instructions whose full name begins with the pattern."""
    return sum(times for name, times in found.items() if re.match(pattern, name))


@lru_cache(maxsize=4)  # several questions about one kernel follow each other
def _run(name: str, option: str, cubin: Cubin) -> str:
    program = tool(name)
    assert program is not None, missing()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin.code)
        file.flush()
        done = subprocess.run([program, option, file.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit a multiprocessor at a time."""
    kib, warps, most = LIMITS[arch]
    each = -(-threads // 32)
    # Registers are given out to a warp 256 at a time, on four schedulers.
    by_registers = 65536 // (-(-32 * registers // 256) * 256) // 4 * 4 // each
    return min(by_registers, kib * 1024 // (shared + RESERVED), warps // each, most)


def in_flight(text: str, shared: int, resident: int) -> int:
    """Bytes that a multiprocessor asks for before they are needed: all stages but one."""
    stages = re.search(r"\bstages = (\d+)", text)
    return 0 if stages is None else shared * resident * (int(stages[1]) - 1) // int(stages[1])

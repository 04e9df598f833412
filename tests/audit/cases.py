"""What the machine code of kernels must be like: one line a kernel, here and nowhere else.

Counts of tensor core instructions follow from a tile: 16-row tiles x 8-column tiles x steps of a
stage. That they come out exactly means that loops unrolled and nothing is multiplied twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from recorder import Recorder
from usual import DEVICES, DTYPES, Work, packed, product

import lowbit as lb
from lowbit.kernels.cuda import dequantize, fused, quantize
from lowbit.kernels.cuda.launch import Device, Source

ALL = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
BOTH = ("sm_80", "sm_90a")
HOPPER = ("sm_90a",)


@dataclass(frozen=True)
class Case:
    """A kernel, and what must be true of it on every architecture named."""

    work: str
    """``x @ w -> out``, ``x -> format``, ``silu x -> format`` or ``format -> dtype``."""
    m: int = 64
    """Rows of x, of 4096 columns, for a weight of 4096 rows."""
    kernel: str | None = None
    """Name of a kernel; None: the chosen one."""
    archs: tuple[str, ...] = BOTH
    registers: int = 255
    """Most of a thread."""
    blocks: int = 1
    """Fewest that a multiprocessor holds at a time."""
    exactly: dict[str, int] = field(default_factory=dict)
    """Beginning of an instruction's name, as a regular expression: how many."""
    at_least: dict[str, int] = field(default_factory=dict)
    at_most: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = f" M={self.m}" if "@" in self.work else ""
        return f"{self.work}{rows}{f' {self.kernel}' if self.kernel else ''}"

    def sources(self, arch: str) -> list[Source]:
        """The kernels, in the order of their launches."""
        recorder = Recorder(DEVICES.get(arch) or Device(int(arch.strip("sm_a")), 128, plain=True))
        left, out = self.work.split(" -> ")
        if "@" in left:
            x, w = left.split(" @ ")
            product(recorder, Work(x, w, out), self.m, 4096, 4096, self.kernel)
        elif left.startswith("silu "):
            values = np.zeros((64, 4096), DTYPES[left.removeprefix("silu ")])
            with recorder.asked_by(self.work):
                fused.silu_mul_quantize(values, values, lb.format(out))
        elif left in DTYPES:
            with recorder.asked_by(self.work):
                quantize.enqueue(lb.format(out), np.zeros((64, 4096), DTYPES[left]))
        else:
            values = np.zeros((64, 4096), DTYPES[out])
            with recorder.asked_by(self.work):
                dequantize.dequantize_to(packed(lb.format(left), values.shape), values)
        return list(recorder.sources)


COPIES = {"LDGSTS.E.BYPASS.128.ZFILL": 1}  # weights past L1, zeros beyond the edge
PAIRS = {"LDS.128": 4}

CASES = (
    # Few rows: latency is hidden by blocks, so several have to fit: three of
    # 48 KiB on sm_80, two where a multiprocessor has 100 KiB.
    Case("float16 @ int4_g128 -> float16", 1, "matmul.cuda.mma", ALL, 96, 2,
         {r"HMMA.16816.F32$": 8}, {**COPIES, **PAIRS}, {"LDGSTS": 24}),
    Case("bfloat16 @ int4_g128 -> bfloat16", 16, "matmul.cuda.mma", BOTH, 96, 3,
         {r"HMMA.16816.F32.BF16$": 16}, COPIES, {"LDGSTS": 24}),
    Case("float32 @ int4_g128 -> float32", 1, "matmul.cuda.mma", BOTH, 80, 3,
         {r"HMMA.16816.F32.BF16$": 12}, COPIES, {"LDGSTS": 24}),
    # Many rows: the sums of a tile live in registers, two blocks of four warps.
    Case("float16 @ int4_g128 -> float16", 64, "matmul.cuda.mma", ALL, 255, 1,
         {r"HMMA.16816.F32$": 64}, {**COPIES, "LDS.128": 16}, {"LDGSTS": 40}),
    Case("float16 @ int4_g128 -> float16", 128, "matmul.cuda.mma", BOTH, 255, 1,
         {r"HMMA.16816.F32$": 64}, COPIES, {"LDGSTS": 40}),
    Case("float32 @ int4_g128 -> float32", 64, "matmul.cuda.mma", BOTH, 255, 1,
         {r"HMMA.16816.F32.BF16$": 192}, COPIES, {"LDGSTS": 48}),
    Case("float16 @ uint4_g128_asym -> float16", 64, "matmul.cuda.mma", BOTH, 255, 1,
         {r"HMMA.16816.F32$": 64}, COPIES),
    Case("float16 @ int3_g128 -> float16", 1, "matmul.cuda.mma", BOTH, 80, 3,
         {r"HMMA.16816.F32$": 8}, COPIES),
    Case("bfloat16 @ nf4_g64 -> bfloat16", 16, "matmul.cuda.mma", BOTH, 96, 3,
         {r"HMMA.16816.F32.BF16$": 16}, {**COPIES, "PRMT": 64}),
    Case("bfloat16 @ int8_row -> bfloat16", 64, "matmul.cuda.mma", BOTH, 255, 1,
         {r"HMMA.16816.F32.BF16$": 64}, COPIES),
    Case("float16 @ fp8_row -> float16", 16, "matmul.cuda.mma", (*BOTH, "sm_89"), 112, 2,
         {r"HMMA.16816.F32$": 16}, COPIES),
    Case("bfloat16 @ mxfp4 -> bfloat16", 1, "matmul.cuda.mma", BOTH, 96, 3,
         {r"HMMA.16816.F32.BF16$": 8}, COPIES),
    Case("bfloat16 @ nvfp4 -> bfloat16", 64, "matmul.cuda.mma", BOTH, 255, 1,
         {r"HMMA.16816.F32.BF16$": 64}, COPIES),
    # Whole numbers: half as many steps, 32 columns each.
    Case("int8_row @ int8_row -> bfloat16", 1, "matmul.cuda.integer", BOTH, 96, 3,
         {r"IMMA.16832.S8.S8$": 4}, COPIES),
    Case("int8_row @ int8_row -> bfloat16", 64, "matmul.cuda.integer", ALL, 160, 1,
         {r"IMMA.16832.S8.S8$": 32}, COPIES),
    Case("int8_row @ int4_g128 -> bfloat16", 64, "matmul.cuda.integer", BOTH, 255, 1,
         {r"IMMA.16832.S8.S8$": 32}, COPIES),
    # float8 by its own instruction, where a warp has it.
    Case("fp8_row @ fp8_row -> bfloat16", 64, "matmul.cuda.float8", ("sm_89", "sm_120"), 255, 1,
         {"QMMA.16832.F32.E4M3.E4M3$": 32}, COPIES),
    # Hopper's: copies by one thread, products of four warps together.
    Case("float16 @ int4_g128 -> float16", 512, "matmul.cuda.wgmma", HOPPER, 168, 1,
         {"HGMMA": 8, "UTMALDG.2D": 2}, {"SYNCS": 8, "LDS.128": 4}),
    Case("bfloat16 @ int8_row -> bfloat16", 512, "matmul.cuda.wgmma", HOPPER, 168, 1,
         {"HGMMA": 8, "UTMALDG.2D": 2}, {"SYNCS": 8}),
    # Streams: 16 bytes at a time, and enough threads that memory stays busy.
    Case("float16 -> int4_g128", registers=64, blocks=4, at_least={"LDG.E.NA.128": 2}),
    Case("bfloat16 -> fp8_row", registers=64, blocks=4, at_least={"LDG.E.NA.128": 4}),
    Case("bfloat16 -> mxfp4", registers=64, blocks=4, at_least={"LDG.E.NA.128": 2}),
    Case("silu float16 -> fp8_row", registers=80, blocks=3, at_least={"LDG.E.NA.128": 4}),
    Case("int4_g128 -> float16", registers=40, blocks=6, at_least={"STG.E.(64|128)": 1}),
    Case("nvfp4 -> bfloat16", registers=40, blocks=6, at_least={"STG.E.(64|128)": 1}),
)  # fmt: skip

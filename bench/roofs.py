"""What this machine can do at best, measured: reading, copying, multiplying.

    python -P bench/roofs.py [--threads N] [--size BYTES]

Small loops of generated code, run on lowbit's own pool. A roof is the best of several runs: the
limit, not the usual case. Reading and copying go through as many bytes as the benchmark takes
weights in turn; where a last-level cache is larger than that, the roof is that cache's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import numpy as np
from harness.targets import Roofs

import lowbit as lb
from lowbit.kernels.cpu import isa as isas
from lowbit.kernels.cpu import native, pool
from lowbit.kernels.cpu.isa import Isa

SECONDS = 1.0
"""For the repetitions of one roof: short ones, so that some meet with no disturbance."""
CHUNK = 1 << 20
"""Bytes that a thread reads or copies before it takes the next piece."""
READINGS = ((1, 8, 0), (1, 8, 1024), (4, 4, 1024))
"""Streams, vectors of each in a turn, and bytes that are asked for ahead: the best one counts.

On a Granite Rapids server one core reads 16 GB/s without asking ahead, 22 with.
"""


@dataclass(frozen=True)
class Peak:
    """A loop of independent multiply-accumulate instructions."""

    isa: Isa
    accumulators: int
    kind: str
    """LLVM type of an accumulator, or "" where the instruction works on tiles."""
    step: str
    """One instruction: {to} is its result, {acc} the accumulator, %x and %y are operands."""
    operand: str
    """LLVM type of %x and %y."""
    head: str
    """Declarations."""
    operations: int
    """Multiplications and additions of one instruction."""


def measure(threads: int, size: int = 256 << 20) -> Roofs:
    """All roofs for a number of threads; `size` is the bytes that reading goes through."""
    best = isas.runnable()[0]
    source = np.ones(size // 4, np.float32)
    target = np.zeros(size // 4, np.float32)
    read = max(_moving(_reading(*how), source, None, threads) for how in READINGS)
    copy = max(
        _moving(_copying(streaming, ahead), source, target, threads)
        for streaming in (False, True)
        for ahead in (0, 1024)
    )
    operations = {name: _peak(peak, threads) for name, peak in peaks(best).items()}
    return Roofs(threads, read * size, 2 * copy * size, operations)


def peaks(isa: Isa) -> dict[str, Peak]:
    """A loop for each kind of instruction that an instruction set has."""
    found = {"fma": _fma(isa)}
    if isa.dot.startswith("vpdpbusd"):
        found["int8_dot"] = _vnni(isa)
    if isa.dot in ("sdot", "smmla"):
        found["int8_dot"] = _arm_dot(isa)
    if isa.bf16:
        found["bf16_dot"] = _bf16(isa)
    if isa.amx:
        found["amx_int8"] = _tiles(isa, "tdpbssd", 4)
        found["amx_bf16"] = _tiles(isa, "tdpbf16ps", 2)
    return found


def _fma(isa: Isa) -> Peak:
    lanes = isa.lanes
    kind, name = f"<{lanes} x float>", f"@llvm.fma.v{lanes}f32"
    fused = "fma" in isa.needs or isa.triple.startswith("aarch64")
    step = f"{{to}} = call {kind} {name}({kind} %x, {kind} %y, {kind} {{acc}})"
    head = f"declare {kind} {name}({kind}, {kind}, {kind})"
    if not fused:
        step = f"{{to}} = fadd {kind} {{acc}}, %x"
        head = ""
    return Peak(isa, isa.registers - 4, kind, step, kind, head, lanes * (2 if fused else 1))


def _vnni(isa: Isa) -> Peak:
    bits = 32 * isa.lanes
    kind, bytes_ = f"<{isa.lanes} x i32>", f"<{4 * isa.lanes} x i8>"
    name = f"@llvm.x86.avx512.vpdpbusd.{bits}"
    return Peak(
        isa,
        isa.registers - 4,
        kind,
        f"{{to}} = call {kind} {name}({kind} {{acc}}, {bytes_} %x, {bytes_} %y)",
        bytes_,
        f"declare {kind} {name}({kind}, {bytes_}, {bytes_})",
        8 * isa.lanes,
    )


def _arm_dot(isa: Isa) -> Peak:
    """sdot sums four products a lane; smmla multiplies 2 x 8 by 8 x 2."""
    name = f"@llvm.aarch64.neon.{isa.dot}.v4i32.v16i8"
    return Peak(
        isa,
        isa.registers - 4,
        "<4 x i32>",
        f"{{to}} = call <4 x i32> {name}(<4 x i32> {{acc}}, <16 x i8> %x, <16 x i8> %y)",
        "<16 x i8>",
        f"declare <4 x i32> {name}(<4 x i32>, <16 x i8>, <16 x i8>)",
        {"sdot": 32, "smmla": 64}[isa.dot],
    )


def _bf16(isa: Isa) -> Peak:
    kind, pairs = "<16 x float>", "<32 x bfloat>"
    name = "@llvm.x86.avx512bf16.dpbf16ps.512"
    return Peak(
        isa,
        isa.registers - 4,
        kind,
        f"{{to}} = call {kind} {name}({kind} {{acc}}, {pairs} %x, {pairs} %y)",
        pairs,
        f"declare {kind} {name}({kind}, {pairs}, {pairs})",
        64,
    )


def _tiles(isa: Isa, instruction: str, depth: int) -> Peak:
    """Four accumulators of 16 x 16; a tile of operands has 16 rows of 64 bytes."""
    return Peak(
        isa,
        4,
        "",
        f"call void @llvm.x86.{instruction}(i8 {{acc}}, i8 4, i8 5)",
        "",
        f"declare void @llvm.x86.{instruction}(i8, i8, i8)\n"
        "declare void @llvm.x86.ldtilecfg(ptr)\n"
        "declare void @llvm.x86.tilerelease()\n"
        "declare void @llvm.x86.tilezero(i8)",
        2 * 16 * 16 * 16 * depth,
    )


def _peak(peak: Peak, threads: int) -> float:
    """Operations a second."""
    function = native.load(text(peak), peak.isa).address("loop")
    turns = 20_000 if peak.kind else 2_000
    argument = np.zeros(256, np.uint8)
    argument[:8] = np.array([turns], np.int64).view(np.uint8)
    if not peak.kind:
        # Palette 1; bytes of a row of tiles 0 to 5 from byte 16 on, their rows from byte 48 on.
        argument[64] = 1
        argument[64 + 16 : 64 + 28 : 2] = 64
        argument[64 + 48 : 64 + 54] = 16
    tiles = 4 * threads
    seconds = _best(lambda: pool.run(function, argument.ctypes.data, tiles, 1024, threads))
    return tiles * turns * peak.accumulators * peak.operations / seconds


def text(peak: Peak) -> str:
    """The loop in LLVM's language."""
    return _vector_loop(peak) if peak.kind else _tile_loop(peak)


def _vector_loop(peak: Peak) -> str:
    numbers = range(peak.accumulators)
    kind, nothing = peak.kind, "zeroinitializer"
    phis = [f"  %a{i} = phi {kind} [{nothing}, %entry], [%b{i}, %loop]" for i in numbers]
    steps = ["  " + peak.step.format(to=f"%b{i}", acc=f"%a{i}") for i in numbers]
    stores = [f"  store volatile {kind} %b{i}, ptr %scratch, align 64" for i in numbers]
    return f"""{peak.head}
define void @loop(ptr %argument, i64 %tile, ptr %scratch) nounwind {{
entry:
  %count = load i64, ptr %argument
  %px = getelementptr i8, ptr %argument, i64 128
  %x = load volatile {peak.operand}, ptr %px, align 1
  %y = load volatile {peak.operand}, ptr %px, align 1
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
{chr(10).join(phis)}
{chr(10).join(steps)}
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
{chr(10).join(stores)}
  ret void
}}
"""


def _tile_loop(peak: Peak) -> str:
    zero = [f"  call void @llvm.x86.tilezero(i8 {i})" for i in range(6)]
    steps = ["  " + peak.step.format(to="", acc=i) for i in range(peak.accumulators)]
    return f"""{peak.head}
define void @loop(ptr %argument, i64 %tile, ptr %scratch) nounwind {{
entry:
  %count = load i64, ptr %argument
  %shapes = getelementptr i8, ptr %argument, i64 64
  call void @llvm.x86.ldtilecfg(ptr %shapes)
{chr(10).join(zero)}
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
{chr(10).join(steps)}
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  call void @llvm.x86.tilerelease()
  ret void
}}
"""


def _moving(loop: str, source: np.ndarray, target: np.ndarray | None, threads: int) -> float:
    """Passes over all of the memory a second."""
    function = native.load(loop, isas.runnable()[0]).address("loop")
    other = source if target is None else target
    argument = np.array([source.ctypes.data, other.ctypes.data], np.int64)
    tiles = source.nbytes // CHUNK
    return 1 / _best(lambda: pool.run(function, argument.ctypes.data, tiles, 64, threads))


def _reading(streams: int, lines: int, ahead: int) -> str:
    """All lanes xored together, or the loads would be left out."""
    kind = "<16 x i32>"
    span = CHUNK // streams
    places = [span * stream + 64 * line for stream in range(streams) for line in range(lines)]
    phis = [f"  %a{at} = phi {kind} [zeroinitializer, %entry], [%b{at}, %loop]" for at in places]
    body = [
        f"  %p{at} = getelementptr i8, ptr %p, i64 {at}\n"
        f"  %v{at} = load {kind}, ptr %p{at}, align 16\n"
        f"  %b{at} = xor {kind} %a{at}, %v{at}\n" + _asked(at, ahead)
        for at in places
    ]
    stores = [f"  store volatile {kind} %b{at}, ptr %scratch, align 64" for at in places]
    return _pass(span, 64 * lines, phis, body, stores)


def _copying(streaming: bool, ahead: int) -> str:
    """`streaming` stores do not read the lines that they overwrite."""
    kind, hint = "<16 x i32>", ", !nontemporal !0" if streaming else ""
    body = [
        f"  %p{at} = getelementptr i8, ptr %p, i64 {at}\n"
        f"  %q{at} = getelementptr i8, ptr %q, i64 {at}\n"
        f"  %v{at} = load {kind}, ptr %p{at}, align 16\n"
        f"  store {kind} %v{at}, ptr %q{at}, align 16{hint}\n" + _asked(at, ahead)
        for at in range(0, 256, 64)
    ]
    return _pass(CHUNK, 256, [], body, []) + "\n!0 = !{i32 1}\n"


def _asked(at: int, ahead: int) -> str:
    """Ask for the line that is read `ahead` bytes later."""
    if not ahead:
        return ""
    return (
        f"  %f{at} = getelementptr i8, ptr %p, i64 {at + ahead}\n"
        f"  call void @llvm.prefetch.p0(ptr %f{at}, i32 0, i32 3, i32 1)\n"
    )


def _pass(span: int, step: int, phis: list[str], body: list[str], end: list[str]) -> str:
    """A loop that moves %p and %q over `span` bytes of a chunk of the source and the target."""
    return f"""declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define void @loop(ptr %argument, i64 %tile, ptr %scratch) nounwind {{
entry:
  %second = getelementptr i8, ptr %argument, i64 8
  %source = load ptr, ptr %argument
  %target = load ptr, ptr %second
  %start = mul i64 %tile, {CHUNK}
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
{chr(10).join(phis)}
  %offset = add i64 %start, %i
  %p = getelementptr i8, ptr %source, i64 %offset
  %q = getelementptr i8, ptr %target, i64 %offset
{chr(10).join(body)}
  %next = add i64 %i, {step}
  %more = icmp ult i64 %next, {span}
  br i1 %more, label %loop, label %done
done:
{chr(10).join(end)}
  ret void
}}
"""


def _best(call: Callable[[], None]) -> float:
    call()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the roofs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=lb.get_num_threads())
    parser.add_argument("--size", type=int, default=256 << 20, help="bytes to read")
    options = parser.parse_args()
    roofs = measure(options.threads, options.size)
    print(f"{roofs.threads} threads, {options.size / 2**20:.0f} MiB")
    print(f"read      {roofs.read / 1e9:10.1f} GB/s")
    print(f"copy      {roofs.copy / 1e9:10.1f} GB/s, read and written")
    for name, rate in roofs.operations.items():
        print(f"{name:<10}{rate / 1e9:10.0f} Gop/s")


if __name__ == "__main__":
    main()

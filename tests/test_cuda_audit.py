"""The machine code of kernels: no spills, no stack, registers and instructions as designed.

Cases are in tests/audit/cases.py; `make audit` looks at every kernel that the dispatcher can
choose for common formats and writes tests/audit/table.json, whose freshness is tested here.
"""

from __future__ import annotations

import json

import pytest
import sass
import table
import usual
from absence import absent
from cases import CASES, Case

from lowbit.kernels.cuda import compile
from lowbit.kernels.cuda.launch import Source


@pytest.fixture
def disassembler(nvrtc) -> None:
    reason = sass.missing()
    if reason is not None:
        absent(reason)


@pytest.mark.parametrize(
    ("case", "arch"),
    [pytest.param(case, arch, id=f"{case} {arch}") for case in CASES for arch in case.archs],
)
def test_machine_code_is_as_designed(disassembler, case: Case, arch: str):
    for source in case.sources(arch):
        code = compile.nvrtc(source, arch)
        usage = sass.usage(code, arch)
        shared = source.shared + usage.shared
        assert usage.faults() == []
        assert usage.registers <= case.registers
        assert sass.blocks(arch, usage.registers, source.threads, shared) >= case.blocks
    # Where a kernel prepares for another, the last one does the work.
    found = sass.disassembled(code)
    assert sass.count(found, "LDL|STL") == 0
    wanted = {**case.exactly, **case.at_least, **case.at_most}
    counts = {pattern: sass.count(found, pattern) for pattern in wanted}
    assert {pattern: counts[pattern] for pattern in case.exactly} == case.exactly
    assert all(counts[pattern] >= least for pattern, least in case.at_least.items()), counts
    assert all(counts[pattern] <= most for pattern, most in case.at_most.items()), counts


@pytest.mark.parametrize("arch", usual.DEVICES)
def test_the_table_of_all_kernels_is_fresh(arch):
    found = json.loads(table.PATH.read_text())[arch]
    assert set(found) == set(table.keys(arch)), "stale: run make audit"


def test_spills_are_seen(disassembler):
    text = """
    extern "C" __global__ void __launch_bounds__(1024) many(float* x) {
        float held[256];
        #pragma unroll
        for (int i = 0; i < 256; ++i) held[i] = x[i * 1024];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 256; ++i) x[i * 1024 + 1] = held[255 - i];
    }
    """
    source = Source(text, "many", 1024)
    for arch in ("sm_80", "sm_90a"):
        code = compile.nvrtc(source, arch)
        usage = sass.usage(code, arch)
        assert usage.registers <= 64
        assert usage.faults() == [f"{usage.stack} bytes of stack, spilled registers or arrays"]
        assert sass.count(sass.disassembled(code), "LDL|STL")


def test_a_stack_is_seen(disassembler):
    text = """
    extern "C" __global__ void indexed(int* x) {
        int held[64];
        for (int i = 0; i < 64; ++i) held[x[i] & 63] = i;
        for (int i = 0; i < 64; ++i) x[i] = held[x[i + 64] & 63];
    }
    """
    usage = sass.usage(compile.nvrtc(Source(text, "indexed", 32), "sm_80"), "sm_80")
    assert usage.stack >= 256
    assert usage.faults()


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        # From NVIDIA's occupancy calculator: limited by registers, shared memory, warps, blocks.
        ("sm_80", 255, 128, 0, 2),
        ("sm_80", 128, 256, 0, 2),
        ("sm_80", 32, 128, 40 * 1024, 4),
        ("sm_80", 32, 1024, 0, 2),
        ("sm_89", 32, 1024, 0, 1),
        ("sm_80", 16, 32, 0, 32),
        ("sm_89", 16, 32, 0, 24),
        ("sm_90a", 168, 384, 164864, 1),
        ("sm_90a", 64, 128, 227 * 1024, 1),
        ("sm_90a", 72, 128, 41600, 5),
    ],
)
def test_blocks_of_a_multiprocessor(arch, registers, threads, shared, blocks):
    assert sass.blocks(arch, registers, threads, shared) == blocks


def test_fillers_are_not_counted():
    listing = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/             @!UP1 UTMALDG.2D [UR8], [UR4] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   NOP ;
    """
    assert sass.opcodes(listing) == {"LDG.E.128": 2, "UTMALDG.2D": 1, "NOP": 1}

"""Machine code of the kernels on CUTLASS: what the package brings, read without compiling it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import cubins
import pytest
import sass
from absence import absent, needs_headers

from lowbit.kernels.cuda import archive, compile, elf
from lowbit.kernels.cuda.compile import Cubin
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cutlass import dense
from lowbit.kernels.cutlass.package import Shipped

FAMILIES = cubins.families()
ALONE = cubins.alone()
CASES = [
    pytest.param(*each, *ALONE[each], id=f"{each[0]} {ALONE[each][1].label}") for each in ALONE
]


@pytest.fixture
def disassembler() -> None:
    reason = sass.missing()
    if reason is not None:
        absent(reason)


def instructions(arch: str, text: str) -> list[str]:
    """What has to be there: products of tensor cores, and how their operands come."""
    if arch == "sm_90a":
        integral = "int32_t, float" in text
        half = re.search(
            r"cutlass::(half|bfloat16)_t, cutlass::layout::ColumnMajor, \d+, float", text
        )
        return ["IGMMA" if integral else "HGMMA" if half else "QGMMA", "UTMALDG", "UTMASTG"]
    if arch in ("sm_80", "sm_89"):
        return ["IMMA|QMMA", "LDGSTS", "LDSM"]
    return ["UTC.MMA|OMMA|QMMA", "UTMALDG"]


def test_the_package_brings_these_and_no_others() -> None:
    held = {path.stem for path in archive.FOLDER.glob("*-*.xz")}
    assert held == {archive.file_of(*each) for each in ALONE}, "stale: run make cubins"
    assert set(json.loads(cubins.TABLE.read_text())) == held, "stale: run make cubins"
    sizes = [path.stat().st_size for path in archive.FOLDER.glob("*-*.xz")]
    assert sum(sizes) <= cubins.BUDGET_ALONE


@pytest.mark.parametrize(("arch", "key", "source", "shipped"), CASES)
def test_machine_code(
    disassembler: None, arch: str, key: str, source: Source, shipped: Shipped
) -> None:
    made = archive.load(arch, key)
    assert made is not None
    cubin = Cubin(*made.cubins[key])
    usage = sass.usage(cubin, arch)
    assert usage.faults() == []
    assert sass.blocks(arch, usage.registers, source.threads, source.shared) >= 1
    assert elf.argument_bytes(cubin.code, source.name) == [shipped.argument]
    if source.threads == dense.THREADS:
        assert elf.cluster(cubin.code, source.name) == (*shipped.cluster, 1)
    found = sass.disassembled(cubin)
    assert sass.count(found, "LDL|STL") == 0
    listed = json.loads(cubins.TABLE.read_text())[archive.file_of(arch, key)]
    assert listed == cubins.row(arch, key, source, shipped), "stale: run make cubins"
    for pattern in instructions(arch, source.text):
        assert sass.count(found, pattern), f"no {pattern} among {sorted(found)}"


def test_texts_are_the_same_in_every_process() -> None:
    script = (
        "import sys; sys.path[:0] = ['tests/audit']; import cubins; print(sorted(cubins.alone()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == str(sorted(ALONE)), done.stderr


@needs_headers
@pytest.mark.timeout(900)  # a minute where nothing else runs
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_compiles_to_what_the_package_brings(disassembler: None, family: str) -> None:
    if compile.missing() is not None:
        absent(str(compile.missing()))
    # The smallest takes the least time.
    size = {
        each: (archive.FOLDER / f"{archive.file_of(*each)}.xz").stat().st_size for each in ALONE
    }
    arch, key = min(FAMILIES[family], key=lambda each: size[each])
    source, shipped = FAMILIES[family][arch, key]
    compiled, said = compile.nvrtc_said(source, arch)
    assert "wgmma" not in said  # which the compiler makes wait for each other
    made = archive.load(arch, key)
    assert made is not None
    assert made.nvrtc == compile.version()
    assert sass.disassembled(compiled) == sass.disassembled(Cubin(*made.cubins[key]))
    assert elf.argument_bytes(compiled.code, source.name) == [shipped.argument]
    assert len(elf.shortened(compiled.code)) == len(compiled.code)

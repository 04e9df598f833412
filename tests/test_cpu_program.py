"""What the generated programs contain, refuse, and never touch."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.formats.codebook import NF4
from lowbit.formats.declare import codebook, floating, integer, power_of_two
from lowbit.kernels.cpu import gemm, native, pool, program
from lowbit.kernels.cpu.cases import Case, address
from lowbit.kernels.cpu.isa import RECORDS, Isa, runnable
from lowbit.kernels.cpu.spec import METHODS, Spec

ISAS = {isa.name: isa for isa in RECORDS}
INT4, UINT4, INT8 = integer(4), integer(4, signed=False), integer(8)
E4M3, E2M1 = floating(4, 3, specials="fn"), floating(2, 1, specials="none")
SPECS = {
    "int4": Spec("fma", INT4, layout="words16", x_scale=True, activation="gelu"),
    "nf4": Spec("fma", NF4, "decoded", out="bfloat16"),
    "zeros": Spec("fma", UINT4, zero="uint8", scale="float16"),
    "int8": Spec("fma", INT8, out="float16", residual="float16", activation="silu"),
    "e4m3": Spec("fma", E4M3, "decoded", activation="gelu_tanh"),
    "int3": Spec("fma", integer(3), layout="words16"),
    "odd6": Spec("fma", codebook("odd6", np.sqrt(np.arange(64)))),
    "dot4": Spec("dot", INT4, layout="words16", x_scale=True),
    "dot8": Spec("dot", INT8, "decoded", x_scale=True),
    "dotz": Spec("dot", UINT4, zero="uint8"),
    "pairs": Spec("bf16", NF4, "decoded"),
    "pairs8": Spec("bf16", E4M3, layout="words16"),
    "tiles": Spec("dot", INT4, "tiles", layout="words16", x_scale=True),
    "single": Spec("dot", UINT4, "single", tile=16, zero="uint8"),
    "tiles of pairs": Spec("bf16", NF4, "tiles", activation="gelu"),
    "folded": Spec("bf16", E2M1, "single", tile=16, folded=4, scale=power_of_two()),
}


def runs(spec: Spec, isa: Isa) -> bool:
    return not (spec.inner == "bf16" and not isa.bf16) and not (spec.tiled and not isa.amx)


@pytest.mark.parametrize(
    ("spec", "isa"),
    [(spec, name) for spec in SPECS for name, isa in ISAS.items() if runs(SPECS[spec], isa)],
)
def test_every_program_compiles_for_every_instruction_set_that_has_it(spec: str, isa: str) -> None:
    text = native.assembly(program.text(SPECS[spec], ISAS[isa]), ISAS[isa])
    called = set(re.findall(r"^\s*(?:callq?|bl)\s+(\S+)", text, re.M))
    own = set(re.findall(r"^(\w+):", text, re.M))
    outside = {name.partition("@")[0] for name in called} - own
    assert outside <= {"memcpy", "memset", "memmove"}, "needs a library that may differ"


@pytest.mark.parametrize("spec", SPECS)
def test_offsets_are_of_64_bits(spec: str) -> None:
    text = program.text(SPECS[spec], RECORDS[0])
    offsets = re.findall(r"getelementptr i8, ptr \S+, (\w+)", text)
    assert offsets
    assert set(offsets) == {"i64"}
    # 32-bit lanes hold codes and numbers; the only narrowed index is a lane's or a shift's.
    assert len(re.findall(r"= (?:add|mul) (?:nsw |nuw )*i32", text)) == 0


def sparse(size: int) -> mmap.mmap:
    """Zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, size, flags=flags)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved")
@pytest.mark.parametrize("layout", ["rows", "words16"])
@pytest.mark.parametrize(("m", "n"), [(2**11, 2**20), (2**17, 64)])
def test_the_last_tile_of_a_huge_product(
    m: int, n: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 2**31 codes, numbers of x, or results; only the last tile's are touched."""
    k, isa = 2**13, runnable()[0]
    panels = layout == "words16"
    spec = Spec("fma", INT8, layout=layout, scale_layout="panels16" if panels else "rows")
    x = np.frombuffer(sparse(m * k * 4), np.float32).reshape(m, k)
    w = np.frombuffer(sparse(n * k), np.uint8)
    scales = np.frombuffer(sparse(n * 4), np.float32)
    out = np.frombuffer(sparse(m * n * 4), np.float32).reshape(m, n)
    x[-1, -1] = 3
    scales[-1] = 0.5
    w[-1] = 5  # the last byte belongs to the last row and column in both arrangements
    jobs: list[tuple[int, int, int, int]] = []

    def run(entry: int, argument: int, tiles: int, scratch: int, threads: int | None) -> None:
        memory = np.zeros(scratch + 64, np.uint8)
        aligned = -(-address(memory) // 64) * 64
        kinds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
        ctypes.CFUNCTYPE(None, *kinds)(entry)(argument, tiles - 1, aligned)
        jobs.append((entry, argument, tiles, scratch))

    monkeypatch.setattr(pool, "run", run)
    gemm.build(spec, isa)(
        m=m,
        n=n,
        k=k,
        segment=k,
        x=address(x),
        x_stride=4 * k,
        codes=address(w),
        codes_stride=k,
        scales=address(scales),
        scales_stride=1,
        block_rows=1,
        block_segments=1,
        out=address(out),
        out_stride=n,
    )
    assert len(jobs) == 1
    assert out[-1, -1] == 7.5
    assert not out[-1, :-1].any()
    assert jobs[0][3] < 2**22, "scratch grows with the problem"


FENCED = """
import ctypes, mmap, sys
sys.path.insert(0, {src!r})
import numpy as np
from lowbit import kernels
from lowbit.formats.declare import integer
from lowbit.kernels.cpu import cases, gemm, pool
from lowbit.kernels.cpu.cases import Case, records
from lowbit.kernels.cpu.spec import METHODS, Spec
from lowbit.testing import conformance

kernels.registered()
libc, held, in_front = ctypes.CDLL(None, use_errno=True), [], False
address, run = cases.address, pool.run

def fenced(a):
    "An address in a copy that ends, or begins, where memory does."
    low, high = np.lib.array_utils.byte_bounds(a)
    page, size = mmap.PAGESIZE, high - low
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (first, first + page + room):
        assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    start = first + page + (0 if in_front else room - size)
    ctypes.memmove(start, low, size)
    held.append((memory, a, low, start, size))
    return start + address(a) - low

def copied_back(*job):
    run(*job)
    for _, _, low, start, size in held:
        ctypes.memmove(low, start, size)

pool.run = copied_back
for name, module in list(sys.modules.items()):
    if name.startswith("lowbit.kernels.cpu.") and name.split(".")[3] not in ("packing", "pool"):
        for each in ("address", "_address"):
            if hasattr(module, each):
                setattr(module, each, fenced)

{body}
print("inside", len(held) > 0)
"""
GENERATOR = """
WORDS = dict(layout="words16", scale_layout="panels16")
for inner in ("fma", "bf16", "dot"):
    for method in METHODS[: 2 if inner == "fma" else 4]:
        for bits in (2, 3, 4, 7, 8) if inner == "dot" else (3, 4, 8):
            options = dict(residual="float16", out="float16") if bits == 3 else WORDS
            zero = "int8" if bits == 4 else None
            spec = Spec(inner, integer(bits), method, x_scale=True, zero=zero, **options)
            step = gemm.granule(spec)
            for m, n, k, segment in (
                (1, 17, 3, 3), (3, 5, 39 * step, step), (13, 33, 129, 129), (4, 64, 64, 64)
            ):
                held.clear()
                case = Case(spec, m=m, n=n, k=k, segment=segment, bias=True)
                if method != "single" or not case.padded():
                    for in_front in (False, True):
                        case.check(records(spec, every=False)[:2])
"""
LIBRARY = """
for in_front in (False, True):
    for kernel in ("matmul.cpu.fma", "matmul.cpu.bf16", "matmul.cpu.dot"):
        for w in ("int8_row", "int3_g32", "uint4_g64_asym", "nf4_g64_bias_bf16", "mxfp4"):
            for x in ("float32", "float16", "bfloat16", "int8_row", "int4_g32", "mxfp8"):
                held.clear()
                check = "same_when_prepared" if x == "int8_row" else "bounded_products"
                getattr(conformance, check)(kernel, w, x)
held.clear()
import lowbit as lb
for dtype in (np.float32, np.float16, cases.BFLOAT16):
    for x_format in ("int8_row", "int8_g32", "int4_g96"):
        for m, n, k in ((1, 17, 65), (5, 33, 130), (37, 66, 200)):
            w = conformance.random_qarray("int4_g32", n, k)
            x = np.random.default_rng(0).standard_normal((m, k)).astype(dtype)
            lb.matmul(x, w.T, x_format=x_format, kernel="matmul.cpu.dot")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("body", [GENERATOR, LIBRARY], ids=["generator", "library"])
def test_nothing_is_read_or_written_around_an_operand(body: str) -> None:
    source = str(Path(__file__).parent.parent / "src")
    done = subprocess.run(
        [sys.executable, "-P", "-c", FENCED.format(src=source, body=body)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "inside True\n", f"ended with {done.returncode}: {done.stderr[-900:]}"


@pytest.mark.parametrize(
    ("spec", "segment", "reason"),
    [
        (Spec("fma", INT4), 12, "multiples of 8 columns for int4, they change every 12"),
        (Spec("fma", integer(1)), 16, "multiples of 32 columns"),
        (Spec("fma", codebook("nan0", (math.nan, 1.0))), 32, "code 0"),
        (Spec("dot", NF4), 32, "nf4 is not a plain integer element"),
        (Spec("dot", codebook("sparse", (0, 1, 5, 9))), 32, "not a plain integer"),
        (Spec("dot", UINT4, zero="float16"), 32, "not whole numbers"),
        (Spec("dot", INT4, biases=True), 32, "block biases"),
    ],
)
def test_refusals(spec: Spec, segment: int, reason: str) -> None:
    refusal = gemm.refuse(spec, segment=segment, k=100)
    assert refusal is not None
    assert reason in refusal


def test_what_is_not_refused() -> None:
    assert gemm.refuse(Spec("fma", INT4), segment=12, k=12) is None
    assert gemm.refuse(Spec("fma", integer(3)), segment=12, k=100) is None
    assert gemm.refuse(Spec("dot", UINT4, zero="int8"), segment=64, k=100) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inner", "dots"),
        ("method", "amx"),
        ("out", "float64"),
        ("activation", "tanh"),
        ("zero", "int4"),
    ],
)
def test_a_spec_refuses_what_it_does_not_know(name: str, value: str) -> None:
    words: dict[str, Any] = {"inner": "fma", "element": INT4} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: '{value}'"):
        Spec(**words)


def test_the_longest_segments() -> None:
    assert gemm.longest_segment(INT8, INT8) == 131_071
    assert gemm.longest_segment(INT8, INT4) == 2_097_151
    assert gemm.longest_segment(INT8, UINT4, "uint8") == (2**31 - 1) // (128 * 255)


@pytest.mark.parametrize("method", METHODS)
def test_the_longest_segment_does_not_overflow(method: str) -> None:
    """The largest sum there is, and the first one beyond it would be another number."""
    k = gemm.longest_segment(INT8, INT8) // 64 * 64
    case = Case(Spec("dot", INT8, method), m=1, n=1, k=k, segment=k)
    case.codes[...], case.x[...], case.scales[...] = 128, -128, 1
    assert case.expected()[0, 0] == np.float32(k * 128 * 128)
    case.check()


@pytest.mark.parametrize("method", ["tiles", "single"])
def test_tiles_do_not_multiply_float32(method: str) -> None:
    with pytest.raises(ValueError, match="tiles multiply int8 and bfloat16, not float32"):
        Spec("fma", INT4, method)

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
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.formats import codes as bitstream
from lowbit.formats.codebook import NF4
from lowbit.formats.declare import Element, codebook, floating, integer
from lowbit.kernels.cpu import gemm, native, pool, program
from lowbit.kernels.cpu.isa import RECORDS, Isa, runnable
from lowbit.kernels.cpu.tile import DOTS, shapes

Array = npt.NDArray[Any]
ISAS = {isa.name: isa for isa in RECORDS}
INT4, UINT4, INT8 = integer(4), integer(4, signed=False), integer(8)
SPECS = {
    "int4": gemm.Spec("fma", INT4, "words16", x_scale=True, activation="gelu"),
    "nf4": gemm.Spec("fma", NF4, out="bfloat16"),
    "zeros": gemm.Spec("fma", UINT4, zero="uint8", scale="float16"),
    "int8": gemm.Spec("fma", INT8, out="float16", residual="float16", activation="silu"),
    "e4m3": gemm.Spec("fma", floating(4, 3, specials="fn"), activation="gelu_tanh"),
    "int3": gemm.Spec("fma", integer(3)),
    "odd6": gemm.Spec("fma", codebook("odd6", np.sqrt(np.arange(64)))),
    "dot4": gemm.Spec("dot", INT4, "words16", x_scale=True),
    "dot8": gemm.Spec("dot", INT8, x_scale=True),
    "dotz": gemm.Spec("dot", UINT4, zero="uint8"),
}


def inner_loops(assembly: str, instruction: str) -> list[list[str]]:
    """For each micro-kernel the shortest stretch that jumps back and has the instruction."""
    found = []
    for function in re.findall(r"^rows\w+:\n(.*?)^\.Lfunc_end", assembly, re.M | re.S):
        lines = [line.strip() for line in function.splitlines()]
        places = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L")}
        loops = []
        for end, line in enumerate(lines):
            jump = re.match(r"(?:j\w+|b[.\w]*|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.L\w+)", line)
            if jump and places.get(jump[1], end) < end:
                loop = lines[places[jump[1]] : end]
                if any(each.startswith(instruction) for each in loop):
                    loops.append(loop)
        assert loops, f"a micro-kernel has no loop with {instruction}"
        found.append(min(loops, key=len))
    return found


@pytest.mark.parametrize(
    ("spec", "isa", "wanted"),
    [
        ("int4", "avx512vnni", ("vfmadd", "vpermps|vpermd", "zmm")),
        ("nf4", "avx512vnni", ("vfmadd", "vpermps|vpermd", "zmm")),
        ("dot4", "avx512vnni", ("vpdpbusd", "zmm")),
        ("dot8", "avx512vnni", ("vpdpbusd", "zmm")),
        ("int4", "avx2", ("vfmadd", "vcvtdq2ps", "ymm")),
        ("nf4", "avx2", ("vfmadd", "vpermps|vpermd", "ymm")),
        ("dot4", "avx2", ("vpmaddwd", "ymm")),
        ("dot8", "avx2", ("vpmaddwd", "ymm")),
        ("int4", "neon", ("fmla", "scvtf")),
        ("dot4", "neon", ("sdot",)),
        ("dot8", "neon", ("sdot",)),
    ],
)
def test_the_inner_loops_use_the_instructions(spec: str, isa: str, wanted: Any) -> None:
    text = native.assembly(program.text(SPECS[spec], ISAS[isa]), ISAS[isa])
    loops = inner_loops(text, wanted[0])
    assert len(loops) == len(shapes(ISAS[isa]))
    for loop in loops:
        for each in wanted:
            assert re.search(each, "\n".join(loop)), each
    # It saturates sums of two products to 16 bits.
    assert "vpmaddubsw" not in text


@pytest.mark.parametrize(
    ("spec", "instruction"), [("int4", "vfmadd"), ("dot4", "vpdpbusd"), ("dot8", "vpdpbusd")]
)
def test_the_inner_loops_of_avx512_keep_all_in_registers(spec: str, instruction: str) -> None:
    isa = ISAS["avx512vnni"]
    text = native.assembly(program.text(SPECS[spec], isa), isa)
    for loop in inner_loops(text, instruction):
        assert not [line for line in loop if re.match(r"vmov\w*\s+%zmm\d+, .*\(", line)]


@pytest.mark.parametrize("isa", RECORDS, ids=list(ISAS))
@pytest.mark.parametrize("spec", SPECS)
def test_every_program_compiles_for_every_instruction_set(spec: str, isa: Isa) -> None:
    text = native.assembly(program.text(SPECS[spec], isa), isa)
    called = set(re.findall(r"^\s*(?:callq?|bl)\s+(\S+)", text, re.M))
    own = set(re.findall(r"^(\w+):", text, re.M))
    outside = {name.partition("@")[0] for name in called} - own
    assert outside <= {"memcpy", "memset", "memmove"}, "needs a library that may differ"


@pytest.mark.parametrize("spec", SPECS)
def test_offsets_are_of_64_bits(spec: str) -> None:
    text = program.text(SPECS[spec], ISAS["avx2"])
    offsets = re.findall(r"getelementptr i8, ptr \S+, (\w+)", text)
    assert offsets
    assert set(offsets) == {"i64"}
    # 32-bit lanes hold codes and numbers; the only narrowed index is a lane's or a shift's.
    assert len(re.findall(r"= (?:add|mul) (?:nsw |nuw )*i32", text)) == 0


def address(a: Array) -> int:
    pointer: int = a.__array_interface__["data"][0]
    return pointer


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
    spec = gemm.Spec("fma", INT8, layout, scale_layout="panels16" if panels else "rows")
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
        x_stride=k,
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


OVERRUN = """
import ctypes, mmap, sys
sys.path.insert(0, {src!r})
import numpy as np
from lowbit.formats import codes as bitstream
from lowbit.formats.declare import integer
from lowbit.kernels.cpu import gemm
from lowbit.kernels.cpu.isa import runnable

libc, kept = ctypes.CDLL(None, use_errno=True), []

def fenced(a):
    "The address of a copy that ends where memory ends."
    a = np.ascontiguousarray(a)
    size = -(-a.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    held = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    ctypes.memmove(start + size - a.nbytes, a.ctypes.data, a.nbytes)
    kept.append(held)
    return start + size - a.nbytes

rng = np.random.default_rng(0)
for bits in range(1, 9):
    for m, n, k, dtype in (
        (1, 17, 3, "float32"), (3, 5, 39, "float16"), (17, 33, 129, "float16"),
        (4, 64, 64, "float32"),
    ):
        # Packing is the same text everywhere, but for one instruction.
        for isa in runnable() if bits in (3, 4) else runnable()[:1]:
            element = integer(bits)
            codes = bitstream.pack(rng.integers(0, 2**bits, (n, k), dtype=np.uint8), bits)
            x = np.zeros((m, gemm.word_columns(element, k)), np.float32)
            scales, blocks = np.ones((n, -(-k // 32)), dtype), -(-k // 32)
            out = fenced(np.zeros((m, n), dtype))
            gemm.build(gemm.Spec("fma", element, scale=dtype, out=dtype, residual=dtype), isa)(
                m=m, n=n, k=k, segment=32, x=fenced(x), x_stride=x.shape[1],
                codes=fenced(codes), codes_stride=codes.shape[1], scales=fenced(scales),
                scales_stride=blocks, block_rows=1, block_segments=1, out=out, out_stride=n,
                bias=fenced(np.ones(n, np.float32)), residual_stride=n,
                residual=fenced(np.zeros((m, n), dtype)),
            )
            size = m * n * np.dtype(dtype).itemsize
            got = np.frombuffer(ctypes.string_at(out, size), dtype)
            assert (got == 1).all()
print("inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_is_read_or_written_behind_an_operand() -> None:
    source = str(Path(__file__).parent.parent / "src")
    done = subprocess.run(
        [sys.executable, "-P", "-c", OVERRUN.format(src=source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "inside\n", f"ended with {done.returncode}: {done.stderr[-500:]}"


@pytest.mark.parametrize(
    ("spec", "segment", "reason"),
    [
        (gemm.Spec("fma", INT4), 12, "multiples of 8 columns for int4, they change every 12"),
        (gemm.Spec("fma", integer(1)), 16, "multiples of 32 columns"),
        (gemm.Spec("fma", codebook("nan0", (math.nan, 1.0))), 32, "code 0"),
        (gemm.Spec("dot", NF4), 32, "nf4 is not a plain integer element"),
        (gemm.Spec("dot", codebook("sparse", (0, 1, 5, 9))), 32, "not a plain integer"),
        (gemm.Spec("dot", UINT4, zero="float16"), 32, "not whole numbers"),
        (gemm.Spec("dot", INT4, biases=True), 32, "block biases"),
    ],
)
def test_refusals(spec: gemm.Spec, segment: int, reason: str) -> None:
    refusal = gemm.refuse(spec, segment=segment, k=100)
    assert refusal is not None
    assert reason in refusal


def test_what_is_not_refused() -> None:
    assert gemm.refuse(gemm.Spec("fma", INT4), segment=12, k=12) is None
    assert gemm.refuse(gemm.Spec("fma", integer(3)), segment=12, k=100) is None
    assert gemm.refuse(gemm.Spec("dot", UINT4, zero="int8"), segment=64, k=100) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("inner", "dots"), ("out", "float64"), ("activation", "tanh"), ("zero", "int4")],
)
def test_a_spec_refuses_what_it_does_not_know(name: str, value: str) -> None:
    words: dict[str, Any] = {"inner": "fma", "element": INT4} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: '{value}'"):
        gemm.Spec(**words)


def test_the_longest_segments() -> None:
    assert gemm.longest_segment(INT8, INT8) == 131_071
    assert gemm.longest_segment(INT8, INT4) == 2_097_151
    assert gemm.longest_segment(INT8, UINT4, "uint8") == (2**31 - 1) // (128 * 255)


@pytest.mark.parametrize("isa", runnable(), ids=[isa.name for isa in runnable()])
def test_the_longest_segment_does_not_overflow(isa: Isa) -> None:
    """The largest sum there is, and the first one beyond it would be another number."""
    k = gemm.longest_segment(INT8, INT8) // 4 * 4
    codes, x = np.full((1, k), 128, np.uint8), np.full((1, k), -128, np.int8)
    arranged, out = gemm.arrange(x, INT8, isa, k), np.empty(1, np.float32)
    scale = np.ones(1, np.float32)
    gemm.build(gemm.Spec("dot", INT8), isa)(
        m=1,
        n=1,
        k=k,
        segment=k,
        x=address(arranged.x),
        x_stride=k,
        codes=address(codes),
        codes_stride=k,
        scales=address(scale),
        scales_stride=1,
        block_rows=1,
        block_segments=1,
        out=address(out),
        out_stride=1,
        x_sums=address(arranged.sums),
        x_sums_stride=1,
    )
    assert out[0] == np.float32(k * 128 * 128)


ELEMENTS = [integer(b, signed=s) for b in (1, 2, 3, 4, 8) for s in (True, False)]


@pytest.mark.parametrize("isa", RECORDS, ids=list(ISAS))
@given(
    element=st.sampled_from(ELEMENTS),
    m=st.integers(0, 4),
    k=st.integers(0, 70),
    seed=st.integers(0, 99),
)
def test_arranged_x_meets_its_codes(isa: Isa, element: Element, m: int, k: int, seed: int) -> None:
    """Multiply words the way the instruction does: shift, cut into parts, pair with x."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**element.bits, (1, k), dtype=np.uint8)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    arranged = gemm.arrange(x, element, isa, 32)
    each, parts = gemm.codes_per_word(element), DOTS[isa.dot].parts
    width = 32 // each
    padded = np.zeros((1, gemm.word_columns(element, k)), np.uint8)
    padded[:, :k] = codes
    words = bitstream.pack(padded, width).view("<u4")[0].astype(np.int64)
    total = np.zeros(m, np.int64)
    numbers = arranged.x.reshape(m, len(words), each // parts, parts).astype(np.int64)
    for shift in range(each // parts):
        for part in range(parts):
            code = words >> (shift * width + part * (32 // parts)) & (2**element.bits - 1)
            total += numbers[:, :, shift, part] @ code
    assert (total == x.astype(np.int64) @ codes[0]).all()
    assert arranged.sums.dtype == np.int32
    for s in range(-(-k // 32)):
        part_of_x = x[:, 32 * s : 32 * s + 32].astype(np.int64)
        assert (arranged.sums[:, s] == part_of_x.sum(1)).all()

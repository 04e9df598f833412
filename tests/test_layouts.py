"""Arrangements of weights are bijections, and the compiled rearrangement gives the same bits."""

from __future__ import annotations

import ctypes
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

import lowbit as lb
from lowbit.formats import codes as bitstream
from lowbit.formats import declared
from lowbit.kernels import layouts
from lowbit.kernels.cpu import native, packing, pool
from lowbit.kernels.cpu.isa import RECORDS, Isa, runnable
from lowbit.kernels.words16 import Words16

Array = npt.NDArray[Any]

BITS = range(1, 9)
ODD = (3, 5, 6, 7)
PATTERN = 0xA5A5A5A5


def stream(n: int, bits: int, k: int, seed: int) -> Array:
    """Canonical rows of random codes."""
    numbers = np.random.default_rng(seed).integers(0, 2**bits, (n, k), dtype=np.uint8)
    return bitstream.pack(numbers, bits)


def address(a: Array) -> int:
    pointer: int = a.__array_interface__["data"][0]
    return pointer


def ones(a: Array) -> int:
    return int(np.bitwise_count(a).sum(dtype=np.int64))


heights, seeds = st.integers(0, 40), st.integers(0, 2**32 - 1)
# Compiled code works on 16 granules at a time: 256 or 512 codes.
lengths = st.one_of(st.integers(0, 140), st.integers(250, 260), st.integers(505, 1100))
widths = st.sampled_from(BITS)


@pytest.mark.parametrize(
    ("bits", "planes", "codes", "words"),
    [
        (1, (1,), 32, 1),
        (2, (2,), 16, 1),
        (3, (2, 1), 32, 3),
        (4, (4,), 8, 1),
        (5, (4, 1), 32, 5),
        (6, (4, 2), 16, 3),
        (7, (4, 2, 1), 32, 7),
        (8, (8,), 4, 1),
    ],
)
def test_planes_and_granules(bits: int, planes: tuple[int, ...], codes: int, words: int) -> None:
    assert layouts.planes(bits) == planes
    assert (layouts.granule(bits), layouts.granule_words(bits)) == (codes, words)
    for k in (0, 1, codes - 1, codes, codes + 1, 5 * codes):
        assert layouts.row_words(bits, k) == -(-k // codes) * words


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits: words16 has codes of 1 to 8 bits, got {bits}"):
        layouts.words16(np.zeros((1, 4), np.uint8), bits, 4)


@given(heights, widths, lengths, seeds)
def test_words16_and_back(n: int, bits: int, k: int, seed: int) -> None:
    canonical = stream(n, bits, k, seed)
    panels = layouts.words16(canonical, bits, k)
    assert panels.dtype == np.uint32
    assert panels.shape == (-(-n // 16), layouts.row_words(bits, k), 16)
    back = layouts.rows(panels, n, bits, k)
    assert back.shape == canonical.shape
    assert (back == canonical).all()
    # What the rows do not have is zero, so that equal weights have equal panels.
    assert ones(panels) == ones(canonical)


@pytest.mark.parametrize("bits", layouts.WIDTHS)
def test_a_word_holds_consecutive_codes_of_one_row(bits: int) -> None:
    n, k = 21, 77
    codes = np.random.default_rng(bits).integers(0, 2**bits, (n, k), dtype=np.uint8)
    panels = layouts.words16(bitstream.pack(codes, bits), bits, k)
    each = layouts.granule(bits)
    for row in range(n):
        for column in range(k):
            word = int(panels[row // 16, column // each, row % 16])
            assert word >> (column % each * bits) & (2**bits - 1) == codes[row, column]


@pytest.mark.parametrize("bits", ODD)
def test_planes_hold_four_codes_in_the_same_bits_of_four_bytes(bits: int) -> None:
    n, k = 21, 77
    codes = np.random.default_rng(bits).integers(0, 2**bits, (n, k), dtype=np.uint8)
    panels = layouts.words16(bitstream.pack(codes, bits), bits, k)
    for row in range(n):
        for column in range(k):
            number, place = divmod(column, layouts.granule(bits))
            dword, byte = divmod(place, 4)
            first, low, code = number * layouts.granule_words(bits), 0, 0
            for width in layouts.planes(bits):
                word = int(panels[row // 16, first + dword * width // 8, row % 16])
                field = word >> 8 * byte + dword * width % 8
                code |= (field & 2**width - 1) << low
                first += layouts.granule(bits) * width // 32
                low += width
            assert code == codes[row, column]


def test_the_picture_of_three_bits() -> None:
    """The docstring's picture, code by code."""
    low = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    for code in range(32):
        rows = np.zeros((1, 32), np.uint8)
        rows[0, code] = 7
        words = layouts.words16(bitstream.pack(rows, 3), 3, 32)[0, :, 0].tolist()
        byte, place = next((b, q.index(code % 16)) for b, q in enumerate(low) if code % 16 in q)
        expected = [0, 0, 1 << 8 * byte + place + 4 * (code // 16)]
        expected[code // 16] = 3 << 8 * byte + 2 * place
        assert words == expected


@given(heights, st.integers(0, 9), st.sampled_from(["float32", "float16", "uint8"]), seeds)
def test_panels16_and_back(n: int, blocks: int, dtype: str, seed: int) -> None:
    scales = np.random.default_rng(seed).integers(1, 100, (n, blocks)).astype(dtype)
    panels = layouts.panels16(scales)
    assert panels.shape == (-(-n // 16), blocks, 16)
    assert (layouts.unpanel16(panels, n) == scales).all()
    for row in range(n):
        assert (panels[row // 16, :, row % 16] == scales[row]).all()
    assert np.count_nonzero(panels) == np.count_nonzero(scales)


@pytest.mark.parametrize("isa", runnable(), ids=[isa.name for isa in runnable()])
@pytest.mark.parametrize("bits", BITS)
@given(
    n=st.integers(1, 40),
    k=lengths,
    spare=st.integers(0, 5),
    step=st.sampled_from([1, -1, 0]),
    seed=seeds,
)
def test_the_compiled_rearrangement_gives_the_same_bits(
    isa: Isa, n: int, bits: int, k: int, spare: int, step: int, seed: int
) -> None:
    """Both ways; everything around what is asked for stays as it was."""
    size = -(-k * bits // 8)
    wide = np.random.default_rng(seed).integers(0, 256, (n, size + spare), dtype=np.uint8)
    wide[:, :size] = stream(n, bits, k, seed)
    # Rows one behind the other, from the last to the first, and all in the same memory.
    given_rows = wide[::step] if step else np.broadcast_to(wide[:1], wide.shape)
    dense = np.ascontiguousarray(given_rows[:, :size])
    expected = layouts.words16(dense, bits, k)
    out = np.full(expected.size + 32, PATTERN, np.uint32)
    packing.packing(bits, isa)(
        rows=address(given_rows), stride=given_rows.strides[0], n=n, k=k, panels=address(out[16:])
    )
    assert (out[16:-16].reshape(expected.shape) == expected).all()
    assert (out[:16] == PATTERN).all()
    assert (out[-16:] == PATTERN).all()

    panels = expected.copy()
    panels[-1, :, (n - 1) % 16 + 1 :] = PATTERN  # no row's
    whole = np.full((n + 2, size + spare), 0xA5, np.uint8)
    back = whole[1:-1][:: step or 1]
    packing.unpacking(bits, isa)(
        rows=address(back), stride=back.strides[0], n=n, k=k, panels=address(panels)
    )
    assert (back[:, :size] == dense).all()
    back[:, :size] = 0xA5
    assert (whole == 0xA5).all()


def memory(kind: str, rows: Array) -> Array:
    """The same rows, stored in another way."""
    if kind == "spaced":
        wide = np.full((*rows.shape[:-1], 2 * rows.shape[-1] + 3), 0xA5, np.uint8)
        wide[..., 1:-2:2] = rows
        return wide[..., 1:-2:2]
    if kind == "reversed":
        return rows[::-1, :, ::-1].copy()[::-1, :, ::-1]
    if kind == "turned":
        return rows.swapaxes(0, 2).copy().swapaxes(0, 2)
    return rows


@pytest.mark.parametrize("kind", ["dense", "spaced", "reversed", "turned"])
@pytest.mark.parametrize("bits", BITS)
def test_stacks_of_matrices_in_any_memory(bits: int, kind: str) -> None:
    shape = (2, 3, 19)
    k = 45
    dense = stream(2 * 3 * 19, bits, k, bits).reshape(*shape, -1)
    panels = packing.words16(memory(kind, dense), bits, k)
    assert panels.shape == (2, 3, 2, layouts.row_words(bits, k), 16)
    for index in np.ndindex(2, 3):
        assert (panels[index] == layouts.words16(dense[index], bits, k)).all()
    assert (packing.rows(panels, 19, bits, k) == dense).all()
    turned = panels.swapaxes(2, 4).copy().swapaxes(2, 4)
    assert (packing.rows(turned[::-1], 19, bits, k) == dense[::-1]).all()
    assert address(panels) % 64 == 0  # no vector in two cache lines


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5), (0, 3, 5), (0, 3, 0)])
def test_empty_matrices(bits: int, shape: tuple[int, ...]) -> None:
    *lead, n, k = shape
    canonical = np.zeros((*lead, n, -(-k * bits // 8)), np.uint8)
    panels = packing.words16(canonical, bits, k)
    assert panels.shape == (*lead, -(-n // 16), layouts.row_words(bits, k), 16)
    assert panels.dtype == np.uint32
    back = packing.rows(panels, n, bits, k)
    assert (back.shape, back.dtype) == (canonical.shape, canonical.dtype)


@pytest.mark.parametrize("name", declared())
@pytest.mark.parametrize("shape", [(35, 96), (2, 3, 17), (0, 24), (2, 3, 0), (0, 5, 8)])
def test_the_parts_of_every_format_come_back(name: str, shape: tuple[int, ...]) -> None:
    fmt = lb.format(name)
    x = np.random.default_rng(1).uniform(0.1, 1, shape).astype(np.float32)
    x = -x if name == "int1" else x  # int1 is {0, -1}
    parts = lb.quantize(x, fmt)._rows()
    held = Words16.of(parts)
    back = held.rows()
    assert (back.format, back.shape) == (parts.format, parts.shape)
    for part in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        mine, other = getattr(back, part), getattr(parts, part)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
            assert mine.tobytes() == other.tobytes()
    # A bit a code for each bit of the format, of whole panels and granules.
    bits, rows = fmt.element.bits, -(-shape[-2] // 16) * 16
    columns = -(-shape[-1] // layouts.granule(bits)) * layouts.granule(bits)
    assert held.codes.nbytes == np.prod(shape[:-2], dtype=int) * rows * columns * bits // 8


@pytest.mark.parametrize(
    ("name", "k", "layout"),
    [
        ("int3_g32", 96, "words16"),
        ("int3_g32", 100, "words16"),
        ("int3_g48", 96, "rows"),
        ("int3_g16", 96, "rows"),
        ("int3_g16", 16, "words16"),
        ("int6_g16", 96, "words16"),
        ("int6_g8", 96, "rows"),
        ("int7_row", 96, "words16"),
        ("int5_4x32", 96, "words16"),
        ("int4_g4", 96, "words16"),
    ],
)
def test_planes_are_prepared_where_no_scale_changes_within_a_granule(
    name: str, k: int, layout: str
) -> None:
    x = np.random.default_rng(2).uniform(-1, 1, (3, k)).astype(np.float32)
    w = lb.quantize(x, name)
    held = w.prepare()
    assert held.layout == layout
    assert (held.codes == w.codes).all()
    slow = [lb.explain(x, each.T).kernel == "reference" for each in (w, held)]
    assert slow[0] == slow[1]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    n, bits, k = 200, 5, 900
    canonical = stream(n, bits, k, 0)
    expected = layouts.words16(canonical, bits, k)
    for threads in (1, 2, 3):
        panels, back = np.zeros_like(expected), np.zeros_like(canonical)
        operands: dict[str, int] = {"n": n, "k": k, "stride": back.shape[1], "threads": threads}
        for isa in runnable():
            packing.packing(bits, isa)(rows=address(canonical), panels=address(panels), **operands)
            packing.unpacking(bits, isa)(rows=address(back), panels=address(panels), **operands)
            assert (panels == expected).all()
            assert (back == canonical).all()


OVERRUN = """
import ctypes, mmap, sys
sys.path.insert(0, {src!r})
import numpy as np
from lowbit.kernels import layouts
from lowbit.kernels.cpu import packing
from lowbit.kernels.cpu.isa import runnable

libc, kept = ctypes.CDLL(None, use_errno=True), []

def fenced(a, behind):
    "A copy that ends where memory ends, or begins where it begins."
    size = -(-a.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    held = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept.append(held)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    fence = start + size if behind else start
    assert libc.mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0
    at = fence - a.nbytes if behind else fence + mmap.PAGESIZE
    ctypes.memmove(at, a.ctypes.data, a.nbytes)
    return at

rng = np.random.default_rng(0)
for bits in range(1, 9):
    for n, k in ((1, 1), (3, 39), (16, 129), (17, 64), (32, 613)):
        canonical = rng.integers(0, 256, (n, -(-k * bits // 8)), dtype=np.uint8)
        panels = layouts.words16(canonical, bits, k)
        for isa in runnable():
            for behind in (True, False):
                sizes = dict(n=n, k=k, stride=canonical.shape[1])
                out = fenced(np.zeros_like(panels), behind)
                packing.packing(bits, isa)(rows=fenced(canonical, behind), panels=out, **sizes)
                assert ctypes.string_at(out, panels.nbytes) == panels.tobytes()
                out = fenced(np.zeros_like(canonical), behind)
                packing.unpacking(bits, isa)(rows=out, panels=fenced(panels, behind), **sizes)
                assert ctypes.string_at(out, canonical.nbytes) == canonical.tobytes()
print("inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_is_read_or_written_outside_of_an_operand() -> None:
    source = str(Path(__file__).parent.parent / "src")
    done = subprocess.run(
        [sys.executable, "-P", "-c", OVERRUN.format(src=source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "inside\n", f"ended with {done.returncode}: {done.stderr[-500:]}"


def sparse(size: int) -> mmap.mmap:
    """Zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, size, flags=flags)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved")
@pytest.mark.parametrize("bits", [3, 8])
def test_the_last_panel_of_a_huge_matrix(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 2**32 bytes of codes; only the last panel's are touched."""
    n, k = 2**20 + 2**19, 2**13
    size = k * bits // 8
    rows, back = (np.frombuffer(sparse(n * size), np.uint8).reshape(n, size) for _ in range(2))
    memory = np.frombuffer(sparse(n * size), np.uint32)
    panels = memory.reshape(n // 16, layouts.row_words(bits, k), 16)
    rows[-16:] = stream(16, bits, k, 0)
    scratches = []

    def run(entry: int, argument: int, tiles: int, scratch: int, threads: int | None) -> None:
        private = np.zeros(scratch + 64, np.uint8)
        kinds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
        aligned = -(-address(private) // 64) * 64
        ctypes.CFUNCTYPE(None, *kinds)(entry)(argument, tiles - 1, aligned)
        scratches.append(scratch)

    monkeypatch.setattr(pool, "run", run)
    isa, sizes = runnable()[0], {"n": n, "k": k, "stride": size}
    packing.packing(bits, isa)(rows=address(rows), panels=address(panels), **sizes)
    assert (panels[-1] == layouts.words16(rows[-16:], bits, k)[0]).all()
    packing.unpacking(bits, isa)(rows=address(back), panels=address(panels), **sizes)
    assert (back[-16:] == rows[-16:]).all()
    assert max(scratches) < 2**14, "scratch grows with the matrix"


@pytest.mark.parametrize("isa", RECORDS, ids=[isa.name for isa in RECORDS])
@pytest.mark.parametrize("bits", ODD)
def test_a_granule_stays_in_registers(isa: Isa, bits: int) -> None:
    """Foreign instruction sets too: whole vectors, and at most a few words leave the registers."""
    for name, text in (
        ("arrange", packing.pack_text(bits, isa)),
        ("stream", packing.unpack_text(bits, isa)),
    ):
        body = re.search(rf"^{name}:$(.*?)^\.Lfunc_end", native.assembly(text, isa), re.M | re.S)
        assert body is not None
        lines = re.findall(r"^\t[a-z].*", body[1], re.M)
        spills = sum("%rsp" in line or "[sp" in line for line in lines)
        assert spills <= (0 if isa.registers >= 32 and isa.lanes == 16 else 64)
        # Lane by lane, four codes of sixteen rows would take some 200 instructions.
        vectors = layouts.granule(bits) // 4 * 16 // isa.lanes
        assert len(lines) <= 30 * vectors


@pytest.mark.parametrize("x_format", ["int8_g16", "nvfp4", "int8_g8"])
@pytest.mark.parametrize("w_format", ["int3_g32", "int5_row", "int6_g64", "int7_g32"])
def test_scales_of_x_inside_a_granule_do_not_keep_kernels_away(w_format, x_format):
    rng = np.random.default_rng(0)
    w = lb.quantize(rng.standard_normal((33, 192), np.float32), w_format)
    x = lb.quantize(rng.standard_normal((5, 192), np.float32), x_format)
    rows, held = (lb.explain(x, each.T) for each in (w, w.prepare()))
    assert held.kernel == rows.kernel != "reference"
    np.testing.assert_array_equal(x @ w.T, x @ w.prepare().T)

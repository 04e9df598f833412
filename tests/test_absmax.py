"""Dynamic quantization of a row inside a kernel: the reference's bits, not a byte beside them."""

from __future__ import annotations

import ctypes
import mmap
import struct
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from lowbit.formats import names, reference
from lowbit.kernels.cpu import absmax, native, pool
from lowbit.kernels.cpu import encode_lanes as lanes
from lowbit.kernels.cpu.ir import FLOAT, Module
from lowbit.kernels.cpu.isa import RECORDS, Isa, runnable

Array = npt.NDArray[Any]
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
BITS = (8, 4, 2)


def text(isa: Isa, dtype: str) -> str:
    """A `tile` for the pool that quantizes one row; its arguments lie in a block."""
    module = Module(isa)
    quantize = absmax.quantizer(module, dtype)
    f = module.function("tile", {"a": "ptr", "number": "i64", "scratch": "ptr"}, "external")
    block, number, _ = f.parameters
    a = f.at(block, f.mul(number, 48))
    kinds = ("ptr", "i64", "ptr", "ptr", "float", "ptr")
    f.run(quantize, *(f.load(kind, f.at(a, 8 * i), 8) for i, kind in enumerate(kinds)))
    return module.text()


@cache
def entry(isa: Isa, dtype: str) -> int:
    return native.load(text(isa, dtype), isa).address("tile")


def run(isa: Isa, rows: list[Array], bits: int) -> list[tuple[Array, Array, int]]:
    """Codes, scale and flag of each row: one tile a row; what lies around must stay as it was."""
    dtype = rows[0].dtype.name
    codes = [np.full(len(x) + 64, 0x5A, np.int8) for x in rows]
    scales = np.full((len(rows), 3), 7, np.float32)
    flags = np.zeros(len(rows), np.int64)
    blocks = b"".join(
        struct.pack(
            "qqqqf4xq",
            x.__array_interface__["data"][0],
            len(x),
            held.ctypes.data + 32,
            scales[i, 1:].ctypes.data,
            2 ** (bits - 1) - 1,
            flags[i:].ctypes.data,
        )
        for i, (x, held) in enumerate(zip(rows, codes, strict=True))
    )
    argument = ctypes.create_string_buffer(blocks, len(blocks))
    pool.run(entry(isa, dtype), ctypes.addressof(argument), len(rows))
    for held in codes:
        assert (held[:32] == 0x5A).all(), "written in front of the codes"
        assert (held[-32:] == 0x5A).all(), "written behind the codes"
    assert (scales[:, (0, 2)] == 7).all(), "written beside the scale"
    return [(c[32:-32], scales[i, 1], int(flags[i])) for i, c in enumerate(codes)]


def check(rows: list[Array], bits: int) -> None:
    """Every instruction set that runs here gives the reference's bits."""
    fmt = names.get(f"int{bits}_row")
    expected = []
    for x in rows:
        w = reference.quantize(fmt, x[None])
        codes = reference.element_codes(w)[0].view(np.int8)
        expected.append((codes << (8 - bits) >> (8 - bits), w.scales.reshape(-1)))
    for isa in runnable():
        for x, (codes, scale, flag), (right, step) in zip(
            rows, run(isa, rows, bits), expected, strict=True
        ):
            assert not flag
            assert scale.tobytes() == step.tobytes(), (isa.name, scale, step)
            wrong = np.flatnonzero(codes != right)
            assert not wrong.size, f"{isa.name}: {wrong.size} of {len(x)} differ, {wrong[:3]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_every_short_row(dtype: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows = [rng.standard_normal(n).astype(DTYPES[dtype]) for n in range(1, 71)]
    check(rows, bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_of_every_magnitude(dtype: str) -> None:
    rng = np.random.default_rng(2)
    rows = []
    info: Any = ml_dtypes.finfo(DTYPES[dtype])
    low, high = int(info.minexp) - int(info.nmant), int(info.maxexp) - 3
    for power in np.linspace(low, high, 41):
        with np.errstate(under="ignore"):
            wide = rng.standard_normal(int(rng.integers(900, 1200))) * 2.0 ** float(power)
            rows.append(np.clip(wide, -float(info.max), float(info.max)).astype(DTYPES[dtype]))
    check(rows, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_even_code(dtype: str) -> None:
    halves = np.arange(-127, 127.5, 0.5)
    rows = [(halves[np.abs(halves) <= 127] * s).astype(DTYPES[dtype]) for s in (1.0, 0.25, 8.0)]
    if dtype == "bfloat16":  # 8 bits hold no half above 128
        rows = [
            r[np.abs(r.astype(float)) <= 64 * s] for r, s in zip(rows, (1, 0.25, 8), strict=True)
        ]
        rows = [
            np.append(r, np.array(127 * s, r.dtype))
            for r, s in zip(rows, (1, 0.25, 8), strict=True)
        ]
    check(rows, 8)
    codes, scale, _ = run(runnable()[0], [np.array([127, 0.5, 1.5, -2.5], DTYPES[dtype])], 8)[0]
    assert codes.tolist() == [127, 0, 2, -2]
    assert scale == 1


def test_quotients_next_to_ties() -> None:
    """Where a quotient that is one unit off would give another code."""
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(60):
        amax = np.float32(rng.uniform(1, 2) * 2.0 ** rng.integers(-60, 60))
        scale = amax / np.float32(127)
        ties = (rng.integers(-127, 127, 400) + 0.5).astype(np.float32) * scale
        near = ties.view(np.int32) + rng.integers(-2, 3, 400).astype(np.int32)
        rows.append(np.append(near.view(np.float32), amax).astype(np.float32))
    check(rows, 8)


def test_rows_of_zeros_and_subnormal_numbers() -> None:
    tiny = np.float32(2.0**-149)
    for dtype in DTYPES.values():
        check([np.zeros(n, dtype) for n in (1, 16, 77)], 8)
        check([np.full(33, -0.0, dtype)], 8)
    steps = np.arange(-300, 301).astype(np.float32) * tiny
    check([steps[300 - n : 301 + n].copy() for n in (1, 3, 63, 64, 100, 190, 191, 254, 300)], 8)
    check([steps[300 - n : 301 + n].copy() for n in (1, 3, 63, 64, 100, 190, 191, 254, 300)], 4)


def test_an_empty_row() -> None:
    for isa in runnable():
        codes, scale, flag = run(isa, [np.zeros(0, np.float32)], 8)[0]
        assert (len(codes), float(scale), flag) == (0, 1.0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_reported_wherever_it_stands(dtype: str) -> None:
    for isa in runnable():
        for count in (1, 16, 37, 300):
            places = sorted({0, count // 2, count - 1})
            for value in (np.nan, -np.nan, np.inf, -np.inf):
                rows = [np.ones(count, DTYPES[dtype]) for _ in places]
                for x, place in zip(rows, places, strict=True):
                    x[place] = value
                assert all(flag for *_, flag in run(isa, rows, 8))
            assert not run(
                isa, [np.full(count, ml_dtypes.finfo(DTYPES[dtype]).max, DTYPES[dtype])], 8
            )[0][2]


def test_a_flag_is_never_cleared() -> None:
    isa = runnable()[0]
    x, codes = np.ones(5, np.float32), np.zeros(5, np.int8)
    scale, flag = np.zeros(1, np.float32), np.array([9], np.int64)
    block = struct.pack(
        "qqqqf4xq", x.ctypes.data, 5, codes.ctypes.data, scale.ctypes.data, 127, flag.ctypes.data
    )
    argument = ctypes.create_string_buffer(block, len(block))
    pool.run(entry(isa, "float32"), ctypes.addressof(argument), 1)
    assert codes.tolist() == [127] * 5
    assert flag[0] == 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_behind_the_row(dtype: str) -> None:
    """The row ends where the memory of the process does."""
    size = np.dtype(DTYPES[dtype]).itemsize
    page = mmap.PAGESIZE
    held = mmap.mmap(-1, 2 * page)
    libc = ctypes.CDLL(None, use_errno=True)
    whole = np.frombuffer(held, np.uint8)
    end = whole.ctypes.data + page
    assert libc.mprotect(ctypes.c_void_p(end), page, 0) == 0
    try:
        for count in range(1, 71):
            for offset in (0, 1):
                start = page - count * size - offset
                x = whole[start : start + count * size].view(DTYPES[dtype])
                x[...] = 1
                for isa in runnable():
                    assert run(isa, [x], 8)[0][0].tolist() == [127] * count
    finally:
        libc.mprotect(ctypes.c_void_p(end), page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("isa", RECORDS, ids=[isa.name for isa in RECORDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_record_compiles_and_calls_no_library(isa: Isa, dtype: str) -> None:
    assembly = native.assembly(text(isa, dtype), isa)
    calls = [
        line.split()[-1]
        for line in assembly.splitlines()
        if line.split()[:1] in (["callq"], ["bl"])
    ]
    assert all(call.startswith("absmax_") for call in calls), calls


def quotients(isa: Isa, x: Array, by: Any) -> Array:
    """What `quotient` gives for whole vectors of x, divided quickly."""
    module = Module(isa)
    f = module.function("divide", {"a": "ptr", "count": "i64", "out": "ptr"}, "external")
    a, count, out = f.parameters
    divisor = lanes.quick_divisor(f, f.load("float", a, 4))
    numbers = f.at(a, 64)
    with f.loop(0, count) as loop:
        place = f.mul(loop.index, 64)
        number = f.load(FLOAT, f.at(numbers, place), 4)
        f.store(lanes.quotient(f, number, divisor), f.at(out, place), 4)
    held = np.zeros(16 + -(-len(x) // 16) * 16, np.float32)
    held[0], held[16 : 16 + len(x)] = by, x
    result = np.empty_like(held)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    run = kind(native.load(module.text(), isa).address("divide"))
    run(held.ctypes.data, len(held) // 16 - 1, result.ctypes.data)
    return result[: len(x)]


QUICK = [isa for isa in runnable() if Module(isa).fused]
"""Those that divide by a reciprocal; the others have the instruction's quotients."""


def next_to_midpoints(by: int) -> Array:
    """Numerators whose quotients by an odd 24-bit number come as close to a midpoint as any do."""
    found = []
    for sign in (1, -1):
        middle = 2**24 + pow(by, -1, 2**24) * sign % 2**24
        numerator, rest = divmod(middle * by - sign, 2**24)
        assert rest == 0
        if numerator < 2**24:
            found.append(numerator)
    return np.array(found, np.float32)


@pytest.mark.parametrize("isa", QUICK, ids=[isa.name for isa in QUICK])
def test_quotients_are_correctly_rounded(isa: Isa) -> None:
    rng = np.random.default_rng(4)
    mantissas = [2**24 - 1, 2**23 + 1, *(rng.integers(2**22, 2**23, 300) * 2 + 1).tolist()]
    hard = 0
    for mantissa in mantissas:
        close = next_to_midpoints(mantissa)
        hard += len(close)
        some = (rng.standard_normal(50) * 2.0 ** rng.integers(-20, 20, 50)).astype(np.float32)
        x = np.concatenate([close, -close, some]) * np.float32(2.0**-23)
        for power in (-70, -1, 0, 76):
            by = np.float32(np.ldexp(float(mantissa), power - 23 + (power < 0)))
            numerators = x * np.float32(2.0 ** (power // 2))
            expected = numerators / by
            assert quotients(isa, numerators, by).tobytes() == expected.tobytes(), float(by)
    assert hard > 100
    zeros = np.array([0.0, -0.0], np.float32)
    assert quotients(isa, zeros, 3.0).tobytes() == zeros.tobytes()
    for limit in (lanes.SMALLEST_DIVISOR, lanes.LARGEST_DIVISOR):
        x = (rng.standard_normal(4000) * 2.0 ** rng.integers(-99, 126, 4000)).astype(np.float32)
        for number in (np.float32(limit), np.nextafter(np.float32(limit), np.float32(1))):
            with np.errstate(over="ignore", under="ignore"):
                right = x / number
            whole = np.isfinite(right) & (np.abs(right) >= 2.0**-126)
            assert whole.sum() > 1000
            got = quotients(isa, x, number)
            assert got[whole].tobytes() == right[whole].tobytes()

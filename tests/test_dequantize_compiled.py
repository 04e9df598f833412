"""Compiled dequantizing has the reference's bits: every format, code, scale, instruction set."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import checks
from lowbit.formats import Format, declared, reference
from lowbit.formats.declare import Element, codebook, integer
from lowbit.kernels.cpu import dequantize as compiled
from lowbit.kernels.cpu import native
from lowbit.kernels.cpu.dequantize_ir import PIECE, Spec, text
from lowbit.kernels.cpu.dequantize_ways import smallest_scale, way
from lowbit.kernels.cpu.ir import Module
from lowbit.kernels.cpu.isa import RECORDS, Isa, runnable
from lowbit.testing import random_qarray
from lowbit.testing.strategies import formats, lengths, qarrays

Array = npt.NDArray[Any]
DTYPES = ("float32", "float16", "bfloat16")
VARIANTS = (
    "int4_g32_asym", "uint4_g16_asym_f16", "uint4_g8_zf16", "int8_row_zbf16", "uint2_g16_zf32",
    "uint4_g8_zint8", "int4_g8_asym_e4m3", "uint3_g8_bias", "int6_row_bias_bf16", "int4_4x4",
    "int8_3x5_asym", "float8_e4m3fn_128x128", "nf4_allx16", "float6_e3m2fn_2xall", "int5_tensor",
    "uint8_tensor_asym_e8m0", "float4_e2m1fn_g16_e4m3", "int4_g32_ts", "nvfp4_2x8", "mxfp4_4x16",
    "mxfp8_g1", "int3_g1000", "fp8_tensor_bf16", "int4_g64_f16", "int7_g128_bf16", "int2_g20",
    "uint5_allx3_asym", "fp8_e5m2_g32_bf16", "nf4_tensor_f16", "int8_g16_e8m0_ts", "int1_g32_asym",
    "fp8_g32_ts", "fp8_e5m2_g32_bias", "int4_g256", "int5_g64", "int2_row", "uint4_g64_bias",
    "int4_g32_e4m3_ts", "mxfp4_ts", "uint4_g32_asym_e4m3_ts", "fp8_e5m2_g32_e4m3_ts", "nf4_e4m3_ts",
)  # fmt: skip
EVERY = [*declared(), *VARIANTS]


def distinct() -> list[Isa]:
    """Records that this machine runs and whose code differs here; the best one first."""
    found: dict[Any, Isa] = {}
    for isa in runnable():
        found.setdefault((isa.permute, isa.pdep, isa.lanes), isa)
    return list(found.values())


ISAS = distinct()


def same_bits(got: Array, expected: Array, note: str = "") -> None:
    kind = f"u{got.itemsize}"
    one, other = got.view(kind), expected.view(kind)
    both = np.isnan(got.astype(np.float64)) & np.isnan(expected.astype(np.float64))
    wrong = np.argwhere((one != other) & ~both)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(f"{note}: {len(wrong)} differ, first {at}: {got[at]}, {expected[at]}")


def check(w: reference.Packed, isas: Any = None, dtypes: Any = DTYPES) -> None:
    """The reference's bits, and nothing written around them."""
    for name in dtypes:
        dtype = checks.float_dtype(name, "dtype")
        expected = np.empty(w.shape, dtype)
        with np.errstate(all="ignore"):
            reference.dequantize_to(w, expected)
        for isa in ISAS if isas is None else isas:
            room = np.full(expected.nbytes + 128, 0xA5, np.uint8)
            out = room[64 : 64 + expected.nbytes].view(dtype).reshape(w.shape)
            compiled.dequantize_to(w, out, isa=isa)
            same_bits(out, expected, f"{isa.name} {name}")
            assert (room[:64] == 0xA5).all()
            assert (room[64 + expected.nbytes :] == 0xA5).all()


def with_scales(fmt: Format, scales: Array, seed: int = 0) -> reference.Packed:
    """Every code of the element under each scale, in rows of one block."""
    bits = fmt.element.bits
    every = np.resize(np.arange(2**bits, dtype=np.uint8), max(2**bits, 32))
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.permutation(every) for _ in scales])
    zeros = None
    if fmt.zero is not None:
        low, high = (fmt.zero.min, fmt.zero.max) if isinstance(fmt.zero, Element) else (-30, 30)
        zeros = rng.integers(int(low), int(high) + 1, (len(scales), 1))
        zeros = (zeros + (0 if isinstance(fmt.zero, Element) else 0.37)).astype(
            reference.zero_dtype(fmt)
        )
    return reference.Packed(
        fmt, codes.shape, lb.formats.codes.pack(codes, bits), scales[:, None], zeros
    )


@pytest.mark.parametrize("name", EVERY)
def test_every_format(name: str) -> None:
    fmt = lb.format(name)
    for spread, nonfinite in ((1.0, False), (8.0, True)):
        w = random_qarray(fmt, 37, 301, seed=1, spread=spread, nonfinite=nonfinite)._rows()
        check(w, dtypes=("float32",))
        check(w, ISAS[:2], DTYPES[1:])


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
@pytest.mark.parametrize("name", ["int4_g32", "int8_g32_bf16", "fp8_g32", "nvfp4", "uint3_g8_bias"])
def test_narrow_results_on_every_instruction_set(name: str, isa: Isa) -> None:
    w = random_qarray(lb.format(name), 37, 301, seed=2, spread=9.0, nonfinite=True)._rows()
    check(w, [isa], DTYPES[1:])


@pytest.mark.parametrize("scale", ["f32", "f16", "bf16", "e8m0", "e4m3"])
@pytest.mark.parametrize(
    "element", ["int4", "int8", "uint8_asym", "fp8", "fp8_e5m2", "nf4", "mxfp6", "uint4_zf32"]
)
def test_every_code_under_scales_of_every_magnitude(element: str, scale: str) -> None:
    """Negative, zero, subnormal and huge ones: where float32 would round twice or lose a bit."""
    fmt = lb.format(f"{element}_{scale}")
    fmt = Format(fmt.element, lb.formats.Scale(fmt.scale.element, (1, None)), fmt.zero)
    rng = np.random.default_rng(3)
    kind = fmt.scale.element
    if isinstance(kind, Element):
        scales = np.array([c for c, v in enumerate(kind.values) if np.isfinite(v)], np.uint8)
    else:
        size = 4 if kind == "float32" else 2
        patterns = rng.integers(0, 2 ** (8 * size), 1500).astype(f"u{size}")
        small = np.concatenate([np.arange(1, 20), [0]]).astype(f"u{size}")
        patterns = np.concatenate([patterns, small, small | 1 << (8 * size - 1)])
        scales = patterns.astype(f"u{size}").view(checks.float_dtype(kind, "dtype"))
        scales = scales[np.isfinite(scales.astype(np.float32))]
    check(with_scales(fmt, scales), ISAS[:2])


@pytest.mark.parametrize("out", DTYPES[1:])
def test_products_next_to_ties_are_rounded_once(out: str) -> None:
    """A float32 product that lies on a tie only because it was rounded."""
    bits = {"float16": 11, "bfloat16": 8}[out]
    scales: list[Any] = []
    for value in (3, 5, 7, 113, 127):
        for number in range(2 ** (bits - 1), 2**bits):
            tie = (2 * number + 1) / 2.0**bits
            near = np.float32(tie / value)
            scales += [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1))]
    fmt = Format(integer(8), lb.formats.Scale("float32", (1, None)))
    dtype = checks.float_dtype(out, "dtype")
    # The last ones are so small that the error of a float32 product is no float32.
    for power in (0, -13, -60, -116, -122, -126, -130):
        w = with_scales(fmt, np.ldexp(np.array(scales[:1500], np.float32), power))
        once = np.empty(w.shape, dtype)
        reference.dequantize_to(w, once)
        twice = reference.dequantize(w).astype(np.float32).astype(dtype)
        if power > -20:
            wrong = (twice.view(np.uint16) != once.view(np.uint16)).sum()
            assert wrong > 100, "no hard case"
        check(w, dtypes=(out,))


@settings(max_examples=60)
@given(st.data())
def test_drawn_formats_shapes_and_memory(data: st.DataObject) -> None:
    name = data.draw(formats())
    rows, columns = data.draw(lengths(70)), data.draw(lengths(300))
    w = data.draw(qarrays(name, rows, columns, nonfinite=data.draw(st.booleans())))
    check(w._rows(), ISAS[:1], (data.draw(st.sampled_from(DTYPES)),))


@pytest.mark.parametrize("shape", [(3, 5, 65), (2, 2, 7, 33), (1, 100_000), (2000, 3), (0, 4)])
@pytest.mark.parametrize("name", ["int4_g32", "int3_row", "nvfp4", "fp8_3x5", "int8_tensor"])
def test_other_shapes(name: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    w = lb.quantize(rng.standard_normal(shape).astype(np.float32), name)
    check(w._rows(), ISAS[:1])


@pytest.mark.parametrize("columns", [PIECE - 1, PIECE, PIECE + 1, 4 * PIECE + 8, 8192 + 40])
def test_rows_longer_than_what_waits(columns: int) -> None:
    for name in ("int5_g24", "int4_row", "int8_g1000"):
        w = random_qarray(lb.format(name), 3, columns, seed=5)._rows()
        check(w, ISAS[:1])


def test_bits_do_not_depend_on_threads() -> None:
    for name in ("int4_g128", "fp8_128x128", "nvfp4"):
        w = random_qarray(lb.format(name), 300, 1000, seed=6)._rows()
        for dtype in DTYPES:
            results = []
            for threads in (1, 2, 3):
                out = np.empty(w.shape, checks.float_dtype(dtype, "dtype"))
                compiled.dequantize_to(w, out, threads=threads)
                results.append(out.tobytes())
            assert len(set(results)) == 1


@pytest.mark.parametrize("name", ["int3_g32", "int8_g32", "int4_row", "uint1_g8"])
def test_nothing_is_read_behind_the_codes(name: str) -> None:
    """The codes end where the memory of the process does."""
    page = mmap.PAGESIZE
    held = mmap.mmap(-1, 2 * page)
    whole = np.frombuffer(held, np.uint8)
    libc = ctypes.CDLL(None)
    end = whole.ctypes.data + page
    assert libc.mprotect(ctypes.c_void_p(end), page, 0) == 0
    try:
        for columns in range(1, 140):
            w = random_qarray(lb.format(name), 2, columns, seed=7)._rows()
            at_end = whole[page - w.codes.nbytes : page].reshape(w.codes.shape)
            at_end[...] = w.codes
            moved = reference.Packed(w.format, w.shape, at_end, w.scales)
            check(moved, dtypes=("float32",))
    finally:
        libc.mprotect(ctypes.c_void_p(end), page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_the_shortest_exact_way_is_chosen() -> None:
    module = Module(ISAS[0])
    assert module.fused

    def chosen(name: str, out: str) -> str:
        return way(compiled.plan(lb.format(name), out, 256), module)

    assert chosen("int4_g128", "float32") == chosen("fp8", "float32") == "single"
    assert chosen("uint4_g32_asym", "float32") == "single"
    assert chosen("int4_g128_f16", "float16") == chosen("mxfp4", "bfloat16") == "single"
    assert chosen("int8_g128_bf16", "bfloat16") == "single"
    assert chosen("nvfp4", "float32") == chosen("int4_g32_e4m3_ts", "float32") == "single"
    inexact = "directed" if module.isa.permute == "vpermps512" else "odd"
    assert chosen("int4_g128", "bfloat16") == chosen("nf4", "float16") == inexact
    assert chosen("nf4_g64_f16", "float16") == inexact
    assert chosen("nvfp4", "float16") == ("directed" if inexact == "directed" else "double")
    for name in ("uint4_g32_bias", "uint4_g32_zf16", "int4_g32_ts", "mxfp4_ts"):
        assert chosen(name, "float32") == "double"
    fused = [isa for isa in ISAS if Module(isa).fused and isa.permute != "vpermps512"]
    for isa in fused:
        fine = Spec("bfloat16", codebook("fine", [0, 2.0**-120, 1, -1]), "float32")
        assert way(fine, Module(isa)) == "double"
        assert way(Spec("bfloat16", integer(4), "float32"), Module(isa)) == "odd"
    assert smallest_scale(Spec("bfloat16", integer(4), "float32")) == 2.0**-126


# Through the front door.


class UsedError(Exception):
    """The reference was asked."""


def test_large_arrays_are_dequantized_by_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise UsedError

    x = np.random.default_rng(8).standard_normal((128, 256)).astype(np.float32)
    w = lb.quantize(x, "int4_g32")
    expected = w.dequantize(np.float64)
    monkeypatch.setattr(reference, "dequantize_to", asked)
    for dtype in DTYPES:
        values = w.dequantize(dtype)
        assert values.dtype.name == dtype
        same_bits(values, lb.formats.codes.rounded(expected, values.dtype))
    assert (w.T.dequantize() == expected.T.astype(np.float32)).all()
    assert (lb.dequantize(w.prepare()) == expected.astype(np.float32)).all()
    with pytest.raises(UsedError):
        w.dequantize(np.float64)
    with pytest.raises(UsedError):
        w[:4].dequantize()


@pytest.mark.parametrize("isa", RECORDS, ids=[isa.name for isa in RECORDS])
@pytest.mark.parametrize("name", ["int4_g128", "uint3_g8_bias_bf16", "nvfp4", "nf4_g64", "mxfp8"])
def test_every_record_compiles_and_calls_no_library(name: str, isa: Isa) -> None:
    for dtype in DTYPES:
        spec = compiled.plan(lb.format(name), dtype, 512)
        for line in native.assembly(text(spec, isa), isa).splitlines():
            words = line.split()
            if words[:1] in (["callq"], ["bl"]):
                called = words[1].lstrip("*.L")
                assert called.startswith(("prepare", "values", "unpack", "copy")), line

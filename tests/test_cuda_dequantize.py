"""CUDA kernels dequantize with the reference's bits: every format, code, scale, memory."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from absence import absent
from emulator import Emulator, missing
from emulator_batch import Batch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import checks
from lowbit.formats import Format, declared, reference
from lowbit.formats.declare import Element, codebook, integer
from lowbit.kernels.cuda import dequantize as compiled
from lowbit.kernels.cuda import emit_quantize, launch
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
    "fp8_g32_ts", "fp8_e5m2_g32_bias", "int4_g256", "int2_row", "uint4_g64_bias",
    "int4_g32_e4m3_ts", "mxfp4_ts", "uint4_g32_asym_e4m3_ts", "fp8_e5m2_g32_e4m3_ts", "nf4_e4m3_ts",
)  # fmt: skip
EVERY = [*declared(), *VARIANTS]
FINE = codebook("fine_values", [*np.linspace(-1, 1, 200), *np.linspace(2, 9, 55), -0.0])


def same_bits(got: Array, expected: Array, note: str = "") -> None:
    kind = f"u{got.itemsize}"
    one, other = got.view(kind), expected.view(kind)
    both = np.isnan(got.astype(np.float64)) & np.isnan(expected.astype(np.float64))
    wrong = np.argwhere((one != other) & ~both)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(f"{note}: {len(wrong)} differ, first {at}: {got[at]}, {expected[at]}")


def check(machine: Emulator, w: reference.Packed, dtypes: Any = DTYPES) -> None:
    for name in dtypes:
        dtype = checks.float_dtype(name, "dtype")
        expected = np.empty(w.shape, dtype)
        with np.errstate(all="ignore"):
            reference.dequantize_to(w, expected)
        out = machine.empty(w.shape, dtype)
        with launch.pretending(machine):
            compiled.dequantize_to(w, out)
        same_bits(out, expected, f"{w.format.name} {name}")


def sample(name: str, rows: int = 37, columns: int = 301, **options: Any) -> reference.Packed:
    return random_qarray(lb.format(name), rows, columns, seed=1, **options)._rows()


SCALES = ("f32", "f16", "bf16", "e8m0", "e4m3")
ELEMENTS = ("int4", "int8", "uint8_asym", "fp8", "fp8_e5m2", "nf4", "mxfp6", "uint4_zf32")


def rows_of_one_block(name: str) -> Format:
    fmt = lb.format(name)
    return Format(fmt.element, lb.formats.Scale(fmt.scale.element, (1, None)), fmt.zero)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """An emulator that knows the kernels of every format and dtype."""
    reason = missing()
    if reason is not None:
        absent(reason)
    machine = Batch()
    every = [sample(name, 2, 40) for name in EVERY]
    for element in ELEMENTS:
        for scale in SCALES:
            fmt = rows_of_one_block(f"{element}_{scale}")
            every.append(random_qarray(fmt, 2, 40, seed=1)._rows())
    with machine.noting(), launch.pretending(machine):
        for w in every:
            for dtype in DTYPES:
                compiled.dequantize_to(w, np.empty(w.shape, checks.float_dtype(dtype, "dtype")))
    return machine


@pytest.mark.parametrize("name", EVERY)
def test_every_format(batch: Batch, name: str) -> None:
    for seed, (spread, nonfinite) in enumerate(((1.0, False), (8.0, True))):
        batch.seed = seed
        check(batch, sample(name, spread=spread, nonfinite=nonfinite))


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


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_code_under_scales_of_every_magnitude(batch: Batch, element: str, scale: str) -> None:
    """Negative, zero, subnormal and huge ones: where float32 would round twice or lose a bit."""
    fmt = rows_of_one_block(f"{element}_{scale}")
    rng = np.random.default_rng(3)
    kind = fmt.scale.element
    if isinstance(kind, Element):
        scales = np.array([c for c, v in enumerate(kind.values) if np.isfinite(v)], np.uint8)
    else:
        size = 4 if kind == "float32" else 2
        patterns = rng.integers(0, 2 ** (8 * size), 300).astype(f"u{size}")
        small = np.concatenate([np.arange(1, 20), [0]]).astype(f"u{size}")
        patterns = np.concatenate([patterns, small, small | 1 << (8 * size - 1)])
        scales = patterns.astype(f"u{size}").view(checks.float_dtype(kind, "dtype"))
        scales = scales[np.isfinite(scales.astype(np.float32))]
    check(batch, with_scales(fmt, scales))


@pytest.mark.parametrize("out", DTYPES[1:])
def test_products_next_to_ties_are_rounded_once(emulator: Emulator, out: str) -> None:
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
    for power in (0, -13, -116, -126, -130):
        w = with_scales(fmt, np.ldexp(np.array(scales[:1500], np.float32), power))
        once = np.empty(w.shape, dtype)
        reference.dequantize_to(w, once)
        twice = reference.dequantize(w).astype(np.float32).astype(dtype)
        if power > -20:
            wrong = (twice.view(np.uint16) != once.view(np.uint16)).sum()
            assert wrong > 100, "no hard case"
        check(emulator, w, (out,))


@settings(max_examples=12)
@given(st.data())
def test_drawn_formats_shapes_and_memory(data: st.DataObject) -> None:
    name = data.draw(formats())
    rows, columns = data.draw(lengths(70)), data.draw(lengths(300))
    w = data.draw(qarrays(name, rows, columns, nonfinite=data.draw(st.booleans())))
    machine = Emulator(seed=data.draw(st.integers(0, 99)))
    check(machine, w._rows(), (data.draw(st.sampled_from(DTYPES)),))


COMMON = ("int4_g32_asym", "nvfp4", "int8", "fp8", "int3", "mxfp6", "uint5_allx3_asym")
_kept = Emulator(seed=7)


@settings(max_examples=60)
@given(st.data())
def test_drawn_shapes_of_common_formats(data: st.DataObject) -> None:
    """Compiled once, so that many examples cost little."""
    name = data.draw(st.sampled_from(COMMON))
    w = sample(name, data.draw(lengths(70)), data.draw(lengths(300)))
    check(_kept, w, (data.draw(st.sampled_from(DTYPES)),))


@pytest.mark.parametrize("shape", [(3, 5, 65), (2, 2, 7, 33), (1, 20_000), (600, 3), (0, 4)])
@pytest.mark.parametrize("name", ["int4_g32_asym", "int2_row", "nvfp4", "int8_3x5_asym", "fp8"])
def test_other_shapes(batch: Batch, name: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    check(batch, lb.quantize(x, name)._rows())


@pytest.mark.parametrize("name", ["int4_g32_asym", "nvfp4", "fp8", "int7_g128_bf16", "int2_row"])
def test_parts_and_results_that_lie_apart(batch: Batch, name: str) -> None:
    """Rows of another array, in both; results that no wide store can reach."""
    fmt = lb.format(name)
    whole = sample(name, 48, 300)
    for rows in (slice(0, 48, 3), slice(None, None, -1), slice(5, 40)):
        held = [None if p is None else p[rows] for p in (whole.codes, whole.scales, whole.zeros)]
        codes, scales, zeros = held
        assert codes is not None
        assert scales is not None
        w = reference.Packed(fmt, (len(codes), 300), codes, scales, zeros, None, whole.tensor_scale)
        for dtype in DTYPES:
            kind = checks.float_dtype(dtype, "dtype")
            expected = np.empty(w.shape, kind)
            reference.dequantize_to(w, expected)
            for left, width in ((0, 304), (1, 303), (4, 308)):
                room = np.full((len(codes), width), 77, kind)
                out = room[:, left : left + 300]
                with launch.pretending(batch):
                    compiled.dequantize_to(w, out)
                same_bits(np.ascontiguousarray(out), expected)
                room[:, left : left + 300] = 77
                assert (room == 77).all()


def test_a_codebook_of_many_numbers(emulator: Emulator) -> None:
    fmt = Format(FINE, lb.formats.Scale("float16", (1, 48)))
    check(emulator, random_qarray(fmt, 5, 300, seed=1)._rows())


@pytest.mark.parametrize("seed", range(4))
def test_bits_do_not_depend_on_the_schedule(batch: Batch, seed: int) -> None:
    batch.seed = seed
    for name in ("int4_g32_asym", "fp8", "nvfp4", "uint5_allx3_asym"):
        check(batch, sample(name, 70, 520))


def test_the_shortest_exact_way_is_chosen() -> None:
    def chosen(name: str, out: str) -> str:
        return emit_quantize.way(emit_quantize.spec(lb.format(name)), out)

    assert chosen("int4_g128", "float32") == chosen("fp8", "float32") == "single"
    assert chosen("uint4_g32_asym", "float32") == "single"
    assert chosen("int4_g128_f16", "float16") == chosen("mxfp4", "bfloat16") == "single"
    assert chosen("int8_g128_bf16", "bfloat16") == "single"
    assert chosen("nvfp4", "float32") == chosen("int4_g32_e4m3_ts", "float32") == "single"
    assert chosen("int4_g128", "bfloat16") == chosen("nf4", "float16") == "directed"
    assert chosen("nf4_g64_f16", "float16") == chosen("nvfp4", "float16") == "directed"
    for name in ("uint4_g32_bias", "uint4_g32_zf16", "int4_g32_ts", "mxfp4_ts"):
        assert chosen(name, "float32") == "twofold"


def test_what_is_refused_is_refused_in_words() -> None:
    assert compiled.refuse(np.dtype(np.float32)) is None
    assert compiled.refuse(np.dtype(ml_dtypes.bfloat16)) is None
    assert compiled.refuse(np.dtype(np.float64)) == "float64 is what the reference computes in"


@pytest.mark.parametrize(("name", "columns"), [("int8_g128", 256), ("uint5_allx3_asym", 1 << 14)])
def test_offsets_beyond_32_bits(name: str, columns: int) -> None:
    """Values of 8 GiB, codes of 2 to 4: only the last rows are looked at."""
    fmt = lb.format(name)
    rows = (1 << 32) // columns + 64
    tail = sample(name, 64, columns)
    machine = Emulator()
    codes = machine.sparse((rows, fmt.row_bytes(columns)), tail.codes.dtype)
    codes[-64:] = tail.codes
    scales, zeros = tail.scales, tail.zeros
    if fmt.scale.block[0]:
        scales = machine.sparse((rows, tail.scales.shape[1]), tail.scales.dtype)
        scales[-64:] = tail.scales
    w = reference.Packed(fmt, (rows, columns), codes, scales, zeros)
    out = machine.sparse((rows, columns), ml_dtypes.bfloat16)
    make = machine.function

    def function(source: Any) -> Any:
        made = make(source)

        def call(grid: tuple[int, ...], block: tuple[int, ...], args: Any, **more: Any) -> None:
            machine.blocks = [math.prod(grid) - 1]
            made(grid, block, args, **more)

        return call

    machine.function = function  # type: ignore[method-assign]
    with launch.pretending(machine):
        compiled.dequantize_to(w, out)
    expected = np.empty(tail.shape, ml_dtypes.bfloat16)
    reference.dequantize_to(tail, expected)
    got = np.array(out[-64:])
    written = got.view(np.uint16) != 0
    assert written[-1].any()
    assert (got.view(np.uint16)[written] == expected.view(np.uint16)[written]).all()

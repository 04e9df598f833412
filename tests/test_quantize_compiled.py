"""Compiled quantizing has the reference's bits: every format, memory, rule, instruction set."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import checks
from lowbit.formats import Format, codes, declared, reference
from lowbit.formats.declare import codebook
from lowbit.kernels.cpu import native
from lowbit.kernels.cpu import quantize as compiled
from lowbit.kernels.cpu.isa import RECORDS, Isa, runnable
from lowbit.kernels.cpu.quantize_ir import text
from lowbit.testing.strategies import MEMORY, formats, in_memory, lengths

Array = npt.NDArray[Any]
PARTS = ("codes", "scales", "zeros", "biases", "tensor_scale")
DTYPES = ("float32", "float16", "bfloat16")
VARIANTS = (
    "int4_g32_asym", "uint4_g16_asym_f16", "uint4_g8_zf16", "int8_row_zbf16", "uint2_g16_zf32",
    "uint4_g8_zint8", "int4_g8_asym_e4m3", "uint3_g8_bias", "int6_row_bias_bf16", "int4_4x4",
    "int8_3x5_asym", "float8_e4m3fn_128x128", "nf4_allx16", "float6_e3m2fn_2xall", "int5_tensor",
    "uint8_tensor_asym_e8m0", "float4_e2m1fn_g16_e4m3", "int4_g32_ts", "nvfp4_2x8", "mxfp4_4x16",
    "mxfp8_g1", "int3_g1000", "fp8_tensor_bf16", "int4_g64_f16", "int7_g128_bf16", "int2_g20",
    "fp4_g256_f16", "uint5_allx3_asym", "fp8_tensor", "nf4_tensor_f16", "int8_g16_e8m0_ts",
)  # fmt: skip
EVERY = [*declared(), *VARIANTS]


def distinct() -> list[Isa]:
    """Records that this machine runs and whose code differs here; the best one first."""
    found: dict[Any, Isa] = {}
    for isa in runnable():
        found.setdefault((isa.permute, isa.pdep, isa.lanes), isa)
    return list(found.values())


ISAS = distinct()


def same(a: reference.Packed, b: reference.Packed, note: str = "") -> None:
    """Two arrays of the same bits in every part."""
    for part in PARTS:
        one, other = getattr(a, part), getattr(b, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), part
            assert one.tobytes() == other.tobytes(), f"{note} {part}"


def sided(fmt: Format, x: Array) -> Array:
    """Numbers that the element can hold: unsigned ones take no negative, int1 no positive."""
    if fmt.zero is None and not fmt.bias:
        if fmt.element.min == 0:
            return np.abs(x)
        if fmt.element.max == 0:
            return -np.abs(x)
    return x


def narrowed(x: Array, dtype: str) -> Array:
    return codes.rounded(x, checks.float_dtype(dtype, "dtype"))


def check(fmt: Format, x: Array, isas: Any = None, **options: Any) -> None:
    expected = reference.quantize(fmt, x, **options)
    for isa in ISAS if isas is None else isas:
        got = compiled.quantize(fmt, x, isa=isa, **options)
        assert got is not None, f"{isa.name}: left to the reference"
        same(got, expected, isa.name)


# Whole arrays.


@pytest.mark.parametrize("name", EVERY)
def test_every_format(name: str) -> None:
    fmt = lb.format(name)
    x = sided(fmt, np.random.default_rng(1).standard_t(4, (2, 35, 299)).astype(np.float32))
    check(fmt, x)
    for dtype in DTYPES[1:]:
        check(fmt, narrowed(x, dtype), ISAS[:1])


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
def test_narrow_numbers_on_every_instruction_set(isa: Isa) -> None:
    x = np.random.default_rng(1).standard_t(4, (35, 299)).astype(np.float32)
    for name in ("int4_g32", "uint3_g8_bias_bf16", "nf4_3x5"):
        for dtype in DTYPES[1:]:
            check(lb.format(name), narrowed(x, dtype), [isa])


WIDE = ("int4_g16", "int4_g32", "int8_g64", "nf4_g128", "uint4_g32_asym", "mxfp4", "int3_g256_f16")


@pytest.mark.parametrize("name", WIDE)
def test_rows_of_many_blocks(name: str) -> None:
    """Sixteen whole blocks are looked at together."""
    fmt = lb.format(name)
    x = np.random.default_rng(13).standard_t(3, (3, 9100)).astype(np.float32)
    for dtype in DTYPES:
        narrow = narrowed(x, dtype)
        check(fmt, narrow)
        for at in ((0, 0), (1, 4097), (2, 9099), (2, 8191)):
            for value in (np.nan, np.inf, -np.inf):
                bad = narrow.copy()
                bad[at] = value
                assert compiled.quantize(fmt, bad) is None


@settings(max_examples=60)
@given(st.data())
def test_drawn_formats_shapes_and_memory(data: st.DataObject) -> None:
    fmt = lb.format(data.draw(formats()))
    shape = data.draw(st.tuples(lengths(70), lengths(300)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 6, (shape[0], 1))
    x[rng.random(shape) < data.draw(st.sampled_from([0, 0.5, 1]))] = 0.0
    x = narrowed(sided(fmt, x.astype(np.float32)), data.draw(st.sampled_from(DTYPES)))
    x = in_memory(x, data.draw(st.sampled_from(MEMORY)))
    if compiled.refuse(fmt, x) is not None:
        return
    try:
        expected = reference.quantize(fmt, x)
    except ValueError:
        assert compiled.quantize(fmt, x) is None
        return
    got = compiled.quantize(fmt, x)
    assert got is not None
    same(got, expected)


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "int8_tensor", "uint4_3x5_asym", "fp8"])
def test_any_memory(name: str, kind: str) -> None:
    x = np.random.default_rng(2).standard_normal((3, 21, 130)).astype(np.float32)
    for dtype in DTYPES:
        check(lb.format(name), in_memory(narrowed(x, dtype), kind), ISAS[:1])


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "int8_tensor", "fp8_8x32"])
def test_rows_in_any_order(name: str) -> None:
    """Backwards, with gaps, or one row many times: read where they are."""
    x = np.random.default_rng(14).standard_normal((64, 300)).astype(np.float32)
    once = np.broadcast_to(x[:1], (64, 300))
    for rows in (x[::-1], x[::3, 5:250], once, np.broadcast_to(x, (3, 64, 300)), x[:, None][::-1]):
        check(lb.format(name), rows, ISAS[:1])


@pytest.mark.parametrize("name", EVERY)
def test_every_magnitude(name: str) -> None:
    """Subnormal and huge rows, zeros of both signs, columns of one number; refusals are equal."""
    for dtype in DTYPES:
        every_magnitude(lb.format(name), dtype)


def every_magnitude(fmt: Format, dtype: str) -> None:
    rng = np.random.default_rng(3)
    info: Any = ml_dtypes.finfo(checks.float_dtype(dtype, "dtype"))
    powers = np.linspace(int(info.minexp) - int(info.nmant), int(info.maxexp) - 3, 14)
    settled = 0
    for power in powers:
        with np.errstate(under="ignore"):
            x = rng.standard_normal((4, 70)) * 2.0 ** float(power)
        x[1] = rng.choice([0.0, -0.0, float(info.smallest_subnormal), float(info.max)], 70)
        x[2, 40:] = 0.0
        x[3] = np.abs(x[3, 0])
        x = np.clip(x, -float(info.max), float(info.max))
        x = narrowed(sided(fmt, x.astype(np.float32)), dtype)
        got = compiled.quantize(fmt, x)
        try:
            expected = reference.quantize(fmt, x)
        except ValueError:
            assert got is None
            continue
        if got is not None:
            settled += 1
            same(got, expected, f"{power}")
    if dtype == "float16" and fmt.scale.element == "float32" and not fmt.bias:
        assert settled == len(powers)


def test_quotients_and_offsets_next_to_ties() -> None:
    rng = np.random.default_rng(4)
    for name in ("int4_g32", "uint4_g32_asym", "int8_g64", "fp8_g32", "mxfp4", "uint4_g32_zf16"):
        fmt = lb.format(name)
        base = rng.standard_normal((16, 320)).astype(np.float32)
        w = reference.quantize(fmt, base)
        step = reference.spread(reference._step(fmt, w.scales, None, np.dtype("f4")),
                                fmt.scale.block, (16, 320))  # fmt: skip
        values = reference.dequantize(w).astype(np.float32)
        near = values + step * np.float32(0.5)
        nudge = rng.integers(-2, 3, near.shape) * (np.abs(near) > 1e-6)
        moved = (near.view(np.int32) + nudge).astype(np.int32)
        x = np.clip(moved.view(np.float32), base.min(), base.max())
        x[:, ::32] = base[:, ::32]
        check(fmt, x.astype(np.float32))


def test_tiny_quotients_are_exact_where_an_element_tells_them_apart() -> None:
    """Quotients on the edge 2**-66, of numerators whose remainders are no float32."""
    element = codebook("tiny_edge", [2.0**-65, 0.0, 1.0, 0.5])
    fmt = Format(element, lb.formats.Scale("float32", (1, None)))
    numerators = np.random.default_rng(12).integers(2**17, 2**18, 500) * 2.0**-149
    x = np.stack([numerators * 2.0**66, numerators, numerators * 3], 1).astype(np.float32)
    check(fmt, x)


def test_a_zero_of_either_sign_in_a_block_with_a_bias() -> None:
    """Which one NumPy takes for the least is its own affair."""
    fmt = lb.format("uint4_g32_bias")
    x = np.random.default_rng(5).random((20, 64)).astype(np.float32)
    x[:, 3] = 0.0
    check(fmt, x)
    x[:, 5] = -0.0
    assert compiled.quantize(fmt, x) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int4_g32", {"method": "fullrange"}),
        ("int4_g32", {"method": "signed_max"}),
        ("mxfp4", {"method": "floor"}),
        ("mxfp6", {"method": "ceil"}),
        ("mxfp8", {"method": "even"}),
        ("mxfp8", {"method": "rceil"}),
        ("int8_tensor", {"scale": np.float64(0.02)}),
        ("int4_g32", {"scale": np.full((2, 33, 1), 0.1)}),
        ("int4_g32", {"scale": np.full((2, 33, 1), -0.1)}),
        ("uint4_g32_asym", {"scale": np.float64(0.1), "zero": np.float64(7)}),
        ("uint4_g32_zf16", {"scale": np.float64(1e-30), "zero": np.float64(7.25)}),
        ("nvfp4", {"scale": np.array([0.001, 0.02])}),
        ("fp8_128x128", {"scale": np.float64(0.5)}),
    ],
)
def test_rules_and_scales_that_are_given(name: str, options: dict[str, Any]) -> None:
    x = np.random.default_rng(6).standard_normal((2, 33, 290)).astype(np.float32)
    check(lb.format(name), x, **options)
    check(lb.format(name), x[:, ::2, 2:], ISAS[:1], **(
        {k: v for k, v in options.items() if not np.ndim(v) or name == "nvfp4"} if options else {}
    ))  # fmt: skip


def test_given_scales_that_carry_quotients_out_of_range() -> None:
    """Infinite quotients saturate, as the division that overflows does."""
    x = np.ones((8, 64), np.float32)
    x[0, :4] = 1e30, -1e30, 3e38, -3e38
    for scale in (1e-20, 1e-9, 1e-38, 3e38):
        check(lb.format("int8_tensor"), x, scale=np.float64(scale))


@pytest.mark.parametrize("shape", [(1, 1 << 20), (3000, 7), (0, 5), (5, 0), (2, 0, 8), (1, 1)])
@pytest.mark.parametrize("name", ["int4_g128", "int8_tensor", "int3_allx16", "nvfp4", "fp8"])
def test_shapes_far_from_square(name: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    check(lb.format(name), x, ISAS[:1])


@pytest.mark.parametrize("name", ["int4_g128", "fp8_128x128", "int8_tensor", "mxfp4", "int3_row"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    fmt = lb.format(name)
    x = np.random.default_rng(8).standard_normal((300, 1000)).astype(np.float32)
    first = compiled.quantize(fmt, x, threads=1)
    assert first is not None
    for threads in (2, 3):
        again = compiled.quantize(fmt, x, threads=threads)
        assert again is not None
        same(again, first)


# What is left to the reference.


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g16_asym", "int8_tensor", "nvfp4", "fp8_8x8"])
def test_what_is_not_finite_is_found_wherever_it_stands(name: str) -> None:
    fmt = lb.format(name)
    for dtype in DTYPES:
        x = narrowed(np.random.default_rng(9).standard_normal((9, 77)), dtype)
        for isa in ISAS:
            for at in ((0, 0), (8, 76), (4, 63), (3, 64)):
                for value in (np.nan, np.inf, -np.inf):
                    bad = x.copy()
                    bad[at] = value
                    assert compiled.quantize(fmt, bad, isa=isa) is None
            assert compiled.quantize(fmt, x, isa=isa) is not None


def test_data_of_the_wrong_sign_and_scales_beyond_their_type() -> None:
    x = np.ones((8, 64), np.float32)
    for name, value in (("uint4_g32", -1.0), ("int1_g32", 1.0), ("int4_g32_f16", 1e6),
                        ("int2_g32_e8m0", 3e38), ("int4_g32_e4m3", 1e5)):  # fmt: skip
        fmt = lb.format(name)
        good = sided(fmt, x)
        assert compiled.quantize(fmt, good) is not None, name
        bad = good.copy()
        bad[5, 40] = value
        with pytest.raises(ValueError, match="quantize"):
            reference.quantize(fmt, bad)
        assert compiled.quantize(fmt, bad) is None, name


def test_refusals_have_reasons() -> None:
    x = np.zeros((4, 8), np.float32)
    fmt = lb.format("int4_g32")
    assert compiled.refuse(fmt, x) is None
    assert "float64" in (compiled.refuse(fmt, x.astype(float)) or "")
    assert "random" in (compiled.refuse(fmt, x, rounding="stochastic") or "")
    assert "raise" in (compiled.refuse(fmt, x, overflow="raise") or "")
    assert "mse" in (compiled.refuse(fmt, x, method="mse") or "")
    assert "tensor scale" in (compiled.refuse(lb.format("uint4_g32_asym_ts"), x) or "")


# Through the front door.


class UsedError(Exception):
    """The reference was asked."""


def test_large_arrays_are_quantized_by_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise UsedError

    x = np.random.default_rng(10).standard_normal((128, 256)).astype(np.float32)
    expected = {name: lb.quantize(x, name)._rows() for name in ("int4_g128", "nvfp4", "fp8")}
    monkeypatch.setattr(reference, "quantize", asked)
    for name, parts in expected.items():
        same(lb.quantize(x, name)._rows(), parts)
        w = lb.quantize(x.T, name, axis=0)
        assert w.shape == (256, 128)
        same(w._rows(), parts)
    choices: tuple[dict[str, Any], ...] = (
        {"rounding": "stochastic", "seed": 1},
        {"overflow": "raise"},
    )
    for options in choices:
        with pytest.raises(UsedError):
            lb.quantize(x, "int4_g128", **options)
    with pytest.raises(UsedError):
        lb.quantize(x[:2], "int4_g128")
    x[100, 200] = np.nan
    with pytest.raises(UsedError):
        lb.quantize(x, "int4_g128")


def test_errors_are_the_references() -> None:
    x = np.ones((130, 256), np.float32)
    x[100, 200], x[101, 3] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"holds 2 NaN or infinite values, first at \(100, 200\)"):
        lb.quantize(x, "int4_g128")
    with pytest.raises(ValueError, match=r"first at \(200, 100\)"):
        lb.quantize(x.T, "int4_g128", axis=0)
    x[100:102] = -2
    with pytest.raises(ValueError, match="uint4_g128 has no negative value"):
        lb.quantize(x, "uint4")


@pytest.mark.parametrize("name", ["int4_g128", "mxfp4", "nvfp4", "int8_tensor", "fp8_128x128"])
def test_memory_is_that_of_the_result(name: str) -> None:
    x = np.random.default_rng(11).standard_normal((1024, 2048)).astype(np.float32)
    for axis in (-1, 0):
        lb.quantize(x, name, axis=axis)
        tracemalloc.start()
        try:
            w = lb.quantize(x, name, axis=axis)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        room = 0 if axis else 5 << 19  # a strip of rows that lie apart
        assert peak <= 1.1 * w.nbytes + (1 << 16) + room


@pytest.mark.parametrize("isa", RECORDS, ids=[isa.name for isa in RECORDS])
@pytest.mark.parametrize("name", ["int4_g128", "uint3_g8_bias_bf16", "nvfp4", "nf4_g64", "mxfp8"])
def test_every_record_compiles_and_calls_no_library(name: str, isa: Isa) -> None:
    fmt = lb.format(name)
    for dtype in DTYPES:
        spec = compiled.plan(fmt, dtype, (64, 512), "rceil" if name == "mxfp8" else "absmax")[0]
        own = ("find", "rule", "encode_row", "pack")
        for line in native.assembly(text(spec, isa), isa).splitlines():
            words = line.split()
            if words[:1] in (["callq"], ["bl"]):
                assert words[1].lstrip("*.L").startswith(own), line


@pytest.mark.parametrize("columns", [16, 64, 96, 100, 127])
def test_a_row_shorter_than_its_group_is_not_unrolled_beyond_its_end(columns):
    fmt = lb.format("int8_g128")
    spec, _ = compiled.plan(fmt, "float32", (64, columns), "absmax")
    assert 16 * spec.vectors <= columns
    x = np.random.default_rng(columns).standard_normal((64, columns), np.float32)
    made = compiled.quantize(fmt, x)
    assert made is not None
    same(made, reference.quantize(fmt, x))

"""quantize: every argument, any memory, any order of work, and what it refuses."""

import functools
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lowbit as lb
from lowbit.formats import blocks, declared, reference
from lowbit.testing.strategies import MEMORY, in_memory

f32 = functools.partial(np.array, dtype=np.float32)
PARTS = ("codes", "scales", "zeros", "biases", "tensor_scale")
EVERY = [
    *declared(),
    "uint4_g16_asym",
    "uint4_g8_zf16",
    "uint3_g8_bias_bf16",
    "int4_3x5_asym",
    "float6_e3m2fn_2xall",
    "nf4_allx16",
    "int5_tensor",
    "nvfp4_2x8",
]
LAYOUTS = ("int4_g32", "uint4_g16_asym", "float8_e4m3fn_3x5", "nvfp4", "int8_tensor", "nf4_allx16")


def same(a, b):
    """Two arrays of the same bits in every part."""
    for part in PARTS:
        one, other = getattr(a, part), getattr(b, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), part
            assert one.tobytes() == other.tobytes(), part
    assert (a.format, a.shape) == (b.format, b.shape)


def codes_of(w):
    """One code an entry, in the shape of the array."""
    return reference.element_codes(w._rows()).reshape(w.shape)


def sided(name, x):
    """Numbers that the element can hold: unsigned ones take no negative, int1 no positive."""
    fmt = lb.format(name)
    if fmt.zero is None and not fmt.bias:
        if fmt.element.min == 0:
            return np.abs(x)
        if fmt.element.max == 0:
            return -np.abs(x)
    return x


# Same numbers, other memory and other order of work


@pytest.mark.parametrize("chunk", [1, 40, 100, 1 << 22])
@pytest.mark.parametrize("name", EVERY)
def test_the_size_of_a_chunk_changes_no_bit(name, chunk, monkeypatch):
    x = sided(name, np.random.default_rng(5).standard_t(3, (2, 7, 45)).astype(np.float32))
    options: tuple[dict[str, Any], ...] = (
        {},
        {"rounding": "stochastic", "seed": 9},
        {"method": "mse"},
    )
    whole = [lb.quantize(x, name, **o) for o in options]
    values = whole[0].dequantize()
    monkeypatch.setattr(blocks, "CHUNK", chunk)
    for option, before in zip(options, whole, strict=True):
        same(lb.quantize(x, name, **option), before)
    np.testing.assert_array_equal(whole[0].dequantize(), values)


@pytest.mark.parametrize("chunk", [1, 40])
def test_errors_count_and_place_the_same_in_any_chunk(chunk, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", chunk)
    x = np.zeros((3, 50), np.float32)
    x[1, 30], x[2, 4] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"holds 2 NaN or infinite values, first at \(1, 30\)"):
        lb.quantize(x, "int4_g32")
    x[1, 30], x[2, 4] = 9, -30
    with pytest.raises(OverflowError, match=r"2 scaled values exceed int4's .* \(1, 30\): 9"):
        lb.quantize(x, "int4_g32", scale=1.0, overflow="raise")


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_any_memory_gives_the_same_bits(kind, dtype):
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x = np.random.default_rng(6).standard_normal((2, 5, 37)).astype(target)
    held = in_memory(x, kind)
    for name in LAYOUTS:
        w = lb.quantize(held, name)
        same(w, lb.quantize(x, name))
        assert w.dtype == np.dtype(target)
        assert w.dtype.isnative
        same(lb.quantize(held[0, 3], name), lb.quantize(x[0, 3].copy(), name))
    np.testing.assert_array_equal(held, x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_input_is_worked_on_in_float32(dtype):
    x = np.random.default_rng(7).standard_normal((4, 48))
    narrow = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for name in LAYOUTS:
        same(lb.quantize(narrow, name), lb.quantize(narrow.astype(np.float32), name))


def test_double_input_is_worked_on_in_float64_of_either_byte_order():
    """0.625 * (1 + 1e-12) is past the tie 2.5 * 0.25 in float64, and is the tie in float32."""
    x = np.array([[7 * 0.25, 0.625 * (1 + 1e-12)]])
    wide = lb.quantize(x, "int4_g32")
    same(lb.quantize(x.astype(">f8"), "int4_g32"), wide)
    assert codes_of(wide).tolist() == [[7, 3]]
    assert codes_of(lb.quantize(x.astype(np.float32), "int4_g32")).tolist() == [[7, 2]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_along_the_last_axis_but_one(name):
    x = np.random.default_rng(8).standard_normal((3, 40, 6)).astype(np.float32)
    w = lb.quantize(x, name, axis=-2)
    other = lb.quantize(x.swapaxes(-1, -2), name)
    assert w.shape == x.shape
    assert w.codes.tobytes() == other.codes.tobytes()
    same(w.mT, other)
    np.testing.assert_array_equal(w.dequantize(), other.dequantize().swapaxes(-1, -2))
    same(lb.quantize(x, name, axis=1), w)


def test_an_axis_that_cannot_be():
    x = np.ones((2, 3, 4), np.float32)
    for axis in (0, -3):
        with pytest.raises(ValueError, match=r"axis: .* last two axes, got -?\d of 3"):
            lb.quantize(x, "int4", axis=axis)
    with pytest.raises(ValueError, match="axis: 3 is out of range for 3 axes"):
        lb.quantize(x, "int4", axis=3)
    with pytest.raises(ValueError, match="axis: -2 is out of range for 1 axes"):
        lb.quantize(x[0, 0], "int4", axis=-2)


def test_a_vector_is_a_matrix_of_one_row():
    x = np.random.default_rng(9).standard_normal(50).astype(np.float32)
    for name in EVERY:
        y = sided(name, x)
        w, matrix = lb.quantize(y, name), lb.quantize(y[None], name)
        assert w.shape == (50,)
        np.testing.assert_array_equal(w.dequantize(), matrix.dequantize()[0])
        assert w.codes.tobytes() == matrix.codes.tobytes()
        assert w.scales.shape == matrix.scales.shape[1:]


# Static scales and zero points


def test_static_scales_are_used_as_they_are():
    x = f32([[1.0, -2.2, 30.0, 0.5], [4.0, 0.1, 0.2, -9.0]])
    w = lb.quantize(x, "int4_g2", scale=0.5)
    assert (w.scales == 0.5).all()
    assert w.dequantize().tolist() == [[1, -2, 3.5, 0.5], [3.5, 0, 0, -4]]
    grid = [[0.5, 10], [1, -1]]
    w = lb.quantize(x, "int4_g2", scale=grid)
    assert w.scales.tolist() == grid
    assert w.scales.dtype == np.float32
    assert w.dequantize().tolist() == [[1, -2, 30, 0], [4, 0, 0, -7]]
    same(lb.quantize(x, "int4_g2", scale=np.array(grid, np.float16)), w)
    same(lb.quantize(x, "int4_g2", scale=np.array(grid, ml_dtypes.bfloat16)), w)
    by_row = lb.quantize(x, "int4_row", scale=[[0.5], [1]])
    assert by_row.scales.tolist() == [[0.5], [1]]
    vector = lb.quantize(x[0], "int4_g2", scale=[0.5, 10])
    assert vector.dequantize().tolist() == [1, -2, 30, 0]


def test_static_scales_take_their_own_type():
    x = f32([[1.0, -2.0]])
    half = lb.quantize(x, "int4_g2_f16", scale=1 / 3)
    assert half.scales == np.float16(1 / 3)
    coded = lb.quantize(x, "float4_e2m1fn_g2_e4m3", scale=0.3)
    assert coded.scales.astype(np.float32) == np.float32(0.3125)
    power = lb.quantize(x, "mxfp4", scale=0.3)
    assert power.scales.astype(np.float32) == 0.25


def test_static_zero_points():
    x = f32([[1.0, -2.0, 3.0, 0.0]])
    w = lb.quantize(x, "uint4_g4_asym", scale=0.5, zero=6)
    assert w.zeros is not None
    assert w.zeros.tolist() == [[6]]
    assert codes_of(w).tolist() == [[8, 2, 12, 6]]
    assert w.dequantize().tolist() == x.tolist()
    w = lb.quantize(x, "uint4_g4_zf32", scale=0.5, zero=[[6.25]])
    assert codes_of(w).tolist() == [[8, 2, 12, 6]]
    assert w.dequantize().tolist() == [[0.875, -2.125, 2.875, -0.125]]
    found = lb.quantize(x, "uint4_g4_asym", scale=0.5)
    assert found.zeros is not None
    assert found.zeros.tolist() == [[4]]  # the smallest number lands on the lowest code


def test_a_static_tensor_scale_replaces_the_one_of_the_data():
    x = np.random.default_rng(3).standard_normal((4, 32)).astype(np.float32)
    w = lb.quantize(x, "nvfp4")
    same(lb.quantize(x, "nvfp4", scale=w.tensor_scale), w)
    wide = lb.quantize(x, "nvfp4", scale=2.0**-7)
    assert wide.tensor_scale == np.float32(2.0**-7)
    narrow = lb.quantize(1000 * x, "nvfp4", scale=2.0**-7)  # block scales saturate
    assert narrow.scales.astype(np.float32).max() == 448
    batch = lb.quantize(np.stack([x, x]), "nvfp4", scale=[2.0**-7, w.tensor_scale])
    same(batch[0], wide)
    same(batch[1], w)


@pytest.mark.parametrize(
    ("name", "scale", "error", "message"),
    [
        ("int4_g2", 0.0, ValueError, "scale: a static scale of 0 cannot divide"),
        ("int4_g2", np.nan, ValueError, "scale: 1 entries are NaN or infinite"),
        ("int4_g2", [1, np.inf], ValueError, r"first at \(1,\)"),
        ("int4_g2", [1.0, 2, 3], ValueError, r"scale: want one number or shape \(1, 2\)"),
        ("int4_g2", [[[1.0, 2]]], ValueError, r"got \(1, 1, 2\)"),
        ("int4_g2", "small", TypeError, "scale"),
        ("int4_g2", [1j], TypeError, "scale"),
        ("int4_g2", 1e-60, ValueError, "becomes 0 or infinite in float32"),
        ("int4_g2", 1e60, ValueError, "becomes 0 or infinite in float32"),
        ("int4_g2_f16", 1e-9, ValueError, "becomes 0 or infinite in float16"),
        ("int4_g2_f16", 1e9, ValueError, "becomes 0 or infinite in float16"),
        ("float4_e2m1fn_g2_e4m3", 500.0, ValueError, r"500 is outside the range of float8_e4m3fn"),
        ("float4_e2m1fn_g2_e4m3", 1e-9, ValueError, "becomes 0"),
        ("mxfp4_g2", -1.0, ValueError, "-1 is outside the range of float8_e8m0fnu"),
        ("nvfp4", [1.0, 2], ValueError, r"scale: want one number or shape \(\) for nvfp4"),
        ("nvfp4", 1e60, ValueError, "the tensor scale becomes 0 or infinite in float32"),
    ],
)
def test_static_scales_that_cannot_be(name, scale, error, message):
    with pytest.raises(error, match=message):
        lb.quantize(np.ones((1, 4), np.float32), name, scale=scale)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("uint4_g2_asym", {"zero": 3}, "zero: static zero points come with scale="),
        ("uint4_g2", {"zero": 3, "scale": 1}, "zero: uint4_g2 has no zero points"),
        ("uint4_g2_asym", {"zero": 16, "scale": 1}, r"whole numbers in \[0, 15\]"),
        ("uint4_g2_asym", {"zero": 2.5, "scale": 1}, "whole numbers"),
        ("uint4_g2_asym", {"zero": np.nan, "scale": 1}, "zero: 1 entries are NaN"),
        ("uint4_g2_asym", {"zero": [1, 2, 3], "scale": 1}, r"zero: want one number or shape"),
        ("uint4_g2_zf16", {"zero": 1e6, "scale": 1}, "zero point of 1e.06, beyond float16"),
    ],
)
def test_static_zero_points_that_cannot_be(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        lb.quantize(np.ones((1, 4), np.float32), name, **keywords)


# Policies


def test_overflow_policies_by_name():
    x = f32([[1.0, 500.0, -1e30]])
    saturated = lb.quantize(x, "fp8", scale=1.0)
    assert saturated.dequantize().tolist() == [[1, 448, -448]]
    same(lb.quantize(x, "fp8", scale=1.0, overflow="saturate"), saturated)
    marked = lb.quantize(x, "fp8", scale=1.0, overflow="nan").dequantize()
    np.testing.assert_array_equal(marked, [[1, np.nan, np.nan]])
    with pytest.raises(
        OverflowError, match=r"overflow='raise': 2 scaled values exceed float8_e4m3fn"
    ):
        lb.quantize(x, "fp8", scale=1.0, overflow="raise")
    with pytest.raises(ValueError, match="overflow='nan': int4 has no NaN code"):
        lb.quantize(x, "int4", overflow="nan")
    same(lb.quantize(x, "fp8", overflow="raise"), lb.quantize(x, "fp8"))


def test_nan_and_infinity_by_name():
    x = f32([[1.0, np.nan, np.inf, -np.inf, 2.0]])
    for name in EVERY:
        with pytest.raises(ValueError, match=r"quantize: x holds 3 NaN or infinite values"):
            lb.quantize(x, name)
    w = lb.quantize(x, "fp8", nonfinite="nan")
    assert w.scales == np.float32(2) / np.float32(448)  # of the finite numbers
    np.testing.assert_array_equal(w.dequantize(), [[1, np.nan, 2, -2, 2]])
    w = lb.quantize(x, "fp8", nonfinite="nan", overflow="nan")
    np.testing.assert_array_equal(w.dequantize(), [[1, np.nan, np.nan, np.nan, 2]])
    with pytest.raises(OverflowError, match="2 scaled values"):
        lb.quantize(x, "fp8", nonfinite="nan", overflow="raise")
    with pytest.raises(ValueError, match="nonfinite='nan': int4 has no NaN code"):
        lb.quantize(x, "int4", nonfinite="nan")
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        with pytest.raises(ValueError, match="holds 3 NaN"):
            lb.quantize(x.astype(dtype), "int4")


def test_errors_name_the_place_in_the_array_that_came_in():
    x = np.zeros((2, 3, 5), np.float32)
    x[1, 2, 4] = np.nan
    with pytest.raises(ValueError, match=r"first at \(1, 2, 4\)"):
        lb.quantize(x, "int4")
    with pytest.raises(ValueError, match=r"first at \(1, 2, 4\)"):
        lb.quantize(x, "int4", axis=-2)
    with pytest.raises(ValueError, match=r"first at \(4,\)"):
        lb.quantize(x[1, 2], "int4")
    x[1, 2, 4] = 100
    with pytest.raises(OverflowError, match=r"first at \(1, 2, 4\): 100"):
        lb.quantize(x, "int4", axis=-2, scale=1.0, overflow="raise")


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"rounding": "up"}, ValueError, "rounding: want one of even, stochastic, got 'up'"),
        ({"overflow": "wrap"}, ValueError, "overflow: want one of saturate, nan, raise"),
        ({"nonfinite": "zero"}, ValueError, "nonfinite: want one of raise, nan, got 'zero'"),
        ({"method": "best"}, ValueError, "method: want one of absmax"),
        ({"rounding": "stochastic"}, ValueError, "needs seed="),
        ({"axis": 1.0}, TypeError, "axis: want an integer, got float"),
        ({"axis": True}, TypeError, "axis: want an integer, got bool"),
    ],
)
def test_policies_that_do_not_exist(keywords, error, message):
    with pytest.raises(error, match=message):
        lb.quantize(np.ones((1, 4), np.float32), "int4", **keywords)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.float32(1), ValueError, "x: want at least one axis, got a 0-d array"),
        (np.ones((2, 2), np.int8), TypeError, "want floating-point numbers, got int8. Cast with"),
        (np.ones((2, 2), bool), TypeError, "x"),
        (np.ones((2, 2), complex), TypeError, "x: dtype complex128"),
        (np.ones((2, 2), object), TypeError, "x: dtype object"),
        (np.ma.masked_array(np.ones(3), [False, True, False]), TypeError, "masked array"),
        (np.ones((2, 2), np.longdouble), TypeError, "x"),
    ],
)
def test_what_cannot_be_quantized(x, error, message):
    with pytest.raises(error, match=message):
        lb.quantize(x, "int4")


def test_a_quantized_array_is_not_quantized_again():
    w = lb.quantize(np.ones((1, 4), np.float32), "int4")
    with pytest.raises(TypeError, match=r"x is quantized already; \.dequantize\(\) it first"):
        lb.quantize(w, "int8")
    with pytest.raises(TypeError, match="w: want a QArray, got ndarray"):
        lb.dequantize(np.ones(3))  # type: ignore[arg-type]


def test_lists_are_arrays_of_float64():
    w = lb.quantize([[1.0, 2.0, 7.0]], "int4_g4")
    assert w.dtype == np.float64
    assert w.dequantize().tolist() == [[1, 2, 7]]


# out=


@pytest.mark.parametrize("name", LAYOUTS)
def test_out_is_written_and_returned(name):
    random = np.random.default_rng(1)
    x, y = (random.standard_normal((4, 32)).astype(np.float32) for _ in range(2))
    out, fresh = lb.quantize(x, name), lb.quantize(y, name)
    memory = out.codes
    assert lb.quantize(y, name, out=out) is out
    same(out, fresh)
    assert memory.tobytes() == fresh.codes.tobytes()  # the memory it had


def test_out_of_another_make_is_refused():
    x = np.ones((4, 32), np.float32)
    w = lb.quantize(x, "int4_g32")
    for other in (
        lb.quantize(x, "int4_g16"),
        lb.quantize(x[:3], "int4_g32"),
        lb.quantize(x.astype(np.float16), "int4_g32"),
        lb.quantize(x.T, "int4_g32", axis=-2),
    ):
        with pytest.raises(
            ValueError, match=r"out: want QArray\(shape=\(4, 32\), format='int4_g32'"
        ):
            lb.quantize(x, "int4_g32", out=other)
    with pytest.raises(TypeError, match="out: want a QArray, got ndarray"):
        lb.quantize(x, "int4_g32", out=x)  # type: ignore[arg-type]
    frozen = w.codes.copy()
    frozen.flags.writeable = False
    held = lb.from_parts("int4_g32", frozen, w.scales.copy())
    with pytest.raises(ValueError, match="out: its codes are read-only"):
        lb.quantize(x, "int4_g32", out=held)
    extras: list[dict[str, Any]] = [{"columns": np.arange(32)[::-1]}, {"divisor": np.full(32, 2.0)}]
    for extra in extras:
        held = lb.from_parts("int4_g32", w.codes.copy(), w.scales.copy(), **extra)
        with pytest.raises(ValueError, match="out: it permutes or divides columns"):
            lb.quantize(x, "int4_g32", out=held)


# Memory


@pytest.mark.parametrize(
    "name", ["int4_g128", "int8_row", "float8_e4m3fn_row", "nvfp4", "int8_tensor"]
)
@pytest.mark.parametrize("shape", [(2048, 2048), (1, 2**22)])
def test_quantizing_needs_little_memory_of_its_own(name, shape):
    """At most 1.2 times the bytes of input and output, for 16 MB of float32."""
    x = np.random.default_rng(0).random(shape, np.float32)
    lb.quantize(x[:, :256], name)  # tables are built once
    tracemalloc.start()
    w = lb.quantize(x, name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + x.nbytes <= 1.2 * (x.nbytes + w.nbytes)

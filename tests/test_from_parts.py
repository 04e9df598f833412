"""from_parts: ready parts are checked one by one and never copied."""

import functools
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lowbit as lb
from lowbit.formats import Element, declared
from lowbit.testing.strategies import MEMORY, in_memory

f32 = functools.partial(np.array, dtype=np.float32)
u8 = functools.partial(np.array, dtype=np.uint8)
VARIANTS = (
    "int4_g32_asym",
    "uint4_g16_zf16",
    "uint3_g8_bias",
    "int8_3x5_asym",
    "float8_e4m3fn_2xall",
    "nf4_allx16",
    "int5_tensor",
    "uint2_g16_zbf16_f16",
    "float4_e2m1fn_g16_e4m3",
)
EVERY = [*declared(), *VARIANTS]
FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def sided(name, x):
    """Numbers that the element can hold."""
    fmt = lb.format(name)
    if fmt.zero is None and not fmt.bias and 0 in (fmt.element.min, fmt.element.max):
        return np.copysign(x, fmt.element.max + fmt.element.min)
    return x


def example(name, shape=(2, 4, 43)):
    x = sided(name, np.random.default_rng(3).standard_normal(shape).astype(np.float32))
    return lb.quantize(x, name)


def others(w) -> dict[str, Any]:
    """The parts that only some formats have, as keywords."""
    parts = {"zeros": w.zeros, "biases": w.biases, "tensor_scale": w.tensor_scale}
    return {name: part for name, part in parts.items() if part is not None}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(2, 4, 43), (4, 43), (43,), (0, 43), (4, 0), (2, 0, 8), (0,)])
def test_an_array_is_the_sum_of_its_parts(name, shape):
    w = example(name, shape)
    again = lb.from_parts(name, w.codes, w.scales, shape=w.shape, dtype=w.dtype, **others(w))
    assert again.shape == shape
    assert lb.array_equal(again, w)
    np.testing.assert_array_equal(again.dequantize(), w.dequantize())


@pytest.mark.parametrize("name", EVERY)
def test_parts_are_not_copied_and_read_only(name):
    w = example(name)
    parts = {"codes": w.codes.copy(), "scales": w.scales.copy()}
    parts |= {part: held.copy() for part, held in others(w).items()}
    held = lb.from_parts(name, shape=w.shape, **parts)
    for part, given in parts.items():
        public = getattr(held, part)
        assert public.ctypes.data == given.ctypes.data, part
        assert public.dtype == given.dtype, part
        assert not public.flags.writeable, part
        with pytest.raises(ValueError, match="read-only"):
            public[...] = 0
        assert given.flags.writeable  # the caller's own stays as it was


@pytest.mark.parametrize("kind", MEMORY)
def test_parts_in_any_memory(kind):
    for name in ("uint4_g16_zf16", "int8_3x5_asym", "nvfp4", "uint3_g8_bias"):
        w = example(name)
        parts = {"codes": w.codes, "scales": w.scales, **others(w)}
        parts = {part: in_memory(held, kind) for part, held in parts.items()}
        again = lb.from_parts(name, shape=w.shape, **parts)
        np.testing.assert_array_equal(again.dequantize(), w.dequantize())
        assert again.scales.dtype.isnative


def test_codes_and_scales_may_be_bytes():
    fp8 = example("mxfp8", (3, 64))
    again = lb.from_parts("mxfp8", fp8.codes.view(np.uint8), fp8.scales.view(np.uint8))
    assert lb.array_equal(again, fp8)
    assert again.codes.dtype == ml_dtypes.float8_e4m3fn
    assert again.scales.dtype == ml_dtypes.float8_e8m0fnu
    int8 = example("int8_row", (3, 8))
    again = lb.from_parts("int8_row", int8.codes.view(np.uint8), int8.scales)
    assert again.codes.dtype == np.int8
    assert lb.array_equal(again, int8)


def test_the_shape_follows_from_full_bytes():
    ones = np.ones((2, 1), np.float32)
    assert lb.from_parts("int4_g32", np.zeros((2, 5), np.uint8), ones).shape == (2, 10)
    assert lb.from_parts("int3_g32", np.zeros((2, 3), np.uint8), ones).shape == (2, 8)
    assert lb.from_parts("int8_row", np.zeros((2, 5), np.int8), ones).shape == (2, 5)
    odd = lb.from_parts("int4_g32", np.zeros((2, 5), np.uint8), ones, shape=(2, 9))
    assert odd.shape == (2, 9)
    with pytest.raises(
        ValueError, match="rows of 5 bytes hold no whole number of 3-bit codes; pass"
    ):
        lb.from_parts("int3_g32", np.zeros((2, 5), np.uint8), ones)
    assert lb.from_parts("int3_g32", np.zeros((2, 5), np.uint8), ones, shape=(2, 13)).shape == (
        2,
        13,
    )


def test_negative_and_zero_scales_occur_in_files():
    w = lb.from_parts("int4_g2", u8([[0x21, 0x43]]), f32([[-0.5, 0]]), dtype=np.float64)
    assert w.dtype == np.float64
    assert w.dequantize().tolist() == [[-0.5, -1, 0, 0]]
    w = lb.from_parts("nvfp4_g2", u8([[0x21]]), u8([[0x38 | 0x80]]), tensor_scale=f32(-2.0))
    assert w.dequantize().tolist() == [[1, 2]]


def test_minus_128_is_read_though_never_written():
    w = lb.from_parts("int8_row", np.array([[-128, 127]], np.int8), f32([[2.0]]))
    assert w.dequantize().tolist() == [[-256, 254]]
    assert lb.from_parts("int4_row", u8([[0x78]]), f32([[1]])).dequantize().tolist() == [[-8, 7]]


def test_one_scale_may_come_as_a_number_and_a_vectors_scales_as_a_vector():
    codes = np.array([[1, -2], [3, -4]], np.int8)
    for scale in (f32(0.5), f32([[0.5]])):
        w = lb.from_parts("int8_tensor", codes, scale)
        assert w.dequantize().tolist() == [[0.5, -1], [1.5, -2]]
        assert w.scales.shape == (1, 1)
    w = lb.from_parts("int8_g1", codes[0], f32([2, 3]))
    assert w.dequantize().tolist() == [2, -6]
    assert w.scales.shape == (2,)
    w = lb.from_parts("nvfp4", u8([[0x02]]), u8([[0x38]]), tensor_scale=0.5)
    assert w.dequantize().tolist() == [[0.5, 0]]


# Refusals


def refuses(error, message, name, codes, scales, **keywords):
    with pytest.raises(error, match=message):
        lb.from_parts(name, codes, scales, **keywords)


def test_codes_of_the_wrong_dtype_or_shape():
    ones = np.ones((2, 1), np.float32)
    for dtype in (np.int8, np.uint16, np.float32, ml_dtypes.int4):
        refuses(
            TypeError, r"codes: int4_g32 wants uint8", "int4_g32", np.zeros((2, 4), dtype), ones
        )
    for dtype in (np.int16, np.float32, ml_dtypes.float8_e4m3fn):
        refuses(TypeError, r"codes: int8_row wants int8", "int8_row", np.zeros((2, 4), dtype), ones)
    refuses(TypeError, "wants float8_e4m3fn", "fp8", np.zeros((2, 4), np.int8), ones)
    refuses(ValueError, "codes: want at least one axis", "int4_g32", u8(3), ones)
    full = np.zeros((2, 4), np.uint8)
    for shape, told in [
        ((2, 9), (2, 5)),
        ((2, 6), (2, 3)),
        ((3, 8), (3, 4)),
        ((1, 2, 8), (1, 2, 4)),
    ]:
        message = (
            rf"int4_g32 of shape \({str(shape)[1:-1]}\) has codes of shape \({str(told)[1:-1]}\)"
        )
        refuses(ValueError, message, "int4_g32", full, ones, shape=shape)
    refuses(ValueError, r"codes of shape \(\), got \(2, 4\)", "int4_g32", full, ones, shape=())
    refuses(ValueError, "codes of shape", "int4_g32", full, ones, shape=(2, -8))
    for no_shape in (8, (2, 8.0), "28"):
        refuses(TypeError, "shape: want a tuple of whole", "int4_g32", full, ones, shape=no_shape)
    refuses(TypeError, "codes", "int4_g32", np.zeros((2, 4), object), ones)


@pytest.mark.parametrize("bits", range(1, 8))
def test_bits_behind_the_last_column(bits):
    name = f"uint{bits}_row"
    for columns in range(1, 9):
        size = -(-columns * bits // 8)
        codes = np.full((3, size), 0xFF, np.uint8)
        used = columns * bits - 8 * (size - 1)
        keywords = {"shape": (3, columns)}
        scales = np.ones((3, 1), np.float32)
        if used < 8:
            message = rf"codes: 3 rows have bits set behind column {columns - 1}; they must be 0"
            refuses(ValueError, message, name, codes, scales, **keywords)
            one = codes.copy()
            one[:, -1] = 2**used - 1
            one[1, -1] = 1 << used  # the first spare bit of one row
            message = "codes: 1 rows have bits set"
            refuses(ValueError, message, name, one, scales, **keywords)
        codes[:, -1] = 2**used - 1
        w = lb.from_parts(name, codes, scales, **keywords)
        assert (w.dequantize() == 2**bits - 1).all()


def test_scales_of_the_wrong_dtype():
    codes = np.zeros((2, 16), np.uint8)
    for name, wanted in (("int4_g32", "float32"), ("int4_g32_f16", "float16")):
        for dtype in set(FLOATS.values()) - {FLOATS[wanted]} | {np.float64, np.int32}:
            scales = np.ones((2, 1), dtype)
            refuses(TypeError, f"scales: {name} wants {wanted}, got", name, codes, scales)
    refuses(TypeError, "wants bfloat16, got float32", "int4_g32_bf16", codes, np.ones((2, 1), "f4"))
    refuses(TypeError, "wants float8_e8m0fnu, got float32", "mxfp4", codes, np.ones((2, 1), "f4"))
    fp8 = np.ones((2, 1), ml_dtypes.float8_e4m3fn)
    refuses(TypeError, "wants float8_e8m0fnu, got float8_e4m3fn", "mxfp4", codes, fp8)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_of_the_wrong_number(name):
    w = example(name)
    parts = {"scales": w.scales, **{k: v for k, v in others(w).items() if k != "tensor_scale"}}
    for part, held in parts.items():
        for wrong in (
            held[..., :0],
            np.concatenate([held, held], -1),
            np.concatenate([held, held], -2),
            held[0],
            held[None],
        ):
            if wrong.shape == held.shape:
                continue
            keywords: dict[str, Any] = {**parts, **others(w), "shape": w.shape, part: wrong}
            with pytest.raises(ValueError, match=rf"{part}: \S+ has .* blocks here, got"):
                lb.from_parts(name, w.codes, **keywords)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_and_offsets_that_are_not_finite(bad):
    for name in ("int4_g32", "int4_g32_f16", "int4_g32_bf16", "uint4_g32_zf16", "uint4_g32_bias"):
        w = example(name, (3, 64))
        parts: dict[str, Any] = {"scales": w.scales, **others(w)}
        for part, held in parts.items():
            broken = held.copy()
            broken[1, 1] = bad
            message = rf"{part}: 1 entries are NaN or infinite, first at \(1, 1\)"
            with pytest.raises(ValueError, match=message):
                lb.from_parts(name, w.codes, **{**parts, part: broken})


def test_codes_of_scales_that_stand_for_nan():
    codes = np.zeros((2, 16), np.uint8)
    refuses(ValueError, r"scales: 1 entries are NaN .* \(1, 0\)", "mxfp4", codes, u8([[3], [255]]))
    scales = u8([[0x38, 0x38], [0x7F, 0xFF]])
    message = r"scales: 2 entries are NaN .* \(1, 0\)"
    refuses(ValueError, message, "nvfp4", codes, scales, tensor_scale=f32(1))
    lb.from_parts("mxfp4", codes, u8([[0], [254]]))


def test_parts_that_are_missing_or_superfluous():
    for name, part in (
        ("int4_g32_asym", "zeros"),
        ("uint4_g32_zf32", "zeros"),
        ("uint4_g32_bias", "biases"),
        ("nvfp4", "tensor_scale"),
    ):
        w = example(name, (2, 64))
        refuses(ValueError, f"{part}: {name} needs", name, w.codes, w.scales)
        plain = example("int4_g32", (2, 64))
        with pytest.raises(ValueError, match=f"{part}: int4_g32 has none"):
            lb.from_parts("int4_g32", plain.codes, plain.scales, **others(w))


def test_zero_points_of_the_wrong_dtype_or_range():
    codes, scales = np.zeros((2, 16), np.uint8), np.ones((2, 1), np.float32)
    asym = "int4_g32_asym"
    for dtype in (np.uint8, np.int32, np.float32):
        zeros = np.zeros((2, 1), dtype)
        refuses(TypeError, f"zeros: {asym} wants int8, got", asym, codes, scales, zeros=zeros)
    for value in (8, -9, 127):
        zeros = np.array([[0], [value]], np.int8)
        message = r"zeros: 1 are outside \[-8, 7\] of int4"
        refuses(ValueError, message, asym, codes, scales, zeros=zeros)
    for value in (7, -8):
        lb.from_parts(asym, codes, scales, zeros=np.full((2, 1), value, np.int8))
    zeros = u8([[0], [16]])
    message = r"outside \[0, 15\] of uint4"
    refuses(ValueError, message, "uint4_g32_asym", codes, scales, zeros=zeros)
    zeros = np.zeros((2, 1), np.int8)
    refuses(TypeError, "wants uint8", "uint4_g32_asym", codes, scales, zeros=zeros)
    zeros = np.zeros((2, 1), np.float32)
    refuses(TypeError, "wants float16", "uint4_g32_zf16", codes, scales, zeros=zeros)
    biases = np.zeros((2, 1), np.float16)
    refuses(TypeError, "biases: .* wants float32", "uint4_g32_bias", codes, scales, biases=biases)


def test_tensor_scales():
    w = example("nvfp4", (2, 3, 32))
    assert w.tensor_scale is not None
    parts: dict[str, Any] = {"codes": w.codes, "scales": w.scales}
    for wrong in (f32(1), f32([1, 2, 3]), f32([[1, 2], [3, 4]])):
        with pytest.raises(ValueError, match=r"tensor_scale: want shape \(2,\), got"):
            lb.from_parts("nvfp4", **parts, tensor_scale=wrong)
    for bad in (np.nan, np.inf, 1e300):
        with pytest.raises(ValueError, match="tensor_scale: 1 entries are NaN or infinite"):
            lb.from_parts("nvfp4", **parts, tensor_scale=np.array([1, bad]))
    with pytest.raises(TypeError, match="tensor_scale: want float32"):
        lb.from_parts("nvfp4", **parts, tensor_scale=np.array([1, 2]))
    # Files keep them with axes of one.
    again = lb.from_parts("nvfp4", **parts, tensor_scale=np.reshape(w.tensor_scale, (2, 1, 1)))
    assert lb.array_equal(again, w)
    one = example("nvfp4", (3, 32))
    assert one.tensor_scale is not None
    again = lb.from_parts("nvfp4", one.codes, one.scales, tensor_scale=one.tensor_scale[None])
    assert lb.array_equal(again, one)


# Permutation and divisor


def test_columns_and_divisor_undo_what_was_done_to_the_columns():
    random = np.random.default_rng(0)
    x = random.integers(-7, 8, (3, 32)).astype(np.float32)
    x[:, 0] = 7
    order, divisor = random.permutation(32), 2.0 ** random.integers(-3, 4, 32)
    stored = lb.quantize((x * divisor).astype(np.float32)[:, order], "int8_g1")
    w = lb.from_parts("int8_g1", stored.codes, stored.scales, columns=order, divisor=divisor)
    np.testing.assert_allclose(w.dequantize(), x, rtol=2**-22)  # scale and value, each rounded
    assert w.columns is not None
    assert w.divisor is not None
    np.testing.assert_array_equal(w.columns, order)
    assert w.divisor.dtype == np.float32
    again = pickle.loads(pickle.dumps(w))
    np.testing.assert_array_equal(again.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (np.arange(31), r"columns: want 32 integers, got int64 \(31,\)"),
        (np.arange(32.0), "columns: want 32 integers, got float64"),
        (np.arange(32)[None], r"got int64 \(1, 32\)"),
        (np.zeros(32, int), r"columns: not a permutation of 0\.\.31"),
        (np.arange(1, 33), "columns: not a permutation"),
        (np.arange(32) - 1, "columns: not a permutation"),
    ],
)
def test_columns_that_are_no_permutation(columns, message):
    w = example("int4_g32", (2, 32))
    refuses(ValueError, message, "int4_g32", w.codes, w.scales, columns=columns)


@pytest.mark.parametrize(
    ("divisor", "error", "message"),
    [
        (np.ones(31), ValueError, r"divisor: want shape \(32,\), got \(31,\)"),
        (np.ones((1, 32)), ValueError, "divisor: want shape"),
        (np.ones(32, int), TypeError, "divisor: want float32"),
        (np.zeros(32), ValueError, "divisor: an entry is 0"),
        (np.full(32, 1e-60), ValueError, "divisor: an entry is 0"),
        (np.full(32, np.nan), ValueError, "divisor: 32 entries are NaN"),
        (np.full(32, 1e60), ValueError, "divisor: 32 entries are NaN or infinite"),
    ],
)
def test_divisors_that_cannot_divide(divisor, error, message):
    w = example("int4_g32", (2, 32))
    refuses(error, message, "int4_g32", w.codes, w.scales, divisor=divisor)


def test_the_logical_dtype_is_a_float():
    codes, scales = u8([[0x21]]), f32([[1]])
    for dtype in ("float16", "bfloat16", np.float32, np.float64, float):
        held = lb.from_parts("int4_g32", codes, scales, dtype=dtype)
        assert held.dequantize().dtype == held.dtype
    for other in (np.int8, "float8_e4m3fn", complex, "no"):
        refuses(TypeError, "dtype: want one of", "int4_g32", codes, scales, dtype=other)


def test_every_scale_element_has_its_own_dtype():
    for name in EVERY:
        kind = lb.format(name).scale.element
        wanted = kind.storage if isinstance(kind, Element) else kind
        assert example(name).scales.dtype.name == wanted

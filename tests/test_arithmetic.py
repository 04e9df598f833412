"""What stays quantized stays exact: every value is the real number it should be, or a refusal."""

from fractions import Fraction

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import lowbit as lb

FORMATS = (
    "int2_row", "int3_g8", "int4_g8", "int5_g16_asym", "int7_tensor", "int8_row", "uint4_g8_asym",
    "int4_3x8", "int4_allx8", "int4_g8_bias", "fp8_2x8", "nf4_g4", "mxfp4", "mxfp8", "nvfp4",
    "int4_g16_zf32", "int4_g8_bf16", "int4_g8_f16", "int8_g8_e4m3", "int4_g8_e8m0",
    "int4_g8_asym_e8m0", "int4_g8_zf16_e8m0", "int4_g8_bias_ts", "uint8_row_asym",
)  # fmt: skip


def array(name, shape=(6, 24), *, transposed=False, seed=0):
    """Any legal codes and zero points; scales of few bits, so that there is room to be exact."""
    fmt = lb.format(name)
    random = np.random.default_rng(seed)
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    matrix = stored if len(stored) > 1 else (1, *stored)
    grid = (*matrix[:-2], *fmt.grid(matrix[-2:]))
    finite = [c for c, v in enumerate(fmt.element.values) if np.isfinite(v)]
    codes = random.choice(finite, matrix).astype(np.uint8)
    packed = codes if fmt.element.bits == 8 else _pack(codes, fmt.element.bits)
    if isinstance(fmt.scale.element, str):
        scales = random.choice([-3, -1.5, 0.25, 1, 2], grid).astype(np.dtype(fmt.scale.element))
    else:
        usable = [c for c, v in enumerate(fmt.scale.element.values) if 0.25 <= abs(v) <= 8]
        scales = random.choice(usable, grid).astype(np.uint8)
    zeros = biases = None
    if fmt.zero is not None and not isinstance(fmt.zero, str):
        low, high = int(fmt.zero.min), int(fmt.zero.max)
        zeros = random.integers(low + 1, high, grid).astype(np.int8 if low else np.uint8)
    elif fmt.zero is not None:
        zeros = random.choice([-2, 0.5, 3], grid).astype(fmt.zero)
    if fmt.bias:
        biases = random.choice([-2, 0.5, 3], grid).astype(str(fmt.scale.element))
    second = random.choice([0.5, 3], matrix[:-2]).astype(np.float32) if fmt.tensor_scale else None
    w = lb.from_parts(
        fmt, packed.reshape(*stored[:-1], -1), scales, zeros=zeros, biases=biases,
        tensor_scale=second, shape=stored,
    )  # fmt: skip
    return w.mT if transposed else w


def _pack(codes, bits):
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def exactly(w):
    return w.dequantize(np.float64)


# Negate


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_negation_is_exact_where_it_is_not_refused(name, transposed):
    w = array(name, (2, 6, 24), transposed=transposed)
    fmt = w.format
    signless = not isinstance(fmt.scale.element, str) and fmt.scale.element.min >= 0
    one_sided = fmt.element.integral and fmt.tensor_scale is False and signless
    if one_sided:
        with pytest.raises(ValueError, match=r"holds -8 but not its negative.*alpha=-1"):
            _ = -w
        return
    for got in (-w, np.negative(w)):
        assert np.array_equal(exactly(got), -exactly(w))
        assert got.format == fmt
        assert got.shape == w.shape
        assert np.array_equal(exactly(-got), exactly(w))


@pytest.mark.parametrize("name", ["int4_g8_e8m0", "int4_g8_asym_e8m0", "int4_g8_zf16_e8m0"])
def test_codes_and_zero_points_change_sign_where_scales_have_none(name):
    random = np.random.default_rng(0)
    codes = _pack(random.integers(-7, 8, (6, 24)).astype(np.uint8) & np.uint8(15), 4)
    scales = random.integers(120, 130, (6, 3)).astype(np.uint8)
    zeros = None
    if "asym" in name:
        zeros = random.integers(-7, 8, (6, 3)).astype(np.int8)
    elif "zf16" in name:
        zeros = random.normal(size=(6, 3)).astype(np.float16)
    w = lb.from_parts(name, codes, scales, zeros=zeros)
    assert np.array_equal(exactly(-w), -exactly(w))
    if "asym" in name:
        assert zeros is not None
        zeros[2, 1] = -8
        with pytest.raises(ValueError, match="zero point -8 but not its negative"):
            _ = -lb.from_parts(name, codes, scales, zeros=zeros)


def test_negation_of_eight_bit_codes_and_of_odd_columns():
    w = array("mxfp8", (3, 5))
    assert np.array_equal(exactly(-w), -exactly(w))
    w = array("mxfp4", (3, 5))
    assert np.array_equal(exactly(-w), -exactly(w))


def test_plus_changes_nothing():
    w = array("int4_g8")
    assert +w is w
    assert np.positive(w) is w


# Multiply


@settings(max_examples=2 * settings().max_examples)
@given(
    name=st.sampled_from(FORMATS),
    factor=st.sampled_from([0, 1, -1, 2, 0.5, -3, 1.25, 7, 2.0**-130, 2.0**120, 1 / 3, 0.1, 1e-40])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**40), 2**40),
    prepared=st.booleans(),
)
def test_a_number_multiplies_exactly_or_is_refused(name, factor, prepared):
    w = array(name)
    held = w.prepare() if prepared else w
    for product in (
        lambda: held * factor,
        lambda: factor * held,
        lambda: np.multiply(held, factor),
    ):
        if keeps(w, factor):
            got = product()
            assert got.format == w.format
            assert got.shape == w.shape
            assert exact_products(got, w, factor)
        else:
            with pytest.raises(ValueError, match=r"alpha in lowbit.matmul, or \.dequantize"):
                product()


def keeps(w, factor):
    """Whether every number that the factor meets has an exact product of its own type."""
    second = w.tensor_scale
    parts = [w.scales if second is None else second, w.biases]
    for part in parts:
        if part is None:
            continue
        if not isinstance(w.format.scale.element, str) and part is not second:
            values = {Fraction(v) for v in w.format.scale.element.values if np.isfinite(v)}
            held = part.astype(np.float64)
            if any(Fraction(float(v)) * Fraction(factor) not in values for v in held.ravel()):
                return False
        else:
            info = ml_dtypes.finfo(part.dtype)
            for v in set(part.astype(np.float64).ravel().tolist()):
                wanted = Fraction(v) * Fraction(factor)
                if abs(wanted) > Fraction(float(info.max)):
                    return False
                if Fraction(float(np.float64(wanted).astype(part.dtype))) != wanted:
                    return False
    return True


def exact_products(got, w, factor):
    """Equality of real numbers, not of rounded ones."""
    values, before = (exactly(a).ravel().tolist() for a in (got, w))
    return all(
        Fraction(v) == Fraction(b) * Fraction(factor) for v, b in zip(values, before, strict=True)
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_stored_row_may_have_its_own_factor(name, lead, transposed):
    w = array(name, (*lead, 24, 6) if transposed else (*lead, 6, 24), transposed=transposed)
    factors = np.array([1.0, -2, 0.5, 4, 1, 2], np.float32)
    signless = not isinstance(w.format.scale.element, str) and w.format.scale.element.min >= 0
    factors = np.abs(factors) if signless else factors
    column = factors if transposed else factors[:, None]
    shapes = [column, column.reshape(1, 6) if transposed else column]
    if lead:
        shapes.append(
            np.stack([shapes[1], shapes[1][..., ::-1, :] if not transposed else shapes[1]])
        )
    for factor in shapes:
        for got in (w * factor, factor * w):
            assert got.shape == w.shape
            assert np.array_equal(exactly(got), exactly(w) * factor)


def test_one_number_in_an_array_is_a_number():
    w = array("int4_3x8")
    for factor in (np.array(2.0), np.array([2.0]), np.array([[2.0]]), np.float32(2), np.int8(2)):
        assert np.array_equal(exactly(w * factor), 2 * exactly(w))
        assert (w * factor).format == w.format
    v = array("int4_g8", (24,))
    assert np.array_equal(exactly(v * [2.0]), 2 * exactly(v))


@pytest.mark.parametrize(
    ("factor", "shape"),
    [
        (np.ones(24), (6, 1)),
        (np.ones((1, 24)), (6, 1)),
        (np.ones((6, 24)), (6, 1)),
        (np.ones((5, 1)), (6, 1)),
        (np.ones((1, 1, 1)), (6, 1)),
        (np.ones((3, 6, 1)), (6, 1)),
    ],
)
def test_factors_along_the_columns_are_refused_with_the_shape_that_would_do(factor, shape):
    w = array("int4_g8")
    message = rf"shape \({shape[0]}, {shape[1]}\); got .*dequantize"
    with pytest.raises(ValueError, match=message):
        w * factor
    with pytest.raises(ValueError, match=message):
        factor * w


def test_the_shape_is_that_of_the_transposed_array_and_of_vectors():
    with pytest.raises(ValueError, match=r"shape \(1, 6\); got \(24, 1\)"):
        array("int4_g8").T * np.ones((24, 1))
    with pytest.raises(ValueError, match=r"want a number"):
        array("int4_g8", (24,)) * np.ones(24)
    with pytest.raises(ValueError, match=r"want a number"):
        array("int4_g8", (24,)) * np.ones((1, 1))
    with pytest.raises(ValueError, match=r"shape \(2, 6, 1\)"):
        array("int4_g8", (2, 6, 24)) * np.ones((3, 6, 1))


@pytest.mark.parametrize("factor", [1 / 3, 0.1, 2**24 + 1, 2**53 + 1, 2**60 + 1])
def test_factors_of_too_many_bits_are_refused_even_where_float64_would_hide_it(factor):
    w = lb.from_parts("int4_g8", np.zeros((1, 4), np.uint8), np.full((1, 1), 3, np.float32))
    with pytest.raises(ValueError, match="24 significant bits"):
        w * factor
    assert (w * 2**60).scales.item() == 3 * 2.0**60
    assert (lb.from_parts("int4_g8", w.codes, w.scales / 3) * (2**24 - 1)).scales == 2**24 - 1
    third = lb.from_parts("int4_g8", w.codes, np.full((1, 1), 1 / 3, np.float32))
    with pytest.raises(ValueError, match="scale times the factor is not exact in float32"):
        third * 3


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (np.nan, ValueError, "factor: 1 entries are NaN or infinite"),
        (np.inf, ValueError, "factor: 1 entries are NaN or infinite"),
        (1j, TypeError, "factor: dtype complex128"),
        (True, TypeError, "factor: dtype bool"),
        ("2", TypeError, "factor"),
        (None, TypeError, "factor"),
    ],
)
def test_what_is_no_real_number_does_not_multiply(factor, error, message):
    w = array("int4_g8")
    with pytest.raises(error, match=message):
        w * factor
    with pytest.raises(error, match=message):
        factor * w


def test_two_arrays_do_not_multiply_entry_by_entry():
    w = array("int4_g8")
    with pytest.raises(TypeError, match=r"dequantize"):
        w * w


# Divide


def test_powers_of_two_divide_and_nothing_else_does():
    w = array("int4_g8")
    for divisor in (2, 0.25, -1, -8.0, np.float32(4), np.array(2)):
        assert np.array_equal(exactly(w / divisor), exactly(w) / divisor)
        assert np.array_equal(exactly(np.true_divide(w, divisor)), exactly(w) / divisor)
    for divisor in (3, 0.1, -6, 1.5):
        with pytest.raises(ValueError, match=rf"w / {divisor:g} is not exact; use alpha"):
            w / divisor
    with pytest.raises(ZeroDivisionError):
        w / 0
    with pytest.raises(ValueError, match="finite"):
        w / np.inf
    for wrong in ([2.0], np.ones((6, 1)), np.ones((1, 1)), "2", True, np.True_):
        with pytest.raises(TypeError, match="w / divisor: want a real number"):
            w / wrong


# Compare


def test_equality_is_that_of_values_and_shapes():
    w = array("int4_g8")
    assert lb.array_equal(w, w.copy())
    assert lb.array_equal(w, w.prepare())
    assert lb.array_equal(w, exactly(w))
    assert lb.array_equal(exactly(w), w)
    assert lb.array_equal(w, exactly(w).tolist())
    assert np.array_equal(w, exactly(w))
    assert lb.array_equal(w * 2, lb.from_parts(w.format, w.codes, w.scales * 2))
    assert not lb.array_equal(w, w.T)
    assert not lb.array_equal(w, w * 2)
    assert not lb.array_equal(w, w[:5])
    assert not lb.array_equal(w, exactly(w)[None])
    changed = exactly(w)
    changed[5, 23] = np.nextafter(changed[5, 23], np.inf)
    assert not lb.array_equal(w, changed)


def test_equality_reaches_over_formats_and_dtypes():
    values = np.array([[0, 1, -7, 3]], np.float32)
    narrow, wide = (
        lb.quantize(values, "int4_g8"),
        lb.quantize(values.astype(np.float16), "int8_row"),
    )
    assert lb.array_equal(narrow, values)
    assert lb.array_equal(narrow, lb.quantize(values, "int4_g128"))
    assert lb.array_equal(narrow, values.astype(ml_dtypes.bfloat16))
    assert lb.array_equal(wide, wide.dequantize(np.float64))
    nan = lb.from_parts("fp8_row", np.array([[0x7F]], np.uint8), np.ones((1, 1), np.float32))
    assert not lb.array_equal(nan, nan)


def test_equality_with_another_framework():
    torch = pytest.importorskip("torch", reason="torch is an optional peer")
    w = array("int4_g8")
    assert lb.array_equal(w, torch.from_numpy(exactly(w)))
    assert lb.array_equal(torch.from_numpy(exactly(w)).to(torch.bfloat16), w)

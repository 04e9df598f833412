"""quantize: what comes out is what plain loops over blocks say, whatever comes in."""

import bisect
import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lowbit as lb
from lowbit.formats import Element, declared, reference
from lowbit.testing.strategies import formats, numbers

f32 = functools.partial(np.array, dtype=np.float32)
VARIANTS = (
    "int4_g32_asym",
    "uint4_g16_asym_f16",
    "uint4_g8_zf16",
    "int8_row_zbf16",
    "uint2_g16_zf32",
    "uint4_g8_zint8",
    "int4_g8_asym_e4m3",
    "uint3_g8_bias",
    "int6_row_bias_bf16",
    "int4_4x4",
    "int8_3x5_asym",
    "float8_e4m3fn_128x128",
    "nf4_allx16",
    "float6_e3m2fn_2xall",
    "int5_tensor",
    "uint8_tensor_asym_e8m0",
    "float4_e2m1fn_g16_e4m3",
    "int4_g32_ts",
    "nvfp4_2x8",
    "mxfp4_4x16",
    "mxfp8_g1",
    "int3_g1000",
    "fp8_tensor_bf16",
)
HALF_TYPES = {"float16": (11, -24, 65504), "bfloat16": (8, -133, 255 * 2**120)}
EVERY = [*declared(), *VARIANTS]


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


# The oracle


class RefusedError(Exception):
    """The data need a scale or an offset that its type cannot hold."""


def narrowed(value, kind):
    """A number in a float type, rounded once, ties to even, in exact fractions."""
    if kind in ("float32", "float64"):
        with np.errstate(over="ignore"):
            result = float(np.dtype(kind).type(value))
    else:
        precision, smallest, largest = HALF_TYPES[kind]
        exact = Fraction(float(value))
        if exact == 0:
            return 0.0
        exponent = math.frexp(value)[1] - precision
        unit = Fraction(2) ** max(exponent, smallest)
        exact = round(exact / unit) * unit
        result = float(exact) if abs(exact) <= largest else math.inf
    if math.isinf(result):
        raise RefusedError
    return result


@functools.cache
def sorted_table(element):
    """Value and first code, ascending; and the code of -0."""
    codes: dict[float, int] = {}
    negative_zero = None
    for code, value in enumerate(element.values):
        if value == 0 and math.copysign(1, value) < 0:
            negative_zero = code
        elif math.isfinite(value):
            codes.setdefault(value, code)
    return sorted(codes.items()), negative_zero


def nearest_code(element, y):
    """By distance in exact fractions; ties to the even code; -0 stays."""
    table, negative_zero = sorted_table(element)
    if math.isinf(y):
        return table[-1 if y > 0 else 0][1]
    place = bisect.bisect_left(table, (y, -1))
    around = table[max(place - 1, 0) : place + 1]
    value, code = min(around, key=lambda vc: (abs(Fraction(vc[0]) - Fraction(y)), vc[1] % 2))
    if value == 0 and math.copysign(1, y) < 0 and negative_zero is not None:
        return negative_zero
    return code


def ends(element):
    """The values that the ends of a symmetric block map to."""
    if element.name.startswith("int") and element.bits > 1:
        return -element.max, element.max
    return element.min, element.max


def block_scale(fmt, number, low, high, further=1.0) -> Any:
    """The rule's scale of one block before it is rounded; `number` is the arithmetic's type."""
    if fmt.zero is not None or fmt.bias:
        levels = number((fmt.element.max - fmt.element.min) * further)
        wanted = (high - low) / levels
        if np.isinf(wanted):
            wanted = high / levels - low / levels
        needed = high > low
    else:
        bottom, top = ends(fmt.element)
        if (bottom == 0 > low) or (top == 0 < high):
            raise RefusedError
        wanted = max(
            high / number(top * further) if top else number(0),
            low / number(bottom * further) if bottom else number(0),
        )
        needed = low < 0 or high > 0
    if needed and wanted == 0:
        wanted = number(np.finfo(number).smallest_subnormal)
    return wanted


def stored_scale(fmt, wanted):
    """A scale in its own type; 1 for zero; never 0 for anything else."""
    kind = fmt.scale.element
    if wanted == 0:
        return 1.0
    if isinstance(kind, Element) and kind.name == "float8_e8m0fnu":
        fraction, exponent = math.frexp(wanted)
        power = exponent - (fraction == 0.5)
        if power > 127:
            raise RefusedError
        return math.ldexp(1.0, max(power, -127))
    if isinstance(kind, Element):
        if wanted > kind.max:
            raise RefusedError
        value = kind.values[nearest_code(kind, float(wanted))]
        return value or min(v for v in kind.values if v > 0)
    largest = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0}
    if wanted > largest.get(kind, 255.0 * 2**120):
        raise RefusedError
    tiny = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
    return narrowed(wanted, kind) or tiny[kind]


def cut(length, size):
    size = size or max(length, 1)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def expected(fmt, x) -> Any:
    """Codes and parts of one matrix by plain loops: nothing shared with formats/reference.py."""
    number = np.float64 if x.dtype == np.float64 else np.float32
    x = x.astype(number)
    grid = [(rows, columns) for rows in cut(x.shape[0], fmt.scale.block[0])
            for columns in cut(x.shape[1], fmt.scale.block[1])]  # fmt: skip
    extremes = []
    for (top, bottom), (left, right) in grid:
        held = [number(v) for v in x[top:bottom, left:right].ravel()]
        if not (isinstance(fmt.zero, str) or fmt.bias):
            held.append(number(0))
        extremes.append((min(held), max(held)))
    second = None
    if fmt.tensor_scale:
        kind = fmt.scale.element
        coded = isinstance(kind, Element) and kind.name != "float8_e8m0fnu"
        further = kind.max if coded else 1.0
        largest = max((block_scale(fmt, number, a, b, further) for a, b in extremes), default=0)
        second = np.float32(narrowed(largest, "float32") or 2.0**-149 if largest else 1)
    codes = np.zeros(x.shape, np.uint8)
    scales, zeros, biases = [], [], []
    for ((top, bottom), (left, right)), (low, high) in zip(grid, extremes, strict=True):
        wanted = block_scale(fmt, number, low, high)
        if second is not None:
            share = wanted / number(second)
            if isinstance(fmt.scale.element, Element):
                share = min(share, number(fmt.scale.element.max))
            wanted = share or (wanted and number(np.finfo(number).smallest_subnormal))
        scale = stored_scale(fmt, wanted)
        step = number(scale)
        if second is not None:
            step = step * number(second)
        zero = bias = None
        if fmt.bias:
            bias = narrowed(low - number(fmt.element.min) * step, fmt.scale.element)
        elif isinstance(fmt.zero, Element):
            zero = float(np.rint(number(fmt.element.min) - low / step))
            zero = min(max(zero, fmt.zero.min), fmt.zero.max)
        elif fmt.zero is not None:
            zero = narrowed(number(fmt.element.min) - low / step, fmt.zero)
        for row, column in itertools.product(range(top, bottom), range(left, right)):
            y = x[row, column]
            y = y if bias is None else y - number(bias)
            y = y / step
            y = y if zero is None else y + number(zero)
            codes[row, column] = nearest_code(fmt.element, float(y))
        scales.append(scale)
        zeros.append(zero)
        biases.append(bias)
    return codes, scales, zeros, biases, second


def check(name, x):
    """Quantize and compare every part and every value with the oracle."""
    fmt = lb.format(name)
    matrices = [x[lead] for lead in np.ndindex(x.shape[:-2])] if x.ndim > 1 else [x[None]]
    try:
        with np.errstate(over="ignore", under="ignore"):
            wanted = [expected(fmt, matrix) for matrix in matrices]
    except RefusedError:
        with pytest.raises(
            ValueError, match=r"would need|needs a scale|has no (posi|nega)tive value"
        ):
            lb.quantize(x, name)
        return
    w = lb.quantize(x, name)
    assert w.shape == x.shape
    assert w.dtype == x.dtype
    held = w._rows()
    codes = np.array([m[0] for m in wanted], np.uint8).reshape(x.shape)
    np.testing.assert_array_equal(codes_of(w), codes)
    assert w.codes.shape[-1] == fmt.row_bytes(x.shape[-1])
    scales = w.scales.astype(np.float64).ravel()
    np.testing.assert_array_equal(scales, [s for m in wanted for s in m[1]])
    for part, place in ((held.zeros, 2), (held.biases, 3)):
        numbers = [n for m in wanted for n in m[place]]
        if part is None:
            assert set(numbers) <= {None}
        else:
            np.testing.assert_array_equal(part.astype(np.float64).ravel(), numbers)
    if held.tensor_scale is not None:
        assert held.tensor_scale.dtype == np.float32
        np.testing.assert_array_equal(held.tensor_scale.ravel(), [m[4] for m in wanted])
    check_values(w, matrices, wanted)


def check_values(w, matrices, wanted):
    """value = (values[code] - zero) * scale * tensor_scale + bias, exactly but for float64.

    Five operations of a relative error of 2**-53 each, none larger than the sum of magnitudes.
    """
    fmt = w.format
    if not matrices:
        return
    values = w.dequantize(np.float64).reshape(len(matrices), *matrices[0].shape)
    for got, matrix, (codes, scales, zeros, biases, second) in zip(
        values, matrices, wanted, strict=True
    ):
        rows, columns = (cut(n, b) for n, b in zip(matrix.shape, fmt.scale.block, strict=True))
        for index, ((top, bottom), (left, right)) in enumerate(itertools.product(rows, columns)):
            table = np.array(fmt.element.values)
            factor = Fraction(scales[index]) * Fraction(1 if second is None else float(second))
            zero, bias = (Fraction(p[index] or 0) for p in (zeros, biases))
            for row, column in itertools.product(range(top, bottom), range(left, right)):
                value = Fraction(table[codes[row, column]].item())
                exact = (value - zero) * factor + bias
                size = (abs(value) + abs(zero)) * abs(factor) + abs(bias)
                assert abs(Fraction(got[row, column]) - exact) <= 5 * size * Fraction(1, 2**53)


SHAPES = st.one_of(
    st.tuples(st.integers(0, 40)),
    st.tuples(st.integers(0, 6), st.integers(0, 40)),
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 20)),
    st.sampled_from([(1, 129), (5, 33), (0, 7), (7, 0), (2, 0, 4), (0,), (1,), (1, 1, 1, 9)]),
)


@st.composite
def data(draw, dtype="float32"):
    """Arrays of any legal shape: whole numbers, tiny, huge and ordinary ones."""
    wide = draw(hnp.arrays(np.float64, draw(SHAPES), elements=numbers(dtype)))
    return wide.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("name", EVERY)
@given(x=data())
@settings(max_examples=settings().max_examples // 8)
def test_quantize_is_what_plain_loops_say(name, x):
    check(name, sided(name, x))


@given(name=formats(), dtype=st.sampled_from(["float16", "bfloat16", "float64"]), draw=st.data())
@settings(max_examples=settings().max_examples)
def test_other_input_types_and_any_format(name, dtype, draw):
    x = sided(name, draw.draw(data(dtype)))
    check(name, x)


@pytest.mark.parametrize("name", EVERY)
def test_ordinary_numbers(name):
    """Normal numbers with a few outliers, a ragged last block and two batches."""
    x = np.random.default_rng(11).standard_t(4, (2, 6, 43)).astype(np.float32)
    check(name, sided(name, x))


# Special blocks


@pytest.mark.parametrize("name", EVERY)
def test_all_zeros_have_scale_one_and_give_zero(name):
    w = lb.quantize(np.zeros((3, 40), np.float32), name)
    assert (w.scales.astype(np.float32) == 1).all()
    assert w.tensor_scale is None or w.tensor_scale == 1
    values = w.dequantize()
    assert (values == 0).all()
    assert not np.signbit(values).any()


@pytest.mark.parametrize("name", EVERY)
def test_a_block_of_zeros_among_others(name):
    x = sided(name, np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32))
    x[0] = 0
    w = lb.quantize(x, name)
    assert (w.dequantize()[0] == 0).all()
    if w.scales.shape[0] == 4 and not w.format.bias:
        assert (w.scales[0].astype(np.float32) == 1).all()


@pytest.mark.parametrize("name", ["int4_g32", "int8_row", "uint4_g32_asym", "float8_e4m3fn_row"])
def test_subnormal_blocks_divide_by_their_scale(name):
    """A reciprocal of such a scale would be infinite."""
    smallest = 2.0**-149
    exact = f32([[0, 1, -2, 3, 2, -3]]) * np.float32(smallest)
    w = lb.quantize(exact, name)
    assert w.scales == np.float32(smallest)
    if "e4m3" not in name:
        np.testing.assert_array_equal(w.dequantize(), exact)
    above = f32([[1.0, -0.5, 0.25]]) * np.float32(2.0**-127)
    check(name, above)
    assert np.isfinite(lb.quantize(above, name).dequantize()).all()


def test_a_float16_scale_neither_vanishes_nor_overflows():
    tiny = lb.quantize(f32([[1e-9, -2e-9, 0]]), "int4_g32_f16")
    assert tiny.scales == np.float16(2.0**-24)
    assert np.isfinite(tiny.dequantize()).all()
    with pytest.raises(ValueError, match=r"a scale of 142857, beyond the largest float16, 65504"):
        lb.quantize(f32([[1e6]]), "int4_g32_f16")
    with pytest.raises(ValueError, match=r"Use a scale type of more range \(bf16, f32\)"):
        lb.quantize(f32([[1e6]]), "int4_g32_f16")
    with pytest.raises(ValueError, match=r"beyond the largest float8_e4m3fn, 448"):
        lb.quantize(f32([[4000.0]]), "float4_e2m1fn_g16_e4m3")
    with pytest.raises(ValueError, match=r"beyond the largest float32"):
        lb.quantize(np.array([[1e300]]), "int4_g32")


def test_offsets_far_from_zero_are_refused_where_their_type_ends():
    x = f32([[1000.0, 1000.001]])
    with pytest.raises(ValueError, match=r"uint4_g32_zf16 would need a zero point of .* float16"):
        lb.quantize(x, "uint4_g32_zf16")
    with pytest.raises(ValueError, match=r"would need a bias of 1e\+06, beyond float16.*\(f32\)"):
        lb.quantize(f32([[1e6, 1e6 + 1]]), "uint4_g32_bias_f16")
    assert lb.quantize(x, "uint4_g32_zf32").zeros is not None


def test_integer_zero_points_stay_in_their_range():
    """A scale that was rounded down, or given, asks for one beyond the last code."""
    x = f32([[-10.0, -1.0]])
    w = lb.quantize(x, "uint4_g2_asym", scale=0.1)
    assert w.zeros is not None
    assert w.zeros.tolist() == [[15]]
    w = lb.quantize(-x, "int4_g2_asym_e4m3", scale=0.25)
    assert w.zeros is not None
    assert w.zeros.tolist() == [[-8]]
    for name in ("int4_row_asym_e4m3", "uint8_row_asym_e4m3"):
        for largest in np.linspace(1, 2, 40, dtype=np.float32):
            check(name, f32([[-largest, -largest / 3]]))


def test_a_constant_block_far_from_zero_keeps_its_number():
    x = np.full((1, 32), 5.25, np.float32)
    for name in ("uint4_g32_zf32", "uint4_g32_zf16", "uint4_g32_bias"):
        w = lb.quantize(x, name)
        assert w.scales == 1
        assert (w.dequantize() == 5.25).all(), name


def test_the_second_level_uses_the_whole_range_of_the_first():
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    w = lb.quantize(x, "nvfp4")
    assert w.tensor_scale is not None
    assert w.tensor_scale == np.abs(x).max() / np.float32(6 * 448)
    assert w.scales.dtype == ml_dtypes.float8_e4m3fn
    assert w.scales.astype(np.float32).max() == 448
    batch = lb.quantize(np.stack([x, 4 * x, 0 * x]), "nvfp4")
    assert batch.tensor_scale is not None
    np.testing.assert_array_equal(batch.tensor_scale, [w.tensor_scale, 4 * w.tensor_scale, 1])
    assert lb.array_equal(batch[1], lb.quantize(4 * x, "nvfp4"))
    with pytest.raises(ValueError, match=r"would need a tensor scale of .*, beyond float32"):
        lb.quantize(np.array([[1e300]]), "nvfp4")


def test_a_tiny_tensor_is_coarse_under_two_levels_and_not_lost():
    x = f32([[1, -3, 4, 6]]) * np.float32(2.0**-149)
    w = lb.quantize(x, "nvfp4")
    assert w.tensor_scale == np.float32(2.0**-149)
    np.testing.assert_array_equal(w.dequantize(), x)
    below = lb.quantize(np.array([[1e-300, -1e-300]]), "nvfp4")
    assert below.tensor_scale == np.float32(2.0**-149)
    assert (below.dequantize() == 0).all()


# Values of the grid


@pytest.mark.parametrize("name", [n for n in declared() if n != "nvfp4"])
def test_values_of_the_table_are_fixed_points(name):
    fmt = lb.format(name)
    table = np.array(fmt.element.values, np.float32)
    table = table[np.isfinite(table)]
    if fmt.element.name.startswith("int") and fmt.element.bits > 1:
        table = table[table >= -fmt.element.max]  # -2**(b-1) is never written
    elif fmt.element.name == "int1":
        table = table[table <= 0]
    for exponent in (-20, 0, 17):
        x = np.ldexp(table, exponent)[None]
        w = lb.quantize(x, lb.format(f"{name}_g256"))
        np.testing.assert_array_equal(w.dequantize(), x)
        assert (np.signbit(w.dequantize()) == np.signbit(x)).all()
        assert (w.scales.astype(np.float32) == 2.0**exponent).all()


def test_values_of_nvfp4_are_fixed_points():
    table = f32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = np.concatenate([table, -table])[None] * f32([[448], [1], [0.125]])
    w = lb.quantize(x, "nvfp4", scale=1.0)
    np.testing.assert_array_equal(w.dequantize(), x)
    np.testing.assert_array_equal(w.scales.astype(np.float32), [[448], [1], [0.125]])


# Biases, and block scales under a tensor scale, are found and never given.
GIVEN = [n for n in EVERY if not (lb.format(n).bias or lb.format(n).tensor_scale)]


@pytest.mark.parametrize("name", GIVEN)
def test_what_was_dequantized_comes_back_under_the_same_scales(name):
    x = sided(name, np.random.default_rng(4).standard_normal((4, 32)).astype(np.float32))
    w = lb.quantize(x, name)
    again = lb.quantize(w.dequantize(), name, scale=w.scales, zero=w.zeros)
    np.testing.assert_array_equal(again.dequantize(), w.dequantize())


# Values out


def test_dequantized_values_are_rounded_to_bfloat16_once():
    """A product just above a tie of bfloat16, which float32 in between would round to the tie."""
    tie = 1 + 2.0**-8
    scales = {code: np.float32(tie / code) for code in range(2, 128)}
    above = [c for c, s in scales.items() if c * float(s) > tie and np.float32(c * float(s)) == tie]
    assert above
    for code in above:
        w = lb.from_parts("int8_row", np.array([[code]], np.int8), f32([[scales[code]]]))
        assert w.dequantize("bfloat16").tolist() == [[1 + 2.0**-7]]


@given(name=formats(), x=data())
@settings(max_examples=settings().max_examples // 2)
def test_dequantize_rounds_its_exact_values_once(name, x):
    assume(x.size)
    try:
        w = lb.quantize(sided(name, x), name)
    except ValueError:
        assume(False)
    exact = w.dequantize(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(w.dequantize(np.float32), exact.astype(np.float32))
        np.testing.assert_array_equal(w.dequantize(np.float16), exact.astype(np.float16))
    bfloat = w.dequantize("bfloat16").astype(np.float64)
    for got, value in zip(bfloat.ravel().tolist(), exact.ravel().tolist(), strict=True):
        try:
            assert got == narrowed(value, "bfloat16")
        except RefusedError:
            assert math.isinf(got)

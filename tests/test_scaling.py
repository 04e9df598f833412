"""Scale rules: each by its definition in exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

import lowbit as lb
from lowbit.formats import reference, scaling

MX = ("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "mxint8")
# OCP MX v1.0, table 1: exponent of the largest value, fraction bits, largest value.
MX_FACTS = {
    "mxfp8": (8, 3, Fraction(448)),
    "mxfp8_e5m2": (15, 2, Fraction(57344)),
    "mxfp6": (2, 3, Fraction(15, 2)),
    "mxfp6_e3m2": (4, 2, Fraction(28)),
    "mxfp4": (2, 1, Fraction(6)),
    "mxint8": (0, 6, Fraction(127, 64)),
}
# precision, exponent of the smallest number, largest number
FLOATS = {
    "float64": (53, -1074, Fraction(np.finfo(np.float64).max)),
    "float32": (24, -149, Fraction(float(np.finfo(np.float32).max))),
    "float16": (11, -24, Fraction(65504)),
    "bfloat16": (8, -133, Fraction(255 * 2**120)),
    "e4m3": (4, -9, Fraction(448)),
}


def log2_floor(number):
    """floor(log2(number)) of a positive fraction."""
    exponent = number.numerator.bit_length() - number.denominator.bit_length()
    return exponent - (Fraction(2) ** exponent > number)


def nearest(number, kind):
    """A fraction rounded to a float type, ties to even; no end at the top."""
    precision, smallest, _ = FLOATS[kind]
    if number == 0:
        return number
    unit = Fraction(2) ** max(log2_floor(abs(number)) - precision + 1, smallest)
    return round(number / unit) * unit  # round() of a fraction takes ties to even


def magnitudes(top=128):
    """Positive float32 numbers: every exponent, with mantissas at and beside the rules' edges."""
    ulp = 2.0**-23
    edges = [1, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375, 1.9921875, 1.99609375]
    mantissas = {m + step for m in edges for step in (-ulp, 0, ulp) if 1 <= m + step < 2}
    mantissas |= {2 - ulp, 4 / 3, 5 / 3}
    normal = [np.ldexp(m, e) for m in sorted(mantissas) for e in range(-126, top)]
    subnormal = [k * 2.0**-149 for k in (1, 2, 3, 5, 7, 11, 13, 100, 2**22, 2**23 - 1)]
    subnormal += [2.0**e for e in range(-149, -126)]
    return np.unique(np.array(normal + subnormal, np.float32))


# E8M0


def power_byte(name, amax, rule):
    """The definition of each MX rule, as an unclipped E8M0 byte."""
    emax, bits, largest = MX_FACTS[name]
    if rule == "rceil":  # the quotient is a float32, as NVIDIA and torchao have it
        ratio = max(nearest(amax / largest, "float32"), Fraction(2) ** -149)
        exponent = log2_floor(ratio)
        return exponent + (Fraction(2) ** exponent < ratio) + 127
    exponent = log2_floor(amax)
    if rule == "ceil":
        exponent += Fraction(2) ** exponent < amax
    if rule == "even":
        unit = Fraction(2) ** (exponent - bits)
        exponent = log2_floor(round(amax / unit) * unit)
    return exponent - emax + 127


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("name", MX)
def test_power_of_two_rules_over_all_exponents(name, rule):
    numbers = magnitudes()
    expected = np.array([power_byte(name, Fraction(float(v)), rule) for v in numbers])
    fits = expected <= 254
    # One block a row; the sign of the largest number does not matter but to MXINT8's -2.
    x = np.stack([numbers, numbers / 2], 1)
    got = lb.quantize(x[fits], name, method=rule).scales.view(np.uint8)[:, 0]
    np.testing.assert_array_equal(got, np.maximum(expected, 0)[fits])
    for largest in x[~fits]:
        with pytest.raises(ValueError, match=r"needs a scale of 2\*\*128, beyond the largest E8M0"):
            lb.quantize(largest[None], name, method=rule)
    if name != "mxint8":
        negative = lb.quantize(-x[fits], name, method=rule).scales.view(np.uint8)[:, 0]
        np.testing.assert_array_equal(negative, got)


def test_the_default_of_mx_is_rceil_and_loses_no_large_number():
    numbers = magnitudes(127)
    x = np.stack([numbers, -numbers / 3], 1)
    for name in MX:
        default = lb.quantize(x, name, overflow="raise")
        assert lb.array_equal(default, lb.quantize(x, name, method="rceil"))
        assert lb.array_equal(default, lb.quantize(x, name, method="absmax"))
        # The OCP rule saturates what lies between the largest value and the next power of two.
        with pytest.raises(OverflowError):
            lb.quantize(x, name, method="floor", overflow="raise")
    floor = lb.quantize(np.array([[6.9]], np.float32), "mxfp4", method="floor").dequantize()
    assert floor.tolist() == [[6]]
    assert lb.quantize(np.array([[7.5]], np.float32), "mxfp4").dequantize().tolist() == [[8]]


def test_int8_elements_of_mx_may_use_minus_two():
    """OCP leaves -128/64 to the implementation: it is a value of the table, so it is used."""
    w = lb.quantize(np.array([[-2.0, 1.0]], np.float32), "mxint8")
    assert w.codes.tolist() == [[-128, 64]]
    assert w.scales.view(np.uint8).tolist() == [[127]]
    w = lb.quantize(np.array([[2.0, 1.0]], np.float32), "mxint8")
    assert w.scales.view(np.uint8).tolist() == [[128]]


def test_power_rules_for_integers_under_e8m0_scales():
    """emax and mantissa follow from the table: int8 is 127 = 1.98 * 2**6 with 6 fraction bits."""
    x = np.array([[127.0], [127.6], [128.0], [63.4]], np.float32)
    for rule, exponents in {
        "floor": [0, 0, 1, -1],
        "ceil": [1, 1, 1, 0],
        "rceil": [0, 1, 1, -1],
        "even": [0, 1, 1, -1],
    }.items():
        got = lb.quantize(x, "int8_row_e8m0", method=rule).scales.view(np.uint8)[:, 0]
        assert (got - 127.0).tolist() == exponents, rule
    ones = lb.quantize(np.array([[-3.0]], np.float32), "int1_row_e8m0", method="floor")
    assert ones.dequantize() == -2  # int1 is {0, -1}: floor keeps 2, and -3 saturates


# Float scales


def wanted_scale(name, low, high, method="absmax", kind="float32"):
    """amax / qmax and its kin in exact fractions, each quotient rounded once."""
    element = lb.format(name).element
    bits = element.bits
    signed_integer = element.name.startswith("int")
    if lb.format(name).zero is not None or lb.format(name).bias:
        return nearest(nearest(high - low, kind) / Fraction(element.max - element.min), kind)
    if method == "signed_max":
        extreme = high if high > -low else low
        return nearest(-extreme / 2 ** (bits - 1), kind)
    if method == "fullrange":
        return nearest(max(high, -low) / 2 ** (bits - 1), kind)
    top = Fraction(element.max)
    bottom = -top if signed_integer and bits > 1 else Fraction(element.min)
    above = nearest(high / top, kind) if top else 0
    below = nearest(low / bottom, kind) if bottom else 0
    return max(above, below)


def checked_scales(name, x, kind, method="absmax"):
    """Every row of x is one block; the scales must be those of the definition."""
    arithmetic = "float64" if x.dtype == np.float64 else "float32"
    largest, smallest = FLOATS[kind][2], Fraction(2) ** FLOATS[kind][1]
    expected, fits = [], []
    for row in x:
        values = [Fraction(float(v)) for v in row]
        offset = isinstance(lb.format(name).zero, str) or lb.format(name).bias
        low = min(values if offset else [*values, Fraction(0)])
        high = max(values if offset else [*values, Fraction(0)])
        wanted = wanted_scale(name, low, high, method, arithmetic)
        if wanted == 0 and high > low:
            wanted = Fraction(2) ** FLOATS[arithmetic][1]
            if method == "signed_max" and high > -low:
                wanted = -wanted
        fits.append(abs(wanted) <= largest)
        rounded = nearest(wanted, kind) if wanted else Fraction(1)
        if wanted and rounded == 0:
            rounded = smallest if wanted > 0 else -smallest
        expected.append(float(rounded))
    good = np.array(fits)
    if good.any():
        w = lb.quantize(x[good], name, method=method)
        got = scaling.decode_scales(w.format, w.scales)[:, 0].astype(np.float64)
        np.testing.assert_array_equal(got, np.array(expected)[good])
    for row in x[~good]:
        with pytest.raises(ValueError, match=r"would need a scale of .* beyond the largest"):
            lb.quantize(row[None], name, method=method)
    return good


ROWS = {
    "both": lambda v: np.stack([v, -v / 3], 1),
    "negative": lambda v: np.stack([-v, v / 3], 1),
}
SYMMETRIC = ["int2", "int3", "int4", "int8", "nf4", "fp4", "float8_e4m3fn", "float8_e5m2fnuz"]


@pytest.mark.parametrize("sides", ROWS)
@pytest.mark.parametrize("name", [*SYMMETRIC, "float4_e2m1fn", "float6_e3m2fn", "fixed8"])
def test_absmax_over_all_exponents(name, sides):
    assert checked_scales(f"{name}_row", ROWS[sides](magnitudes()[::7]), "float32").all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_absmax_of_one_sided_elements(bits):
    positive = ROWS["both"](magnitudes()[::11])
    positive[:, 1] *= -1
    assert checked_scales(f"uint{bits}_row", positive, "float32").all()
    if bits == 1:
        assert checked_scales("int1_row", -positive, "float32").all()


@pytest.mark.parametrize("method", ["fullrange", "signed_max"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sides", ROWS)
def test_full_range_rules_over_all_exponents(bits, method, sides):
    assert checked_scales(
        f"int{bits}_row", ROWS[sides](magnitudes()[::23]), "float32", method
    ).all()


def test_signed_max_puts_the_largest_number_on_the_lowest_code():
    w = lb.quantize(
        np.array([[4.0, -1, 2], [-4, 1, 2]], np.float32), "int4_g32", method="signed_max"
    )
    assert w.scales.tolist() == [[-0.5], [0.5]]
    assert w.dequantize().tolist() == [[4, -1, 2], [-4, 1, 2]]
    w = lb.quantize(np.array([[4.0, -4.0]], np.float32), "int4_g32", method="signed_max")
    assert w.scales.tolist() == [[0.5]]  # equal sizes: the negative one
    full = lb.quantize(np.array([[4.0, -4.0]], np.float32), "int4_g32", method="fullrange")
    assert full.scales.tolist() == [[0.5]]
    assert full.dequantize().tolist() == [[3.5, -4]]


@pytest.mark.parametrize(
    "name", ["uint4_row_asym", "int8_row_asym", "uint2_row_zf32", "int3_row_bias"]
)
@pytest.mark.parametrize("sides", ROWS)
def test_ranges_with_an_offset_over_all_exponents(name, sides):
    """(high - low) / levels: an integer zero point counts zero in, a float offset does not."""
    numbers = magnitudes(126)[::7]
    checked_scales(name, ROWS[sides](numbers), "float32")
    apart = np.stack([numbers, numbers * 2], 1)
    checked_scales(name, apart[np.isfinite(apart).all(1)], "float32")


def test_a_range_wider_than_float32_is_divided_first():
    largest = np.finfo(np.float32).max
    x = np.array([[largest, -largest]], np.float32)
    expected = largest / np.float32(15) - -largest / np.float32(15)
    w = lb.quantize(x, "uint4_row_asym")
    assert w.scales == expected
    np.testing.assert_array_equal(w.codes, [[0x0F]])


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "e4m3"])
@pytest.mark.parametrize("name", ["int4", "float8_e4m3fn", "nf4"])
def test_narrow_scales_over_all_exponents(name, kind):
    """Rounded once from float32; tiny ones stay above 0, too large ones are refused."""
    word = {"float16": "f16", "bfloat16": "bf16", "e4m3": "e4m3"}[kind]
    good = checked_scales(f"{name}_row_{word}", ROWS["both"](magnitudes()[::29]), kind)
    assert good.any()
    if kind != "bfloat16":
        assert not good.all()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "e4m3"])
def test_scales_of_float64_data_are_rounded_once(kind):
    """Also where a float32 in between would make a tie of what is none."""
    edges = [1.00390625, 1.01171875, 1.0000000596046448, 1.00048828125, 1.0625, 1.5]
    ties = [e * 7 * 2.0**k for e in edges for k in (-160, -140, -30, -4, 0, 5, 40, 130)]
    numbers = np.array([n + n * s for n in ties for s in (0, 2.0**-45, -(2.0**-45))])
    word = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "e4m3": "e4m3"}[kind]
    checked_scales(f"int4_row_{word}", ROWS["both"](numbers), kind)


@pytest.mark.parametrize(
    "name", ["int4_g32", "nf4_g32", "mxfp4", "uint4_g32_asym", "float8_e4m3fn_row_e4m3"]
)
def test_a_block_of_zeros_has_scale_one(name):
    w = lb.quantize(np.zeros((2, 64), np.float32), name)
    assert (scaling.decode_scales(w.format, w.scales) == 1).all()
    values = w.dequantize()
    assert (values == 0).all()
    assert not np.signbit(values).any()


# Least squares


@pytest.mark.parametrize(
    "name",
    ["int4_g8", "uint3_g8_asym", "nf4_g8_f16", "mxfp4_g8", "int4_4x4", "nvfp4", "uint2_g8_bias"],
)
def test_mse_takes_the_best_of_its_thirty_shares(name):
    random = np.random.default_rng(3)
    x = random.standard_t(3, (4, 32)).astype(np.float32)
    fmt = lb.format(name)
    w = lb.quantize(x, name, method="mse")
    # Every candidate by the plain rule, from data whose extremes are shrunk.
    candidates = []
    for step in range(30):
        share = np.float32(1 - 0.02 * step)
        candidates.append(squares(name, x, shrunk(fmt, x, share), w.tensor_scale))
    best = np.min(candidates, axis=0)
    found = squares(name, x, w, w.tensor_scale)
    plain = squares(name, x, lb.quantize(x, name), w.tensor_scale)
    # Sums of 16 squares at most, each of three roundings, were compared in float64.
    slack = 1 + 2 * 20 * 2.0**-53
    assert (found <= best * slack).all()
    assert (found <= plain).all()
    assert (found < plain).any()


def test_mse_shrinks_as_far_as_it_pays():
    """31 * (0.45 - s)**2 + (1 - s)**2 is least at 0.467: of the shares, at 0.46."""
    x = np.full((1, 32), 0.45, np.float32)
    x[0, 5] = 1
    w = lb.quantize(x, "int2_g32", method="mse")
    assert w.scales == np.float32(1 - 27 * 0.02)
    # And no further than 0.42, where 0.32 would be best.
    x[x < 1] = 0.3
    assert lb.quantize(x, "int2_g32", method="mse").scales == np.float32(1 - 29 * 0.02)


def shrunk(fmt, x, share):
    """Quantize x with the scales that its extremes times `share` ask for."""
    low, high = reference.extremes(fmt, x)
    parts = []
    size = fmt.scale.block[0], fmt.scale.block[1]
    for i, j in np.ndindex(low.shape):
        block = np.zeros((size[0], size[1]), np.float32)
        block[:] = low[i, j] * share
        block[0, 0] = high[i, j] * share
        parts.append(block)
    grid = np.array(parts).reshape(*low.shape, *size).swapaxes(1, 2).reshape(x.shape)
    # A tensor scale is not shrunk with the blocks.
    return lb.quantize(grid, fmt, scale=lb.quantize(x, fmt).tensor_scale)


def squares(name, x, like, tensor_scale):
    """Squared error a block when x is rounded with the parts of `like`."""
    fmt = lb.format(name)
    grid = fmt.grid(x.shape)
    rows, columns = fmt.scale.block
    scales = scaling.decode_scales(fmt, like.scales).astype(np.float64)
    total = np.zeros(grid)
    second = 1.0 if tensor_scale is None else np.float32(tensor_scale)
    table = np.array(fmt.element.values)
    for i, j in np.ndindex(grid):
        step = np.float32(scales[i, j]) * np.float32(second)
        for value in x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].ravel():
            y = np.float32(value)
            if like.biases is not None:
                y = y - like.biases[i, j]
            y = y / step
            if like.zeros is not None:
                y = y + np.float32(like.zeros[i, j])
            miss = np.min(np.abs(table - np.float64(y)))
            total[i, j] += (miss * np.float64(step)) ** 2
    return total


# What the rules refuse


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("int4", "best", "method: want one of absmax, fullrange, signed_max, mse, floor"),
        ("int4", "floor", "method 'floor' is for E8M0 scales; int4_g128 has none"),
        ("nvfp4", "rceil", "method 'rceil' is for E8M0 scales"),
        ("mxfp4", "fullrange", "for signed integers of 2 bits or more, with float scales"),
        ("int1", "signed_max", "int1_g128 is none. Use 'absmax'"),
        ("uint4", "signed_max", "uint4_g128 is none. Use 'absmax'"),
        ("int4_asym", "fullrange", "is none. Use 'absmax'"),
        ("int4_bias", "signed_max", "is none. Use 'absmax'"),
        ("nf4", "fullrange", "nf4_g64 is none"),
        ("int8_row_asym_e8m0", "floor", "has zero points. Use 'rceil'"),
    ],
)
def test_a_rule_that_does_not_fit_the_format_is_refused(name, method, message):
    with pytest.raises(ValueError, match=message):
        lb.quantize(np.ones((1, 4), np.float32), name, method=method)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_elements_refuse_negative_numbers(bits):
    x = np.array([[1.0, -0.5, 2.0]], np.float32)
    with pytest.raises(
        ValueError, match=rf"uint{bits}_\S+ has no negative value, and x holds -0.5"
    ):
        lb.quantize(x, f"uint{bits}")
    with pytest.raises(ValueError, match=rf"Use a zero point: uint{bits}_\.\.\._asym"):
        lb.quantize(x, f"uint{bits}")
    for name in (f"uint{bits}_asym", f"uint{bits}_bias", f"uint{bits}_zf32"):
        lb.quantize(x, name)


def test_int1_refuses_positive_numbers():
    """Two's complement of one bit is {0, -1}."""
    for method in ("absmax", "mse"):
        with pytest.raises(ValueError, match=r"int1_g128 has no positive value, and x holds 0\.5"):
            lb.quantize(np.array([[0.5, -1]], np.float32), "int1", method=method)
    assert lb.quantize(np.array([[-3.0, 0]], np.float32), "int1").dequantize().tolist() == [[-3, 0]]

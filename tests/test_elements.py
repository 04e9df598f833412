"""Elements: every code of every table, and every half-precision number cast to each of them."""

import bisect
import functools
import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import lowbit as lb
from lowbit.formats import declare, declared
from lowbit.formats.codes import beyond, decode, encode, rounded

f32 = functools.partial(np.array, dtype=np.float32)

ELEMENTS = {}
for named in declared().values():
    for part in (named.format.element, named.format.scale.element):
        if isinstance(part, declare.Element):
            ELEMENTS[part.name] = part
FLOATS = {
    name: element
    for name, element in ELEMENTS.items()
    if name.startswith("float") and name != "float8_e8m0fnu"
}
# Where each float element ends: the first number that does not round to its largest value, and
# what ml_dtypes makes of that number.
ENDS = {
    "float8_e4m3fn": (np.nextafter(464, np.inf), "nan"),
    "float8_e5m2": (61440.0, "inf"),
    "float8_e4m3fnuz": (248.0, "nan"),
    "float8_e5m2fnuz": (61440.0, "nan"),
    "float6_e3m2fn": (30.0, "saturated"),
    "float6_e2m3fn": (7.75, "saturated"),
    "float4_e2m1fn": (7.0, "saturated"),
}
WIDE_TABLE = declare.codebook("wide_table", (1e-30, 1.0, -1.0, 0.0, 1.5, 1.5, -3e38, 3e38))


def all_numbers(dtype):
    """All 65,536 codes of a two-byte float dtype but its NaN."""
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    return numbers[~np.isnan(numbers.astype(np.float32))]


HALVES = {"bfloat16": all_numbers(ml_dtypes.bfloat16), "float16": all_numbers(np.float16)}


class Nearest:
    """Round to nearest, ties to the even code, in whole numbers and knowing nothing of codes.py.

    Every table and every input is a multiple of 2**-160 here, so products with 2**160 are integers.
    """

    UNIT = 2**160

    def __init__(self, values):
        units: dict[int, int] = {}
        for code, value in enumerate(values):
            if math.isfinite(value) and not (value == 0 and math.copysign(1, value) < 0):
                units.setdefault(self.scaled(value), code)  # the first code of equal ones
        self.units = sorted(units)
        self.codes = [units[unit] for unit in self.units]
        self.middles = [a + b for a, b in itertools.pairwise(self.units)]
        self.negative_zero = next(
            (c for c, v in enumerate(values) if v == 0 and math.copysign(1, v) < 0), None
        )

    @classmethod
    @functools.cache  # the same numbers go to every element
    def scaled(cls, value):
        number = Fraction(value) * cls.UNIT
        assert number.denominator == 1
        return number.numerator

    def code(self, value):
        if math.isinf(value):
            return self.codes[-1 if value > 0 else 0]
        twice = 2 * self.scaled(value)
        place = bisect.bisect_left(self.middles, twice)
        if place < len(self.middles) and self.middles[place] == twice:
            place += self.codes[place + 1] % 2 == 0
        if (
            self.units[place] == 0
            and math.copysign(1, value) < 0
            and self.negative_zero is not None
        ):
            return self.negative_zero
        return self.codes[place]


def finite_codes(element):
    return np.array([c for c, v in enumerate(element.values) if np.isfinite(v)], np.uint8)


# Tables


def test_every_element_is_here():
    integers = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)}
    assert set(ELEMENTS) >= {*integers, *ENDS, "float8_e8m0fnu", "fixed8", "nf4", "fp4"}
    assert set(FLOATS) == set(ENDS)


@pytest.mark.parametrize("name", sorted(n for n in ELEMENTS if hasattr(ml_dtypes, n)))
def test_table_is_that_of_ml_dtypes(name):
    element = ELEMENTS[name]
    codes = np.arange(2**element.bits, dtype=np.uint8)
    expected = codes.view(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(decode(element, codes), expected)
    number = ~np.isnan(expected)
    assert (np.signbit(decode(element, codes)) == np.signbit(expected))[number].all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_tables(bits):
    signed, unsigned = ELEMENTS[f"int{bits}"], ELEMENTS[f"uint{bits}"]
    half = 2 ** (bits - 1)
    assert unsigned.values == tuple(range(2 * half))
    assert signed.values == (*range(half), *range(-half, 0))
    assert signed.integral
    assert unsigned.integral


def test_tables_that_ml_dtypes_lacks():
    assert ELEMENTS["fixed8"].values == tuple(v / 64 for v in (*range(128), *range(-128, 0)))
    # bitsandbytes 0.50.2, get_4bit_type("fp4"), whose code 8 is +0.
    magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    expected = np.concatenate([magnitudes, np.float32(0) - magnitudes])
    np.testing.assert_array_equal(f32(ELEMENTS["fp4"].values), expected)
    assert not np.signbit(ELEMENTS["fp4"].values[8])
    nf4 = f32(ELEMENTS["nf4"].values)
    assert (np.diff(nf4) > 0).all()
    assert (nf4[0], nf4[7], nf4[15]) == (-1, 0, 1)
    # The digits that the QLoRA paper prints in its appendix E.
    printed = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_array_equal(nf4, f32(printed))


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_decodes_and_encodes_back(name):
    element = ELEMENTS[name]
    codes = finite_codes(element)
    values = decode(element, codes)
    assert values.dtype == np.float32
    assert (values.astype(np.float64) == np.array(element.values)[codes]).all()
    expected = codes if name != "fp4" else np.where(codes == 8, 0, codes)  # +0 has two codes
    np.testing.assert_array_equal(encode(element, values), expected)
    np.testing.assert_array_equal(encode(element, values, uniform=np.full(len(codes), 0)), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: declare.Element("a", 0, (1.0,)), "1 to 8 bits, got 0"),
        (lambda: declare.Element("a", 9, (1.0,) * 512), "1 to 8 bits, got 9"),
        (lambda: declare.Element("a", 2, (1.0, 2.0, 3.0)), "2 bits need 4 values, got 3"),
        (lambda: declare.Element("a", 1, (math.nan, math.inf)), "no value of the table is finite"),
        (lambda: declare.Element("a", 1, (0.0, 0.1)), "has to be a float32"),
        (lambda: declare.codebook("a", [0.0, 1e39]), "1e.39 is beyond the largest float32"),
    ],
)
def test_a_table_that_is_none_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Rounding to nearest


@pytest.mark.parametrize("source", HALVES)
@pytest.mark.parametrize("element", [*ELEMENTS.values(), WIDE_TABLE], ids=lambda e: e.name)
def test_every_half_precision_number_rounds_to_the_nearest_even(element, source):
    numbers = HALVES[source].astype(np.float32)
    oracle = Nearest(element.values)
    expected = [oracle.code(value) for value in numbers.tolist()]
    np.testing.assert_array_equal(encode(element, numbers), expected)


@pytest.mark.parametrize("element", [*ELEMENTS.values(), WIDE_TABLE], ids=lambda e: e.name)
def test_ties_and_their_neighbours_in_float64(element):
    oracle = Nearest(element.values)
    middles = [float(Fraction(m, 2 * oracle.UNIT)) for m in oracle.middles]
    numbers = np.array(middles + [float(v) for v in element.values if math.isfinite(v)])
    numbers = np.concatenate(
        [numbers, np.nextafter(numbers, np.inf), np.nextafter(numbers, -np.inf)]
    )
    numbers = numbers[np.abs(numbers) >= 2.0**-100]  # what a multiple of 2**-160 can hold
    expected = [oracle.code(value) for value in numbers.tolist()]
    np.testing.assert_array_equal(encode(element, numbers), expected)


@pytest.mark.parametrize("source", HALVES)
@pytest.mark.parametrize("name", ENDS)
def test_casts_agree_with_ml_dtypes_inside_the_range(name, source):
    element, (end, _) = FLOATS[name], ENDS[name]
    numbers = HALVES[source]
    inside = np.abs(numbers.astype(np.float64)) < end
    theirs = numbers.astype(getattr(ml_dtypes, name)).view(np.uint8)
    np.testing.assert_array_equal(
        encode(element, numbers.astype(np.float32))[inside], theirs[inside]
    )


@pytest.mark.parametrize("source", HALVES)
@pytest.mark.parametrize("name", ENDS)
def test_where_casts_differ_from_ml_dtypes_beyond_the_range(name, source):
    element, (end, theirs) = FLOATS[name], ENDS[name]
    numbers = HALVES[source].astype(np.float32)
    outside = numbers[np.abs(numbers) >= end]
    assert outside.size
    cast = outside.astype(getattr(ml_dtypes, name)).astype(np.float32)
    largest = np.copysign(np.float32(element.max), outside)
    expected = {"nan": np.full_like(outside, np.nan), "inf": np.copysign(np.inf, outside)}
    np.testing.assert_array_equal(cast, expected.get(theirs, largest))
    # A checkpoint wants the largest value, infinities included.
    np.testing.assert_array_equal(decode(element, encode(element, outside)), largest)


@pytest.mark.parametrize("name", ELEMENTS)
def test_nan_becomes_nan_where_the_element_has_it(name):
    element = ELEMENTS[name]
    code = encode(element, f32([np.nan, -np.nan]))
    if element.nan_code is None:
        # ml_dtypes makes a zero of it; here the border refuses it.
        for policy in ("raise", "nan"):
            with pytest.raises(ValueError, match="NaN"):
                lb.quantize(f32([[np.nan]]), "mxfp4", nonfinite=policy)
    else:
        assert np.isnan(decode(element, code)).all()


def test_e8m0_differs_from_ml_dtypes_in_ties_and_below_its_range():
    element = ELEMENTS["float8_e8m0fnu"]
    e8m0 = ml_dtypes.float8_e8m0fnu
    numbers = HALVES["bfloat16"].astype(np.float32)
    usual = numbers[(numbers >= 2.0**-126) & (numbers < 1.5 * 2.0**127)]
    fraction, exponent = np.frexp(usual)
    tie = fraction == 0.75
    theirs = usual.astype(e8m0).view(np.uint8)
    ours = encode(element, usual)
    np.testing.assert_array_equal(ours[~tie], theirs[~tie])
    # Ties: theirs go up, ours to the even code as everywhere.
    lower = exponent[tie] + 126
    np.testing.assert_array_equal(theirs[tie], lower + 1)
    np.testing.assert_array_equal(ours[tie], lower + lower % 2)
    # What is no positive number in range: theirs NaN, ours the nearest end.
    odd = f32([0.0, -1.0, -np.inf, 1.5 * 2.0**127, np.inf])
    np.testing.assert_array_equal(odd.astype(e8m0).view(np.uint8), 255)
    np.testing.assert_array_equal(encode(element, odd), [0, 0, 0, 254, 254])
    # float32 subnormals: theirs 2**-126 from just above 2**-127, ours the nearest.
    small = f32([2.0**-127 * 1.25])
    assert small.astype(e8m0).view(np.uint8)[0] == 1
    assert encode(element, small)[0] == 0


def test_negative_zero_is_kept_where_the_element_has_one():
    for name, element in ELEMENTS.items():
        value = decode(element, encode(element, f32([-0.0, 0.0])))
        has_one = name.startswith("float") and not name.endswith(("fnuz", "e8m0fnu"))
        if element.min <= 0 <= element.max and name != "float8_e8m0fnu":
            np.testing.assert_array_equal(value, [0, 0])
            assert np.signbit(value).tolist() == [has_one, False], name


# Stochastic rounding


@pytest.mark.parametrize("element", [*ELEMENTS.values(), WIDE_TABLE], ids=lambda e: e.name)
def test_stochastic_rounding_goes_up_with_the_probability_of_the_fraction(element):
    """Up exactly where the uniform number is below the fraction of the gap."""
    oracle = Nearest(element.values)
    # A gap of a power of two makes each fraction below a float64; else it is rounded, by less
    # than 2**-50 of itself, and the numbers nearer to it than that are left out.
    exact = all(b - a & b - a - 1 == 0 for a, b in itertools.pairwise(oracle.units))
    slack = 0 if exact else Fraction(1, 2**50)
    cases = []  # number, uniform, expected code
    steps = zip(itertools.pairwise(oracle.units), itertools.pairwise(oracle.codes), strict=True)
    for (lower, upper), (low, high) in steps:
        for sixteenth in range(17):
            share = Fraction(sixteenth, 16)
            exactly = (lower + (upper - lower) * share) / oracle.UNIT
            number = float(exactly)
            if Fraction(number) != exactly:
                continue
            near = float(share)
            candidates = {0.0, near, math.nextafter(near, 0), math.nextafter(near, 1), 1 - 2**-53}
            candidates |= {float(share * (1 - 2 * slack)), float(share * (1 + 2 * slack))}
            for uniform in candidates:
                if uniform < 1 and (exact or abs(Fraction(uniform) - share) > share * slack):
                    code = high if uniform < share else low
                    value = element.values[code]
                    if value == 0 and number < 0 and oracle.negative_zero is not None:
                        code = oracle.negative_zero
                    cases.append((number, uniform, code))
    numbers, uniforms, expected = map(np.array, zip(*cases, strict=True))
    np.testing.assert_array_equal(encode(element, numbers, uniform=uniforms), expected)


@pytest.mark.parametrize("name", ELEMENTS)
def test_stochastic_rounding_stays_with_the_two_neighbours(name):
    element = ELEMENTS[name]
    numbers = HALVES["float16"].astype(np.float64)
    numbers = np.clip(numbers[np.isfinite(numbers)], element.min, element.max)
    table = np.sort(np.array(element.values)[finite_codes(element)])
    below = table[np.searchsorted(table, numbers, "right") - 1]
    above = table[np.searchsorted(table, numbers, "left")]
    for uniform in (0.0, 1 - 2**-53, None):
        share = np.random.default_rng(0).random(len(numbers)) if uniform is None else uniform
        got = decode(
            element, encode(element, numbers, uniform=np.broadcast_to(share, len(numbers)))
        )
        assert ((got == below) | (got == above)).all()
        if uniform == 0.0:
            np.testing.assert_array_equal(got, above)  # the grid itself stays


def test_stochastic_rounding_follows_its_seed():
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    for name in ("int4_g32", "float8_e4m3fn_row", "nf4_g32"):
        runs = [lb.quantize(x, name, rounding="stochastic", seed=s).codes for s in (7, 7, 8)]
        assert (runs[0] == runs[1]).all()
        assert (runs[0] != runs[2]).any()
        uniform = np.random.default_rng(7).random(x.shape)
        w = lb.quantize(x, name)
        fmt = lb.format(name)
        y = x / np.repeat(w.scales, x.shape[1] // w.scales.shape[1], -1)
        unpacked = lb.quantize(x, name, rounding="stochastic", seed=7).dequantize(np.float64)
        grid = decode(fmt.element, encode(fmt.element, y, uniform=uniform)).astype(np.float64)
        np.testing.assert_array_equal(
            unpacked, grid * np.repeat(w.scales, x.shape[1] // w.scales.shape[1], -1)
        )
    with pytest.raises(ValueError, match="needs seed="):
        lb.quantize(x, "int4_g32", rounding="stochastic")


# Overflow


def end_of(element):
    """The least number, and the one nearest to zero below, that rounds past each end."""
    if element.name in ENDS:
        high = ENDS[element.name][0]
        return -high, high
    # Integers: half a step past the end rounds to the even neighbour, which may lie outside.
    step = 1 / 64 if element.name == "fixed8" else 1
    high, low = element.max + step / 2, element.min - step / 2
    if element.max / step % 2 == 0:
        high = np.nextafter(high, np.inf)
    if element.min / step % 2 == 0:
        low = np.nextafter(low, -np.inf)
    return low, high


REGULAR = sorted(set(ELEMENTS) - {"nf4", "fp4", "float8_e8m0fnu"})


@pytest.mark.parametrize("name", REGULAR)
def test_overflow_begins_where_the_next_value_would(name):
    element = ELEMENTS[name]
    low, high = end_of(element)
    numbers = np.array([low, np.nextafter(low, 0), np.nextafter(high, 0), high, np.inf, -np.inf])
    want = [True, False, False, True, True, True]
    np.testing.assert_array_equal(beyond(element, numbers), want)
    ends = [element.min, element.min, element.max, element.max, element.max, element.min]
    np.testing.assert_array_equal(decode(element, encode(element, numbers)), ends)
    with pytest.raises(OverflowError, match=rf"4 scaled values exceed {name}.*first at \(0,\)"):
        encode(element, numbers, overflow="raise")
    np.testing.assert_array_equal(
        encode(element, numbers[1:3], overflow="raise"), encode(element, numbers[1:3])
    )
    if element.nan_code is None:
        with pytest.raises(ValueError, match=f"{name} has no NaN code"):
            encode(element, numbers, overflow="nan")
    else:
        got = decode(element, encode(element, numbers, overflow="nan"))
        np.testing.assert_array_equal(np.isnan(got), want)
        np.testing.assert_array_equal(got[1:3], ends[1:3])


@pytest.mark.parametrize("name", [n for n, (_, theirs) in ENDS.items() if theirs != "saturated"])
def test_overflow_is_where_ml_dtypes_leaves_the_numbers(name):
    for numbers in HALVES.values():
        numbers = numbers.astype(np.float32)
        theirs = numbers.astype(getattr(ml_dtypes, name)).astype(np.float32)
        np.testing.assert_array_equal(beyond(FLOATS[name], numbers), ~np.isfinite(theirs))


def test_overflow_under_stochastic_rounding_begins_at_the_largest_value():
    element = ELEMENTS["float8_e4m3fn"]
    numbers = np.array([448, np.nextafter(448, 500), -448, np.nextafter(-448, -500)])
    uniform = np.full(4, 0.5)
    np.testing.assert_array_equal(beyond(element, numbers, stochastic=True), [0, 1, 0, 1])
    got = encode(element, numbers, uniform=uniform, overflow="nan")
    np.testing.assert_array_equal(np.isnan(decode(element, got)), [0, 1, 0, 1])
    with pytest.raises(OverflowError, match=r"2 scaled values .* first at \(1,\)"):
        encode(element, numbers, uniform=uniform, overflow="raise")


# Narrow floats


def test_float64_is_rounded_to_bfloat16_once():
    """Also next to ties that float32 cannot tell from a tie; ml_dtypes rounds twice there."""
    halves = np.sort(np.abs(HALVES["bfloat16"].astype(np.float64)))
    halves = halves[np.isfinite(halves)][::37]  # also to be quick
    following = (halves[1:] + halves[:-1]) / 2
    numbers = np.concatenate([halves, following, [3.3895e38, 3.4e38, 1e300, np.inf]])
    shift = np.ldexp(numbers[:-1], -40)
    numbers = np.concatenate([numbers, numbers[:-1] + shift, numbers[:-1] - shift])
    numbers = np.concatenate([numbers, -numbers])
    grid = HALVES["bfloat16"].astype(np.float64)
    oracle = Nearest([v if math.isfinite(v) else math.nan for v in grid[:0x7F80].tolist()])
    expected: list[float | None] = []
    for value in np.abs(numbers).tolist():
        if value >= 2.0**128 * (1 - 2.0**-9):  # half a step past the largest bfloat16
            expected.append(math.inf)
        elif value < 2.0**-100:
            expected.append(None)  # finer than the oracle's unit
        else:
            expected.append(grid[oracle.code(value)])
    got = rounded(numbers, np.dtype(ml_dtypes.bfloat16)).astype(np.float64)
    for value, want, found in zip(numbers.tolist(), expected, got.tolist(), strict=True):
        if want is not None:
            assert found == math.copysign(want, value)
    with np.errstate(over="ignore"):
        direct = numbers.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert (direct != got).any()  # or rounded() would have no reason to be
    nan = rounded(np.array([np.nan, -0.0]), np.dtype(ml_dtypes.bfloat16)).astype(np.float64)
    assert np.isnan(nan[0])
    assert np.signbit(nan[1])

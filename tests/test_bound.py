"""The bound holds where roundings are at their worst, and breaks where one more is made."""

import math
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import lowbit as lb
from lowbit import kernels
from lowbit.kernels.declare import ACTIVATIONS
from lowbit.kernels.reference import ACTIVATION_ERROR, activate
from lowbit.testing import (
    assert_within_bound,
    bounds,
    conformance,
    error_bound,
    exact,
    gamma,
    random_qarray,
)
from lowbit.testing.bounds import Exact
from lowbit.testing.conformance import single

U = 2.0**-24
FMA, BF16, DOT = "matmul.cpu.fma", "matmul.cpu.bf16", "matmul.cpu.dot"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def ones(n, k, fmt="int8_row", scale=1.0):
    w = lb.format(fmt)
    return lb.from_parts(w, np.ones((n, k), np.int8), np.full(w.grid((n, k)), scale, np.float32))


def vanishing(k):
    """Every addend is half a unit in the last place: it is rounded away, and all errors add up."""
    x = np.full((1, k), U, np.float32)
    x[0, 0] = 1
    return x


def test_gamma():
    assert gamma(0, np.float32) == 0
    assert gamma(3, np.float32) == 3 * U / (1 - 3 * U)
    assert gamma(3, ml_dtypes.bfloat16) == 3 / 253
    with pytest.raises(ValueError, match="65536 roundings in float16 leave no bound"):
        gamma(65536, np.float16)


@pytest.mark.parametrize("k", [10, 100, 1000])
def test_the_worst_sum_nearly_reaches_the_bound(k):
    x, w = vanishing(k), ones(1, k)
    result = lb.matmul(x, w.T, kernel=FMA)
    assert result == 1  # all but the first are lost
    share = assert_within_bound(result, x, w.T, kernel=FMA)
    assert (k - 1) / (k + 8) < share <= 1
    assert error_bound(x, w.T, kernel=FMA)[0, 0] < (k + 8) * U


def test_fewer_roundings_than_are_made_do_not_cover_the_worst_sum(monkeypatch):
    x, w = vanishing(100), ones(1, 100)
    result = lb.matmul(x, w.T, kernel=FMA)
    assert_within_bound(result, x, w.T, kernel=FMA)
    promise(monkeypatch, FMA, count=90)
    with pytest.raises(AssertionError, match="1 of 1 entries are outside of the bound"):
        assert_within_bound(result, x, w.T, kernel=FMA)


def promise(monkeypatch, name, **less):
    """Let a kernel promise less roundings than it makes."""
    honest = next(k for k in kernels.registered() if k.name == name)
    modest = replace(honest, roundings=lambda p: replace(honest.roundings(p), **less))
    rest = tuple(k for k in kernels.registered() if k.name != name)
    monkeypatch.setattr(kernels, "registered", lambda: (*rest, modest))


@pytest.fixture
def pairs():
    """Asks whether the kernel of bfloat16 pairs is of use here."""
    if conformance.refusal(BF16, np.ones((1, 8), BFLOAT16), ones(1, 8)) is not None:
        pytest.skip("this machine does not multiply bfloat16")


def test_values_that_are_rounded_first_are_counted(pairs, monkeypatch):
    element = lb.format("nf4").element
    lost = [abs(1 - float(BFLOAT16.type(v)) / v) if v else 0.0 for v in element.values]
    codes = np.full((1, 32), np.argmax(lost) * 0x11, np.uint8)  # two codes a byte
    w = lb.from_parts("nf4", codes, np.ones((1, 1), np.float32), shape=(1, 64))
    x = np.ones((1, 64), BFLOAT16)
    result = lb.matmul(x, w.T, kernel=BF16)
    share = assert_within_bound(result, x, w.T, kernel=BF16)
    assert share > 0.9 * max(lost) / 2.0**-8
    promise(monkeypatch, BF16, weight=0.0)
    with pytest.raises(AssertionError, match="1 of 1 entries are outside of the bound"):
        assert_within_bound(result, x, w.T, kernel=BF16)


def test_numbers_that_are_taken_for_zero_are_counted(pairs, monkeypatch):
    x, w = np.full((1, 64), 2.0**-127, BFLOAT16), ones(1, 64)
    result = lb.matmul(x, w.T, kernel=BF16)
    assert result == 0
    assert_within_bound(result, x, w.T, kernel=BF16)
    promise(monkeypatch, BF16, flushed=0.0)
    with pytest.raises(AssertionError, match="1 of 1 entries are outside of the bound"):
        assert_within_bound(result, x, w.T, kernel=BF16)


@pytest.mark.parametrize(
    ("kernel", "x", "w", "count"),
    [
        # columns of a block, blocks, then alpha, bias and their fma
        (FMA, "float32", "int8_row", 96 + 1 + 3),
        (FMA, "float32", "int4_g32", 32 + 3 + 3),
        (FMA, "float32", "int4_g32_asym", 32 + 3 + 3),  # integer zero points are exact
        (FMA, "float32", "int4_g32_zf16", 32 + 3 + 1 + 3),
        (FMA, "float32", "int4_g32_bias", 32 + 2 * 3 + 1 + 3),
        (FMA, "float8_e4m3fn_row", "int4_g32", 32 + 3 + 1 + 3),
        (FMA, "int8_g16", "int4_g32", 16 + 6 + 1 + 3),
        (DOT, "int8_row", "int8_row", 1 + 2 + 3),
        (DOT, "int8_row", "int4_g32", 3 + 2 + 3),
        ("reference", "float32", "int4_g32", 96 + 12),
    ],
)
def test_roundings_are_those_of_the_documented_order(kernel, x, w, count):
    left = random_qarray(x, 3, 96) if x not in ("float32",) else np.ones((3, 96), np.float32)
    explanation = lb.explain(left, random_qarray(w, 5, 96).T, kernel=kernel)
    chosen = next(v.kernel for v in explanation.verdicts if v.kernel.name == kernel)
    assert chosen.roundings(explanation.problem).count == count


def test_integer_sums_have_no_error_of_their_own():
    x, w = random_qarray("int8_row", 3, 4096, spread=0), random_qarray("int8_row", 5, 4096)
    size = np.abs(x.dequantize(float)) @ np.abs(w.dequantize(float)).T
    bound = error_bound(x, w.T, kernel=DOT)
    assert (bound < 8 * U * size).all()
    assert_within_bound(lb.matmul(x, w.T, kernel=DOT), x, w.T, kernel=DOT)


def test_worst_scales_of_an_integer_sum():
    """The sum, its product with either scale: three roundings in one direction, 1.5 u each."""
    worst = 0.0
    w = lb.from_parts("int8_row", np.full((1, 1025), 127, np.int8), np.ones((1, 1), np.float32))
    for step in range(200):
        scale = np.float32(1 + step * 3 * 2.0**-23)
        x = lb.from_parts("int8_row", np.full((1, 1025), 127, np.int8), np.full((1, 1), scale))
        w = lb.from_parts(w.format, w.codes, np.full((1, 1), 2 - scale))
        result = lb.matmul(x, w.T, kernel=DOT)
        worst = max(worst, assert_within_bound(result, x, w.T, kernel=DOT))
    assert 0.15 < worst <= 1


def test_nothing_is_promised_beyond_float32():
    w = ones(2, 64)
    x = np.full((2, 64), 1e37, np.float32)
    x[1] = 1e36
    bound = error_bound(x, w.T)
    assert np.isinf(bound[0]).all()
    assert np.isfinite(bound[1]).all()
    big = lb.matmul(x[1:], w.T, out_dtype="float16")
    assert (big == np.inf).all()
    assert_within_bound(big, x[1:], w.T, out_dtype="float16")
    with pytest.raises(AssertionError, match="outside of the bound"):
        assert_within_bound(np.full((1, 2), 65504, np.float16), x[1:], w.T, out_dtype="float16")


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 2.0**-100])
def test_underflow_is_covered(scale):
    w = ones(3, 64, "int8_g32", scale)
    for size in (2.0**-149, 2.0**-60, 1.0, 2.0**20):
        x = np.full((2, 64), 0.7 * size, np.float32)
        for alpha in (1.0, 2.0**20, 1e-30):
            result = lb.matmul(x, w.T, alpha=alpha, kernel=FMA)
            assert_within_bound(result, x, w.T, alpha=alpha, kernel=FMA)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes(activation):
    v = np.linspace(-12, 12, 2_000_001)
    slope = np.diff(activate(activation, v)) / np.diff(v)
    steepest = np.abs(slope).max()
    assert bounds.LIPSCHITZ[activation] - 0.01 < steepest < bounds.LIPSCHITZ[activation] + 1e-9


def test_the_reference_does_not_cancel():
    """Tails from tables: Phi(-10) = 7.619853024160527e-24, Phi(-30) = 4.906713927148e-198."""
    for v, tail in ((-10.0, 7.619853024160527e-24), (-30.0, 4.906713927148187e-198)):
        assert math.isclose(activate("gelu", np.array(v)), v * tail, rel_tol=ACTIVATION_ERROR[0])
    assert math.isclose(activate("silu", np.array(-700.0)), -700 * math.exp(-700), rel_tol=1e-12)
    t = math.sqrt(2 / math.pi) * (-5 + 0.044715 * -125)
    wanted = -5 * math.exp(2 * t) / (1 + math.exp(2 * t))
    assert math.isclose(activate("gelu_tanh", np.array(-5.0)), wanted, rel_tol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", ["reference", FMA])
def test_activations_of_many_numbers(activation, kernel):
    v = np.concatenate([np.linspace(-20, 20, 3000), np.logspace(-45, 38, 500), [0.0, -0.0]])
    x = np.concatenate([v, -v]).astype(np.float32)[:, None]
    w = ones(1, 1)
    result = lb.matmul(x, w.T, activation=activation, kernel=kernel)
    assert_within_bound(result, x, w.T, activation=activation, kernel=kernel)


def test_a_wrong_activation_is_noticed():
    x, w = np.full((1, 32), 0.05, np.float32), ones(1, 32)
    other = lb.matmul(x, w.T, activation="gelu_tanh")
    with pytest.raises(AssertionError, match="outside of the bound"):
        assert_within_bound(other, x, w.T, activation="gelu")


def test_messages_name_the_entry():
    x, w = np.ones((2, 32), np.float32), ones(3, 32)
    result = lb.matmul(x, w.T)
    result[1, 2] += 1
    with pytest.raises(AssertionError, match=r"1 of 6 entries .* first at \(1, 2\): .*33\.0"):
        assert_within_bound(result, x, w.T)
    with pytest.raises(AssertionError, match=r"want float32 \(2, 3\), got float64 \(2, 3\)"):
        assert_within_bound(result.astype(float), x, w.T)
    with pytest.raises(AssertionError, match=r"want float32 \(2, 3\), got float32 \(3, 2\)"):
        assert_within_bound(result.T, x, w.T)


def test_special_numbers_have_to_be_the_same():
    w, x = ones(1, 8), np.ones((3, 8), np.float32)
    x[0, 2], x[1, 3], x[2, 3] = np.nan, np.inf, -np.inf
    right = np.array([[np.nan], [np.inf], [-np.inf]], np.float32)
    assert assert_within_bound(right, x, w.T) == 0
    for row, wrong in ((0, np.inf), (0, 1.0), (1, np.nan), (1, -np.inf), (2, -3e38)):
        changed = right.copy()
        changed[row] = wrong
        with pytest.raises(AssertionError, match="outside of the bound"):
            assert_within_bound(changed, x, w.T)


@pytest.mark.parametrize(
    ("x", "w"), [((40,), (3, 40)), ((2, 5, 40), (3, 40)), ((5, 40), (2, 3, 40))]
)
def test_shapes_of_the_bound(x, w):
    q, left = lb.quantize(np.ones(w, np.float32), "nvfp4"), np.ones(x, np.float32)
    assert error_bound(left, q.mT).shape == lb.matmul(left, q.mT).shape
    turned = error_bound(q, left.mT if left.ndim > 1 else left)
    assert turned.shape == lb.matmul(q, left.mT if left.ndim > 1 else left).shape


def test_the_bound_is_around_the_exact_product():
    x, w = np.array([[0.1, 0.2, 0.3]], np.float32), random_qarray("nf4", 4, 3)
    terms = [
        sum(map(Fraction.__mul__, map(Fraction, map(float, x[0])), map(Fraction, row)), Fraction(0))
        for row in w.dequantize(np.float64)
    ]
    found = exact(x, w.T)
    assert np.abs(found.value - [[float(t) for t in terms]]).max() < 1e-15
    nearest = np.array([[float(single(t)) for t in terms]], np.float32)
    assert (np.abs(nearest - found.value) <= error_bound(x, w.T)).all()
    assert (found.low <= nearest).all()
    assert (nearest <= found.high).all()


def test_limits_are_rounded_once():
    # Through float32 this one became the tie 5.328125, and bfloat16 the even 5.3125 below it.
    value = np.array([5.328125015])
    found = Exact(value, np.zeros(1), np.dtype(ml_dtypes.bfloat16), strict=True)
    assert found.low == found.high == 5.34375

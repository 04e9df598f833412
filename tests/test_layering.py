"""quantize_silu_mul and quantize_rmsnorm on the host: quantize of the layer, whatever comes."""

import math
import re
import tracemalloc
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit import layer_rows
from lowbit.dlpack import Exported
from lowbit.formats import blocks, codes
from lowbit.kernels import layers
from lowbit.kernels.cuda import quantize as cuda_quantize
from lowbit.testing.strategies import DTYPES, MEMORY, dense, formats, in_memory, lengths

RNG = np.random.default_rng(0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PARTS = ("codes", "scales", "zeros", "biases", "tensor_scale")


def drawn(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    numbers = np.random.default_rng(seed).standard_t(4, shape)
    return codes.rounded(np.asarray(numbers), np.dtype(dtype))


def same(a: Any, b: Any) -> None:
    """Two arrays of the same bits in every part."""
    assert (a.format, a.shape, a.dtype) == (b.format, b.shape, b.dtype)
    for part in PARTS:
        one, other = getattr(a, part), getattr(b, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), part
            equal = one.tobytes() == other.tobytes()
            assert equal, part


def native(x: Any) -> Any:
    return x.astype(x.dtype.newbyteorder("="))


def matches(call: Any, layer: Any, name: str) -> bool:
    """The same array, or both are refused."""
    try:
        expected = lb.quantize(layer, name)
    except ValueError:
        with pytest.raises(ValueError, match=r"quantize_|NaN or infinite|\A\w+: "):
            call()
        return False
    got = call()
    same(got[0] if isinstance(got, tuple) else got, expected)
    return True


# The definitions


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
def test_silu_is_rounded_where_a_layer_would_write_it(dtype):
    gate, up = drawn((64,), dtype, 1), drawn((64,), dtype, 2)
    silu = codes.rounded(silu_of(gate), np.dtype(dtype)).astype(np.float64)
    product = (silu * up.astype(np.float64)).astype(np.float32)  # of 24-bit numbers: rounded once
    expected = codes.rounded(product, np.dtype(dtype))
    np.testing.assert_array_equal(layers.silu_mul(gate, up), expected)


def test_silu_of_float64():
    gate, up = drawn((64,), np.float64, 1), drawn((64,), np.float64, 2)
    np.testing.assert_allclose(layers.silu_mul(gate, up), silu_of(gate) * up, rtol=1e-15)


def silu_of(gate: Any) -> Any:
    return np.array([float(g) / (1 + math.exp(-float(g))) for g in gate])


def test_rmsnorm_is_the_formula_in_float64():
    x, other, weight = (drawn((3, 700), np.float64, seed) for seed in (1, 2, 3))
    got, updated = layers.rmsnorm(x, weight[0], 0.25, other)
    h = x + other
    np.testing.assert_array_equal(updated, h)
    exact = h / np.sqrt((h**2).mean(-1, keepdims=True) + 0.25) * weight[0]
    np.testing.assert_allclose(got, exact, rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_rmsnorm_of_16_bits_is_that_of_float32_rounded_thrice(dtype):
    x, other, weight = (drawn((5, 300), dtype, seed) for seed in (1, 2, 3))
    h = codes.rounded(x.astype(np.float32) + other.astype(np.float32), np.dtype(dtype))
    ones = np.ones(300, np.float32)
    normal = layers.rmsnorm(h.astype(np.float32), ones, 1e-3)[0].astype(dtype)
    expected = (normal.astype(np.float32) * weight[0].astype(np.float32)).astype(dtype)
    got, updated = layers.rmsnorm(x, weight[0], 1e-3, other)
    assert updated.tobytes() == h.tobytes()
    assert got.tobytes() == expected.tobytes()


def test_the_order_of_the_sum_is_that_of_the_kernels():
    """Their tiles decide bits; quantizers may have others one day, this order may not follow."""
    assert layers.TILES == ((128, 2), (256, 4), (256, 8), (512, 8))
    assert set(layers.TILES) <= set(cuda_quantize.TILES)
    assert layers.tile(2049) == (256, 4)
    assert layers.tile(40_000) == (1024, 5)


@pytest.mark.parametrize("scale", [1.0, 2.0**-66, 2.0**-75, 2.0**60])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_squares_are_added_with_one_rounding(dtype, scale):
    x = drawn((4000,), dtype, 4)
    x = x if dtype is np.float16 else (x.astype(np.float64) * scale).astype(dtype)
    total = (np.abs(drawn((4000,), np.float32, 5)) * np.float32(scale) ** 2).astype(np.float32)
    total[::5] *= np.float32(2.0**-26)
    x[::7] = x[::7].astype(np.float64) * 2.0**-12
    got = layers._fma(x, total)
    for a, b, found in zip(x, total, got, strict=True):
        exact = Fraction(float(a)) ** 2 + Fraction(float(b))
        assert found == nearest(exact)


def test_ties_are_decided_by_what_float64_does_not_hold():
    """Squares just below the middle of two float32 numbers, and what is missing to it, rounded."""
    x = np.random.default_rng(6).uniform(1, 1.4, 100_000).astype(np.float32)
    square = x.astype(np.float64) ** 2
    missing = (np.floor(square * 2.0**23) + 0.5) * 2.0**-23 - square
    close = (missing > 0) & (missing < 2.0**-30)
    x, total = x[close], missing[close].astype(np.float32)
    x, total = np.append(x, np.float32(1 + 2.0**-12)), np.append(total, np.float32(2.0**-60))
    exact = [Fraction(float(a)) ** 2 + Fraction(float(b)) for a, b in zip(x, total, strict=True)]
    twice = (x.astype(np.float64) ** 2 + total).astype(np.float32)
    expected = [nearest(each) for each in exact]
    assert (twice != expected).any()
    assert (layers._fma(x, total) == expected).all()
    one_by_one = [layers._fma(x[i : i + 1], total[i : i + 1])[0] for i in range(len(x))]
    assert one_by_one == expected


def nearest(exact: Fraction) -> np.float32:
    """A float32 number, ties to even."""
    middle = np.float32(float(exact))
    around = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))]
    return min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))


# Public calls are the definitions, quantized


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    lead = draw(st.lists(st.integers(0, 3), max_size=2))
    vector = not lead and draw(st.booleans())
    rows = () if vector else (draw(lengths(20)),)
    return (*lead, *rows, draw(lengths(130)))


@given(st.data())
def test_silu_mul_is_quantize_of_the_layer(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    gate, up = data.draw(dense(shape, dtype)), data.draw(dense(shape, dtype))
    name = data.draw(formats())
    layer = layers.silu_mul(native(gate), native(up))
    matches(lambda: lb.quantize_silu_mul(gate, up, name), layer, name)


@given(st.data())
def test_rmsnorm_is_quantize_of_the_layer(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    x = data.draw(dense(shape, dtype))
    weight = data.draw(dense(shape[-1:], data.draw(st.sampled_from(DTYPES[:3]))))
    residual = data.draw(st.none() | dense(shape, dtype))
    eps, name = data.draw(st.sampled_from([1e-6, 0, 0.5])), data.draw(formats())
    given = None if residual is None else native(residual)
    if x.size:
        layer, h = layers.rmsnorm(native(x), native(weight), eps, given)
    else:
        layer = h = native(x)

    def call() -> Any:
        return lb.quantize_rmsnorm(x, weight, name, eps=eps, residual=residual)

    if matches(call, layer, name) and residual is not None:
        _, updated = call()
        assert (updated.dtype, updated.shape) == (h.dtype, shape)
        assert updated.tobytes() == h.tobytes()


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "fp8_32x16", "int8_tensor", "uint4_3x5_asym",
                                  "mxfp8", "int4_allx16", "uint4_g16_bias"])  # fmt: skip
@pytest.mark.parametrize("step", [1, 300, 4000])
def test_how_many_rows_are_worked_on_changes_no_bit(name, step, monkeypatch):
    gate, up = drawn((2, 3, 37, 48), seed=1), drawn((2, 3, 37, 48), seed=2)
    layer, (normal, h) = layers.silu_mul(gate, up), layers.rmsnorm(gate, up[0, 0, 0], 1e-6, up)
    monkeypatch.setattr(layer_rows, "_QUANTIZED", step)
    monkeypatch.setattr(blocks, "CHUNK", step // 3)
    same(lb.quantize_silu_mul(gate, up, name), lb.quantize(layer, name))
    got, updated = lb.quantize_rmsnorm(gate, up[0, 0, 0], name, residual=up)
    same(got, lb.quantize(normal, name))
    assert updated.tobytes() == h.tobytes()


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_gives_the_same_bits(kind, dtype):
    x, other = (drawn((2, 5, 37), dtype, seed) for seed in (6, 7))
    weight = drawn((37,), dtype, 8)
    held = [in_memory(each, kind) for each in (x, other, weight)]
    same(
        lb.quantize_silu_mul(held[0], held[1], "int4_g32"),
        lb.quantize_silu_mul(x, other, "int4_g32"),
    )
    got, updated = lb.quantize_rmsnorm(held[0], held[2], "int8_row", residual=held[1])
    expected, h = lb.quantize_rmsnorm(x, weight, "int8_row", residual=other)
    same(got, expected)
    assert updated.dtype.isnative
    assert updated.tobytes() == h.tobytes()
    for before, after in zip((x, other, weight), held, strict=True):
        np.testing.assert_array_equal(before, after)


def test_halves_of_one_array():
    both = drawn((3, 4, 128), seed=9)
    gate, up = both[..., :64], both[..., 64:]
    same(lb.quantize_silu_mul(gate, up, "int8_row"),
         lb.quantize(layers.silu_mul(gate, up), "int8_row"))  # fmt: skip


def test_large_arrays_go_through_compiled_code_with_the_same_bits():
    x, other = drawn((700, 1030), BFLOAT16, 10), drawn((700, 1030), BFLOAT16, 11)
    same(lb.quantize_silu_mul(x, other, "int4_g128"),
         lb.quantize(layers.silu_mul(x, other), "int4_g128"))  # fmt: skip
    y, h = layers.rmsnorm(x, other[0], 1e-6, other)
    got, updated = lb.quantize_rmsnorm(x, other[0], "fp8_128x128", residual=other)
    same(got, lb.quantize(y, "fp8_128x128"))
    assert updated.tobytes() == h.tobytes()


def test_float64_is_computed_in_float64():
    """1 + 2**-40 is told from 1, which float32 does not."""
    gate = np.full((1, 2), 1e4)
    up = np.array([[127.0, 63.5 * (1 + 2.0**-40)]]) / 1e4
    w = lb.quantize_silu_mul(gate, up, "int8_row")
    assert w.codes.view(np.int8).tolist() == [[127, 64]]
    x = np.array([[127.0, 0.5 * (1 + 2.0**-40)]])
    w = lb.quantize_rmsnorm(x, np.ones(2), "int8_row")
    assert w.codes.view(np.int8).tolist() == [[127, 1]]
    large = np.full((2, 64), 1e30)  # whose squares float32 does not hold
    assert lb.quantize_rmsnorm(large, np.ones(64), "int8_row").dequantize()[0, 0] == pytest.approx(
        1
    )


def test_a_vector_stays_one():
    x = drawn((64,), seed=21)
    w, updated = lb.quantize_rmsnorm(x, x, "int8_row", residual=x)
    assert w.shape == updated.shape == lb.quantize_silu_mul(x, x, "int8_row").shape == (64,)


def test_weights_of_any_dtype():
    x = drawn((4, 64), BFLOAT16, 12)
    for dtype in DTYPES:
        weight = drawn((64,), dtype, 13)
        expected = layers.rmsnorm(x, weight.astype(np.float32), 1e-6)[0]
        same(lb.quantize_rmsnorm(x, weight, "int8_row"), lb.quantize(expected, "int8_row"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_torch(dtype):
    x, other = (drawn((3, 5, 64), dtype, seed) for seed in (14, 15))
    there = [torch.from_dlpack(Exported(each)) for each in (x, other, x[0, 0].copy())]
    same(
        lb.quantize_silu_mul(there[0], there[1], "int8_row"),
        lb.quantize_silu_mul(x, other, "int8_row"),
    )
    w, updated = lb.quantize_rmsnorm(there[0], there[2], "mxfp8", residual=there[1])
    expected, h = lb.quantize_rmsnorm(x, x[0, 0], "mxfp8", residual=other)
    same(w, expected)
    assert type(updated) is torch.Tensor
    assert updated.dtype == there[0].dtype
    assert torch.equal(updated, torch.from_dlpack(Exported(h)))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_arrays_of_jax(dtype):
    x, other = (drawn((3, 64), dtype, seed) for seed in (14, 15))
    there = jnp.asarray(x), jnp.asarray(other)
    same(lb.quantize_silu_mul(*there, "int8_row"), lb.quantize_silu_mul(x, other, "int8_row"))
    w, updated = lb.quantize_rmsnorm(there[0], there[1][0], "mxfp8", residual=there[1])
    expected, h = lb.quantize_rmsnorm(x, other[0], "mxfp8", residual=other)
    same(w, expected)
    assert isinstance(updated, jax.Array)
    assert updated.dtype == there[0].dtype
    assert np.asarray(updated).tobytes() == h.tobytes()


def test_others_by_dlpack_and_the_residual_goes_to_the_framework_of_x():
    x = drawn((3, 64), BFLOAT16, 16)
    w, updated = lb.quantize_rmsnorm(
        Exported(x), x[0].tolist(), "int8_row", residual=torch.from_dlpack(Exported(x))
    )
    expected, h = lb.quantize_rmsnorm(x, x[0], "int8_row", residual=x)
    same(w, expected)
    assert type(updated) is np.ndarray
    assert updated.tobytes() == h.tobytes()


def test_the_residual_is_memory_of_its_own():
    x = drawn((3, 64), seed=17)
    zero, before = np.zeros_like(x), x.copy()
    _, updated = lb.quantize_rmsnorm(x, x[0], "int8_row", residual=zero)
    np.testing.assert_array_equal(updated, x)
    updated[...] = 7
    np.testing.assert_array_equal(x, before)
    assert not zero.any()


def test_the_layer_is_nowhere_whole():
    x = drawn((2048, 1024), seed=18)
    lb.quantize_silu_mul(x, x, "int8_row")  # compiles
    for call in (
        lambda: lb.quantize_silu_mul(x, x, "int8_row"),
        lambda: lb.quantize_rmsnorm(x, x[0], "int8_row"),
        lambda: lb.quantize_silu_mul(x[::-1, ::-1], x, "int4_g128"),
    ):
        tracemalloc.start()
        held = call().nbytes
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * held + (4 << 20)  # x is 8 MiB


# Refused


@pytest.mark.parametrize("argument", ["gate", "up", "x", "weight", "residual"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(3, 64), (200, 64), (64,), (2, 5, 64)])
def test_operands_that_are_not_finite_are_named(argument, value, shape):
    operands = {n: drawn(shape, BFLOAT16, i) for i, n in enumerate(("gate", "up", "x", "residual"))}
    operands["weight"] = drawn((64,), np.float32, 5)
    bad = operands[argument]
    bad[..., 7] = 1
    first = (*(1 for _ in bad.shape[:-1]), 7)
    bad[first] = value
    silu = argument in ("gate", "up")
    text = f"{argument}: 1 entries are NaN or infinite, first at {first}"
    with pytest.raises(ValueError, match=re.escape(text)):
        (both if silu else three)(operands)


def both(operands: dict[str, Any]) -> None:
    lb.quantize_silu_mul(operands["gate"], operands["up"], "int8_row")


def three(operands: dict[str, Any]) -> None:
    x, weight, residual = (operands[name] for name in ("x", "weight", "residual"))
    lb.quantize_rmsnorm(x, weight, "int8_row", residual=residual)


def test_a_product_that_passes_its_dtype_is_placed():
    gate, up = np.ones((2, 3, 64), np.float16), np.ones((2, 3, 64), np.float16)
    gate[1, 2, 5:7], up[1, 2, 5:7] = 300, 400
    text = (
        r"quantize_silu_mul: silu\(gate\) \* up holds 2 NaN or infinite values, first at "
        r"\(1, 2, 5\): gate is 300 and up is 400 there, and float16 ends"
    )
    for name in ("int8_row", "nvfp4"):
        with pytest.raises(ValueError, match=text):
            lb.quantize_silu_mul(gate, up, name)
    with pytest.raises(ValueError, match=r"1 NaN or infinite values, first at \(5,\): gate is 300"):
        lb.quantize_silu_mul(gate[1, 2, :6], up[1, 2, :6], "int8_row")


def test_what_rmsnorm_cannot_hold_is_explained():
    x, one = drawn((3, 64), seed=19), np.ones(64, np.float32)
    large = x.copy()
    large[1] = 1e30
    with pytest.raises(
        ValueError,
        match=r"first at \(1, 0\): numbers up to 1e\+30 .* sum passes the end of float32",
    ):
        lb.quantize_rmsnorm(large, one, "int8_row")
    large[1] = -3e38
    with pytest.raises(ValueError, match=r"x \+ residual passes the end of float32"):
        lb.quantize_rmsnorm(large, one, "int8_row", residual=large)
    nothing = x.copy()
    nothing[2] = 0
    with pytest.raises(ValueError, match=r"first at \(2, 0\): .*mean square.* is 0, and eps"):
        lb.quantize_rmsnorm(nothing, one, "int8_row", eps=0)
    assert not lb.quantize_rmsnorm(nothing, one, "int8_row").dequantize()[2].any()
    half, heavy = x.astype(np.float16), np.full(64, 60000, np.float16)
    with pytest.raises(ValueError, match=r"weight is 60000 there, and float16 ends"):
        lb.quantize_rmsnorm(half, heavy, "int8_row")
    with pytest.raises(ValueError, match=r"weight is 1e\+300 there, and float32 ends"):
        lb.quantize_rmsnorm(x, np.full(64, 1e300), "int8_row")


def test_what_the_format_refuses_is_said_of_the_layer():
    x = drawn((3, 64), seed=20)
    text = r"quantize_silu_mul: with silu\(gate\) \* up as x, uint4_g32 has no negative value"
    with pytest.raises(ValueError, match=text):
        lb.quantize_silu_mul(x, -x, "uint4_g32")
    with pytest.raises(ValueError, match=r"with the normalized x times weight as x, uint4_g32 has"):
        lb.quantize_rmsnorm(x, x[0], "uint4_g32")


X = drawn((3, 64))
W = np.ones(64, np.float32)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "shapes": (lambda: lb.quantize_silu_mul(X, X[:1], "int8"), ValueError,
               r"up: want gate's shape \(3, 64\), got \(1, 64\)"),
    "dtypes": (lambda: lb.quantize_silu_mul(X, X.astype(np.float16), "int8"), TypeError,
               r"up: want gate's dtype float32, got float16; cast one of the two"),
    "quantized": (lambda: lb.quantize_silu_mul(lb.quantize(X, "int8"), X, "int8"), TypeError,
                  r"quantize_silu_mul: gate is quantized already; \.dequantize\(\) it"),
    "quantized up": (lambda: lb.quantize_silu_mul(X, lb.quantize(X, "int8"), "int8"), TypeError,
                     r"quantize_silu_mul: up is quantized already"),
    "integers": (lambda: lb.quantize_silu_mul(X, X.astype(np.int32), "int8"), TypeError,
                 r"up: want floating-point numbers, got int32\. Cast with \.astype"),
    "no axis": (lambda: lb.quantize_silu_mul(X[0, 0], X[0, 0], "int8"), ValueError,
                r"gate: want at least one axis"),
    "no format": (lambda: lb.quantize_silu_mul(X, X, 8), TypeError, r"format: want a format"),
    "unknown format": (lambda: lb.quantize_rmsnorm(X, W, "int9"), ValueError, r"int9"),
    "float8": (lambda: lb.quantize_rmsnorm(X.astype(ml_dtypes.float8_e4m3fn), W, "int8"), TypeError,
               r"x: want float32, float16, bfloat16 or float64, got float8_e4m3fn"),
    "complex": (lambda: lb.quantize_rmsnorm(X * 1j, W, "int8"), TypeError, r"x: dtype complex"),
    "quantized x": (lambda: lb.quantize_rmsnorm(lb.quantize(X, "int8"), W, "int8"), TypeError,
                    r"quantize_rmsnorm: x is quantized already"),
    "quantized weight": (lambda: lb.quantize_rmsnorm(X, lb.quantize(W, "int8"), "int8"), TypeError,
                         r"quantize_rmsnorm: weight is quantized already"),
    "quantized residual": (
        lambda: lb.quantize_rmsnorm(X, W, "int8", residual=lb.quantize(X, "int8")), TypeError,
        r"quantize_rmsnorm: residual is quantized already"),
    "whole weight": (lambda: lb.quantize_rmsnorm(X, W.astype(np.int8), "int8"), TypeError,
                     r"weight: want floating-point numbers, got int8"),
    "weight's shape": (lambda: lb.quantize_rmsnorm(X, W[None], "int8"), ValueError,
                       r"weight: want shape \(64,\), a number for each column of x, got \(1, 64\)"),
    "residual's shape": (lambda: lb.quantize_rmsnorm(X, W, "int8", residual=X[0]), ValueError,
                         r"residual: want x's shape \(3, 64\), got \(64,\)"),
    "residual's dtype": (lambda: lb.quantize_rmsnorm(X, W, "int8", residual=X.astype("f8")),
                         TypeError, r"residual: want x's dtype float32, got float64"),
    "negative eps": (lambda: lb.quantize_rmsnorm(X, W, "int8", eps=-1e-6), ValueError,
                     r"eps: want a number from 0 to 1e\+30, got -1e-06"),
    "large eps": (lambda: lb.quantize_rmsnorm(X, W, "int8", eps=1e31), ValueError,
                  r"eps: want a number from 0 to 1e\+30, got 1e\+31"),
    "NaN as eps": (lambda: lb.quantize_rmsnorm(X, W, "int8", eps=np.nan), ValueError,
                   r"eps: want a finite number, got nan"),
    "no eps": (lambda: lb.quantize_rmsnorm(X, W, "int8", eps=None), TypeError,  # type: ignore
               r"eps: want a real number, got NoneType"),
    "a gradient": (lambda: lb.quantize_silu_mul(torch.ones(2, 32, requires_grad=True), X, "int8"),
                   ValueError, r"gate: the tensor requires grad"),
    "a tracer": (lambda: jax.jit(lambda x: lb.quantize_rmsnorm(x, W, "int8").codes)(X), TypeError,
                 r"x: a JAX tracer stands for values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_in_words(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()

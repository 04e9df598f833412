"""matmul takes what numpy.matmul takes: any shape, memory, orientation, dtype and epilogue."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import binding, kernels
from lowbit.kernels.declare import ACTIVATIONS
from lowbit.testing import assert_within_bound, conformance, random_qarray, strategies

RNG = np.random.default_rng(0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(dtype)


def check(x, w, **options):
    """Multiply, hold the result to its bound, give it back."""
    result = lb.matmul(x, w, **options)
    options.pop("out", None)
    assert assert_within_bound(result, x, w, **options) <= 1
    return result


# Shapes and memory


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ("float32", "int4_g32_asym"),
        ("bfloat16", "int8_row"),
        ("float16", "nf4"),
        ("float64", "int4_g32"),
        ("float32", "int3_g24"),
        ("float32", "float8_e4m3fn_16x24"),
        ("float32", "int4_2x32_bias"),
        ("int8_row", "int4_g32"),
        ("int8_g32", "int8_g64_asym"),
        ("float8_e4m3fn_row", "float8_e4m3fn_row"),
    ],
)
@settings(max_examples=50)
@given(data=st.data())
def test_any_shape_and_memory(x, w, data):
    case = data.draw(strategies.products(w, x))
    held = case.w.prepare() if data.draw(st.booleans()) else case.w
    check(case.x, held.T)


@settings(max_examples=150)
@given(data=st.data())
def test_any_format_and_epilogue_on_the_reference(data):
    w = data.draw(strategies.formats())
    x = data.draw(st.sampled_from(strategies.DTYPES))
    case = data.draw(strategies.products(w, x, most=65, epilogue=True))
    check(case.x, case.w.T, kernel="reference", **case.options)


@pytest.mark.parametrize("kind", strategies.MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_memory_of_every_operand(kind, dtype):
    w = random_qarray("int4_g32_asym", 24, 96)
    target = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    plain = {"x": normal(7, 96), "bias": normal(24), "residual": normal(7, 24)}
    plain = {name: each.astype(target) for name, each in plain.items()}
    held = {name: strategies.in_memory(each, kind) for name, each in plain.items()}
    got = lb.matmul(held["x"], w.T, bias=held["bias"], residual=held["residual"])
    wanted = lb.matmul(plain["x"], w.T, bias=plain["bias"], residual=plain["residual"])
    conformance.same_bits(got, wanted)
    assert got.dtype == np.promote_types(target, np.float32)
    assert_within_bound(got, plain["x"], w.T, bias=plain["bias"], residual=plain["residual"])


@pytest.mark.parametrize("kind", strategies.MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_out_is_written_and_returned(kind, dtype):
    x, w = normal(7, 96), random_qarray("int4_g32", 24, 96)
    target = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    out = strategies.in_memory(np.full((7, 24), 3, target), kind)
    if kind == "read-only":
        with pytest.raises(ValueError, match="out: the array is read-only"):
            lb.matmul(x, w.T, out=out)
        return
    assert lb.matmul(x, w.T, out=out) is out
    assert (out == lb.matmul(x, w.T, out_dtype=dtype)).all()


def test_out_may_be_the_operand():
    x, w = normal(32, 32), random_qarray("int4_g32", 32, 32)
    wanted = lb.matmul(x, w.T)
    assert (lb.matmul(x, w.T, out=x) == wanted).all()


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("n", [0, 1, 17])
@pytest.mark.parametrize("k", [0, 1, 40])
def test_empty_axes(m, n, k):
    w = random_qarray("int4_g32_asym", n, k)
    result = check(normal(m, k), w.T, bias=normal(n), activation="relu", residual=normal(m, n))
    assert result.shape == (m, n)
    assert check(normal(m, k), w.T, x_format="int8_row").shape == (m, n)
    assert check(w, normal(k, m)).shape == (n, m)


def test_nothing_summed_is_the_epilogue_of_zero():
    w = random_qarray("int4_g32", 3, 0)
    result = lb.matmul(normal(2, 0), w.T, bias=np.array([1.0, -1.0, 2.0]), activation="relu")
    assert (result == [[1, 0, 2]] * 2).all()


# Orientation


@pytest.mark.parametrize("w", ["int4_g32_asym", "int8_row", "nf4", "float8_e4m3fn_16x24"])
@pytest.mark.parametrize("prepared", [False, True])
def test_every_orientation(w, prepared):
    q = random_qarray(w, 33, 70)
    q = q.prepare() if prepared else q
    for result in (
        check(normal(5, 70), q.T),
        check(normal(5, 33), q),
        check(q, normal(70, 5)),
        check(q.T, normal(33, 5)),
        check(q, normal(70, 5), bias=normal(5), activation="silu", residual=normal(33, 5)),
        check(q.T, normal(33, 5, dtype="float16"), alpha=0.3, out_dtype="bfloat16"),
    ):
        assert result.size


@pytest.mark.parametrize("left", ["int8_row", "float8_e4m3fn_row", "int4_g32_asym"])
def test_two_quantized_operands_in_every_orientation(left):
    p, q = random_qarray(left, 20, 64), random_qarray("int8_g32", 33, 64)
    assert check(p, q.T).shape == (20, 33)
    square = random_qarray("int4_g32", 64, 64)
    for a, b in ((p, square), (p, square.T), (square.T, q.T), (square, square)):
        assert check(a, b).shape == (a.shape[0], b.shape[1])


@pytest.mark.parametrize("w", ["int4_g32_asym", "int8_row"])
def test_one_dimensional_operands(w):
    q, vector = random_qarray(w, 33, 70), random_qarray(w, 1, 70)[0]
    assert vector.ndim == 1
    assert check(normal(70), q.T, bias=normal(33), residual=normal(33)).shape == (33,)
    assert check(q, normal(70), bias=normal(1), residual=normal(33)).shape == (33,)
    assert check(normal(5, 70), vector).shape == (5,)
    assert check(normal(70), vector).shape == ()
    assert check(vector, normal(70, 5)).shape == (5,)
    assert check(vector, q.T).shape == (33,)
    assert check(vector, vector).shape == ()
    assert check(q, vector).shape == (33,)


@pytest.mark.parametrize(
    ("x", "w", "result"),
    [
        ((2, 3, 5, 40), (17, 40), (2, 3, 5, 17)),
        ((5, 40), (2, 17, 40), (2, 5, 17)),
        ((2, 1, 5, 40), (3, 17, 40), (2, 3, 5, 17)),
        ((2, 5, 40), (2, 17, 40), (2, 5, 17)),
        ((40,), (2, 17, 40), (2, 17)),
        ((0, 5, 40), (17, 40), (0, 5, 17)),
        ((0, 5, 40), (0, 17, 40), (0, 5, 17)),
    ],
)
@pytest.mark.parametrize("fmt", ["int4_g32_asym", "nvfp4"])
def test_stacks_broadcast(x, w, result, fmt):
    q = lb.quantize(normal(*w), fmt)
    for held in (q, q.prepare()):
        assert check(normal(*x), held.mT, bias=normal(17)).shape == result
        residual = normal(*result)
        assert check(normal(*x), held.mT, residual=residual, activation="gelu").shape == result
    assert check(normal(*x), q.mT, x_format="int8_row").shape == result
    if len(x) > 1:
        turned = (*x[:-2], x[-1], x[-2])
        assert check(q, normal(*turned), bias=normal(x[-2])).shape == (*result[:-2], w[-2], x[-2])


# Epilogues and dtypes


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_epilogues(activation, out):
    for kernel in ("reference", "matmul.cpu.fma"):
        conformance.finished_products(kernel, "int4_g32", activation, out)


@pytest.mark.parametrize(
    ("residual", "alpha"),
    [
        (np.arange(24).reshape(4, 6), 1.0),
        (np.ones((4, 6), ">f8"), -2.0),
        (np.ones(6), 0.0),
        (np.ones((4, 1), np.float16), 1e39),
        (np.broadcast_to(np.float32(3), (4, 6)), 1e-60),
        (np.ones((8, 12), np.float32)[::2, ::2], 1.0),
        (np.ones((4, 6), np.float32)[::-1], 1.0),
    ],
)
@pytest.mark.parametrize("out", ["float32", "float64"])
def test_residuals_and_factors(residual, alpha, out):
    check(normal(4, 64), random_qarray("int4_g32", 6, 64).T, residual=residual, alpha=alpha,
          bias=np.arange(6), out_dtype=out)  # fmt: skip


def test_float64_is_computed_in_float64():
    w = random_qarray("int4_g32", 6, 64)
    x, bias = normal(4, 64, dtype="float64"), normal(6, dtype="float64") / 3
    result = check(x, w.T, bias=bias, residual=bias)
    assert result.dtype == np.float64
    exact = x @ w.dequantize(np.float64).T + 2 * bias
    assert np.abs(result - exact).max() < 1e-11


@pytest.mark.parametrize("x", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("w", ["float16", "bfloat16", "float32"])
def test_result_dtype_is_the_promotion(x, w):
    q = lb.quantize(normal(5, 64).astype(w), "int8_row")
    result = check(normal(3, 64).astype(x), q.T)
    if {x, w} == {"float16", "bfloat16"}:
        assert result.dtype == np.float32
    else:
        assert result.dtype == np.promote_types(x, w)


@pytest.mark.parametrize("x_format", ["int8_row", "int8_g32", "float8_e4m3fn_row", "mxfp8"])
@pytest.mark.parametrize("w", ["int4_g32_asym", "float8_e4m3fn_row"])
def test_x_is_quantized_only_when_asked(x_format, w):
    x, q = normal(5, 96), random_qarray(w, 17, 96)
    asked = check(x, q.T, x_format=x_format)
    conformance.same_bits(asked, lb.matmul(lb.quantize(x, x_format), q.T))
    assert (asked != lb.matmul(x, q.T)).any()


def test_static_scales_of_x():
    x, q = normal(5, 64), random_qarray("int8_row", 17, 64)
    check(x, q.T, x_format="int8_tensor", x_scale=0.05)
    wanted = lb.matmul(lb.quantize(x, "int8_tensor", scale=0.05), q.T)
    conformance.same_bits(lb.matmul(x, q.T, x_format="int8_tensor", x_scale=0.05), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_divisor_and_permutation_of_columns(dtype):
    made = lb.quantize(normal(17, 64), "int4_g32")
    q = lb.from_parts(
        made.format,
        made.codes,
        made.scales,
        shape=(17, 64),
        dtype=dtype,
        columns=RNG.permutation(64),
        divisor=RNG.uniform(0.3, 3, 64),
    )
    x = normal(5, 64).astype(dtype)
    assert check(x, q.T).dtype == np.dtype(dtype)
    assert check(x, q.T, x_format="int8_row").dtype == np.dtype(dtype)
    check(normal(5, 17), q)
    check(q, normal(64, 5))
    check(random_qarray("int8_row", 3, 64), q.T)


# Numbers that are none


@pytest.mark.parametrize(
    ("x", "w"),
    [("float32", "int4_g32"), ("float16", "uint4_g64_asym"), ("bfloat16", "nf4"),
     ("float32", "float8_e5m2_row"), ("float32", "float8_e4m3fn_row")],
)  # fmt: skip
def test_infinities_and_nan_come_out_as_in_the_reference(x, w):
    left = normal(6, 130)
    left[0, 3], left[1, 129], left[2, 64], left[3, 5], left[3, 70] = (
        np.nan, np.inf, -np.inf, np.inf, -np.inf,
    )  # fmt: skip
    left = left.astype(x)
    q = random_qarray(w, 40, 130, nonfinite=True)
    for kernel in [v.kernel.name for v in lb.explain(left, q.T).verdicts if v.refusal is None]:
        result = check(left, q.T, kernel=kernel)
        assert np.isnan(result[0].astype(float)).all()
        assert not np.isfinite(result[1].astype(float)).any()
        for activation in ACTIVATIONS:
            check(left, q.T, kernel=kernel, activation=activation)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 2.0**-149, 3e38])
def test_scales_of_any_size_and_sign(scale):
    made = random_qarray("int4_g32", 17, 64, spread=0)
    scales = np.full((17, 2), scale, np.float32)
    scales[::2, 1] = 1
    q = lb.from_parts(made.format, made.codes, scales, shape=(17, 64))
    for kernel in ("reference", "matmul.cpu.fma"):
        check(normal(3, 64), q.T, kernel=kernel)
        check(normal(3, 64) * 1e-30, q.T, kernel=kernel, out_dtype="float16")
    check(normal(3, 64), q.T, x_format="int8_row", kernel="matmul.cpu.dot")


def test_no_warnings_about_numbers():
    x = np.array([[3e38] * 64, [1e-45] * 64], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for w in ("int4_g32", "int4_g32_bias", "float8_e4m3fn_row", "nvfp4"):
            for kernel in ("reference", "matmul.cpu.fma"):
                for out in ("float32", "float16", "bfloat16"):
                    check(x, random_qarray(w, 5, 64).T, kernel=kernel, out_dtype=out)


def stated_problems(monkeypatch):
    """A list that every problem is added to which a kernel is prepared for."""
    seen, real, inside = [], kernels.prepared, binding.fused

    def prepared(problem, name=None):
        seen.append(problem)
        return real(problem, name)

    def fused(problem, kernel, dtype):
        bind = inside(problem, kernel, dtype)
        if bind is not None:
            seen.append(problem)
        return bind

    monkeypatch.setattr(kernels, "prepared", prepared)
    monkeypatch.setattr(binding, "fused", fused)
    return seen


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}, {"activation": "gelu"}])
@pytest.mark.parametrize("x_format", [None, "int8_row"])
def test_explain_names_the_kernel_that_runs(options, x_format, monkeypatch):
    seen = stated_problems(monkeypatch)
    options = {**options, "bias": normal(40), "residual": normal(3, 40), "x_format": x_format}
    x, w = normal(3, 70), random_qarray("int4_g32", 40, 70)
    lb.matmul(x, w.T, **options)
    assert [lb.explain(x, w.T, **options).problem] == seen


@pytest.mark.parametrize(
    ("x", "w"),
    [((2, 3, 40), (17, 40)), ((3, 40), (2, 17, 40)), ((2, 3, 40), (2, 17, 40)), ((40,), (17, 40))],
)
@pytest.mark.parametrize("x_format", [None, "int8_row", "int8_tensor"])
@pytest.mark.parametrize("residual", ["float32", "float64", "int64", "bfloat16"])
def test_explain_names_stacks_and_residuals_as_they_run(x, w, x_format, residual, monkeypatch):
    seen = stated_problems(monkeypatch)
    q = lb.quantize(normal(*w), "int8_row")
    options = {"residual": np.ones(17, residual), "x_format": x_format, "out_dtype": "float16"}
    lb.matmul(normal(*x), q.mT, **options)
    assert {lb.explain(normal(*x), q.mT, **options).problem} == set(seen)
    if x_format is None and len(w) == 2 and len(x) == 2:
        seen.clear()
        lb.matmul(q, normal(40, 3), out_dtype="float16")
        assert {lb.explain(q, normal(40, 3), out_dtype="float16").problem} == set(seen)

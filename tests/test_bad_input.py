"""Refused at the border, with the argument, what came and what would do; and sizes beyond 2^31."""

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit.testing import random_qarray

X = np.ones((3, 32), np.float32)
W = random_qarray("int4_g8", 5, 32)

# What no function takes for an array of numbers: (operand, error, message after the argument).
NO_NUMBERS = {
    "complex": (X * 1j, TypeError, "complex64 does not hold real numbers.*real and imaginary"),
    "object": (X.astype(object), TypeError, "object does not hold real numbers.*make an array"),
    "bool": (X > 0, TypeError, r"bool does not hold real numbers.*\.astype"),
    "text": (X.astype(str), TypeError, "does not hold real numbers.*convert it"),
    "time": (X.astype("M8[s]"), TypeError, "datetime64.*does not hold real numbers"),
    "record": (np.zeros((3, 32), [("a", "f4")]), TypeError, "does not hold real numbers"),
    "longdouble": (X.astype("longdouble"), TypeError, "of at most 64 bits|want float32"),
    "masked": (np.ma.array(X, mask=X > 0), TypeError, r"masked array.*pass \w+\.filled\(0\)"),
    "matrix": (X.view(np.matrix), TypeError, r"np\.matrix.*pass np\.asarray\(\w+\)"),
    "ragged": ([[1.0], [1.0, 2.0]], ValueError, "does not become a NumPy array"),
    "None": (None, TypeError, "does not hold real numbers"),
    "set": ({1.0}, TypeError, "does not hold real numbers"),
    "float8": (X.astype(ml_dtypes.float8_e4m3fn), TypeError, "want float32, .* got float8_e4m3fn"),
    "float4": (X.astype(ml_dtypes.float4_e2m1fn), TypeError, "want float32, .* got float4_e2m1fn"),
    "0-d": (np.float32(1), ValueError, "at least one axis, got a 0-d array"),
    "number": (2.5, ValueError, "at least one axis, got a 0-d array"),
}
INTEGERS = {
    dtype: (X.astype(dtype), TypeError, rf"plain integers \({dtype}\) have no scale; .*astype")
    for dtype in ("int8", "uint8", "int32", "int64", "uint64")
}


def case(table, name):
    operand, error, message = table[name]
    return operand, error, message


@pytest.mark.parametrize("name", [*NO_NUMBERS, *INTEGERS])
def test_operands_that_are_no_numbers(name):
    operand, error, message = case({**NO_NUMBERS, **INTEGERS}, name)
    for call in (lambda: lb.matmul(operand, W.T), lambda: lb.linear(operand, W)):
        with pytest.raises(error, match=f"^x: .*{message}"):
            call()
    with pytest.raises(error, match=f"^x: .*{message}"):
        lb.explain(operand, W.T)
    for call in (lambda: lb.matmul(W, operand), lambda: lb.linear(W, operand)):
        with pytest.raises(error, match=f"^w: .*{message}"):
            call()
    if isinstance(operand, np.ndarray) and name not in ("masked", "matrix"):
        with pytest.raises(error, match=f"^x: .*{message}"):
            operand @ W.T
    with pytest.raises(error, match=f"^w: .*{message}"):
        W @ operand


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_numbers_that_cannot_be_quantized(name):
    operand, error, message = case(NO_NUMBERS, name)
    with pytest.raises(error, match=f"^x: .*{message}"):
        lb.quantize(operand, "int4_g8")


@pytest.mark.parametrize("name", [n for n in NO_NUMBERS if n not in ("0-d", "number", "None")])
@pytest.mark.parametrize("argument", ["bias", "residual", "x_scale"])
def test_further_operands_that_are_no_numbers(name, argument):
    operand, error, message = case(NO_NUMBERS, name)
    if argument == "x_scale" and name.startswith("float"):
        return  # any real number is a scale
    further: dict[str, Any] = {"x_format": "int8_row"} if argument == "x_scale" else {}
    with pytest.raises(error, match=f"^{argument.removeprefix('x_')}: .*{message}"):
        lb.matmul(X, W.T, **{**further, argument: operand})


@pytest.mark.parametrize("argument", ["bias", "residual", "out", "x_scale"])
def test_a_qarray_is_no_further_operand(argument):
    further: dict[str, Any] = {"x_format": "int8_row"} if argument == "x_scale" else {}
    further[argument] = W
    with pytest.raises(TypeError, match=r"\.dequantize\(\)"):
        lb.matmul(X, W.T, **further)


def test_one_operand_has_to_be_quantized():
    for call in (lb.matmul, lb.linear, lb.explain):
        with pytest.raises(TypeError, match=r"neither operand is a QArray; quantize one, or use"):
            call(X, X.T if call is not lb.linear else X)


# Shapes


@pytest.mark.parametrize(
    ("x", "w", "shapes"),
    [
        (np.ones((3, 31), "f4"), W.T, "(3, 31) and (32, 5)"),
        (np.ones(5, "f4"), W.T, "(5,) and (32, 5)"),
        (np.ones((2, 3, 31), "f4"), W.T, "(2, 3, 31) and (32, 5)"),
        (X, W, "(3, 32) and (5, 32)"),
        (W, X, "(5, 32) and (3, 32)"),
        (W, np.ones(5, "f4"), "(5, 32) and (5,)"),
        (W[0], np.ones((5, 32), "f4"), "(32,) and (5, 32)"),
        (W[0], W, "(32,) and (5, 32)"),
        (W, W, "(5, 32) and (5, 32)"),
        (W, W[0][:24], "(5, 32) and (24,)"),
        (X, lb.stack([W, W]), "(3, 32) and (2, 5, 32)"),
        (X[:, :0], W.T, "(3, 0) and (32, 5)"),
    ],
)
def test_contractions_of_different_length_show_both_shapes(x, w, shapes):
    with pytest.raises(ValueError, match=re.escape(shapes)) as caught:
        lb.matmul(x, w)
    k = (np.shape(x)[-1], np.shape(w)[-2 if np.ndim(w) > 1 else -1])
    assert f"x has {k[0]} columns, w has {k[1]} rows" in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(shapes)):
        lb.explain(x, w)


def test_leading_axes_that_do_not_broadcast_are_shown():
    w = lb.stack([W, W, W]).mT
    for x in (np.ones((2, 4, 32), "f4"), lb.quantize(np.ones((2, 4, 32), "f4"), "int8_row")):
        with pytest.raises(ValueError, match=re.escape("axes (2,) and (3,) do not broadcast")):
            lb.matmul(x, w)


@pytest.mark.parametrize("shape", [(), (4,), (6,), (1,), (1, 5), (3, 5), (5, 1), (0,)])
def test_a_bias_has_one_entry_a_column(shape):
    with pytest.raises(ValueError, match=re.escape(f"bias: want shape (5,), got {shape}")):
        lb.matmul(X, W.T, bias=np.ones(shape))
    with pytest.raises(ValueError, match=re.escape(f"bias: want shape (3,), got {shape}")):
        lb.matmul(W, X.T, bias=np.ones(shape) if shape != (3,) else np.ones(2))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5), (5, 3), (1, 3, 5), (2, 3, 5), (0, 5)])
def test_a_residual_broadcasts_to_the_result(shape):
    message = f"residual: {shape} does not broadcast to the result, (3, 5)"
    with pytest.raises(ValueError, match=re.escape(message)):
        lb.matmul(X, W.T, residual=np.ones(shape))


@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (3, 6), (1, 3, 5), (0, 5)])
def test_out_has_the_shape_of_the_result(shape):
    out = np.full(shape, 7, np.float32)
    with pytest.raises(ValueError, match=re.escape(f"out: want shape (3, 5), got {shape}")):
        lb.matmul(X, W.T, out=out)
    assert (out == 7).all()


# out


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ([[0.0] * 5] * 3, TypeError, "out: want an array to write into, got list"),
        (1.0, TypeError, "out: want an array to write into, got float"),
        (bytearray(60), TypeError, "out: want an array to write into, got bytearray"),
        (np.empty((3, 5), int), TypeError, "out: want float32, .* got int64"),
        (np.empty((3, 5), complex), TypeError, "out: dtype complex128"),
        (np.empty((3, 5), object), TypeError, "out: dtype object"),
        (np.empty((3, 5), ml_dtypes.float8_e5m2), TypeError, "out: want float32.*got float8_e5m2"),
        (np.ma.zeros((3, 5), "f4"), TypeError, "out: a masked array"),
        (np.broadcast_to(np.float32(0), (3, 5)), ValueError, "out: the array is read-only"),
    ],
)
def test_out_is_memory_that_can_be_written(out, error, message):
    with pytest.raises(error, match=f"^{message}"):
        lb.matmul(X, W.T, out=out)


def test_out_and_out_dtype_agree():
    with pytest.raises(ValueError, match="out has dtype float64, out_dtype asks float32"):
        lb.matmul(X, W.T, out=np.empty((3, 5)), out_dtype="float32")


def test_the_memory_of_jax_is_not_written():
    jax = pytest.importorskip("jax", reason="jax is an optional peer")
    out = jax.numpy.zeros((3, 5))
    with pytest.raises(ValueError, match="out: the array is read-only"):
        lb.matmul(X, W.T, out=out)
    assert not out.any()


@pytest.mark.parametrize("shift", [0, 1, 5, 32, 64])
@pytest.mark.parametrize("columns", [32, 5])
def test_out_may_overlap_the_operands(shift, columns):
    w = random_qarray("int4_g8", columns, 32).T
    memory = np.random.default_rng(0).normal(size=500).astype(np.float32)
    x = memory[:96].reshape(3, 32)
    out = memory[shift : shift + 3 * columns].reshape(3, columns)
    expected = lb.matmul(x.copy(), w, bias=x[0, :columns].copy(), residual=out.copy())
    got = lb.matmul(x, w, bias=x[0, :columns], residual=out, out=out)
    assert got is out
    assert np.array_equal(out, expected)


def test_a_refusal_leaves_out_as_it_was():
    refused: tuple[dict[str, Any], ...] = (
        {"bias": np.ones(4)}, {"activation": "tanh"}, {"kernel": "magic"}, {"alpha": np.nan},
        {"residual": np.ones((4, 4))}, {"x_format": "int9"}, {"x_scale": 1.0},
    )  # fmt: skip
    for bad in refused:
        out = np.full((3, 5), 7, np.float32)
        with pytest.raises(ValueError, match=r".+"):
            lb.matmul(X, W.T, out=out, **bad)
        assert (out == 7).all()


# Words and numbers


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "tanh"}, ValueError, "activation: want one of relu, gelu, .* got 'tanh'"),
        ({"activation": np.tanh}, ValueError, "activation: want one of relu.*got <ufunc"),
        ({"activation": ["relu"]}, ValueError, r"activation: want one of relu.*got \['relu'\]"),
        ({"kernel": "magic"}, ValueError, "kernel='magic' is not known; there are .*reference"),
        ({"kernel": 3}, ValueError, "kernel=3 is not known"),
        ({"kernel": "matmul.cpu.dot"}, ValueError, r"'matmul\.cpu\.dot' refuses: wants integer"),
        ({"out_dtype": "int8"}, TypeError, "out_dtype: want one of float64, .* got 'int8'"),
        ({"out_dtype": complex}, TypeError, "out_dtype: want one of .*complex"),
        ({"out_dtype": "float8_e4m3fn"}, TypeError, "out_dtype: want one of .*float8_e4m3fn"),
        ({"out_dtype": np.longdouble}, TypeError, "out_dtype: want one of .*longdouble"),
        ({"out_dtype": 7}, TypeError, "out_dtype: want one of .*got 7"),
        ({"x_format": "int9"}, ValueError, "no format 'int9'; a name starts with one of: .*int8"),
        ({"x_format": "int8_rowe"}, ValueError, "'rowe' is neither a block"),
        ({"x_format": 8}, TypeError, "x_format: want a format or its name, got int"),
        ({"x_format": int}, TypeError, "x_format: want a format or its name, got type"),
        ({"x_scale": 1.0}, ValueError, "x_scale: static scales go with x_format="),
        ({"x_format": "int8_row", "x_scale": 0}, ValueError, "scale of 0 cannot divide"),
        ({"x_format": "int8_row", "x_scale": np.nan}, ValueError, "scale: 1 entries are NaN"),
        (
            {"x_format": "int8_row", "x_scale": np.ones(4)},
            ValueError,
            r"shape \(3, 1\) for int8_row",
        ),
        ({"alpha": "2"}, TypeError, "alpha: want a real number, got '2'"),
        ({"alpha": 2j}, TypeError, "alpha: want a real number, got 2j"),
        ({"alpha": True}, TypeError, "alpha: want a real number, got True"),
        ({"alpha": None}, TypeError, "alpha: want a real number, got NoneType"),
        ({"alpha": np.ones(2)}, TypeError, r"alpha: want a real number, got array"),
        ({"alpha": np.nan}, ValueError, "alpha: want a finite number, got nan"),
        ({"alpha": -np.inf}, ValueError, "alpha: want a finite number, got -inf"),
        ({"gamma": 1}, TypeError, "unexpected keyword argument 'gamma'"),
    ],
)
def test_options_of_matmul(options, error, message):
    with pytest.raises(error, match=message):
        lb.matmul(X, W.T, **options)
    with pytest.raises(error, match=message):
        lb.linear(X, W, **options)


def test_options_come_by_name():
    with pytest.raises(TypeError, match="positional arguments"):
        lb.matmul(X, W.T, 2.0)  # type: ignore[call-arg]


def test_what_is_quantized_is_not_quantized_again():
    for x, w in ((W, W.T), (W, X.T)):
        with pytest.raises(TypeError, match="x_format: x is quantized already, as int4_g8"):
            lb.matmul(x, w, x_format="int8_row")
    with pytest.raises(ValueError, match="x holds 96 NaN or infinite values, first at"):
        lb.matmul(X * np.nan, W.T, x_format="int8_row")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", complex, "q", object(), np.longdouble])
def test_values_come_out_as_floats(dtype):
    for call in (W.dequantize, lambda dtype: lb.dequantize(W, dtype)):
        with pytest.raises(TypeError, match="dtype: want one of float64, float32, float16"):
            call(dtype)
    with pytest.raises(TypeError, match="w: want a QArray, got ndarray"):
        lb.dequantize(X)  # type: ignore[arg-type]


@given(data=st.data())
def test_numbers_that_are_not_finite_are_counted_and_placed(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    x = np.ones(shape, data.draw(st.sampled_from(["float16", "float32", "float64", "bfloat16"])))
    bad = data.draw(st.lists(st.integers(0, x.size - 1), min_size=1, max_size=5, unique=True))
    for i in bad:
        x.reshape(-1)[i] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    first = tuple(int(i) for i in np.unravel_index(min(bad), shape))
    message = f"x holds {len(bad)} NaN or infinite values, first at {first}"
    for name in ("int4_g3", "fp8_2x2", "nvfp4"):
        with pytest.raises(ValueError, match=re.escape(message)):
            lb.quantize(x, name)


# Beyond 2^31 elements and bytes, none of which is held: pages of zeros are all one page.

ROWS, BYTES = 2**17 + 3, 2**14  # 4 bits each: 2^32 + 98,304 codes in 2^31 + 49,152 bytes


@pytest.fixture(scope="module")
def huge():
    codes = np.zeros((ROWS, BYTES), np.uint8)
    codes[-1, :2] = 0x21, 0x43
    codes[-1, -1] = 0x70
    codes[2**16, 5] = 0x5A
    return lb.from_parts("int4_tensor", codes, np.float32(0.5).reshape(1, 1))


def test_sizes_are_counted_in_full(huge):
    assert huge.size == ROWS * BYTES * 2 > 2**32
    assert huge.nbytes == ROWS * BYTES + 4
    assert f"{ROWS * BYTES + 4} bytes" in repr(huge)
    assert huge.T.shape == (2 * BYTES, ROWS)
    assert huge.reshape(1, ROWS, 2 * BYTES).size == huge.size
    assert huge.reshape(-1, 2 * BYTES).shape == huge.shape


def test_rows_and_columns_far_out_are_found(huge):
    assert huge[-1, :8].dequantize().tolist() == [0.5, 1, 1.5, 2, 0, 0, 0, 0]
    assert huge[ROWS - 1, -4:].dequantize().tolist() == [0, 0, 0, 3.5]
    assert huge[[0, -1, 2**16], 8:12].dequantize().tolist() == [[0] * 4, [0] * 4, [0, 0, -3, 2.5]]
    mask = np.zeros(ROWS, bool)
    mask[[2**16, ROWS - 1]] = True
    picked = huge[mask]
    assert picked.shape == (2, 2 * BYTES)
    assert np.flatnonzero(picked.dequantize()).tolist() == [
        10, 11, *(2 * BYTES + np.array([0, 1, 2, 3, 2 * BYTES - 1])).tolist()
    ]  # fmt: skip
    assert huge.T[:4, -2:].dequantize().tolist() == [[0, 0.5], [0, 1], [0, 1.5], [0, 2]]


def test_products_reach_rows_beyond_two_gigabytes(huge):
    x = np.arange(1, 65, dtype=np.float32).reshape(2, 32)
    w = huge[:, :32]
    for kernel in (None, "reference"):
        tail = w[-3:] if kernel else w
        got = lb.matmul(x, tail.T, kernel=kernel)
        assert got[:, -1].tolist() == [
            (0.5 * x[i, 0] + x[i, 1] + 1.5 * x[i, 2] + 2 * x[i, 3]) for i in (0, 1)
        ]
        assert not got[:, -2].any()
        if not kernel:
            assert got[:, 2**16].tolist() == [-3 * x[i, 10] + 2.5 * x[i, 11] for i in (0, 1)]
            assert np.count_nonzero(got) == 4


def test_operands_far_apart_in_memory_are_read():
    memory = np.zeros(2**31 + 1024, np.uint8)
    x = np.lib.stride_tricks.as_strided(memory.view(np.float32), (2, 32), (2**31, 4))
    x[0], x[1] = 1, 2
    w = random_qarray("int4_g8", 5, 32)
    assert np.array_equal(x @ w.T, lb.matmul(x.copy(), w.T))
    q = lb.quantize(x, "int8_row")
    assert np.array_equal(q.dequantize(), lb.quantize(x.copy(), "int8_row").dequantize())


def test_stacks_of_many_matrices_are_counted_in_full():
    codes = np.broadcast_to(np.uint8(0x31), (2**12, 2**12, 2**8))
    scales = np.broadcast_to(np.float32(2), (2**12, 1, 1))
    w = lb.from_parts("int4_tensor", codes, scales)
    assert w.size == 2**33
    assert w.nbytes == 2**32 + 2**14
    assert w[-1, -1, :4].dequantize().tolist() == [2, 6, 2, 6]
    assert w.reshape(2**6, 2**6, 2**12, 2**9)[5, 7, 9, :2].dequantize().tolist() == [2, 6]
    assert w.mT.shape == (2**12, 2**9, 2**12)


def test_one_row_may_be_longer_than_two_gigabytes():
    codes = np.zeros((1, 2**31 + 64), np.uint8)
    codes[0, -1], codes[0, 2**31] = 0x21, 0x03
    w = lb.from_parts("int4_tensor", codes, np.ones((1, 1), np.float32))
    tail = w[:, 2**32 :]
    assert tail.shape == (1, 128)
    assert np.flatnonzero(tail.dequantize()).tolist() == [0, 126, 127]
    x = np.arange(128, dtype=np.float32)
    assert (x @ tail.T).tolist() == [126 + 2 * 127]
    assert w[0, -2:].dequantize().tolist() == [1, 2]

"""What reviewers once found: each is one sentence that has to stay true."""

import sys
import time

import numpy as np
import pytest
import torch

import lowbit as lb
from lowbit.formats import names

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    "table",
    [
        [-1000, -500, -300, -200, -100, -50, -20, 0, 20, 50, 100, 200, 300, 500, 1000, 2000],
        [*range(128), *[-i for i in range(128)]],
    ],
    ids=["beyond int8", "sign and magnitude"],
)
def test_whole_numbers_that_are_not_twos_complement_are_not_taken_for_it(monkeypatch, table):
    monkeypatch.setattr(names, "_user", dict(names._user))  # forgotten afterwards
    fmt = lb.codebook(f"whole{len(table)}", table, group=32)
    w = lb.quantize(normal(40, 64), "int4_g32")
    x = normal(5, 64)
    lb.testing.assert_within_bound(lb.matmul(x, w.T, x_format=fmt), x, w.T, x_format=fmt)


@pytest.mark.parametrize("x_format", ["uint8_row", "uint8_row_asym", "int8_row", "int8_row_asym"])
@pytest.mark.parametrize("w_format", ["int8_row", "uint8_row_asym", "int4_row"])
@pytest.mark.parametrize("rows", [1, 3])
def test_sums_of_whole_numbers_are_exact_whatever_the_kernel(x_format, w_format, rows):
    """The sum of a row meets no rounding: what is left is one for each scale and one to convert."""
    x, w = (lb.quantize(np.abs(normal(n, 2**15)), f) for n, f in ((rows, x_format), (8, w_format)))
    exact = x.dequantize(float) @ w.dequantize(float).T
    assert (np.abs(x @ w.T - exact) <= 4 * 2.0**-24 * np.abs(exact)).all()


def test_both_integer_kernels_give_the_same_bits_where_both_are_exact():
    x = lb.quantize(normal(9, 200), "int8_row")
    for name in ("int3_g32", "int4_g64", "uint4_g32_asym", "int2_row"):
        w = lb.quantize(normal(20, 200), name).T
        one, other = (lb.matmul(x, w, kernel=f"matmul.cpu.{k}") for k in ("fma", "dot"))
        np.testing.assert_array_equal(one, other)


def test_the_choice_for_whole_numbers_does_not_change_bits_with_m():
    x = lb.quantize(normal(64, 896), "int8_row")
    w = lb.quantize(normal(24, 896), "int8_row")
    whole = x @ w.T
    for m in (1, 2, 7, 33):
        np.testing.assert_array_equal(x[:m] @ w.T, whole[:m])


def test_a_new_tensor_scale_reaches_the_next_product():
    w = lb.quantize(normal(8, 64), "nvfp4")
    x = normal(2, 64)
    before = x @ w.T
    lb.quantize(w.dequantize() * 4, "nvfp4", out=w)
    after = x @ w.T
    lb.testing.assert_within_bound(after, x, w.T)
    assert not np.array_equal(before, after)


def test_torch_cannot_free_memory_that_an_array_still_reads():
    codes = torch.ones(8, 64, dtype=torch.int8)
    w = lb.from_parts("int8_row", codes, torch.ones(8, 1))
    assert codes.data_ptr() == w.codes.__array_interface__["data"][0]
    with pytest.raises(RuntimeError, match="resiz"):
        codes.untyped_storage().resize_(0)


def test_writing_into_a_tensor_tells_autograd():
    a = torch.ones(2, 8, requires_grad=True)
    b = torch.full((2, 8), 2.0)
    y = (a * b).sum()
    lb.linear(torch.ones(2, 32), lb.quantize(torch.ones(8, 32), "int8_row"), out=b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("x_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["int4_g32", "int4_g6"])
def test_a_weight_on_the_left_keeps_the_bound(name, x_dtype):
    w = lb.quantize(normal(300, 96), name)
    x, bias = RNG.standard_normal((96, 50)).astype(x_dtype), normal(50)
    got = lb.matmul(w, x, bias=bias, out_dtype=np.float32)
    lb.testing.assert_within_bound(got, w, x, bias=bias, out_dtype=np.float32)


def test_a_large_sum_waits_for_its_alpha_without_overflow():
    w = lb.quantize(np.full((2, 32), 1e20, np.float32), "int8_row")
    got = lb.matmul(w, np.full((32, 2), 1e20), alpha=1e-10, out_dtype=np.float32)
    np.testing.assert_array_equal(np.isfinite(got), True)


def test_narrow_results_overflow_to_infinity_in_silence():
    w = lb.quantize(np.full((2, 32), 1e4, np.float32), "int8_row")
    x = np.full((32, 2), 1e4, np.float32)
    for got in (lb.matmul(w, x, out_dtype=np.float16), lb.matmul(x.T, w.T, out_dtype=np.float16)):
        np.testing.assert_array_equal(got, np.inf)


def test_the_commonest_mistake_is_told_its_remedy():
    w = lb.quantize(normal(8, 64), "int8_row")
    with pytest.raises(ValueError, match=r"stored as \(N, K\) comes in as w\.T"):
        lb.matmul(normal(2, 64), w)


def test_the_reference_stops_for_a_signal_between_rows():
    """Rows go piecewise: many einsum calls, each of a bounded number of products."""
    w = lb.quantize(normal(2048, 2048), "int4_g32")
    calls = []

    def count(frame, event, argument):
        if event == "c_call" and getattr(argument, "__name__", "") == "c_einsum":
            calls.append(time.monotonic())

    x = normal(24, 2048).astype(np.float64)
    sys.setprofile(count)
    try:
        x @ w.T
    finally:
        sys.setprofile(None)
    assert len(calls) >= 3

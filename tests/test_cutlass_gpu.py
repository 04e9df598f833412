"""Kernels on CUTLASS on a real GPU: the bits of the others, the published bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launchers import no_gpu

import lowbit as lb
from lowbit.kernels import Problem, registered
from lowbit.kernels.cuda import launch

pytestmark = pytest.mark.gpu

FORMATS = {"int8": "int8_row", "float8": "fp8_row", "float8_fast": "fp8_row"}


@pytest.fixture(scope="module")
def cupy() -> Any:
    reason = no_gpu()
    if reason is not None:
        pytest.skip(reason)
    import cupy

    if launch.machine_of(cupy.empty(1)).device.capability != 90:
        pytest.skip("runs on compute capability 9.0")
    return cupy


def operands(cupy: Any, fmt: str, m: int, n: int, k: int, seed: int) -> tuple[lb.QArray, lb.QArray]:
    rng = np.random.default_rng(seed)
    made = (rng.standard_normal((rows, k), np.float32) for rows in (m, n))
    x, w = (lb.quantize(cupy.asarray(values), fmt) for values in made)
    return x, w


def problem(x: lb.QArray, w: lb.QArray) -> Problem:
    device = launch.machine_of(x.codes).device.name
    return Problem(len(x), len(w), x.shape[1], x.format, w.format, "bfloat16", device=device)


@pytest.mark.parametrize("family", FORMATS)
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.integers(1, 80), st.integers(1, 80), st.integers(0, 9), st.data())
def test_within_the_bound(
    cupy: Any, family: str, m: int, n: int, k: int, seed: int, data: st.DataObject
) -> None:
    x, w = operands(cupy, FORMATS[family], m, 8 * n, 16 * k, seed)
    options: dict[str, Any] = {"out_dtype": "bfloat16", "kernel": f"matmul.cutlass.{family}"}
    options["alpha"] = alpha = data.draw(st.sampled_from([1.0, -0.5]))
    bias = np.random.default_rng(1).standard_normal(8 * n, np.float32)
    if data.draw(st.booleans()):
        options["bias"] = cupy.asarray(bias)
    else:
        bias[:] = 0
    got = cupy.asnumpy(lb.matmul(x, w.T, **options).astype("float32")).astype(np.float64)
    kernel = next(k for k in registered() if k.name == options["kernel"])
    counted = kernel.roundings(problem(x, w)).count
    values = [each.to_device("cpu").dequantize(np.float64) for each in (x, w)]
    exact = alpha * (values[0] @ values[1].T) + bias
    size = abs(alpha) * (abs(values[0]) @ abs(values[1]).T) + abs(bias)
    error = lb.testing.gamma(counted, "float32") * size
    assert (abs(got - exact) <= error + 2.0**-8 * (abs(exact) + error)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.integers(1, 80), st.integers(1, 80), st.integers(0, 9))
def test_int8_has_the_bits_of_the_other_kernels(
    cupy: Any, m: int, n: int, k: int, seed: int
) -> None:
    x, w = operands(cupy, "int8_row", m, 8 * n, 16 * k, seed)
    found = [
        lb.matmul(x, w.T, out_dtype="bfloat16", kernel=name)
        for name in ("matmul.cutlass.int8", "matmul.cuda.integer")
    ]
    ours, others = (cupy.asnumpy(each.view("uint16")) for each in found)
    np.testing.assert_array_equal(ours, others)


def test_memory_that_tma_does_not_read(cupy: Any) -> None:
    x, w = operands(cupy, "int8_row", 64, 256, 528, 0)
    out = cupy.empty((64, 257), "bfloat16")[:, 1:]
    lb.matmul(x, w.T, out=out, kernel="matmul.cutlass.int8")
    wanted = lb.matmul(x, w.T, out_dtype="bfloat16", kernel="matmul.cuda.integer")
    assert (out == wanted).all()

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

Case = tuple[str, str, str]
# What the package brings machine code of; the others are compiled, which takes a minute each.
BROUGHT = [
    ("int8", "int8_row", "int8_row"),
    ("float8", "fp8_row", "fp8_row"),
    ("float8_fast", "fp8_row", "fp8_row"),
    ("float8_blocks", "fp8_g128", "fp8_128x128"),
    ("upcast16", "bfloat16", "int4_g128"),
    ("upcast_int8", "int8_row", "int4_row"),
]
COMPILED = [
    ("int8", "uint8_row_asym", "int8_row"),
    ("upcast16", "float16", "int4_g128"),
    ("upcast16", "bfloat16", "uint4_g128_asym"),
    ("upcast16", "bfloat16", "fp8_row"),
    ("upcast_float8", "fp8_row", "int4_g128_e4m3"),
    ("upcast_float8_scaled", "fp8_row", "int4_g128_e4m3"),
]


@pytest.fixture(scope="module")
def cupy() -> Any:
    reason = no_gpu()
    if reason is not None:
        pytest.skip(reason)
    import cupy

    if launch.machine_of(cupy.empty(1)).device.capability != 90:
        pytest.skip("runs on compute capability 9.0")
    return cupy


def normal(cupy: Any, shape: tuple[int, ...], fmt: str, seed: int) -> Any:
    """Random numbers of a dtype or in a format, on the GPU."""
    values = cupy.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
    return values.astype(fmt) if fmt in ("bfloat16", "float16") else lb.quantize(values, fmt)


def on_the_host(array: Any) -> Any:
    if isinstance(array, lb.QArray):
        return array.to_device("cpu").dequantize(np.float64)
    return array.astype("float32").get().astype(np.float64)


def within_the_bound(
    cupy: Any,
    case: Case,
    m: int,
    n: int,
    k: int,
    seed: int,
    alpha: float,
    bias: Any,
) -> None:
    """A product by a kernel beside float64, as far apart as its roundings say."""
    family, x_fmt, w_fmt = case
    x, w = normal(cupy, (m, k), x_fmt, seed), normal(cupy, (n, k), w_fmt, seed + 1)
    kernel = next(k for k in registered() if k.name == f"matmul.cutlass.{family}")
    left, device = getattr(x, "format", x_fmt), launch.machine_of(w.codes).device.name
    p = Problem(m, n, k, left, w.format, "bfloat16", bias=bias is not None, device=device)
    refusal = kernel.accepts(p)
    if refusal is not None:
        pytest.skip(refusal)
    options: dict[str, Any] = {"out_dtype": "bfloat16", "kernel": kernel.name, "alpha": alpha}
    if bias is not None:
        options["bias"] = cupy.asarray(bias)
    got, added = on_the_host(lb.matmul(x, w.T, **options)), 0 if bias is None else bias
    values, found = [on_the_host(each) for each in (x, w)], kernel.roundings(p)
    exact = alpha * (values[0] @ values[1].T) + added
    size = abs(alpha) * (abs(values[0]) @ abs(values[1]).T) + abs(added)
    growth = lb.testing.gamma(found.count, found.accumulator)
    error = (growth + found.weight * (1 + growth)) * size
    if found.flushed:
        scales = abs(x.to_device("cpu").scales[:, :1]) if isinstance(x, lb.QArray) else 1.0
        error = error + abs(alpha) * found.flushed * scales * k
    assert (abs(got - exact) <= error + 2.0**-8 * (abs(exact) + error)).all()


@pytest.mark.parametrize("case", BROUGHT, ids=lambda case: " ".join(case))
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.integers(1, 80), st.integers(1, 40), st.integers(0, 9), st.data())
def test_within_the_bound(
    cupy: Any, case: Case, m: int, n: int, k: int, seed: int, data: st.DataObject
) -> None:
    alpha = data.draw(st.sampled_from([1.0, -0.5]))
    bias = np.random.default_rng(1).standard_normal(8 * n, np.float32)
    biased = data.draw(st.booleans())
    within_the_bound(cupy, case, m, 8 * n, 32 * k, seed, alpha, bias if biased else None)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: " ".join(case))
def test_what_is_compiled_is_within_the_bound(cupy: Any, case: Case) -> None:
    for seed, k in enumerate((128, 640, 1056)):
        within_the_bound(cupy, case, 40, 136, k, seed, -0.5, None)


@pytest.mark.parametrize("case", BROUGHT[:4] + BROUGHT[5:], ids=lambda case: " ".join(case))
def test_a_stack_has_the_bits_of_its_matrices(cupy: Any, case: Case) -> None:
    family, x_fmt, w_fmt = case
    x, w = normal(cupy, (3, 40, 512), x_fmt, 1), normal(cupy, (3, 136, 512), w_fmt, 2)
    options: dict[str, Any] = {"out_dtype": "bfloat16", "kernel": f"matmul.cutlass.{family}"}
    together = on_the_host(lb.matmul(x, w.mT, **options))
    for i in range(3):
        assert (together[i] == on_the_host(lb.matmul(x[i], w[i].T, **options))).all()


@pytest.mark.parametrize("fmt", ["int8_row", "fp8_row"])
@pytest.mark.parametrize("rows", [1, 24, 60, 150, 400])
def test_experts_in_one_launch(cupy: Any, fmt: str, rows: int) -> None:
    """Sorted rows, and room for as many each, beside one product after the other."""
    ends, counts = [rows, rows, 2 * rows + 1], [rows, 0, rows + 1]
    x = normal(cupy, (ends[-1], 256), fmt, 1)
    w = normal(cupy, (3, 136, 256), fmt, 2)
    options: dict[str, Any] = {"out_dtype": "bfloat16"}
    there = cupy.asarray(np.array(ends, np.int32))
    found = on_the_host(lb.grouped_matmul(x, w, there, **options))
    other = {"int8_row": "matmul.cuda.integer", "fp8_row": "matmul.cuda.mma"}[fmt]
    loop = on_the_host(lb.grouped_matmul(x, w, ends, **options, kernel=other))
    close = 0 if fmt == "int8_row" else 2.0**-6 * abs(loop).max()
    assert (abs(found - loop) <= close).all()
    held = [x[:rows], x[:0], x[rows:]]
    room = lb.stack([lb.concatenate([each, x[: rows + 1 - len(each)]]) for each in held])
    numbers = cupy.asarray(np.array(counts, np.int32))
    masked = on_the_host(lb.grouped_matmul(room, w, counts=numbers, **options))
    assert (abs(masked[0, :rows] - found[:rows]) <= close).all()
    assert (abs(masked[2] - found[rows:]) <= close).all()
    assert not masked[0, rows:].any()
    assert not masked[1].any()


def test_masked_experts_are_captured_in_a_graph(cupy: Any) -> None:
    x, w = normal(cupy, (3, 16, 256), "int8_row", 1), normal(cupy, (3, 136, 256), "int8_row", 2)
    counts, out = cupy.asarray(np.array([5, 0, 16], np.int32)), cupy.zeros((3, 16, 136), "bfloat16")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        lb.grouped_matmul(x, w, counts=counts, out=out)
        stream.begin_capture()
        lb.grouped_matmul(x, w, counts=counts, out=out)
        graph = stream.end_capture()
        for filled in ([5, 0, 16], [1, 16, 3]):
            counts[...] = cupy.asarray(np.array(filled, np.int32))
            out[...] = 0
            graph.launch(stream=stream)
            stream.synchronize()
            wanted = lb.grouped_matmul(x, w, counts=filled, out_dtype="bfloat16")
            assert (on_the_host(out) == on_the_host(wanted)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.integers(1, 80), st.integers(1, 80), st.integers(0, 9))
def test_int8_has_the_bits_of_the_other_kernels(
    cupy: Any, m: int, n: int, k: int, seed: int
) -> None:
    x = normal(cupy, (m, 16 * k), "int8_row", seed)
    w = normal(cupy, (8 * n, 16 * k), "int8_row", seed + 1)
    found = [
        lb.matmul(x, w.T, out_dtype="bfloat16", kernel=name)
        for name in ("matmul.cutlass.int8", "matmul.cuda.integer")
    ]
    ours, others = (cupy.asnumpy(each.view("uint16")) for each in found)
    np.testing.assert_array_equal(ours, others)


def test_memory_that_tma_does_not_read(cupy: Any) -> None:
    x, w = (normal(cupy, (rows, 528), "int8_row", rows) for rows in (64, 256))
    out = cupy.empty((64, 257), "bfloat16")[:, 1:]
    lb.matmul(x, w.T, out=out, kernel="matmul.cutlass.int8")
    wanted = lb.matmul(x, w.T, out_dtype="bfloat16", kernel="matmul.cuda.integer")
    assert (on_the_host(out) == on_the_host(wanted)).all()

"""Activations within their published error, conversions exact, the same bits everywhere."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats.declare import integer
from lowbit.kernels.cpu import gemm
from lowbit.kernels.cpu.isa import Isa, runnable
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.declare import ACTIVATION_ERROR
from lowbit.kernels.reference import activate

Array = npt.NDArray[Any]
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def finished(
    v: Array, isa: Isa, *, residual: Array | None = None, alpha: float = 1.0, **spec: Any
) -> Array:
    """The epilogue of sums that are zero and a bias that is v."""
    n = len(v)
    if residual is not None:
        spec["residual"] = residual.dtype.name
    build = gemm.build(Spec("fma", integer(8), **spec), isa)
    codes, scale, x = np.zeros((n, 1), np.uint8), np.ones(1, np.float32), np.ones(4, np.float32)
    x[1:] = 0
    out = np.full(n + 8, -77, DTYPES.get(spec.get("out", "float32"), np.float32))
    build(
        m=1,
        n=n,
        k=1,
        segment=1,
        x=_address(x),
        x_stride=4,
        codes=_address(codes),
        codes_stride=1,
        scales=_address(scale),
        scales_stride=1,
        block_rows=n,
        block_segments=1,
        out=_address(out),
        out_stride=n,
        bias=_address(v),
        alpha=alpha,
        residual=0 if residual is None else _address(residual),
    )
    assert (out[n:] == -77).all()
    return out[:n]


def _address(a: Array) -> int:
    pointer: int = a.__array_interface__["data"][0]
    return pointer


def same_bits(a: Array, b: Array) -> bool:
    kind = f"u{a.itemsize}"
    return bool(((a.view(kind) == b.view(kind)) | (np.isnan(a) & np.isnan(b))).all())


def sweep() -> Array:
    """Every exponent of float32, both signs, 200 fractions each; densely where the curves bend."""
    rng = np.random.default_rng(0)
    fractions = rng.integers(0, 2**23, (512, 200), dtype=np.uint32)
    patterns = (np.arange(512, dtype=np.uint32)[:, None] << 23) | fractions
    dense = np.linspace(-20, 20, 60001)
    edges = np.array([0, -0.0, -104.9, -105, -105.1, -88, -13.9, 1e-45, -1e-45, np.inf, -np.inf])
    plain = np.concatenate([dense, edges]).astype(np.float32)
    return np.concatenate([patterns.ravel().view(np.float32), plain])


def exact(name: str, v: float) -> float:
    """In float64, by forms that do not cancel."""
    if name == "relu":
        return max(v, 0.0)
    if name == "gelu":
        return v * 0.5 * math.erfc(-v / math.sqrt(2))
    u = v if name == "silu" else 2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
    return v / (1 + math.exp(-u)) if u > -700 else 0.0


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_are_within_their_error(name: str) -> None:
    v = sweep()
    got = finished(v, runnable()[0], activation=name)
    assert (np.isnan(got) == np.isnan(v)).all()
    finite = np.isfinite(v)
    truth = np.array([exact(name, float(each)) for each in v[finite]])
    relative, absolute = ACTIVATION_ERROR[name]
    miss = np.abs(got[finite].astype(np.float64) - truth)
    fits = np.abs(truth) <= np.finfo(np.float32).max
    bound = relative * np.abs(truth) + absolute
    assert (miss <= bound)[fits].all()
    assert got[v == np.inf].tolist() == [np.inf]
    assert got[v == -np.inf].tolist() == [0.0]


@pytest.mark.parametrize("name", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_activations_are_the_reference_s(name: str | None) -> None:
    """The reference is the definition; it cancels far out, so only near numbers are compared."""
    v = np.linspace(-3, 9, 2001).astype(np.float32)
    wanted = activate(name, v.astype(np.float64))
    relative, absolute = ACTIVATION_ERROR[name]
    miss = np.abs(finished(v, runnable()[0], activation=name) - wanted)
    # The reference's 1 + erf loses at most 2**-52 of 1.
    assert (miss <= relative * np.abs(wanted) + absolute + 2.0**-50).all()


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_have_the_same_bits_everywhere(name: str) -> None:
    v = sweep()
    first, *others = (finished(v, isa, activation=name) for isa in runnable())
    assert all(same_bits(each, first) for each in others)


def halfway(dtype: str) -> Array:
    """Every number of the dtype, the middle to the next one, and the float32 around it."""
    narrow = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        middle = np.sort(narrow[np.isfinite(narrow)])
        middle = ((middle[1:].astype(np.float64) + middle[:-1]) / 2).astype(np.float32)
    beyond = np.array([65519.99, 65520, 65536, 1e30, 3.4e38, -3.4e38, np.inf, -np.inf], np.float32)
    around = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    return np.concatenate([narrow, middle, *around, beyond, nans])


@pytest.mark.parametrize("isa", runnable(), ids=[isa.name for isa in runnable()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_to_nearest_even(dtype: str, isa: Isa) -> None:
    v = halfway(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (v + np.float32(0)).astype(DTYPES[dtype])
    assert same_bits(finished(v, isa, out=dtype), expected)


@pytest.mark.parametrize("isa", runnable(), ids=[isa.name for isa in runnable()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_residual_is_read_exactly(dtype: str, isa: Isa) -> None:
    residual = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    nothing = np.zeros(2**16, np.float32)
    got = finished(nothing, isa, residual=residual)
    with np.errstate(invalid="ignore"):
        assert same_bits(got, residual.astype(np.float32) + np.float32(0))


@settings(max_examples=30)
@given(st.integers(1, 150), st.sampled_from(["float32", "float16", "bfloat16"]), st.data())
def test_the_order_of_the_epilogue(n: int, out: str, data: st.DataObject) -> None:
    """Relu cannot hide it: residual after the activation, one rounding to the result's dtype."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    v, residual = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    expected = (np.maximum(v, 0) + residual).astype(DTYPES.get(out, np.float32))
    for isa in runnable():
        got = finished(v, isa, residual=residual, activation="relu", out=out)
        assert same_bits(got, expected)

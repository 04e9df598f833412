"""Quantizing, dequantizing and fused layers on a real GPU: the reference's bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from launchers import no_gpu

import lowbit as lb
from lowbit.formats import codes, reference
from lowbit.kernels import layers
from lowbit.kernels.cuda import dequantize, fused, quantize

pytestmark = pytest.mark.gpu

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Every width, kind of element, scale, zero point and block; every kernel.
FORMATS = (
    "int4_g128", "int8_row", "fp8_row", "fp8_128x128", "mxfp4", "mxfp8", "nvfp4", "nf4_g64",
    "int1_g32", "uint2_g32_asym", "int3_g32", "int5_g24", "mxfp6", "int7_row_bf16", "fp8_e5m2",
    "float8_e4m3fnuz_g16", "uint4_g64_zf16", "uint4_g32_bias", "int4_3x5_asym", "int8_tensor",
    "int2_g20", "uint8_allx64_asym_f16", "fp4_g256_f16", "int4_g32_e4m3",
)  # fmt: skip


@pytest.fixture
def cupy() -> Any:
    reason = no_gpu()
    if reason is not None:
        pytest.skip(reason)
    import cupy

    return cupy


def drawn(fmt: lb.formats.Format, shape: tuple[int, ...], dtype: str, seed: int = 1) -> Any:
    x = np.random.default_rng(seed).standard_t(4, shape)
    if fmt.zero is None and not fmt.bias and 0 in (fmt.element.min, fmt.element.max):
        x = np.abs(x) if fmt.element.min == 0 else -np.abs(x)
    return codes.rounded(x, DTYPES[dtype])


def same(there: reference.Packed | None, here: reference.Packed) -> None:
    assert there is not None, "left to the reference"
    for part in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        one, other = getattr(there, part), getattr(here, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert one.get().tobytes() == other.tobytes(), part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_the_reference(cupy: Any, name: str, dtype: str) -> None:
    fmt = lb.format(name)
    for shape in ((2, 130, 520), (3, 4099), (1, 1)):
        x = drawn(fmt, shape, dtype)
        w = quantize.quantize(fmt, cupy.asarray(x))
        expected = reference.quantize(fmt, x)
        same(w, expected)
        assert w is not None
        out, values = cupy.empty(shape, DTYPES[dtype]), np.empty(shape, DTYPES[dtype])
        dequantize.dequantize_to(w, out)
        reference.dequantize_to(expected, values)
        assert out.get().tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_16_bits_under_a_scale_that_is_given(cupy: Any, dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    x = every.view(np.float16 if dtype == "float16" else ml_dtypes.bfloat16).astype(DTYPES[dtype])
    x[~np.isfinite(x.astype(np.float32))] = 0
    for name in ("int4_tensor", "fp8_tensor", "fp8_e5m2_tensor", "nf4_tensor", "mxfp6_tensor_f32"):
        fmt, scale = lb.format(name), np.asarray(0.75)
        same(quantize.quantize(fmt, cupy.asarray(x), scale=scale),
             reference.quantize(fmt, x, scale=scale))  # fmt: skip


@pytest.mark.parametrize("name", ["int4_g32", "fp8_row", "nvfp4", "int8_tensor"])
def test_views_and_what_is_refused(cupy: Any, name: str) -> None:
    fmt = lb.format(name)
    x = drawn(fmt, (40, 600), "float16")
    there = cupy.asarray(x)
    for view in (np.s_[::-1], np.s_[::3, 5:250], np.s_[:, ::-2], np.s_[:, 1:]):
        same(quantize.quantize(fmt, there[view]), reference.quantize(fmt, x[view]))
    same(quantize.quantize(fmt, there.T), reference.quantize(fmt, x.T))
    there[39, 599] = np.nan
    assert quantize.quantize(fmt, there) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "fp8_g128", "mxfp8"])
def test_layers(cupy: Any, name: str, dtype: str) -> None:
    fmt = lb.format(name)
    for columns in (520, 4096, 9001):
        x, other = drawn(fmt, (5, columns), dtype), drawn(fmt, (5, columns), dtype, 2)
        given = cupy.asarray(x), cupy.asarray(other[0]), 1e-6, fmt, cupy.asarray(other)
        pending, updated = fused.rmsnorm_quantize(*given)
        y, h = layers.rmsnorm(x, other[0], 1e-6, other)
        same(pending.settled(), reference.quantize(fmt, y))
        assert updated is not None
        assert updated.get().tobytes() == h.tobytes()
        # silu of 0 and of large numbers is exact.
        gate = np.where(x < 0, 0, 200 + np.abs(x)).astype(DTYPES[dtype])
        pending = fused.silu_mul_quantize(cupy.asarray(gate), given[-1], fmt)
        same(pending.settled(), reference.quantize(fmt, layers.silu_mul(gate, other)))

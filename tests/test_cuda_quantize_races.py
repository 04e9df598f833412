"""The CUDA quantizers share memory without races: small launches, again under ThreadSanitizer."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import races
from absence import absent
from emulator import Emulator

import lowbit as lb
from lowbit.formats import reference
from lowbit.kernels import layers
from lowbit.kernels.cuda import dequantize, fused, launch, quantize

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("name", "shape"), [("int8", (2, 300)), ("int8_tensor", (9, 1900)), ("uint4_3x5_asym", (7, 33))]
)
def test_small_arrays(emulator: Emulator, name: str, shape: tuple[int, int]) -> None:
    """Lanes, warps and thread blocks that look for extremes together, and octets beside others."""
    fmt = lb.format(name)
    x = np.random.default_rng(1).standard_normal(shape).astype(BFLOAT16)
    expected = reference.quantize(fmt, x)
    out, values = np.empty(shape, np.float16), np.empty(shape, np.float16)
    with launch.pretending(emulator):
        w = quantize.quantize(fmt, x)
        assert w is not None
        dequantize.dequantize_to(w, out)
    assert w.codes.tobytes() == expected.codes.tobytes()
    reference.dequantize_to(expected, values)
    assert out.tobytes() == values.tobytes()


def test_small_layers(emulator: Emulator) -> None:
    x, other = np.random.default_rng(2).standard_normal((2, 2, 296)).astype(BFLOAT16)
    fmt = lb.format("mxfp8")
    with launch.pretending(emulator):
        pending, updated = fused.rmsnorm_quantize(x, other[0], 1e-6, fmt, other)
        w = pending.settled()
    y, h = layers.rmsnorm(x, other[0], 1e-6, other)
    assert w is not None
    assert updated is not None
    assert w.codes.tobytes() == reference.quantize(fmt, y).codes.tobytes()
    assert updated.tobytes() == h.tobytes()


def test_no_races(emulator: Emulator) -> None:
    del emulator  # it says where there is no compiler
    reason = races.missing()
    if reason is not None:
        absent(reason)
    races.rerun(__file__, "-k", "small")

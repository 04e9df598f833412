"""The TMA and wgmma product in the emulator."""

from collections.abc import Iterator

import numpy as np
import pytest
from emulator import Emulator

import lowbit as lb
from lowbit import dispatch
from lowbit.kernels.cuda import launch
from lowbit.testing import assert_within_bound, conformance, exact_operands, random_qarray

WGMMA = "matmul.cuda.wgmma"
# Short tiles of both operands, columns that end within a stage, more stages than the ring has.
SHAPES = ((5, 70, 64), (70, 130, 192), (130, 40, 96), (67, 33, 1088))
FORMATS = ["int4_g64", "int8_row", "uint2_g128_asym", "float6_e3m2fn_row", "fp8_64x64", "nf4_row"]
FORMATS += ["int4_g128_bf16", "float8_e5m2_tensor", "int4_g64_e4m3_ts", "uint8_g64_asym"]


@pytest.fixture
def gpu(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setattr(dispatch, "device", lambda: emulator.device.name)
    with launch.pretending(emulator):
        yield emulator


@pytest.mark.parametrize("index", range(len(FORMATS)), ids=FORMATS)
def test_every_kind_of_format(gpu, index):
    w, x = FORMATS[index], ("float16", "bfloat16")[index % 2]
    for seed, (m, n, k) in enumerate(SHAPES):
        gpu.seed = seed
        case = exact_operands(m, n, k, w, x, bias=True, seed=seed)
        if conformance.refusal(WGMMA, case.x, case.w, bias=case.options["bias"]) is None:
            result = lb.matmul(case.x, case.w.T, kernel=WGMMA, **case.options)
            if conformance.rounds_values(WGMMA, case.x, case.w):
                assert_within_bound(result, case.x, case.w.T, kernel=WGMMA, **case.options)
            else:
                case.check(result)
    assert len(gpu.launches) >= 2
    assert set(gpu.launches) == {"lb::gemm_sm90<Config>"}


def test_tiles_of_every_width(gpu):
    w = random_qarray("int4_row", 150, 192)
    for m in (1, 64, 65, 128, 256, 300):
        x = conformance.dense_or_quantized("bfloat16", m, 192, m)
        result = lb.matmul(x, w.T, kernel=WGMMA, activation="silu", alpha=0.5)
        assert_within_bound(result, x, w.T, kernel=WGMMA, activation="silu", alpha=0.5)


def test_what_tma_cannot_read_is_computed_all_the_same(gpu):
    w = random_qarray("int4_g64", 20, 192)
    memory = np.zeros((70, 200), np.float16)
    memory[:, 1:193] = conformance.dense_or_quantized("float16", 70, 192)
    x = memory[:, 1:193]
    assert_within_bound(lb.matmul(x, w.T, kernel=WGMMA), x, w.T, kernel=WGMMA)
    assert gpu.launches == ["lb::gemm<Config>"]


@pytest.mark.parametrize(
    ("w", "x", "k", "reason"),
    [
        ("int4_g64", "float32", 128, "numbers as they come"),
        ("int3_row", "float16", 128, "whole number of 16 bytes"),
        ("int4_g32", "float16", 128, "multiples of 64 columns"),
        ("int4_row", "float16", 100, "begin at multiples of 16 bytes"),
        ("int4_g16", "float16", 128, "x's own numbers"),
    ],
)
def test_refusals_say_why(gpu, w, x, k, reason):
    left = conformance.dense_or_quantized(x, 3, k)
    assert reason in str(conformance.refusal(WGMMA, left, random_qarray(w, 5, k)))


def test_it_is_for_hopper(gpu):
    gpu.device = launch.Device(89, 128, plain=True)
    refusal = conformance.refusal(
        WGMMA, np.ones((3, 128), np.float16), random_qarray("int4_row", 5, 128)
    )
    assert refusal == "runs on compute capability 9.0, this is 8.9"

"""CUDA products in the emulator: the checks that every kernel passes, and what is theirs alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulator import Emulator
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import dispatch
from lowbit.formats import declared
from lowbit.kernels.cuda import cublas, launch, tiles
from lowbit.kernels.cuda.launch import Device
from lowbit.testing import assert_within_bound, conformance, exact_operands, random_qarray

MMA, INTEGER, CUBLAS = "matmul.cuda.mma", "matmul.cuda.integer", "matmul.cuda.cublas"
FLOATS = ("float16", "bfloat16", "float32")
# Blocks of every shape, scale types, zero points, what does not end where octets do.
MORE = [
    "int4_g32_asym",
    "uint4_g64_asym",
    "uint8_row_asym",
    "int4_g128_bf16",
    "int4_g32_e4m3_ts",
    "uint4_g64_zf16",
    "int4_g64_bias",
    "int4_tensor",
    "int4_4x32_asym",
    "fp8_64x64",
    "int4_g16",
    "int3_g12",
    "nf4_g20",
]
FORMATS = [*(name for name, named in declared().items() if not named.short), *MORE]


@pytest.fixture
def gpu(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """NumPy arrays stand for those of an emulated device."""
    monkeypatch.setattr(dispatch, "device", lambda: emulator.device.name)
    with launch.pretending(emulator):
        yield emulator


@pytest.mark.parametrize("index", range(len(FORMATS)), ids=FORMATS)
def test_every_format(gpu, index):
    conformance.exact_products(MMA, FORMATS[index], FLOATS[index % 2])


@pytest.mark.parametrize("w", ["int4", "fp8", "nf4", *MORE])
def test_any_numbers(gpu, w):
    assert conformance.bounded_products(MMA, w, "bfloat16") > 0


@pytest.mark.parametrize("w", ["int4", "uint8_row_asym", "fp8", "mxfp4", "nvfp4", "int3_g96"])
def test_float32_keeps_all_its_bits(gpu, w):
    conformance.exact_products(MMA, w, "float32")
    assert conformance.bounded_products(MMA, w, "float32") > 0


def test_float32_times_one_is_itself(gpu):
    x = conformance.dense_or_quantized("float32", 9, 70)
    w = lb.from_parts("int8_row", np.eye(70, dtype=np.int8), np.ones((70, 1), np.float32))
    conformance.same_bits(lb.matmul(x, w.T, kernel=MMA), x)


@pytest.mark.parametrize("x", ["fp8", "mxfp8", "mxfp4", "nvfp4", "float8_e5m2_128x128"])
@pytest.mark.parametrize("w", ["fp8_128x128", "int4_g32", "mxfp6", "nvfp4"])
def test_both_quantized(gpu, x, w):
    conformance.exact_products(MMA, w, x)
    conformance.bounded_products(MMA, w, x)


@pytest.mark.parametrize("w", ["int8_row", "int4_g32", "uint4_g64_asym", "uint8_row_asym", "int1"])
@pytest.mark.parametrize("x", ["int8_row", "int8_g32", "int4_g64"])
def test_integer_sums_are_exact_and_meet_scales_in_the_documented_order(gpu, w, x):
    conformance.documented_order(INTEGER, w, x)
    conformance.exact_products(INTEGER, w, x)


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_every_width(gpu, bits):
    conformance.exact_products(INTEGER, f"uint{bits}_g64_asym", f"int{bits}_64x64")


@pytest.mark.parametrize("w", ["int8_row", "uint8_row_asym"])
def test_long_integer_sums_do_not_overflow(gpu, w):
    conformance.long_sums(INTEGER, w, k=140_001)


@pytest.mark.parametrize("w", ["int8_row", "uint8_row", "uint2_g32"])
def test_extreme_integers_do_not_saturate(gpu, w):
    conformance.extreme_integers(INTEGER, w)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_what_follows_the_product(gpu, activation):
    for out in FLOATS:
        conformance.finished_products(MMA, "int8_row", activation, out)


def test_integers_have_the_bits_of_the_cpu(emulator):
    x, w = (
        random_qarray("int8_row", 21, 200, spread=6),
        random_qarray("int4_g64", 70, 200, spread=6),
    )
    options: dict[str, Any] = {"alpha": 0.3, "bias": np.linspace(-3, 3, 70)}
    for activation in (None, "relu", "gelu", "gelu_tanh", "silu"):
        want = lb.matmul(x, w.T, kernel="matmul.cpu.dot", activation=activation, **options)
        with pytest.MonkeyPatch.context() as patch, launch.pretending(emulator):
            patch.setattr(dispatch, "device", lambda: emulator.device.name)
            fresh = w.copy()
            got = lb.matmul(x, fresh.T, kernel=INTEGER, activation=activation, **options)
        conformance.same_bits(got, want)


SHARING = [(MMA, "bfloat16", "int4_g32"), (INTEGER, "int8_row", "int8_row")]
SHARING += [("matmul.cuda.wgmma", "bfloat16", "int4_g128")]


@pytest.mark.parametrize(("kernel", "x", "w"), SHARING)
def test_blocks_share_the_columns_in_a_fixed_order(gpu, kernel, x, w):
    gpu.device = Device(90, 64, plain=True)
    left, right = conformance.dense_or_quantized(x, 9, 2048), random_qarray(w, 100, 2048)
    problem = lb.explain(left, right.T, kernel=kernel).problem
    found = []
    for seed in range(3):
        gpu.seed = seed
        found.append(lb.matmul(left, right.T, kernel=kernel))
        assert_within_bound(found[-1], left, right.T, kernel=kernel)
    assert problem.device == "cuda:90:64:plain"
    assert tiles.shares_for(2, 16, 128) == 8
    conformance.same_bits(found[0], found[1])
    conformance.same_bits(found[0], found[2])


def test_a_row_does_not_depend_on_the_others_where_that_is_asked(gpu):
    gpu.device = Device(90, 64, plain=True)
    x, w = conformance.dense_or_quantized("float16", 70, 1500), random_qarray("int4_g64", 40, 1500)
    whole = lb.matmul(x, w.T, kernel=MMA, batch_invariant=True)
    for rows in (slice(0, 1), slice(5, 17), slice(30, 70)):
        part = lb.matmul(x[rows], w.T, kernel=MMA, batch_invariant=True)
        conformance.same_bits(part, whole[rows])


@settings(max_examples=25)
@given(
    m=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 129]),
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
def test_any_shape(emulator_once, m, n, k, seed):
    with pytest.MonkeyPatch.context() as patch, launch.pretending(emulator_once):
        patch.setattr(dispatch, "device", lambda: emulator_once.device.name)
        emulator_once.seed = seed
        x = conformance.dense_or_quantized("float16", m, k, seed)
        w = random_qarray("int4_g32_asym", n, k, seed=seed)
        result = lb.matmul(x, w.T, kernel=MMA)
        assert_within_bound(result, x, w.T, kernel=MMA)


@pytest.fixture(scope="module")
def emulator_once() -> Emulator:
    return Emulator()


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_no_alignment_is_demanded(gpu, offset):
    case = exact_operands(5, 20, 256, "int4_g32", "float16")
    parts = case.w._parts
    memory = np.zeros(parts.codes.size + 64, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    moved = memory[start : start + parts.codes.size].reshape(parts.codes.shape)
    moved[...] = parts.codes
    w = lb.from_parts("int4_g32", moved, parts.scales, shape=(20, 256))
    rows = np.zeros((5, 300), np.float16)
    rows[:, 3 + offset : 259 + offset] = case.x
    case.check(lb.matmul(rows[:, 3 + offset : 259 + offset], w.T, kernel=MMA))
    case.check(lb.matmul(np.asfortranarray(case.x), w.T, kernel=MMA))


def test_nan_and_infinity_reach_the_result(gpu):
    w = lb.quantize(np.ones((3, 40), np.float32), "int8_row")
    for dtype in FLOATS:
        x = np.ones((4, 40), np.dtype(dtype))
        x[0, 5], x[1, 6], x[2, 7], x[2, 8] = np.nan, np.inf, np.inf, -np.inf
        got = lb.matmul(x, w.T, kernel=MMA).astype(np.float64)
        assert np.isnan(got[0]).all()
        assert (got[1] == np.inf).all()
        assert np.isnan(got[2]).all()
        assert np.allclose(got[3], 40, rtol=2**-8)


def test_the_largest_float32_does_not_become_infinite(gpu):
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = np.finfo(np.float32).max
    w = lb.from_parts("int8_row", np.eye(2, 32, dtype=np.int8), np.ones((2, 1), np.float32))
    assert np.isfinite(lb.matmul(x, w.T, kernel=MMA)).all()


def test_refusals_say_why(gpu):
    x = np.ones((2, 64), np.float32)
    for w, x_format, reason in [
        ("nf4", None, "float32 x deserves better"),
        ("int4_g16", None, "float32 x deserves better"),
        ("int4", "int8_row", "have to be exact"),
        ("int4", "uint8_row_asym", "without zero points"),
        ("int4", "fp8_e5m2_g16", "multiples of 32 columns"),
    ]:
        left = x if x_format is None else lb.quantize(x, x_format)
        refusal = conformance.refusal(MMA, left, lb.quantize(x, w))
        assert refusal is not None
        assert reason in refusal
    assert "codes on both sides" in str(conformance.refusal(INTEGER, x, lb.quantize(x, "int4")))


@pytest.mark.parametrize("x", ["float32", "bfloat16", "int8_row", "mxfp4"])
@pytest.mark.parametrize("w", ["nf4_g20", "int4_g12_asym", "uint4_g64_bias", "fp8_64x64"])
def test_cublas_takes_what_no_kernel_does(gpu, w, x):
    assert conformance.bounded_products(CUBLAS, w, x) > 0
    conformance.exact_products(CUBLAS, w, x)


def test_cublas_multiplies_bfloat16_values(gpu):
    assert conformance.bounded_products(f"{CUBLAS}16", "int4_g32", "bfloat16") > 0


@pytest.mark.parametrize("activation", ["gelu", None])
def test_what_follows_the_product_of_cublas(gpu, activation):
    for out in FLOATS:
        conformance.finished_products(CUBLAS, "int4_g12", activation, out)


def test_cublas_takes_scales_across_the_contraction_axis_and_tiles(gpu, monkeypatch):
    monkeypatch.setattr(cublas, "TILE", 70 * 32)
    w = random_qarray("int4_64x16", 200, 70)
    x = conformance.dense_or_quantized("float32", 5, 70)
    assert_within_bound(lb.matmul(x, w.T, kernel=CUBLAS), x, w.T, kernel=CUBLAS)
    x = conformance.dense_or_quantized("float32", 5, 200)
    assert_within_bound(lb.matmul(x, w, kernel=CUBLAS), x, w, kernel=CUBLAS)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_cublas_takes_empty_axes(gpu, m, n, k):
    w = lb.from_parts("int8_row", np.zeros((n, k), np.int8), np.ones((n, min(k, 1)), np.float32))
    got = lb.matmul(np.ones((m, k), np.float32), w.T, bias=np.ones(n), kernel=CUBLAS)
    assert got.shape == (m, n)
    assert (got == 1).all()


@pytest.mark.parametrize("x", ["fp8_row", "fp8_e5m2_g64", "fp8_g128"])
@pytest.mark.parametrize("w", ["fp8_128x128", "fp8_e5m2_row", "mxfp8"])
def test_float8_has_an_instruction_on_ada(gpu, x, w):
    gpu.device = Device(89, 4, plain=True)
    kernel = "matmul.cuda.float8"
    conformance.exact_products(kernel, w, x)
    assert conformance.bounded_products(kernel, w, x) > 0
    left, right = conformance.dense_or_quantized(x, 3, 320), random_qarray(w, 5, 320)
    result = lb.matmul(left, right.T, kernel=kernel)
    assert 0 < assert_within_bound(result, left, right.T, kernel=kernel) < 1
    gpu.device = Device(90, 4, plain=True)
    assert "no such instruction" in str(conformance.refusal(kernel, left, right))

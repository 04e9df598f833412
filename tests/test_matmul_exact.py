"""Sums of integers are exact, and bits depend on nothing but the operands."""

import numpy as np
import pytest

import lowbit as lb
from lowbit import dispatch, kernels
from lowbit.formats import declared
from lowbit.kernels.cpu import isa
from lowbit.testing import conformance, exact_operands, random_qarray

KERNELS = sorted(kernel.name for kernel in kernels.registered())
INTEGERS = [
    *(name for name, named in declared().items() if named.format.element.integral),
    "int8_g33",
    "int4_g32_asym",
    "uint4_g64_asym",
    "uint8_row_asym",
    "int2_g16_asym",
    "int4_g128_bf16",
    "int4_g32_e4m3_ts",
    "int4_tensor",
    "int4_4x32_asym",
]


@pytest.mark.parametrize("w", INTEGERS)
def test_integer_sums_meet_scales_in_the_documented_order(w):
    conformance.documented_order("matmul.cpu.dot", w)


@pytest.mark.parametrize("w", ["int8_row", "int4_row", "uint8_row_asym", "int8_g150016"])
def test_long_integer_sums_do_not_overflow(w):
    for kernel in KERNELS:
        conformance.long_sums(kernel, w)


@pytest.mark.parametrize("w", ["int8_row", "uint8_row", "int4_g32", "uint2_g32"])
def test_extreme_integers_do_not_saturate(w):
    for kernel in KERNELS:
        conformance.extreme_integers(kernel, w)


@pytest.mark.parametrize("x", ["float32", "bfloat16", "int8_g32", "float8_e4m3fn_row"])
@pytest.mark.parametrize("w", ["int8_row", "uint4_g64_asym", "nf4", "mxfp4"])
def test_a_row_does_not_depend_on_the_others(x, w):
    for kernel in KERNELS:
        conformance.independent_rows(kernel, w, x)


@pytest.mark.parametrize(("x", "w"), [("float32", "int4_g32"), ("int8_row", "int8_row")])
def test_every_instruction_set_gives_the_same_bits(x, w, monkeypatch):
    left, right = conformance.dense_or_quantized(x, 13, 130), random_qarray(w, 40, 130)
    wanted = None
    for record in isa.runnable():
        monkeypatch.setattr(dispatch, "device", lambda name=record.name: f"cpu:{name}")
        assert lb.explain(left, right.T).problem.device == f"cpu:{record.name}"
        got = lb.matmul(left, right.copy().T)
        wanted = got if wanted is None else wanted
        conformance.same_bits(got, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
def test_exact_sums_are_rounded_once(kernel, out):
    conformance.rounded_once(kernel, "int4_g32", out)


@pytest.mark.parametrize("x", ["float32", "bfloat16", "int8_row"])
@pytest.mark.parametrize("w", ["int8_row", "int4_g32_asym", "uint1_g128", "int3_g24", "nf4"])
def test_long_rows(x, w):
    for kernel in KERNELS:
        conformance.long_rows(kernel, w, x)


def test_exact_operands_notice_one_wrong_bit():
    case = exact_operands(7, 40, 70, "int4_g32")
    result = lb.matmul(case.x, case.w.T)
    result[3, 5] = np.nextafter(result[3, 5], np.float32(np.inf))
    with pytest.raises(AssertionError, match=r"1 of 280 entries are not exact, first at \(3, 5\)"):
        case.check(result)


@pytest.mark.parametrize("w", ["int8_row", "nf4", "mxfp4", "uint4_g64_asym", "int4_g32_bias"])
def test_exact_operands_are_exact_in_any_order(w):
    """float32 sums, shuffled and split at random, never meet a rounding."""
    rng = np.random.default_rng(0)
    for seed in range(4):
        case = exact_operands(4, 9, 300, w, seed=seed)
        assert np.any(case.expected != 0)
        x, values = case.x.astype(np.float32), case.w.dequantize(np.float32)
        for order in (np.arange(300), rng.permutation(300), rng.permutation(300)):
            total = np.zeros((4, 9), np.float32)
            for k in order:
                total += x[:, k, None] * values[None, :, k]
            assert (total == case.expected.astype(np.float32)).all()

"""Every kernel computes every format it accepts exactly, or within the derived bound."""

import re

import numpy as np
import pytest

import lowbit as lb
from lowbit import kernels
from lowbit.formats import declared
from lowbit.testing import conformance, random_qarray

KERNELS = sorted(kernel.name for kernel in kernels.registered())
COMPILED = [name for name in KERNELS if name != "reference"]
TABLE = lb.codebook("irregular", np.cbrt(np.arange(-100, 156)), group=48).name
VARIANTS = (
    "int8_g33",  # no word ends where a block does
    "int4_g40",
    "int4_g32_asym",
    "uint4_g64_asym",
    "uint8_row_asym",
    "uint3_g32_asym",
    "int2_g16_asym",
    "int4_g64_zf16",
    "uint4_g32_zf32",
    "int8_row_zbf16",
    "uint8_g32_zint8",  # differences of nine bits
    "uint4_g64_zint8",
    "int4_g32_bias",
    "uint4_g64_bias_f16",
    "nf4_g64_bias_bf16",
    "int4_g32_bias_ts",
    "int4_g128_bf16",
    "int4_g32_f16",
    "int4_g32_e8m0",
    "int4_g32_e4m3_ts",
    "int4_tensor",
    "int4_4x32_asym",
    "int8_20x64",
    "float8_e4m3fn_tensor",
    "float8_e4m3fn_16x24",
    "float8_e4m3fn_allx32",
    TABLE,
)
FORMATS = (*(name for name, named in declared().items() if not named.short), *VARIANTS)
# Widths that fill words and those that are cut into planes; all others in tests of the generator.
SOME = (
    "int1",
    "int3",
    "uint5_row",  # its tiles are cut where those of planes are
    "int7",
    "int8",
    "float6_e3m2fn",
    "float8_e5m2",
    "nf4",
    "mxfp4",
    "nvfp4",
)
X_FORMATS = ("int8_row", "int8_g32", "int4_g64", "float8_e4m3fn_row", "mxfp4", "uint8_row_asym")


def accepted(kernel: str, x: str, w: str) -> bool:
    """Whether a kernel takes this pair; a refusal has to be a sentence."""
    left = conformance.dense_or_quantized(x, 5, 130)
    reason = conformance.refusal(kernel, left, random_qarray(w, 33, 130))
    assert reason is None or len(reason.split()) > 3, reason
    return reason is None


@pytest.mark.parametrize("w", FORMATS)
def test_dense_x_is_exact_and_within_the_bound(w):
    for kernel in KERNELS:
        conformance.exact_products(kernel, w, "float32")
        conformance.exact_products(kernel, w, "bfloat16")
        for x in ("float32", "float16", "bfloat16", "float64"):
            assert conformance.bounded_products(kernel, w, x) <= 1


@pytest.mark.parametrize("w", [*SOME, *VARIANTS])
def test_quantized_x_is_exact_and_within_the_bound(w):
    for kernel in KERNELS:
        for x in ("int8_row", "float8_e4m3fn_row"):
            conformance.exact_products(kernel, w, x)
            assert conformance.bounded_products(kernel, w, x) <= 1


@pytest.mark.parametrize("x", X_FORMATS)
@pytest.mark.parametrize("w", ["int8_row", "uint4_g64_asym", "float8_e4m3fn_row", "nvfp4"])
def test_pairs_of_formats(x, w):
    for kernel in KERNELS:
        conformance.exact_products(kernel, w, x)
        assert conformance.bounded_products(kernel, w, x) <= 1


@pytest.mark.parametrize("w", [*SOME, *VARIANTS[::2]])
def test_a_prepared_weight_gives_the_same_bits(w):
    for kernel in KERNELS:
        conformance.same_when_prepared(kernel, w, "bfloat16")
        conformance.same_when_prepared(kernel, w, "int8_row")


@pytest.mark.parametrize("x", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "w",
    ["int8_row", "int4_g128", "int4_g32", "int4_g32_asym", "uint4_g64_asym", "float8_e4m3fn_row",
     "nf4", "fp4", "mxfp4", "nvfp4", "float8_e4m3fn_128x128"],
)  # fmt: skip
def test_float_pairs_run_compiled(x, w):
    assert any(accepted(kernel, x, w) for kernel in COMPILED)


@pytest.mark.parametrize(
    ("x", "w"),
    [("int8_row", "int8_row"), ("int8_row", "int4_g128"), ("int8_g32", "int4_g32_asym"),
     ("float8_e4m3fn_row", "float8_e4m3fn_row"), ("mxfp8", "mxfp8")],
)  # fmt: skip
def test_quantized_pairs_run_compiled(x, w):
    assert any(accepted(kernel, x, w) for kernel in COMPILED)


def test_large_products_do_not_choose_the_reference():
    w = random_qarray("int4_g128", 256, 512)
    assert lb.explain(np.zeros((1, 512), np.float32), w.T).kernel in COMPILED
    assert lb.explain(np.zeros((1, 512), np.float32), w.T, x_format="int8_row").kernel in COMPILED


@pytest.mark.parametrize("kernel", KERNELS)
def test_refusals_are_the_errors(kernel):
    w = random_qarray("int4_g32_bias_ts", 3, 64)
    x = np.ones((2, 64))
    reason = conformance.refusal(kernel, x, w)
    if reason is None:
        assert lb.matmul(x, w.T, kernel=kernel).shape == (2, 3)
    else:
        with pytest.raises(ValueError, match=re.escape(f"kernel={kernel!r} refuses: {reason}")):
            lb.matmul(x, w.T, kernel=kernel)

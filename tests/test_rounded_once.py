"""Results in float64 on their way to bfloat16 are rounded once, wherever they come from."""

import ml_dtypes
import numpy as np
import pytest

import lowbit as lb

# Just above the middle of 1 and the next bfloat16; float32 in between would make it a tie.
TRICKY = 1 + 2.0**-8 + 2.0**-30
UP = 1 + 2.0**-7


def one(**parts):
    codes, scales = np.ones((1, 1), np.int8), np.ones((1, 1), np.float32)
    return lb.from_parts("int8_row", codes, scales, **parts)


@pytest.mark.parametrize(
    "product",
    [
        lambda x: lb.matmul(x, one().T, out_dtype="bfloat16"),
        lambda x: lb.matmul(one(), x, out_dtype="bfloat16", bias=np.zeros(1)),
        lambda x: lb.matmul(x, one(columns=[0]), out_dtype="bfloat16"),
    ],
    ids=["reference kernel", "weight on the left", "permuted columns"],
)
def test_products(product):
    x = np.array([[TRICKY]])
    assert float(np.float64(product(x)[0, 0])) == UP


def test_divided_values():
    # 129 / 128.49999 lies just above the middle of 1 and 1 + 2**-7 where float32 sees the middle.
    divisor = np.float32(129 / TRICKY)
    exact = 129 / float(divisor)
    codes, scales = np.ones((1, 1), np.int8), np.full((1, 1), 129, np.float32)
    w = lb.from_parts("int8_row", codes, scales, divisor=[divisor])
    got = w.dequantize("bfloat16")[0, 0]
    assert float(got) == (UP if exact > 1 + 2.0**-8 else 1.0)
    assert w.dequantize("bfloat16").dtype == ml_dtypes.bfloat16


def test_narrow_floats_are_no_numbers_to_quantize():
    for dtype in (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn):
        with pytest.raises(TypeError, match="want float32, float16, bfloat16 or float64"):
            lb.quantize(np.ones((2, 2), dtype), "int8_row")

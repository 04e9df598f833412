"""Bugs planted in the CUDA quantizers; comparing with the reference must catch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from emulator import Emulator
from planted import Planted, flattened, mutate

import lowbit as lb
from lowbit.formats import codes, reference
from lowbit.kernels.cuda import dequantize, launch, quantize
from lowbit.kernels.cuda.launch import Source
from lowbit.testing import random_qarray

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Broken(Emulator):
    """Plants a bug in the one kernel whose name holds a word."""

    def __init__(self, kernel: str, bug: Planted | None, seed: int) -> None:
        super().__init__(seed=seed)
        self.kernel, self.bug = kernel, bug
        self.met = False

    def function(self, source: Source) -> Any:
        """Compile the broken text in its place."""
        text = source.text
        if f"::{self.kernel}<" in source.name:
            self.met = True
            text = flattened(text)
            if self.bug is not None:
                text = mutate(text, self.bug.old, self.bug.new)
        return super().function(Source(text, source.name, source.threads, source.shared))


def caught(kernel: str, bug: Planted, run: Callable[[Emulator], None]) -> None:
    right = Broken(kernel, None, 0)
    run(right)
    assert right.met, f"{kernel} is not among {right.launches}"

    def again(_: str, seed: int) -> None:
        run(Broken(kernel, bug, seed))

    bug.must_be_caught(bug.old, again)


def quantizes(name: str, x: Array, **options: Any) -> Callable[[Emulator], None]:
    fmt = lb.format(name)
    expected = reference.quantize(fmt, x, **options)

    def run(machine: Emulator) -> None:
        with launch.pretending(machine):
            got = quantize.quantize(fmt, x, **options)
        assert got is not None
        for part in ("codes", "scales", "zeros", "biases", "tensor_scale"):
            one, other = getattr(got, part), getattr(expected, part)
            same = one is None or one.tobytes() == other.tobytes()
            assert same, part  # of two long strings pytest would draw a diff, for minutes

    return run


def refuses(name: str, x: Array) -> Callable[[Emulator], None]:
    def run(machine: Emulator) -> None:
        with launch.pretending(machine):
            assert quantize.quantize(lb.format(name), x) is None

    return run


def dequantizes(w: reference.Packed, dtype: Any) -> Callable[[Emulator], None]:
    expected = np.empty(w.shape, dtype)
    reference.dequantize_to(w, expected)

    def run(machine: Emulator) -> None:
        out = machine.empty(w.shape, dtype)
        with launch.pretending(machine):
            dequantize.dequantize_to(w, out)
        same = out.tobytes() == expected.tobytes()
        assert same

    return run


def drawn(*shape: int, dtype: Any = np.float32) -> Array:
    return codes.rounded(np.random.default_rng(1).standard_t(4, shape), np.dtype(dtype))


def ties() -> Array:
    """Halves of a step that is 1: every number is one, or lies between two."""
    x = np.arange(-14, 15, dtype=np.float32).repeat(8)[:224].reshape(4, 56) / 2
    x[:, ::8] = 7
    return x


def not_finite() -> Array:
    x = drawn(3, 77)
    x[2, 76] = np.nan
    return x


ROW, TALL = drawn(9, 333), drawn(35, 77)
POSITIVE, ZEROS = np.abs(ROW) + 1, np.zeros((2, 64), np.float32)
# Next to the smallest numbers, so that scales underflow; and where they are subnormal.
TINY = (np.random.default_rng(2).integers(-3, 4, (4, 64)) * 2.0**-149).astype(np.float32)
SMALL = np.ldexp(ROW, -126)
SHORT = drawn(60, 640, dtype=BFLOAT16)  # so few bits that many quotients are ties
LARGE = drawn(2, 2035, dtype=BFLOAT16)
LARGE[np.arange(2), [1777, 2034]] = -50
WIDE, LONG = drawn(11, 5000), drawn(17, 2000)
WIDE[5] *= 10  # the first row of the second block
LONG[16, 1999] = 50
SQUARE = drawn(130, 136)

TWO_GROUPS, INSIDE = "across_lanes(found, 1 << log_group);", "begin < wide && column < columns"
SHUFFLE = f"            {TWO_GROUPS}\n"
LEAVE = "            if (!valid) continue;"
LEAVE_LINE = f"{LEAVE}  // no lane is waited for within the block's last row\n"
ROUNDED = "bits<u32>(add(y, 12582912.f))"
BIAS = "sub(low, mul(F::low(), step))"
MARKSTEIN = "__fmaf_rn(-__fmaf_rn(coder.step, guess, -v), coder.inverse, guess)"
COUNTED = "if constexpr (!F::bias && (!F::Zero::present || F::Zero::whole))"
KEY = "pattern ^ (u32(int(pattern) >> 31) | 0x80000000u)"
CLIPPED = "fminf(fmaxf(wanted, -F::Scale::most()), F::Scale::most())"
INDEX = "row * across + group, begin == 0"

IN_GROUPS = (
    (
        "int4_g32",
        ROW,
        "a group of twice as many lanes",
        TWO_GROUPS,
        TWO_GROUPS.replace("1 <", "2 <"),
    ),
    ("int4_g32", ROW, "a group of half as many lanes", "lanes / 2; d;", "lanes / 4; d;"),
    ("int4_g32", ROW, "scales of the next group", INDEX, INDEX.replace("group", "(group ^ 1)")),
    ("int4_g32", ROW, "rows not bounded", "= inside && row < rows;", "= inside;"),
    ("int4_g32", ROW, "columns not bounded", INSIDE, "begin < wide"),
    ("int4_g24", ROW, "idle lanes of a group take part", INSIDE, "column < columns"),
    (
        "int4_g32",
        ROW,
        "a short octet stored whole",
        "(count * width + 7) / 8, align",
        "width, align",
    ),
    (
        "int4_g32",
        ROW,
        "spare bits are not zero",
        "if (count < 8) stream &=",
        "if (false) stream &=",
    ),
    ("int4_g32", ROW, "lanes leave before the shuffle", SHUFFLE + LEAVE_LINE, LEAVE_LINE + SHUFFLE),
    (
        "int3_g32",
        ROW,
        "codes a bit too far",
        "code[i + 4] << i * Bits",
        "code[i + 4] << i * (Bits + 1)",
    ),
    ("int4_g32", ROW, "a word loaded twice", "u32*>(at + 4 * i)", "u32*>(at + 4 * (i & ~1))"),
    ("int4_g32", SHORT, "quotients by the reciprocal alone", MARKSTEIN, "guess"),
    ("int4_g32", ties(), "halves away from zero", ROUNDED, "u32(int(y + copysignf(.5f, y)))"),
    ("int4_g32", ties(), "halves down", ROUNDED, "u32(int(ceilf(y - .5f)))"),
    ("int4_g32", TINY, "a scale of zero for a tiny block", "wanted == 0.f && needed ?", "false ?"),
    ("int4_g32", ZEROS, "a scale of zero for zeros", "if (wanted == 0.f) wanted = 1.f;", ""),
    ("float6_e2m3fn_g32_bias", ROW, "a bias by fma", BIAS, "__fmaf_rn(-F::low(), step, low)"),
    ("int4_g32_bias", ROW, "a bias not subtracted", "return sub(v, coder.offset);", "return v;"),
    ("uint4_g32_asym", POSITIVE, "zero left out of the range", "low = fminf(low, 0.f), ", ""),
    ("uint4_g32_zf32", POSITIVE, "zero counted into the range", COUNTED, "if constexpr (true)"),
    ("uint4_g32_asym", ROW, "zero points cut off", "rintf(fminf", "truncf(fminf"),
    ("uint4_g32_asym", ROW, "another block's zero point", "index, zero)", "index ^ 1, zero)"),
    ("uint4_g32_asym", ROW, "negative numbers upside down", KEY, "pattern ^ 0x80000000u"),
    ("mxfp4", ROW, "powers rounded down", "exponent += part != 0;", ""),
    ("mxfp4", SMALL, "a subnormal's exponent", "down += 24;", "down += 23;"),
    ("float6_e2m3fn_g32", ROW, "units of subnormal codes", "max(size, first) &", "size &"),
    ("nf4_g32", ROW, "an edge of another level", "y > edge<3>(above)", "y > edge<2>(above)"),
    ("nf4_g32", ROW, "a short ladder's last code", "ull >> 4 * i", "ull >> 4 * (i & 7)"),
    ("nvfp4", ROW, "a step without the tensor scale", "step = mul(step, second);", ";"),
    ("nvfp4", ROW, "a block scale beyond its range", CLIPPED, "wanted * 1.01f"),
)
BARRIER = "    __syncthreads();\n#pragma unroll\n    for (int w = 0; w < Threads"
BLOCK = "blockIdx.x * across + blockIdx.y, threadIdx.x"
IN_TILES = (
    ("int8", LARGE, "no barrier between extremes", BARRIER, "    for (int w = 0; w < Threads"),
    ("int8", LARGE, "the last warp forgotten", "32; ++w) found", "32 - 1; ++w) found"),
    ("int8", LARGE, "octets held last", "high) take(found", "high && h + 1 < Held) take(found"),
    ("int8", LARGE, "an octet too many", "high == 1 ? i >= octets", "high == 1 ? i > octets"),
    ("fp8_128x128", SQUARE, "another block's scale", BLOCK, BLOCK.replace("+ b", "+ 1 - b")),
    ("fp8_128x128", SQUARE, "rows of short blocks", "int(min(tall, rows - top))", "int(tall)"),
    (
        "fp8_128x128",
        SQUARE,
        "columns of short blocks",
        "int(min(wide, columns - left))",
        "int(wide)",
    ),
)
EXTREMES, ENCODE = "extremes", "encode_rows"
PART = "min(min(top + part_rows, block_row * tall + tall), rows)"
LEFT = "top >= bottom || left >= end"
LANES = "for (u32 i = lane(); i < all; i += 32)"
SPREAD = "coder_of(blocks + whole_quotient(column + i, wide))"
APART = (
    (EXTREMES, "int4_5xall", WIDE, "parts beyond their block", PART, "min(top + part_rows, rows)"),
    (EXTREMES, "int8_tensor", LONG, "no last part", LEFT, f"{LEFT} || top + part_rows > rows"),
    (
        EXTREMES,
        "int8_tensor",
        LONG,
        "parts that overwrite",
        "atomicMax(most +",
        "atomicExch(most +",
    ),
    (EXTREMES, "int4_3x5_asym", TALL, "one octet a lane", LANES, "if (u32 i = lane(); i < 2)"),
    (EXTREMES, "int4_g20", TALL, "a row for a block", "across + block_column;", "across;"),
    (ENCODE, "int4_g20", TALL, "two blocks for one", "column + count <= (", "column < ("),
    (ENCODE, "int4_g20", TALL, "the first number's block", SPREAD, SPREAD.replace(" + i", "")),
    (
        ENCODE,
        "int4_3x5_asym",
        TALL,
        "blocks of rows",
        "whole_quotient(row, tall) * across",
        "row / tall",
    ),
    (ENCODE, "int4_3x5_asym", TALL, "rows not bounded", "if (row >= rows) return;", ""),
)


@pytest.mark.parametrize(("name", "x", "bug", "old", "new"), IN_GROUPS)
def test_bugs_in_groups(emulator: Emulator, name: str, x: Array, bug: str, old: str, new: str):
    caught("quantize_groups", Planted(bug, old, new), quantizes(name, x))


@pytest.mark.parametrize(("name", "x", "bug", "old", "new"), IN_TILES)
def test_bugs_in_tiles(emulator: Emulator, name: str, x: Array, bug: str, old: str, new: str):
    caught("quantize_tiles", Planted(bug, old, new), quantizes(name, x))


@pytest.mark.parametrize(("kernel", "name", "x", "bug", "old", "new"), APART)
def test_bugs_in_two_passes(
    emulator: Emulator, kernel: str, name: str, x: Array, bug: str, old: str, new: str
):
    caught(kernel, Planted(bug, old, new), quantizes(name, x))


@pytest.mark.parametrize(
    ("name", "bug", "old", "new"),
    [
        ("int4_g32", "magnitudes not looked at", "bad = !found.finite();", "bad = false;"),
        ("uint4_g32_asym", "extremes not looked at", "bad = !found.finite();", "bad = false;"),
        (
            "int4_g32",
            "nobody sets the flag",
            "if (writes && bad)",
            "if (writes && !bad && index < 0)",
        ),
        ("uint4_g32_asym", "NaN below all", "max(most, rest) <", "most <"),
    ],
)
def test_bugs_that_let_nan_pass(emulator: Emulator, name: str, bug: str, old: str, new: str):
    x = not_finite()
    x[2, 76] = -x[2, 76]
    caught("quantize_groups", Planted(bug, old, new), refuses(name, x))


PLACE = "row * scale_row + column * scale_column"
SIZE = "size = min(pattern & 0x7fffffffu, largest)"


@pytest.mark.parametrize(
    ("kernel", "name", "bug", "old", "new"),
    [
        ("given_rule", "uint4_g32_asym", "the first column's scale", PLACE, "row * scale_row"),
        ("given_rule", "uint4_g32_asym", "the first row's zero", "zero[row * zero_row +", "zero["),
        ("given_rule", "uint4_g32_asym", "zero points cut off", "int(rint(", "int(trunc("),
        (
            "given_rule",
            "int4_g32_bf16",
            "scales rounded twice",
            "narrow(odd(v)); }\n};\n\n",
            "narrow(float(v)); }\n};\n\n",
        ),
        (ENCODE, "fp8_g32", "numbers beyond the largest", SIZE, "size = pattern & 0x7fffffffu"),
        (ENCODE, "int4_g32", "quotients out of range", "fabsf(guess) <=", "0.f <="),
    ],
)
def test_bugs_under_scales_that_are_given(
    emulator: Emulator, kernel: str, name: str, bug: str, old: str, new: str
):
    rng = np.random.default_rng(3)
    scale, zero = rng.random((9, 11)) + 0.001, rng.random((9, 11)) * 15
    scale[0] = 1 + 2.0**-8 + 2.0**-40  # next to a tie of bfloat16
    x = ROW.copy()
    x[1] *= np.float32(1e37)
    scale[1] *= 2.0**-60
    options = {"scale": scale, "zero": zero} if "asym" in name else {"scale": scale}
    caught(kernel, Planted(bug, old, new), quantizes(name, x, **options))


def near_ties(name: str, mantissa: int) -> reference.Packed:
    """Products next to halves of a unit in the last place of a number of so many bits."""
    values = np.array([3, 5, 7, 11, 13, 15])
    number = np.arange(2 ** (mantissa - 1), 2**mantissa, 5)[:, None]
    scales = ((2 * number + 1) / 2.0**mantissa / values).astype(np.float32).reshape(-1, 1)
    fmt = lb.format(name)
    every = np.tile(np.arange(16, dtype=np.uint8), (len(scales), 1))
    zeros = np.zeros(scales.shape, np.float16) if fmt.zero is not None else None
    return reference.Packed(fmt, every.shape, codes.pack(every, 4), scales, zeros)


def some(name: str) -> reference.Packed:
    return random_qarray(lb.format(name), 16, 333, seed=1, spread=6.0)._rows()


ODD = "Out::narrow(bits<u32>(low) & 1 ? low : mul_up(left, right))"
FIRST = "second, blocks + first);"
EACH = "second, blocks + whole_quotient(column + i, wide)"
HALF = "{ return narrow(odd(v)); }\n};\nstruct Bfloat16"
SIGN = "bits<float>(code ^ (0x4b000000u | offset)) - (8388608.f + float(offset))"
TIES, TIES_ZERO = near_ties("uint4_row", 8), near_ties("uint4_row_zf16", 11)
DEQUANTIZE = (
    (TIES, BFLOAT16, "products rounded twice", ODD, "Out::narrow(left * right)"),
    (TIES, BFLOAT16, "products rounded down", ODD, "Out::narrow(low)"),
    (
        TIES,
        BFLOAT16,
        "the even one of two products",
        "bits<u32>(low) & 1 ?",
        "~bits<u32>(low) & 1 ?",
    ),
    (TIES_ZERO, np.float16, "float64 through float32", HALF, HALF.replace("odd(v)", "float(v)")),
    (some("uint4_g32_asym"), np.float32, "no zero points", "left = sub(v, block.zero);", ";"),
    (some("int4_g32"), np.float32, "another block", FIRST, FIRST.replace("first", "(first ^ 1)")),
    (some("int4_3x5"), np.float32, "one block for an octet", EACH, EACH.replace(" + i", "")),
    (
        some("int3_g32"),
        np.float32,
        "codes behind the end",
        "7) / 8, codes_align",
        "7 + 8) / 8, codes_align",
    ),
    (
        some("int4_g32"),
        np.float32,
        "values behind the row",
        "if (i < count) store_number",
        "store_number",
    ),
    (some("int5_g32"), np.float32, "no sign", SIGN, "bits<float>(code | 0x4b000000u) - 8388608.f"),
    (some("fp8_e5m2_g32"), np.float32, "an exponent too low", "u32(254 - Bias)", "u32(253 - Bias)"),
    (some("nvfp4"), np.float32, "no tensor scale", "right = second;", "right = 1.f;"),
    (some("int4_g32_bias"), np.float32, "no bias", "wide = add(wide, block.bias);", ";"),
)


@pytest.mark.parametrize(("w", "dtype", "bug", "old", "new"), DEQUANTIZE)
def test_bugs_in_dequantizing(
    emulator: Emulator, w: reference.Packed, dtype: Any, bug: str, old: str, new: str
):
    caught("dequantize_rows", Planted(bug, old, new), dequantizes(w, dtype))

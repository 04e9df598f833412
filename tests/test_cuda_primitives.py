"""CUDA's primitives do what their users think, in the emulator and on a GPU.

The layouts are those of CUTLASS (MMA_Traits, Copy_Traits), written as CuTe layouts and not as the
emulator has them. Sums are exact, so no rounding of a tensor core's own plays a part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from lowbit.kernels.cuda.launch import Source

Array = npt.NDArray[Any]
Launch = Callable[..., None]
TEXT = (Path(__file__).parent / "emulator/kernels/primitives.cu").read_text()


@pytest.fixture(params=[0, 3])
def run(launcher, request) -> Launch:
    """Launch a kernel of primitives.cu on one block of a warp, under two seeds of the emulator."""
    launcher.seed(request.param)

    def run(name: str, *args: Any, grid: int = 1, threads: int = 32) -> None:
        launcher.launch(Source(TEXT, name, threads), (grid,), (threads,), args)

    return run


def layout(shape: Any, stride: Any) -> Array:
    """CuTe layout ((thread modes), (value modes)): index by thread and value."""

    def flat(extents: tuple[int, ...], steps: tuple[int, ...]) -> Array:
        places = itertools.product(*map(range, extents[::-1]))
        return np.array([sum(i * k for i, k in zip(p[::-1], steps, strict=True)) for p in places])

    return flat(shape[0], stride[0])[:, None] + flat(shape[1], stride[1])[None, :]


# SM80_16x8x16 and SM80_16x8x32: indices row + rows * column of A, B (n, k), C.
K16 = {
    "A": layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
    "B": layout(((4, 8), (2, 2)), ((16, 1), (8, 64))),
}
K32 = {
    "A": layout(((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256))),
    "B": layout(((4, 8), (4, 2)), ((32, 1), (8, 128))),
}
C = layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
KINDS: list[tuple[str, Any, Any]] = [
    ("m16n8k16_f16", np.float16, np.float16),
    ("m16n8k16_bf16", ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    ("m16n8k32_s8", np.int8, np.int8),
    ("m16n8k32_u8s8", np.uint8, np.int8),
    ("m16n8k32_s8u8", np.int8, np.uint8),
    ("m16n8k32_e4m3", E4M3, E4M3),
    ("m16n8k32_e5m2", E5M2, E5M2),
    ("m16n8k32_e4m3e5m2", E4M3, E5M2),
    ("m16n8k32_e5m2e4m3", E5M2, E4M3),
]


@pytest.mark.parametrize(("name", "left", "right"), KINDS, ids=[k[0] for k in KINDS])
def test_mma_multiplies(launcher, run: Launch, name, left, right):
    if launcher.device.capability < 89 and right in (E4M3, E5M2):
        pytest.skip("tensor cores multiply fp8 from compute capability 8.9 on")
    rng, whole = np.random.default_rng(0), np.dtype(left).itemsize == 1 and "8" in str(left)
    k, traits = (16, K16) if np.dtype(left).itemsize == 2 else (32, K32)

    def numbers(dtype: Any, shape: tuple[int, int]) -> Array:
        if np.dtype(dtype).kind in "iu":
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        else:
            low, high = -4, 4  # exact in every type, and so are all sums
        found = rng.integers(low, high, shape, endpoint=True)
        found[0, :4] = low, high, low, high
        return found.astype(dtype)

    assert whole or left in (np.float16, ml_dtypes.bfloat16)
    a, b = numbers(left, (16, k)), numbers(right, (8, k))
    total = np.int32 if np.dtype(left).kind in "iu" else np.float32
    c = rng.integers(-1000, 1000, (16, 8)).astype(total)

    def fragment(matrix: Array, where: Array) -> Array:
        return np.ascontiguousarray(matrix.T.reshape(-1)[where])

    registers = fragment(c, C)
    words = [fragment(m, traits[t]).view(np.uint32) for m, t in ((a, "A"), (b, "B"))]
    run(f"mma<{name}>", *words, registers)
    got = np.empty(128, total)
    got[C.reshape(-1)] = registers.reshape(-1)
    want = a.astype(np.float64) @ b.astype(np.float64).T + c
    assert np.array_equal(got.reshape(8, 16).T, want)


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix_deals_rows_out(run: Launch, matrices, transpose):
    source = np.arange(64 * matrices, dtype=np.uint16).reshape(8 * matrices, 8)
    out = np.zeros((32, matrices), np.uint32)
    run(f"ldmatrix<{matrices}, {str(transpose).lower()}>", source.view(np.uint32), out)
    # SM75_U32xN_LDSM_N and SM75_U16xN_LDSM_T, in bits of 16-bit numbers.
    if transpose:
        want = layout(((4, 8), (1, 2, matrices)), ((256, 16), (1, 128, 1024)))
    else:
        want = layout(((32,), (2, matrices)), ((32,), (16, 1024)))
    assert np.array_equal(out.view(np.uint16).reshape(32, -1), want // 16)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(run: Launch, size):
    source = np.random.default_rng(0).integers(1, 256, (32, size), dtype=np.uint8)
    out = np.full((32, size), 99, np.uint8)
    run(f"cp_async<{size}>", source, out)
    kept = np.arange(size) < np.arange(32)[:, None]
    assert np.array_equal(out, np.where(kept, source, 0)[::-1])


def test_cp_async_groups_come_in_order(run: Launch):
    source, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    run("cp_async_groups", source, out)
    assert np.array_equal(out, source)


TYPES = {1: "unsigned char", 2: "unsigned short", 4: "unsigned", 8: "uint2", 16: "uint4"}


@pytest.mark.parametrize("size", TYPES)
def test_load_once(run: Launch, size):
    source = np.random.default_rng(0).integers(0, 256, (32, size), dtype=np.uint8)
    out = np.zeros_like(source)
    run(f"load_once<{TYPES[size]}>", source, out)
    assert np.array_equal(out, source)


def test_stores(run: Launch):
    source = np.random.default_rng(0).integers(0, 2**32, (32, 7), dtype=np.uint32)
    out = np.full((32, 8), 99, np.uint32)
    run("stores", source, out)
    assert (out[:, 1] == 99).all()
    assert np.array_equal(np.delete(out, 1, axis=1), source)


@pytest.mark.parametrize("table", [0xEA, 0x96, 0x1D])
def test_lop3(run: Launch, table):
    source = np.random.default_rng(0).integers(0, 2**32, (32, 3), dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    run(f"lop3<{table}>", source, out)
    a, b, c = (np.unpackbits(np.ascontiguousarray(v).view(np.uint8)) for v in source.T)
    want = np.packbits(table >> (4 * a.astype(int) + 2 * b + c) & 1)
    assert np.array_equal(out.view(np.uint8), want)


def test_bits_and_shuffles(run: Launch):
    source = np.random.default_rng(0).integers(0, 2**32, (32, 3), dtype=np.uint32)
    out = np.zeros((32, 12), np.uint32)
    run("bits", source, out)
    a, b, c = (v.astype(object) for v in source.T)
    pair, shift = a + b * 2**32, c % 32
    assert np.array_equal(out[:, 2], (pair >> shift) % 2**32)
    assert np.array_equal(out[:, 3], (pair << shift >> 32) % 2**32)
    pool = np.ascontiguousarray(source[:, :2]).view(np.uint8)
    digits = (source[:, 2, None] >> (4 * np.arange(4, dtype=np.uint32))) & 7
    want = np.take_along_axis(pool, digits.astype(np.intp), 1)
    assert np.array_equal(out[:, :1].copy().view(np.uint8), want)
    bytes_ = np.ascontiguousarray(source[:, :2]).view(np.int8).astype(np.int64).reshape(32, 2, 4)
    assert np.array_equal(out[:, 1], (bytes_.prod(1).sum(1) + source[:, 2]) % 2**32)
    text = [[f"{int(v):032b}" for v in row] for row in source]
    counts = [x.count("1") + 100 * y.find("1") + 10000 * (32 - z.rfind("1")) for x, y, z in text]
    assert np.array_equal(out[:, 4], counts)
    assert np.array_equal(out[:, 5], [int(x[::-1], 2) for x, _, _ in text])
    t, first = np.arange(32), source[:, 0]
    assert np.array_equal(out[:, 6], first[t ^ 5])
    assert np.array_equal(out[:, 7], first[np.where(t % 8 + 3 < 8, t + 3, t)])
    assert np.array_equal(out[:, 8], first[np.where(t % 16 >= 3, t - 3, t)])
    assert np.array_equal(out[:, 9], first[(t & -16) | (source[:, 1].astype(np.int64) & 15)])
    assert (out[:, 10] == sum(int(v & 1) << i for i, v in enumerate(first))).all()
    assert (out[:, 11] == 1).all()


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_a_fused_pair_is_rounded_once(run: Launch, name, dtype):
    rng, count = np.random.default_rng(0), 500
    ones = 2.0 ** rng.integers(-8, 8, (count, 3, 2)) * rng.uniform(1, 2, (count, 3, 2))
    numbers = (ones * rng.choice([-1, 1], ones.shape)).astype(dtype)
    # Just beside a tie: rounded to float first, these would become ties, and go to even.
    mantissa = 11 if dtype is np.float16 else 8
    eps = 2.0**-mantissa
    numbers[:20, 0], numbers[:20, 1] = 1 + 2 * eps, eps * (1 - 2 * eps * np.arange(1, 21))[:, None]
    numbers[:20, 2] = 1
    numbers[20:40, 0], numbers[20:40, 1] = 2.0**-12, 2.0**-12
    numbers[20:40, 2] = (1 + 2 * eps * np.arange(20))[:, None]
    # A tie but for a c that a double loses, too; in float16 it is 0.
    numbers[40, 0], numbers[40, 1], numbers[40, 2] = 1.5, 1 + 2.0**-7, (-(2.0**-100), 2.0**-100)
    numbers[41] = numbers[40] * np.array([[1], [-1], [1]], dtype)
    out = np.zeros((count, 2), dtype)
    run(f"fma_{name}", numbers.view(np.uint32), out.view(np.uint32), np.int32(count))
    for (a, b, c), got in zip(
        numbers.transpose(0, 2, 1).reshape(-1, 3), out.reshape(-1), strict=True
    ):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        miss = abs(Fraction(float(got)) - exact)
        for side in (-np.inf, np.inf):
            neighbour = np.nextafter(got, dtype(side))
            other = abs(Fraction(float(neighbour)) - exact)
            even = got.view(np.uint16) % 2 == 0
            assert miss < other or (miss == other and even), (a, b, c, got)


def test_every_fp8_code_becomes_its_half(run: Launch):
    e4m3, e5m2 = np.zeros((256, 2), np.float16), np.zeros((256, 2), np.float16)
    run("fp8", e4m3.view(np.uint32), e5m2.view(np.uint32))
    codes = np.stack([np.arange(256), 255 - np.arange(256)], 1).astype(np.uint8)
    for got, dtype in ((e4m3, E4M3), (e5m2, E5M2)):
        want = codes.view(dtype).astype(np.float16)
        assert np.array_equal(got, want, equal_nan=True)
        assert np.array_equal(np.signbit(got[got == 0]), np.signbit(want[want == 0]))


def test_conversions_saturate(run: Launch):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 2**31, -(2**31), 2**32, -1, 3e9, 1e20, -1e20, np.nan]
    source = np.array([*values, np.inf, -np.inf], np.float32)
    out = np.zeros((source.size, 4), np.int32)
    run("conversions", source, out, np.int32(source.size))
    known = np.where(np.isnan(source), 0, source).astype(np.float64)
    signed = np.clip(known, -(2**31), 2**31 - 1)
    assert np.array_equal(out[:, 0], np.rint(signed))
    assert np.array_equal(out[:, 1], np.trunc(signed))
    assert np.array_equal(out[:, 2].view(np.uint32), np.rint(np.clip(known, 0, 2**32 - 1)))
    of_double = np.where(np.isnan(source), -(2**31), np.rint(signed))
    assert np.array_equal(out[:, 3], of_double)


def test_the_last_block_sees_what_the_others_wrote(run: Launch):
    source = np.random.default_rng(0).integers(-100, 100, (7, 32), dtype=np.int32)
    partial, arrived, out = np.zeros_like(source), np.zeros(1, np.int32), np.zeros(32, np.int32)
    run("last_block", source, partial, arrived, out, grid=7)
    assert np.array_equal(out, source.sum(0))


def test_flags_order_memory(run: Launch):
    flag, data, out = np.zeros(1, np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    run("flags", flag, data, out, threads=64)
    assert np.array_equal(out, 3 * np.arange(31, -1, -1) + 1)

"""Layers fused with their quantization: the bits of the layer, rounded, then the reference's."""

from __future__ import annotations

from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from absence import absent
from emulator import Emulator, missing
from emulator_batch import Batch
from planted import Planted, flattened

import lowbit as lb
from lowbit.formats import codes, reference
from lowbit.kernels import layers
from lowbit.kernels.cuda import emit_quantize, fused, launch
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.declare import ACTIVATION_ERROR

Array = npt.NDArray[Any]
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
FORMATS = ("int8", "fp8_g128", "mxfp8", "int4_g32", "uint4_g16_asym", "int8_row_bias", "mxfp4")


def same(a: reference.Packed | None, b: reference.Packed) -> None:
    assert a is not None, "left to separate steps"
    for part in ("codes", "scales", "zeros", "biases"):
        one, other = getattr(a, part), getattr(b, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), part
            equal = one.tobytes() == other.tobytes()
            assert equal, part  # of two long strings pytest would draw a diff, for minutes


def drawn(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    return codes.rounded(np.random.default_rng(seed).standard_t(4, shape), DTYPES[dtype])


def within(gate: Array) -> tuple[Array, Array]:
    """What silu may be before its rounding, by its error bound."""
    relative, absolute = ACTIVATION_ERROR["silu"]
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = wide / (1 + np.exp(-wide))
    room = np.abs(exact) * relative + absolute
    return exact - room, exact + room


def settled(gate: Array) -> Array:
    """Replace numbers whose silu may be rounded in either of two ways by zero."""
    low, high = (codes.rounded(v, gate.dtype) for v in within(gate))
    return np.where(low == high, gate, np.zeros_like(gate))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """An emulator that knows the kernels of every format and dtype here."""
    reason = missing()
    if reason is not None:
        absent(reason)
    machine = Batch()
    with machine.noting(), launch.pretending(machine):
        for name, dtype in product(FORMATS, DTYPES):
            x = drawn((2, 520), dtype, 1)
            fused.silu_mul_quantize(x, x, lb.format(name))
            for residual in (None, x):
                fused.rmsnorm_quantize(x, x[0], 1e-6, lb.format(name), residual)
    return machine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_silu_mul(batch: Batch, name: str, dtype: str) -> None:
    """Exact where the bound of silu's error leaves one result."""
    fmt = lb.format(name)
    for seed, shape in enumerate([(3, 4, 520), (5, 33), (1, 1), (0, 8), (4, 0)]):
        batch.seed = seed
        gate, up = drawn(shape, dtype, 2), drawn(shape, dtype, 3)
        # Every float32 is within reach of two results, but for those of -0 and of large numbers.
        large = np.where(gate < 0, -0.0, 200 * np.abs(gate) + 200).astype(gate.dtype)
        gate = large if dtype == "float32" else settled(gate)
        with launch.pretending(batch):
            got = fused.silu_mul_quantize(gate, up, fmt).settled()
        same(got, reference.quantize(fmt, layers.silu_mul(gate, up)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_silu_of_every_number_of_16_bits(batch: Batch, dtype: str) -> None:
    """A row of one number y has the scale y / 127, which tells y."""
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])
    gate = every[np.isfinite(every.astype(np.float32))][:, None]
    up = np.ones_like(gate)
    with launch.pretending(batch):
        w = fused.silu_mul_quantize(gate, up, lb.format("int8")).settled()
    assert w is not None
    signed = w.codes.view(np.int8).astype(np.float64) * w.scales.astype(np.float64)
    low, high = (codes.rounded(v, gate.dtype).astype(np.float64) for v in within(gate))
    # The scale is rounded once; it may be the smallest number instead of none.
    room = np.abs(signed) * 2.0**-23 + 127 * 2.0**-149
    assert ((low - room <= signed) & (signed <= high + room)).all()
    assert len(np.unique(signed)) > 20_000


SIZES = [1, 7, 8, 33, 520, 2049, 8200, 16390]


@pytest.mark.parametrize("columns", SIZES)
def test_rmsnorm_of_rows_of_each_size(batch: Batch, columns: int) -> None:
    for name in ("int8", "mxfp8"):
        check_rmsnorm(batch, name, "bfloat16", (2, columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_rmsnorm(batch: Batch, name: str, dtype: str) -> None:
    for seed, shape in enumerate([(3, 4, 520), (0, 8), (4, 0)]):
        batch.seed = seed
        check_rmsnorm(batch, name, dtype, shape)


def check_rmsnorm(machine: Emulator, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    fmt = lb.format(name)
    x, other = drawn(shape, dtype, 4), drawn(shape, dtype, 5)
    weight = drawn(shape[-1:], dtype, 6)
    for residual in (None, other):
        with launch.pretending(machine):
            got, updated = fused.rmsnorm_quantize(x, weight, 1e-6, fmt, residual)
        if x.size:
            y, h = layers.rmsnorm(x, weight, 1e-6, residual)
        else:
            y = h = x
        same(got.settled(), reference.quantize(fmt, y))
        assert (updated is None) == (residual is None)
        if updated is not None:
            equal = updated.tobytes() == h.tobytes()
            assert equal


def test_rmsnorm_in_numpy_is_the_formula() -> None:
    """Against float64, with every float32 rounding counted."""
    x, weight = drawn((4, 3000), "float32", 7), drawn((3000,), "float32", 8)
    y, _ = layers.rmsnorm(x, weight, 1e-5)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    # The sum: 16 terms of a thread, 5 levels of lanes, 8 warps. Then mean, eps, root (which halves
    # what came before), reciprocal, two products; eps itself is rounded.
    roundings = (16 + 5 + 8 + 3) / 2 + 4
    assert (np.abs(y - exact) <= roundings * 2.0**-24 * 1.01 * np.abs(exact)).all()
    same_sum = (wide**2).sum(-1)
    assert np.allclose(layers.sum_of_squares(x), same_sum, rtol=29 * 2.0**-24, atol=0)


def test_weights_of_another_dtype_than_x(emulator: Emulator) -> None:
    x, weight = drawn((3, 264), "bfloat16", 9), drawn((264,), "float32", 10)
    with launch.pretending(emulator):
        got, _ = fused.rmsnorm_quantize(x, weight, 1e-6, lb.format("fp8"))
    same(got.settled(), reference.quantize(lb.format("fp8"), layers.rmsnorm(x, weight, 1e-6)[0]))


@pytest.mark.parametrize("columns", [520, 517])
def test_halves_of_one_array(batch: Batch, columns: int) -> None:
    fmt = lb.format("int8")
    both = settled(drawn((2, 3, 2 * columns), "bfloat16", 11))
    gate, up = both[..., :columns], both[..., columns:]
    with launch.pretending(batch):
        got = fused.silu_mul_quantize(gate, up, fmt).settled()
        norm, _ = fused.rmsnorm_quantize(gate, up[0, 0].copy(), 1e-6, fmt, up)
    same(got, reference.quantize(fmt, layers.silu_mul(gate, up)))
    expected = layers.rmsnorm(gate, up[0, 0], 1e-6, up)[0]
    same(norm.settled(), reference.quantize(fmt, expected))


def test_rows_that_lie_unevenly_are_named() -> None:
    x = drawn((3, 4, 8), "float32", 12)[:, :3]
    with pytest.raises(ValueError, match=r"gate: rows of shape \(3, 3, 8\) .* copy it first"):
        fused.rows_of(x, "gate")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_sets_the_flag(batch: Batch, value: float) -> None:
    fmt = lb.format("int8")
    good = drawn((3, 520), "bfloat16", 13)
    bad = good.copy()
    bad[1, 300] = value
    with launch.pretending(batch):
        for gate, up in ((bad, good), (good, bad)):
            assert fused.silu_mul_quantize(gate, up, fmt).settled() is None
        for x, weight, residual in ((bad, good[0], None), (good, bad[1], None),
                                    (bad, good[0], good), (good, good[0], bad)):  # fmt: skip
            pending, _ = fused.rmsnorm_quantize(x, weight, 1e-6, fmt, residual)
            assert pending.settled() is None


def test_a_sum_of_squares_beyond_float32_sets_the_flag(batch: Batch) -> None:
    x = np.full((2, 520), 1e30, np.float32)
    with launch.pretending(batch):
        pending, _ = fused.rmsnorm_quantize(x, np.ones(520, np.float32), 1e-6, lb.format("int8"))
    assert pending.settled() is None


def test_what_is_refused_is_refused_in_words() -> None:
    x = np.ones((2, 64), np.float32)
    int8 = lb.format("int8")
    assert fused.refuse(int8, x) is None
    assert fused.refuse(int8, x, "silu_mul") is None
    assert fused.refuse(lb.format("int4_g48"), x, "silu_mul") is None
    wide, half = np.ones((1, 40000), np.float16), np.ones((1, 20000), np.float32)
    for reason, name, array, kind in (
        ("worked on in float64", "int8", x.astype(np.float64), "rmsnorm"),
        ("between rows", "fp8_128x128", x, "silu_mul"),
        ("between rows", "nvfp4", x, "rmsnorm"),
        ("columns of x lie apart", "int8", x[:, ::2], "rmsnorm"),
        ("no thread block holds a group of 40000 columns", "int8", wide, "silu_mul"),
        ("no thread block holds a row of 40000 columns", "int8", wide, "rmsnorm"),
        ("no thread block holds a row of 20000 columns", "int8", half, "rmsnorm"),
        ("no thread block holds a group of 20000", "nf4_row", half.astype(np.float16), "silu_mul"),
        ("groups of 48 columns are not 8, 16, 32", "int4_g48", x, "rmsnorm"),
    ):  # fmt: skip
        said = fused.refuse(lb.format(name), array, kind)
        assert said is not None
        assert reason in said


class Swapped(Emulator):
    """Runs another text in place of a kernel's."""

    def __init__(self, text: str, seed: int) -> None:
        super().__init__(seed=seed)
        self.text = text

    def function(self, source: Source) -> Any:
        """Compile the text."""
        return super().function(Source(self.text, source.name, source.threads, source.shared))


PLANTED = (
    Planted("a residual that is not rounded", "X::narrow(add(own.number(i), other.number(i)))",
            "X::narrow(own.number(i))"),
    Planted("numbers behind the row's end in the sum", "if (i < count) sum", "sum"),
    Planted("no barrier in the sum", "    __syncthreads();\n    v = partial[0];\n#pragma unroll\n"
            "    for (int w = 1; w < Threads / 32; ++w) v = add", "    v = partial[0];\n"
            "    for (int w = 1; w < Threads / 32; ++w) v = add"),
    Planted("the last warp left out of the sum", "w < Threads / 32; ++w) v = add",
            "w < Threads / 32 - 1; ++w) v = add"),
    Planted("a factor that is not rounded to x's dtype",
            "X::number(X::narrow(mul(own.number(i), factor)))", "mul(own.number(i), factor)"),
    Planted("epsilon left out", "add(div(sum, float(columns)), epsilon)",
            "div(sum, float(columns))"),
    Planted("weights of another octet", "weight + column * weight_size",
            "weight + h * 8 * weight_size"),
    Planted("scales of the next row", "row * across + group, writes",
            "(row + 1) * across + group, writes"),
    Planted("extremes that are kept between groups", "found = Extremes<F::apart>();", ""),
)  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_planted_bugs_are_caught(batch: Batch, bug: Planted) -> None:
    del batch  # skips where there is no compiler
    fmt = lb.format("mxfp8")
    x, other = drawn((3, 2035), "bfloat16", 14), drawn((3, 2035), "bfloat16", 15)
    x[1], other[1] = x[1] * 2.0**-12, 0  # of the size of epsilon
    x[2, 1024:], other[2, 1024:] = x[2, 1024:] * 2.0**-9, 0  # what each thread holds last
    weight = drawn((2035,), "bfloat16", 16)
    kernel = fused._rmsnorm(emit_quantize.spec(fmt), "bfloat16", "bfloat16", 2035, True, True)

    def run(text: str, seed: int) -> None:
        machine = Swapped(text, seed)
        with launch.pretending(machine):
            got, updated = fused.rmsnorm_quantize(x, weight, 1e-6, fmt, other)
        y, h = layers.rmsnorm(x, weight, 1e-6, other)
        same(got.settled(), reference.quantize(fmt, y))
        assert updated is not None
        equal = updated.tobytes() == h.tobytes()
        assert equal

    run(flattened(kernel.text), 0)
    bug.must_be_caught(flattened(kernel.text), run)

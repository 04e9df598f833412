"""CUDA kernels quantize with the reference's bits: every format, block, memory, rule, schedule."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from absence import absent
from emulator import Emulator, missing
from emulator_batch import Batch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import checks
from lowbit.formats import Format, Scale, codes, declared, reference
from lowbit.formats.declare import Element, codebook
from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda import quantize as compiled
from lowbit.testing.strategies import MEMORY, formats, in_memory, lengths

Array = npt.NDArray[Any]
PARTS = ("codes", "scales", "zeros", "biases", "tensor_scale")
DTYPES = ("float32", "float16", "bfloat16")
VARIANTS = (
    "int4_g32_asym", "uint4_g16_asym_f16", "uint4_g8_zf16", "int8_row_zbf16", "uint2_g16_zf32",
    "uint4_g8_zint8", "int4_g8_asym_e4m3", "uint3_g8_bias", "int6_row_bias_bf16", "int4_4x4",
    "int8_3x5_asym", "float8_e4m3fn_128x128", "nf4_allx16", "float6_e3m2fn_2xall", "int5_tensor",
    "uint8_tensor_asym_e8m0", "float4_e2m1fn_g16_e4m3", "int4_g32_ts", "nvfp4_2x8", "mxfp4_4x16",
    "mxfp8_g1", "int3_g1000", "fp8_tensor_bf16", "int4_g64_f16", "int7_g128_bf16", "int2_g20",
    "fp4_g256_f16", "uint5_allx3_asym", "fp8_tensor", "nf4_tensor_f16", "int8_g16_e8m0_ts",
    "int4_g24", "int1_g40", "uint6_2x24_asym_f16",
)  # fmt: skip
EVERY = [*declared(), *VARIANTS]
FINE = codebook("fine", [*np.linspace(-1, 1, 200), *np.linspace(2, 9, 55), -0.0])
USER = {"tiny_edge": codebook("tiny_edge", [2.0**-65, 0.0, 1.0, 0.5]), "fine": FINE}


def same(a: reference.Packed, b: reference.Packed, note: str = "") -> None:
    """Two arrays of the same bits in every part."""
    for part in PARTS:
        one, other = getattr(a, part), getattr(b, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), part
            assert one.tobytes() == other.tobytes(), f"{note} {part}"


def sided(fmt: Format, x: Array) -> Array:
    """Numbers that the element can hold: unsigned ones take no negative, int1 no positive."""
    if fmt.zero is None and not fmt.bias:
        if fmt.element.min == 0:
            return np.abs(x)
        if fmt.element.max == 0:
            return -np.abs(x)
    return x


def narrowed(x: Array, dtype: str) -> Array:
    return codes.rounded(x, checks.float_dtype(dtype, "dtype"))


def drawn(fmt: Format, shape: tuple[int, ...], dtype: str, seed: int = 1) -> Array:
    x = np.random.default_rng(seed).standard_t(4, shape).astype(np.float32)
    return narrowed(sided(fmt, x), dtype)


def check(machine: Emulator, fmt: Format, x: Array, note: str = "", **options: Any) -> None:
    with launch.pretending(machine):
        got = compiled.quantize(fmt, x, **options)
    assert got is not None, "left to the reference"
    same(got, reference.quantize(fmt, x, **options), note or fmt.name)


def same_or_refused(machine: Emulator, fmt: Format, x: Array, note: str = "") -> bool:
    """Whether the kernels settled it; they may leave to the reference what it can do."""
    with launch.pretending(machine):
        got = compiled.quantize(fmt, x)
    try:
        expected = reference.quantize(fmt, x)
    except ValueError:
        assert got is None, note
        return False
    if got is not None:
        same(got, expected, note)
    return got is not None


@pytest.fixture(scope="module")
def batch() -> Batch:
    """An emulator that knows the kernels of every format and dtype."""
    reason = missing()
    if reason is not None:
        absent(reason)
    machine = Batch()
    with machine.noting(), launch.pretending(machine):
        for name in EVERY:
            fmt = lb.format(name)
            for dtype in DTYPES:
                for shape in ((2, 35, 299), (4, 70)):
                    compiled.quantize(fmt, drawn(fmt, shape, dtype))
    return machine


# Whole arrays.


@pytest.mark.parametrize("name", EVERY)
def test_every_format(batch: Batch, name: str) -> None:
    fmt = lb.format(name)
    for seed, dtype in enumerate(DTYPES):
        batch.seed = seed
        check(batch, fmt, drawn(fmt, (2, 35, 299), dtype))


@pytest.mark.parametrize("name", EVERY)
def test_every_magnitude(batch: Batch, name: str) -> None:
    """Subnormal and huge rows, zeros of both signs, columns of one number; refusals are equal."""
    fmt = lb.format(name)
    rng = np.random.default_rng(3)
    for dtype in DTYPES:
        info: Any = ml_dtypes.finfo(checks.float_dtype(dtype, "dtype"))
        powers = np.linspace(int(info.minexp) - int(info.nmant), int(info.maxexp) - 3, 14)
        settled = 0
        for power in powers:
            with np.errstate(under="ignore"):
                x = rng.standard_normal((4, 70)) * 2.0 ** float(power)
            x[1] = rng.choice([0.0, -0.0, float(info.smallest_subnormal), float(info.max)], 70)
            x[2, 40:] = 0.0
            x[3] = np.abs(x[3, 0])
            x = np.clip(x, -float(info.max), float(info.max))
            x = narrowed(sided(fmt, x.astype(np.float32)), dtype)
            settled += same_or_refused(batch, fmt, x, f"{dtype} {power}")
        if dtype == "float16" and fmt.scale.element == "float32" and not fmt.bias:
            assert settled == len(powers)


@settings(max_examples=12)
@given(st.data())
def test_drawn_formats_shapes_and_memory(data: st.DataObject) -> None:
    fmt = lb.format(data.draw(formats()))
    shape = data.draw(st.tuples(lengths(70), lengths(300)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 6, (shape[0], 1))
    x[rng.random(shape) < data.draw(st.sampled_from([0, 0.5, 1]))] = 0.0
    x = narrowed(sided(fmt, x.astype(np.float32)), data.draw(st.sampled_from(DTYPES)))
    x = in_memory(x, data.draw(st.sampled_from(MEMORY)))
    if compiled.refuse(fmt, x) is None:
        same_or_refused(Emulator(seed=data.draw(st.integers(0, 99))), fmt, x)


COMMON = (
    "int4",
    "nvfp4",
    "int8",
    "fp8",
    "mxfp4",
    "uint4_g16_asym_f16",
    "int8_3x5_asym",
    "uint3_g8_bias",
)


@settings(max_examples=60)
@given(st.data())
def test_drawn_shapes_and_memory_of_common_formats(data: st.DataObject) -> None:
    """Compiled once, so that many examples cost little."""
    fmt = lb.format(data.draw(st.sampled_from(COMMON)))
    shape = data.draw(st.tuples(lengths(70), lengths(300)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    x = drawn(fmt, shape, data.draw(st.sampled_from(DTYPES)), seed)
    x = in_memory(x, data.draw(st.sampled_from(MEMORY)))
    if compiled.refuse(fmt, x) is None:
        same_or_refused(_kept, fmt, x)


_kept = Emulator(seed=7)


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "fp8", "int8_3x5_asym", "int5_tensor"])
def test_rows_that_lie_apart(batch: Batch, name: str) -> None:
    """Misaligned views, rows with gaps, backwards, one row many times: read where they are."""
    fmt = lb.format(name)
    for dtype in DTYPES:
        x = drawn(fmt, (24, 300), dtype)
        once = np.broadcast_to(x[:1], (24, 300))
        for rows in (x[::-1], x[::3, 5:250], x[:, 1:], x[:, 2:298], once, x[:, None][::-1],
                     x.T, x[:, ::-2]):  # fmt: skip
            check(batch, fmt, rows)


SHAPES = [(1, 9000), (1, 20000), (300, 7), (0, 5), (5, 0), (2, 0, 8), (1, 1), (2, 3, 2, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_far_from_square(batch: Batch, shape: tuple[int, ...]) -> None:
    for name in ("int4_g32", "int8_tensor", "int3_allx16", "nvfp4", "fp8"):
        fmt = lb.format(name)
        check(batch, fmt, drawn(fmt, shape, "bfloat16"))


def test_blocks_that_registers_hold_and_those_they_do_not() -> None:
    def chosen(name: str, rows: int, columns: int, size: int = 2) -> str:
        tall, wide = lb.format(name).scale.block
        block = min(tall or rows, rows), min(wide or columns, columns)
        plan = compiled.plan(block, (rows, columns), size)
        return f"{plan.kernel} {plan.threads} {plan.held}" if plan else "twice"

    assert chosen("int4_g128", 4096, 4096) == chosen("mxfp4", 1, 40) == "quantize_groups 256 2"
    assert chosen("int8", 4096, 256) == "quantize_groups 256 2"
    assert chosen("int8", 4096, 2048) == "quantize_tiles 128 2"
    assert chosen("fp8", 4096, 8192) == "quantize_tiles 256 4"
    assert chosen("fp8_128x128", 4096, 8192) == "quantize_tiles 256 8"
    assert chosen("fp8", 4096, 32768) == "quantize_tiles 512 8"
    assert chosen("fp8", 4096, 32768, 4) == chosen("int8_tensor", 4096, 4096) == "twice"
    assert chosen("int2_g20", 64, 64) == chosen("int4_3x5", 64, 64) == "twice"
    assert chosen("int2_g20", 64, 20) == "quantize_groups 256 2"


@pytest.mark.parametrize("columns", [2040, 2049, 8190, 8200, 16000, 16400, 32768])
def test_rows_of_each_size_of_tile(batch: Batch, columns: int) -> None:
    """The largest number stands in each warp's part in turn."""
    fmt = lb.format("int8")
    x = drawn(fmt, (3, columns), "bfloat16")
    x[np.arange(3), np.arange(3) * 777 % columns] = -100
    check(batch, fmt, x)


@pytest.mark.parametrize("shape", [(130, 128), (256, 264), (129, 8), (7, 1000)])
def test_square_blocks(batch: Batch, shape: tuple[int, int]) -> None:
    for name in ("fp8_128x128", "int4_64x64", "uint4_16x128_asym"):
        fmt = lb.format(name)
        check(batch, fmt, drawn(fmt, shape, "bfloat16"))


@pytest.mark.parametrize("seed", range(6))
def test_bits_do_not_depend_on_the_schedule(batch: Batch, seed: int) -> None:
    batch.seed = seed
    for name in ("int4_g32", "fp8", "int8_tensor", "uint4_g16_asym_f16", "nvfp4", "fp8_128x128"):
        fmt = lb.format(name)
        check(batch, fmt, drawn(fmt, (70, 520), "bfloat16", seed=seed))


# Numbers.


def whole_types() -> list[Element]:
    found = {lb.format(name).element for name in declared()}
    return [*sorted(found, key=lambda e: e.name), *USER.values()]


@pytest.fixture(scope="module")
def casts() -> Batch:
    """An emulator that knows the casts of every element."""
    machine = Batch()
    with machine.noting(), launch.pretending(machine):
        for element in whole_types():
            for x in patterns(element):
                compiled.quantize(Format(element, Scale("float32", (None, None))), x, scale=1.0)
    return machine


def patterns(element: Element) -> list[Array]:
    """All finite 16-bit numbers, and float32 around each place where rounding changes over."""
    every = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    found = [every.view(np.float16), every.view(ml_dtypes.bfloat16)]
    steps = codes.ladder(element)
    middles = np.concatenate([steps.edges, steps.values, [steps.low_limit, steps.high_limit]])
    with np.errstate(over="ignore"):
        near = middles.astype(np.float32).view(np.int32)
    around = (near[:, None] + np.arange(-3, 4)).astype(np.int32).view(np.float32)
    found.append(np.concatenate([around, -around]).reshape(1, -1))
    for x in found:
        x[~np.isfinite(x.astype(np.float32))] = 0
    return found


@pytest.mark.parametrize("element", whole_types(), ids=lambda e: e.name)
def test_every_number_of_16_bits_and_those_next_to_ties(casts: Batch, element: Element) -> None:
    fmt = Format(element, Scale("float32", (None, None)))
    for x in patterns(element):
        check(casts, fmt, x, element.name, scale=1.0)


def test_quotients_and_offsets_next_to_ties(batch: Batch) -> None:
    rng = np.random.default_rng(4)
    for name in ("int4_g32", "uint4_g16_asym_f16", "int8", "fp8", "mxfp4", "uint4_g8_zf16"):
        fmt = lb.format(name)
        base = rng.standard_normal((16, 320)).astype(np.float32)
        w = reference.quantize(fmt, base)
        step = reference.spread(reference._step(fmt, w.scales, None, np.dtype("f4")),
                                fmt.scale.block, (16, 320))  # fmt: skip
        values = reference.dequantize(w).astype(np.float32)
        near = values + step * np.float32(0.5)
        nudge = rng.integers(-2, 3, near.shape) * (np.abs(near) > 1e-6)
        moved = (near.view(np.int32) + nudge).astype(np.int32)
        x = np.clip(moved.view(np.float32), base.min(), base.max())
        x[:, ::8] = base[:, ::8]
        check(batch, fmt, x.astype(np.float32))


def test_tiny_quotients_are_exact_where_an_element_tells_them_apart(emulator: Emulator) -> None:
    """Quotients on the edge 2**-66, of numerators whose remainders are no float32."""
    fmt = Format(USER["tiny_edge"], Scale("float32", (1, None)))
    numerators = np.random.default_rng(12).integers(2**17, 2**18, 500) * 2.0**-149
    x = np.stack([numerators * 2.0**66, numerators, numerators * 3], 1).astype(np.float32)
    check(emulator, fmt, x)


def test_a_codebook_of_many_numbers(emulator: Emulator) -> None:
    fmt = Format(FINE, Scale("bfloat16", (1, 48)))
    check(emulator, fmt, np.abs(drawn(fmt, (5, 200), "float32")))


def test_a_zero_of_either_sign_in_a_block_with_a_bias(batch: Batch) -> None:
    """Which one NumPy takes for the least is its own affair."""
    fmt = lb.format("uint3_g8_bias")
    x = np.random.default_rng(5).random((20, 64)).astype(np.float32)
    x[:, 3] = 0.0
    check(batch, fmt, x)
    x[:, 5] = -0.0
    with launch.pretending(batch):
        assert compiled.quantize(fmt, x) is None


RULES: list[tuple[str, dict[str, Any]]] = [
    ("int4_g32", {"method": "fullrange"}),
    ("int4_g32", {"method": "signed_max"}),
    ("int8_row", {"method": "signed_max"}),
    ("mxfp4", {"method": "floor"}),
    ("mxfp6", {"method": "ceil"}),
    ("mxfp8", {"method": "even"}),
    ("mxfp8", {"method": "rceil"}),
    ("uint8_g32_e8m0", {"method": "even"}),
    ("int8_tensor", {"scale": np.float64(0.02)}),
    ("int8_tensor", {"scale": np.float64(-0.02)}),
    ("int4_g32", {"scale": np.full((2, 33, 1), 0.1)}),
    ("int4_g32", {"scale": np.full((2, 33, 1), -0.1)}),
    ("int4_g32_bf16", {"scale": np.linspace(0.1, 0.3, 660).reshape(2, 33, 10)}),
    ("int4_g32_f16", {"scale": np.linspace(1e-7, 0.3, 660).reshape(2, 33, 10)}),
    ("float4_e2m1fn_g32_e4m3", {"scale": np.linspace(0.002, 1, 660).reshape(2, 33, 10)}),
    ("mxfp4", {"scale": np.geomspace(1e-38, 1e38, 660).reshape(2, 33, 10)}),
    ("uint4_g32_asym", {"scale": np.float64(0.1), "zero": np.float64(7)}),
    ("uint4_g32_asym", {"scale": np.float64(0.1)}),
    ("uint4_g32_bias", {"scale": np.float64(0.1)}),
    ("uint4_g32_zf16", {"scale": np.float64(1e-30), "zero": np.float64(7.25)}),
    ("uint4_g32_zbf16", {"scale": np.float64(0.1), "zero": np.linspace(0, 9, 33)[:, None]}),
    ("nvfp4", {"scale": np.array([0.001, 0.02])}),
    ("fp8_128x128", {"scale": np.float64(0.5)}),
    ("fp8_3x5", {"scale": np.linspace(0.01, 1, 2 * 11 * 58).reshape(2, 11, 58)}),
    ("fp8_tensor", {"scale": np.float64(2.0**-69)}),
]  # fmt: skip


@pytest.fixture(scope="module")
def rules() -> Batch:
    """An emulator that knows the kernels of RULES."""
    machine = Batch()
    with machine.noting(), launch.pretending(machine):
        for name, options in RULES:
            fmt = lb.format(name)
            compiled.quantize(fmt, drawn(fmt, (2, 33, 290), "float32"), **options)
    return machine


@pytest.mark.parametrize(("name", "options"), RULES)
def test_rules_and_scales_that_are_given(rules: Batch, name: str, options: dict[str, Any]) -> None:
    fmt = lb.format(name)
    x = drawn(fmt, (2, 33, 290), "float32", seed=6)
    check(rules, fmt, x, **options)
    if all(np.ndim(options.get(part, 0)) == 0 for part in ("scale", "zero")):
        check(rules, fmt, x[:, ::2, 3:], **options)


def test_given_scales_that_carry_quotients_out_of_range(emulator: Emulator) -> None:
    """Infinite quotients saturate, as the division that overflows does."""
    x = np.array([[1e30, -1e30, 3e38, 1e-10, 0, -3e38, 1e20, 2.0**-100]], np.float32)
    for scale in (1e-20, 1e-9, 1e-38, 1e-44, 3e38):
        check(emulator, lb.format("int8_tensor"), x, scale=np.asarray(scale))
    check(emulator, lb.format("nvfp4"), x, scale=np.asarray(1e-30))
    # A zero point that brings a quotient of 2**100 back into range.
    x[0, :4] = 2.0**29
    step, zero = np.asarray(2.0**-71), np.asarray(-(2.0**100))
    check(emulator, lb.format("uint4_row_zf32"), x, scale=step, zero=zero)


# What is left to the reference.


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g16_asym_f16", "int8_tensor", "nvfp4", "fp8"])
def test_what_is_not_finite_is_found_wherever_it_stands(batch: Batch, name: str) -> None:
    fmt = lb.format(name)
    for dtype in DTYPES:
        x = drawn(fmt, (9, 77), dtype)
        for at in ((0, 0), (8, 76), (4, 63), (3, 64)):
            for value in (np.nan, -np.nan, np.inf, -np.inf):
                bad = x.copy()
                bad[at] = value
                with launch.pretending(batch):
                    assert compiled.quantize(fmt, bad) is None
        check(batch, fmt, x)


def test_what_is_not_finite_is_found_under_scales_that_are_given(rules: Batch) -> None:
    for name, scale in (("int8_tensor", 0.02), ("uint4_g32_asym", 0.1)):
        for value in (np.nan, np.inf, -np.inf):
            x = drawn(lb.format(name), (33, 290), "float32")
            x[7, 11] = value
            with launch.pretending(rules):
                assert compiled.quantize(lb.format(name), x, scale=np.asarray(scale)) is None


def test_data_of_the_wrong_sign_and_scales_beyond_their_type(emulator: Emulator) -> None:
    x = np.ones((8, 64), np.float32)
    for name, value in (("uint4_g32", -1.0), ("int1_g32", 1.0), ("int4_g32_f16", 1e6),
                        ("int2_g32_e8m0", 3e38), ("int4_g32_e4m3", 1e5)):  # fmt: skip
        fmt = lb.format(name)
        good = sided(fmt, x)
        check(emulator, fmt, good)
        bad = good.copy()
        bad[7, 63] = value
        with launch.pretending(emulator):
            assert compiled.quantize(fmt, bad) is None
        with pytest.raises(ValueError, match="quantize:"):
            reference.quantize(fmt, bad)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("int8_tensor", 1e-60), ("int8_tensor_f16", 1e6), ("float4_e2m1fn_g16_e4m3", 1e4),
     ("mxfp4", 1e-60), ("nvfp4", 1e-60), ("mxfp4", -1.0), ("mxfp4", 3e38)],
)  # fmt: skip
def test_scales_that_cannot_be_kept(emulator: Emulator, name: str, scale: float) -> None:
    x = np.ones((2, 64), np.float32)
    with launch.pretending(emulator):
        assert compiled.quantize(lb.format(name), x, scale=np.asarray(scale)) is None
    with pytest.raises(ValueError, match="scale"):
        reference.quantize(lb.format(name), x, scale=np.asarray(scale))


def test_what_is_refused_is_refused_in_words() -> None:
    x = np.ones((2, 64), np.float32)
    int4 = lb.format("int4_g32")
    assert compiled.refuse(int4, x) is None
    for reason, fmt, array, options in (
        ("float64 data are worked on in float64", int4, x.astype(np.float64), {}),
        ("draws a random number", int4, x, {"rounding": "stochastic"}),
        ("looks at each number once more", int4, x, {"overflow": "raise"}),
        ("tries many scales", int4, x, {"method": "mse"}),
        ("the extremes of every block at once", lb.format("int4_asym_ts"), x, {}),
    ):
        said = compiled.refuse(fmt, array, **options)
        assert said is not None
        assert reason in said


def test_nothing_waits_before_the_flag_is_looked_at(batch: Batch) -> None:
    fmt = lb.format("int4_g32")
    x = drawn(fmt, (9, 77), "float32")
    x[3, 3] = np.nan
    with launch.pretending(batch):
        pending = compiled.enqueue(fmt, x)
    assert pending.flag.shape == (1,)
    assert pending.settled() is None

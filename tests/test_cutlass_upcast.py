"""Narrow weights on CUTLASS: what is launched, read back from the arguments, computed in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from absence import needs_headers
from host import Watching
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import OfMixed

import lowbit as lb
from lowbit import kernels
from lowbit.formats import reference
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import launch
from lowbit.kernels.cutlass import tiles, upcast, weights
from lowbit.testing import magnitudes

Array = Any
NUMBERS: dict[str, Any] = {
    "cutlass::bfloat16_t": ml_dtypes.bfloat16, "cutlass::half_t": np.float16, "float": np.float32,
    "int8_t": np.int8, "cutlass::float_e4m3_t": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
DTYPES: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
}  # fmt: skip
HOPPER = "cuda:90:132"
WEIGHTS = {
    "upcast16": [
        "int4_g128", "int4_g64_bf16", "int4_g128_f16", "int4_g64_asym", "uint4_g128_asym",
        "uint4_g64_asym_bf16", "uint4_g64_zint8", "uint4_g64_bias", "int8_g64_asym", "int8_row",
        "int8_row_asym", "int4_row_f16", "uint4_row_asym", "fp8_row", "fp8_g128", "fp8_128x128",
        "int4_tensor", "int4_row_bias",
    ],
    "upcast_int8": ["int4_row", "int4_tensor", "uint4_row", "uint4_row_asym", "int4_row_bf16_asym"],
    "upcast_float8": [
        "int4_row", "uint4_tensor", "int4_g128_e4m3", "int4_g256_e4m3_ts", "int4_16x128_e4m3",
    ],
    "upcast_float8_scaled": ["int4_g128_e4m3", "int4_g256_e4m3_ts", "int4_16x128_e4m3"],
}  # fmt: skip
X = {
    "upcast16": ["bfloat16", "float16"],
    "upcast_int8": ["int8_row", "int8_tensor"],
    "upcast_float8": ["fp8_row", "fp8_tensor"],
    "upcast_float8_scaled": ["fp8_row", "fp8_tensor"],
}


def placed(array: Array) -> Array:
    """The same at a multiple of 16 bytes, as a GPU's memory is."""
    raw = np.zeros(array.nbytes + 16, np.uint8)
    at = -raw.ctypes.data % 16
    found = raw[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


def packed(fmt: str, rows: int, columns: int, seed: int) -> tuple[Any, Array, Array]:
    """Random parts, their values, and the sizes that errors grow with."""
    made = lb.testing.random_qarray(fmt, rows, columns, seed=seed)
    values, found = made.dequantize(np.float64), magnitudes.pieces(made)
    sizes = found.values * found.tensor_scale
    return replace(made._parts, codes=placed(made._parts.codes)), values, sizes


def left(x: str, m: int, k: int) -> tuple[Any, Array, Array]:
    """x as a kernel takes it, its format or dtype, its values."""
    if x in DTYPES:
        dense = placed(np.random.default_rng(1).standard_normal((m, k)).astype(DTYPES[x]))
        return dense, x, dense.astype(np.float64)
    parts, values, _ = packed(x, m, k, 1)
    return parts, parts.format, values


@needs_headers
@pytest.mark.parametrize(
    ("family", "fmt"), [(family, fmt) for family, names in WEIGHTS.items() for fmt in names]
)
@settings(deadline=None, max_examples=12)
@given(st.data())
def test_what_is_launched_computes_the_product(family: str, fmt: str, data: st.DataObject) -> None:
    x_fmt = data.draw(st.sampled_from(X[family]))
    m, n = data.draw(st.sampled_from([1, 9, 40, 130, 300])), 8 * data.draw(st.integers(1, 40))
    k = data.draw(st.sampled_from([320, 704, 96, 1024]))
    # Sums of 8-bit numbers reach beyond float16.
    out_dtype = data.draw(
        st.sampled_from(["bfloat16", "float32", "float16"][: 3 - (x_fmt not in DTYPES)])
    )
    activation = data.draw(st.sampled_from([None, "relu"]))
    alpha = data.draw(st.sampled_from([1.0, -0.75]))
    x, x_kind, left_values = left(x_fmt, m, k)
    w, values, sizes = packed(fmt, n, k, 2)
    rng = np.random.default_rng(3)
    bias = placed(rng.standard_normal(n, np.float32)) if data.draw(st.booleans()) else None
    residual = None
    if data.draw(st.booleans()):
        residual = placed(rng.standard_normal((m, n)).astype(DTYPES[out_dtype]))
    p = Problem(
        m, n, k, x_kind, w.format, out_dtype, bias is not None, activation,
        None if residual is None else out_dtype, device=HOPPER,
    )  # fmt: skip
    kernel = {each.name: each for each in upcast.KERNELS}[f"matmul.cutlass.{family}"]
    refusal = kernel.accepts(p)
    if refusal is not None:
        assert "float16's range" in refusal
        return
    out = placed(np.zeros((m, n), DTYPES[out_dtype]))
    machine = Watching(launch.parse(HOPPER))
    with launch.pretending(machine):
        run = kernel.build(p)(w)
        run(x, Epilogue(alpha, bias, activation, residual), out)
    ((source, grid, argument),) = machine.launched
    assert source.headers == "cutlass"
    assert np.prod(grid) <= 132
    spec = upcast.FAMILIES[family].spec_of(p)
    assert source == upcast.source(spec)
    launched = OfMixed(spec, argument)
    launched.compute()
    found, multiplied, plain = kernel.roundings(p), launched.weights(), reference.centred(w)
    if not w.format.bias:
        assert not multiplied[plain == 0].any()
    if not found.weight:
        assert (multiplied == plain).all()
    elif not found.flushed:
        scaled = multiplied * launched.vector("w_scale", n)[:, None].astype(np.float64)
        assert (np.abs(scaled - values) <= found.weight * sizes).all()
    wanted = alpha * left_values @ values.T + (0 if bias is None else bias)
    size = abs(alpha) * np.abs(left_values) @ sizes.T + (0 if bias is None else np.abs(bias))
    wanted = np.maximum(wanted, 0) if activation else wanted
    wanted = wanted if residual is None else wanted + residual.astype(np.float64)
    size = size if residual is None else size + np.abs(residual.astype(np.float64))
    # Sums are exact here: what remains are w's values and what follows the sum.
    error = (found.weight + 8 * 2.0**-24) * size
    if found.flushed:
        error += abs(alpha) * found.flushed * np.abs(x.scales[:, :1]) * k
    narrow = DTYPES[out_dtype]
    low, high = ((wanted + sign * error).astype(np.float32) for sign in (-1, 1))
    got = out.astype(np.float32)
    assert (low.astype(narrow).astype(np.float32) <= got).all()
    assert (got <= high.astype(narrow).astype(np.float32)).all()


@given(st.integers(0, 2**32 - 1))
def test_int4_as_an_index_and_a_sign(seed: int) -> None:
    """CUTLASS's table: -8 to -1 stay, and n, 1 to 7, has the low bits of -n."""
    codes = np.random.default_rng(seed).integers(0, 256, 64, np.uint8)
    wanted = {code: 8 - code if 0 < code < 8 else code for code in range(16)}
    found = weights.recoded(codes)
    for nibble in (0, 4):
        halves = ((each >> nibble) & 15 for each in (codes, found))
        for code, index in zip(*halves, strict=True):
            assert index == wanted[int(code)]


def selected(low: int, high: int, selector: int) -> int:
    """The instruction prmt: bytes of two words by nibbles."""
    held = low | high << 32
    return sum((held >> 8 * ((selector >> 4 * i) & 7) & 255) << 8 * i for i in range(4))


def test_float8_without_its_dtype() -> None:
    codes = np.arange(256, dtype=np.uint8)
    wanted, found = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32), weights._float8s(codes)
    np.testing.assert_array_equal(found, wanted)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.signbit(found[finite]), np.signbit(wanted[finite]))


def test_tables_give_codes_times_scales() -> None:
    """What CUTLASS's kernel does with a table and recoded codes, in Python."""
    scales = np.arange(256, dtype=np.uint8).reshape(-1, 2)
    machine = Watching(launch.parse(HOPPER))
    table = weights.tabled(machine, scales).reshape(2, -1, 8)[:, : len(scales)]
    four_codes = np.array([[0x10, 0x32], [0x54, 0x76], [0x98, 0xBA], [0xDC, 0xFE]], np.uint8)
    narrow = ml_dtypes.float8_e4m3fn
    for (group, row), codes in ((at, c) for at in np.ndindex(table.shape[:2]) for c in four_codes):
        word = int(weights.recoded(codes).view("<u2")[0])
        low, high = (int(half) for half in table[group, row].view("<u4"))
        positive = (low & 0xFFFFFF00) ^ 0x80808080, high ^ 0x80808080
        signs = ((word & 0x88888888) | 0x64206420) >> 1
        index = word & 0x77777777
        found = selected(selected(*positive, index), selected(low, high, index), signs)
        scale = scales.view(narrow)[row, group].astype(np.float64)
        values = np.array([(int(c >> s) & 15 ^ 8) - 8 for c in codes for s in (0, 4)])
        got = np.array([found], "<u4").view(narrow).astype(np.float64)
        wanted = (values * scale / 8).astype(narrow).astype(np.float64)
        # A code of 0 is 0 whatever its scale is, NaN too.
        np.testing.assert_array_equal(got, np.where(values == 0, 0, wanted))


@given(
    st.sampled_from(["uint4_g64_asym", "int4_g64_zint8", "int8_g64_asym", "uint4_g64_asym_f16"]),
    st.integers(0, 2**32 - 1),
)
def test_products_with_shortened_scales_are_exact(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fmt: Any = lb.format(name)
    scales = (10.0 ** rng.uniform(-30, 30, 64)).astype(np.float32)
    if fmt.scale.element == "float16":
        scales = rng.standard_normal(64).astype(np.float16).astype(np.float32)
    short = weights.shortened(scales, fmt)
    assert (np.abs(short - scales) <= np.abs(scales) * 2.0**-15).all()
    for numbers in (fmt.element.values, fmt.zero.values):
        exact = np.multiply.outer(np.array(numbers), short.astype(np.float64))
        assert (exact.astype(np.float32) == exact).all()


def problem(family: str = "upcast16", **changed: Any) -> Problem:
    given: dict[str, Any] = {
        "m": 512, "n": 512, "k": 512, "x": X[family][0], "w": WEIGHTS[family][0],
        "out": "bfloat16", "device": HOPPER,
    }  # fmt: skip
    given |= changed
    for side in ("x", "w"):
        given[side] = given[side] if given[side] in DTYPES else lb.format(given[side])
    return Problem(**given)


REFUSALS: list[tuple[str, str, dict[str, Any]]] = [
    ("upcast16", "capability 9.0", {"device": "cuda:89:128"}),
    ("upcast16", "lowbit's own kernels", {"device": "cuda:90:4:plain"}),
    ("upcast16", "bfloat16 or float16 x", {"x": "float32"}),
    ("upcast16", "weights of int4", {"w": "int3_g64"}),
    ("upcast16", "zero points that are whole", {"w": "uint4_g64_zf16"}),
    ("upcast16", "scales of a float dtype", {"w": "int4_g64_e8m0"}),
    ("upcast16", "float16's range", {"x": "float16", "w": "uint4_g64_bias"}),
    ("upcast16", "multiples of 64 columns", {"w": "int4_g32"}),
    ("upcast16", "of w do not begin", {"k": 528}),
    ("upcast16", "numbers of the result", {"n": 516}),
    ("upcast16", "numbers of the residual", {"n": 516, "out": "float32", "residual": "bfloat16"}),
    ("upcast16", "across the contraction axis", {"w_along": False}),
    ("upcast_int8", "x of int8", {"x": "bfloat16"}),
    ("upcast_int8", "x of int8", {"x": "int8_row_asym"}),
    ("upcast_int8", "one float32 scale", {"x": "int8_row_bf16"}),
    ("upcast_int8", "of x must not change", {"x": "int8_g128"}),
    ("upcast_int8", "weights of int4", {"w": "int8_row"}),
    ("upcast_int8", "exact sums meet one", {"w": "int4_g128"}),
    ("upcast_int8", "surely fit in int8", {"w": "uint4_row_zint8"}),
    ("upcast_int8", "surely fit in int32", {"k": 1 << 22}),
    ("upcast_float8", "no zero points", {"w": "int4_row_asym"}),
    ("upcast_float8", "int4 with float8_e4m3fn scales", {"w": "int4_g128"}),
    ("upcast_float8", "multiples of 128 columns", {"w": "int4_g64_e4m3"}),
    ("upcast_float8_scaled", "weights of int4", {"w": "uint4_row"}),
    ("upcast_float8_scaled", "scales codes in groups", {"w": "int4_row"}),
]


@needs_headers
@pytest.mark.parametrize(("family", "words", "changed"), REFUSALS)
def test_what_is_refused_is_said_why(family: str, words: str, changed: dict[str, Any]) -> None:
    kernel = {each.name: each for each in upcast.KERNELS}[f"matmul.cutlass.{family}"]
    assert kernel.accepts(problem(family)) is None
    refusal = kernel.accepts(problem(family, **changed))
    assert refusal is not None
    assert words in refusal


@needs_headers
def test_int4_by_int8_is_chosen_for_many_rows() -> None:
    chosen = kernels.choose(problem("upcast_int8", m=4096, n=4096, k=4096)).kernel
    assert chosen.name == "matmul.cutlass.upcast_int8"
    assert chosen.describe is not None
    assert "w first" in chosen.describe(problem("upcast_int8", m=4096, n=4096, k=4096))


@needs_headers
def test_values_that_are_rounded_are_said_to_be() -> None:
    rounded = {w: upcast.KERNELS[0].roundings(problem(w=w)).weight > 0 for w in WEIGHTS["upcast16"]}
    exact = {w for w in rounded if "row" in w or "tensor" in w} - {"int4_row_bias"}
    assert {w for w, found in rounded.items() if not found} == exact


@needs_headers
@pytest.mark.parametrize("top", [1.0, -0.75, 2.0**-60, 2.0**99])
@pytest.mark.parametrize(
    ("fmt", "apart"),
    [("int4_g64", 26), ("int8_g64", 22), ("uint4_g64_zint8", 21), ("fp8_g64", 11)],
)
def test_float16_holds_scales_that_are_not_too_far_apart(fmt: str, apart: int, top: float) -> None:
    """The largest of a row over the smallest; what goes beyond is computed by another kernel."""
    made, _, _ = packed(fmt, 16, 256, 5)
    family, p = upcast.FAMILIES["upcast16"], problem(x="float16", w=fmt, m=8, n=16, k=256)
    machine = Watching(launch.parse(HOPPER))
    x, out = placed(np.ones((8, 256), np.float16)), placed(np.zeros((8, 16), ml_dtypes.bfloat16))
    for power in (apart, apart + 1):
        # A row is divided by the power of two at or above its largest scale.
        least = 2.0 ** (np.ceil(np.log2(abs(top))) - power)
        scales = np.array([top, least, 0, -top / 8], np.float32)
        held = replace(made, scales=placed(np.tile(scales, (16, 1))))
        with launch.pretending(machine):
            run = family.kernel.build(p)(held)
            run(x, Epilogue(), out)
        source, _, argument = machine.launched.pop()
        assert source.headers == ("cutlass" if power == apart else None)
        if power == apart:
            read = OfMixed(family.spec_of(p), argument)
            found = read.weights() * read.vector("w_scale", 16)[:, None].astype(np.float64)
            wanted = reference.dequantize(held).astype(np.float64)
            promised = family.kernel.roundings(p).weight
            assert 2.0**-11 < promised < 2.0**-10
            assert (np.abs(found - wanted) <= promised * np.abs(wanted)).all()
        del run


@needs_headers
@pytest.mark.parametrize("odd", [np.nan, np.inf, 2.0**-126, 2.0**127])
def test_float16_leaves_scales_that_are_not_usual_to_another_kernel(odd: float) -> None:
    made, _, _ = packed("int4_g64", 16, 256, 5)
    scales = placed(made.scales)
    scales[3] = odd
    machine, p = Watching(launch.parse(HOPPER)), problem(x="float16", m=8, n=16, k=256)
    x, out = placed(np.ones((8, 256), np.float16)), placed(np.zeros((8, 16), ml_dtypes.bfloat16))
    with launch.pretending(machine):
        run = upcast.FAMILIES["upcast16"].kernel.build(p)(replace(made, scales=scales))
        run(x, Epilogue(), out)
    assert [source.headers for source, *_ in machine.launched] == [None]


@needs_headers
def test_float8_is_never_chosen_unless_asked_for() -> None:
    for family in ("upcast_float8", "upcast_float8_scaled"):
        for w in WEIGHTS[family]:
            p = problem(family, w=w)
            found = kernels.choose(p, f"matmul.cutlass.{family}")
            assert found.refusal is None
            assert found.kernel.by_name
            assert not kernels.choose(p).kernel.by_name


@needs_headers
@pytest.mark.parametrize("family", ["upcast_float8", "upcast_float8_scaled"])
def test_what_becomes_zero_is_within_what_is_said(family: str) -> None:
    narrow = ml_dtypes.float8_e4m3fn
    # The largest scale whose eighth is lost, by a code of 1 and the largest x.
    scales = np.arange(1, 64, dtype=np.uint8).view(narrow).astype(np.float32)
    lost = scales[(scales / np.float32(8)).astype(narrow) == 0].max() * np.float32(448)
    kernel = {each.name: each for each in upcast.KERNELS}[f"matmul.cutlass.{family}"]
    assert kernel.roundings(problem(family, w="int4_g128_e4m3")).flushed >= lost > 3


@needs_headers
def test_memory_that_tma_does_not_read_goes_to_another_kernel() -> None:
    p = problem()
    (w, *_), machine = packed("int4_g128", 512, 512, 1), Watching(launch.parse(HOPPER))
    x, out = (placed(np.zeros((512, 512), ml_dtypes.bfloat16)) for _ in range(2))
    odd = placed(np.zeros(512 * 512 + 1, ml_dtypes.bfloat16))[1:].reshape(512, 512)
    codes = placed(np.zeros(512 * 256 + 1, np.uint8))[1:].reshape(512, 256)
    build = kernels.choose(p, "matmul.cutlass.upcast16").kernel.build(p)
    with launch.pretending(machine):
        build(w)(odd, Epilogue(), out)
        build(replace(w, codes=codes))(x, Epilogue(), out)
        build(w)(x, Epilogue(), out)
    assert [source.headers for source, *_ in machine.launched] == [None, None, "cutlass"]


def test_tiles_hold_whole_rows_of_memory() -> None:
    for family in upcast.FAMILIES:
        for tile in tiles.listed(family):
            assert tile.turned
            assert tile.shape[2] == (64 if family == "upcast16" else 128)

"""Block-scaled float8 on CUTLASS: arguments byte by byte, and what they compute."""

from __future__ import annotations

import ctypes
from typing import Any

import host
import numpy as np
import pytest
from absence import needs_headers
from calls import PROCESSORS, built, calls, matrices, same, swizzled, theirs
from computed import DTYPES, aligned, placed, quantized
from host import Watching
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import OfBlocks, block_sums

import lowbit as lb
from lowbit import kernels
from lowbit.formats import reference
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import launch
from lowbit.kernels.cutlass import blocks, blockwise, dense, package, tiles
from lowbit.kernels.cutlass.blocks import Call, Spec
from lowbit.kernels.cutlass.dense import Matrices
from lowbit.kernels.cutlass.schedulers import grid

HOPPER = "cuda:90:132"
FLOAT8 = "cutlass::float_e4m3_t", "cutlass::float_e4m3_t"
SPECS = {
    "rows": Spec(*FLOAT8, "bfloat16", (128, 128, 128), (2, 1), "Cooperative", residual="float32"),
    "turned": Spec(
        *FLOAT8, "float16", (64, 16, 128), (1, 1), "Pingpong", turned=True, w_rows=64
    ),
}  # fmt: skip


@st.composite
def scaled(draw: st.DrawFn, spec: Spec) -> Call:
    call = draw(calls(blocks, spec))
    columns = -(-call.k // 128)

    def scales(rows: int, shared: int) -> Matrices:
        return draw(matrices(-(-rows // shared), 4 * columns, call.batches, 4))

    fields = {name: getattr(call, name) for name in dense.Call.__dataclass_fields__}
    return Call(
        **fields, x_scales=scales(call.m, spec.x_rows), w_scales=scales(call.n, spec.w_rows)
    )


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None)
@given(st.data(), st.sampled_from(PROCESSORS))
def test_arguments(name: str, data: st.DataObject, processors: int) -> None:
    spec = data.draw(swizzled(SPECS[name]))
    call = data.draw(scaled(spec))

    def scales(of_x: bool) -> tuple[int, ...]:
        found, rows, shared = (
            (call.x_scales, call.m, spec.x_rows) if of_x else (call.w_scales, call.n, spec.w_rows)
        )
        columns = -(-call.k // 128)
        return (
            found.address, -(-rows // shared), columns, call.batches, found.pitch // 4,
            found.batch // 4,
        )  # fmt: skip

    wanted, grid_ = theirs(blocks, spec, call, processors, "blocks.hpp", scales)
    same(blocks.layout(spec), blocks.arguments(spec, call, processors, host.recorded), wanted)
    assert grid(dense.tiling(spec, call), processors) == grid_


@pytest.mark.parametrize("name", SPECS)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_scales_of_a_tile_are_those_of_its_rows(name: str, data: st.DataObject) -> None:
    """CUTLASS's own loads, run on the host's memory: -1 stands where nothing was brought."""
    spec = SPECS[name]
    (first_rows, second_rows, _), turned = spec.tile, spec.turned
    m, batches = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 2))
    n, k = 8 * data.draw(st.integers(1, 60)), 16 * data.draw(st.integers(1, 80))
    columns, gap = -(-k // 128), data.draw(st.integers(0, 3))
    shared = {"x": (m, spec.x_rows), "w": (n, spec.w_rows)}
    held = {
        side: np.random.default_rng(len(side) + rows).random(
            (batches, -(-rows // each), columns + gap), np.float32
        )
        for side, (rows, each) in shared.items()
    }
    described = {
        side: Matrices(array.ctypes.data, 4 * (columns + gap), array.strides[0])
        for side, array in held.items()
    }
    unread = Matrices(1 << 40, 1 << 20, 1 << 40)
    finish = blocks.operands(1.0, 0)
    call = Call(
        m, n, k, unread, unread, unread, finish, None if spec.residual is None else unread,
        batches, x_scales=described["x"], w_scales=described["w"],
    )  # fmt: skip
    made = blocks.arguments(spec, call, 132, host.recorded)
    place = ctypes.create_string_buffer(len(made) + 64)
    at = (ctypes.addressof(place) + 63) // 64 * 64
    ctypes.memmove(at, bytes(made), len(made))
    order = ("w", "x") if turned else ("x", "w")
    tiles = [-(-shared[side][0] // rows) for side, rows in zip(order, spec.tile, strict=False)]
    i, j = (data.draw(st.integers(0, count - 1)) for count in tiles)
    depth, batch = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, batches - 1))
    found = (np.zeros(first_rows, np.float32), np.zeros(second_rows, np.float32))
    built(blocks, spec, "blocks.hpp").brought(
        ctypes.c_void_p(at), i, j, depth, batch,
        *(ctypes.c_void_p(each.ctypes.data) for each in found),
    )  # fmt: skip
    for side, tile, rows, seen in zip(order, (i, j), spec.tile, found, strict=False):
        each = shared[side][1]
        wanted = held[side][batch, tile * rows // each :, depth][: rows // each]
        assert seen[: len(wanted)].tolist() == wanted.tolist()
        assert (seen[len(wanted) : rows // each] == -1).all()


def problem(**changed: Any) -> Problem:
    """A product of DeepSeek's kind."""
    given: dict[str, Any] = {
        "m": 512, "n": 512, "k": 512, "x": lb.format("fp8_g128"), "w": lb.format("fp8_128x128"),
        "out": "bfloat16", "device": HOPPER,
    }  # fmt: skip
    return Problem(**{**given, **changed})


@needs_headers
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_launched_computes_the_product(data: st.DataObject) -> None:
    m, n = data.draw(st.sampled_from([1, 17, 100, 300])), 8 * data.draw(st.integers(1, 50))
    k = 16 * data.draw(st.integers(1, 40))
    formats = [
        data.draw(st.sampled_from([f"fp8_{b}", f"fp8_e5m2_{b}"])) for b in ("g128", "128x128")
    ]
    x, w = quantized(formats[0], (m, k), 1), quantized(formats[1], (n, k), 2)
    out_dtype, added = data.draw(st.sampled_from(sorted(DTYPES))), data.draw(st.booleans())
    rng = np.random.default_rng(3)
    bias = placed(rng.standard_normal(n, np.float32)) if data.draw(st.booleans()) else None
    residual = placed(rng.standard_normal((m, n)).astype(DTYPES[out_dtype])) if added else None
    p = problem(
        m=m, n=n, k=k, x=x.format, w=w.format, out=out_dtype, bias=bias is not None,
        residual=out_dtype if added else None,
    )  # fmt: skip
    out, machine = aligned((m, n), DTYPES[out_dtype]), Watching(launch.parse(HOPPER))
    tile = data.draw(st.sampled_from(tiles.listed("float8_blocks")))
    spec = blockwise.spec_with(p, tile)
    with launch.pretending(machine):
        run = blockwise.bind(p, spec)(w)  # keeps what it has made of w's scales
        run(x, Epilogue(-0.75, bias, None, residual), out)
    ((source, grid_, argument),) = machine.launched
    assert source == blockwise.source(spec)
    assert np.prod(grid_) <= 132
    OfBlocks(spec, argument).compute(*formats)
    left, right = (parts.codes.view(np.uint8) for parts in (x, w))
    w_scales = w.scales.repeat(128, 0)[:n]
    shift = 0 if bias is None else bias
    wanted = block_sums(
        formats[0], formats[1], left, right, x.scales, w_scales, -0.75, shift, residual
    )
    np.testing.assert_array_equal(out, wanted.astype(out.dtype))
    # And that is the product, within what is promised.
    exact = (
        reference.dequantize(x).astype(np.float64) @ reference.dequantize(w).astype(np.float64).T
    )
    size = np.abs(reference.dequantize(x)).astype(np.float64) @ np.abs(reference.dequantize(w)).T
    exact = -0.75 * exact + (0 if bias is None else bias)
    exact = exact if residual is None else exact + residual.astype(np.float64)
    promised = blockwise.KERNELS[0].roundings(p)
    assert promised.count < 2**21
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[out_dtype]
    assert (
        np.abs(out.astype(np.float64) - exact) <= 1e-3 * size + 2 * unit * np.abs(exact) + 1e-6
    ).all()


REFUSALS: dict[str, dict[str, Any]] = {
    "capability 9.0": {"device": "cuda:89:128"},
    "lowbit's own kernels": {"device": "cuda:90:4:plain"},
    "wants float8 on both": {"x": "bfloat16"},
    "wants float8_e4m3fn": {"w": lb.format("int8_128x128")},
    "1 x 128 codes of x": {"x": lb.format("fp8_row")},
    "128 x 128 codes of w": {"w": lb.format("fp8_g128")},
    "has others": {"x": lb.format("fp8_g128_bf16")},
    "rows of 520 columns": {"k": 520},
    "numbers of the result": {"n": 516},
    "across the contraction axis": {"w_along": False},
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_is_refused_is_said_why(words: str) -> None:
    (kernel,) = blockwise.KERNELS
    if package.headers() is not None:
        assert kernel.accepts(problem()) is None
    refusal = kernel.accepts(problem(**REFUSALS[words]))
    assert refusal is not None
    assert words in refusal


@needs_headers
def test_products_of_many_rows_go_there() -> None:
    for m in (128, 512, 8192):
        found = kernels.choose(problem(m=m, n=4096, k=7168)).kernel
        assert found.name == "matmul.cutlass.float8_blocks"


def test_batch_invariance_keeps_the_tile() -> None:
    spec_of = blockwise.FAMILIES["float8_blocks"].spec_of
    found = {spec_of(problem(m=m, batch_invariant=True)) for m in (1, 64, 8192)}
    assert len(found) == 1

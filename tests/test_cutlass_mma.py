"""Products on CUTLASS 2.x: what is launched, read back from the arguments and computed in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from absence import needs_headers
from computed import DTYPES, aligned, finished, placed, quantized, sums
from host import Watching
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import OfAmpere

import lowbit as lb
from lowbit import kernels
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import launch
from lowbit.kernels.cutlass import mma, package

Array = Any
AMPERE, ADA = "cuda:80:108", "cuda:89:128"
FORMATS = {"mma_int8": ("int8", "int8"), "mma_int4": ("int8", "int4"), "mma_float8": ("fp8", "fp8")}


@needs_headers
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_launched_computes_the_product(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    kinds = [f"{kind}_{data.draw(st.sampled_from(['row', 'tensor']))}" for kind in FORMATS[name]]
    m, n = data.draw(st.integers(1, 300)), 8 * data.draw(st.integers(1, 40))
    k = 32 * data.draw(st.integers(1, 20))
    out_dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    biased, added = data.draw(st.booleans()), data.draw(st.booleans())
    activation = data.draw(st.sampled_from([None, "relu"]))
    alpha = data.draw(st.sampled_from([1.0, -0.75]))
    x, w = quantized(kinds[0], (m, k), 1), quantized(kinds[1], (n, k), 2)
    rng = np.random.default_rng(3)
    bias = placed(rng.standard_normal(n, np.float32)) if biased else None
    residual = placed(rng.standard_normal((m, n)).astype(DTYPES[out_dtype])) if added else None
    p = Problem(
        m, n, k, x.format, w.format, out_dtype, biased, activation, out_dtype if added else None,
        device=ADA,
    )  # fmt: skip
    kernel = kernels.choose(p, f"matmul.cutlass.{name}").kernel
    machine, out = Watching(launch.parse(ADA)), aligned((m, n), DTYPES[out_dtype])
    with launch.pretending(machine):
        run = kernel.build(p)(w)
        run(x, Epilogue(alpha, bias, activation, residual), out)
    ((source, grid, argument),) = machine.launched
    spec = mma.FAMILIES[name].spec_of(p)
    assert source == mma.source(spec)
    assert np.prod(grid) >= -(-m // spec.tile[0]) * -(-n // spec.tile[1])
    OfAmpere(spec, argument).compute(kinds[0], kinds[1])
    scales = [np.broadcast_to(parts.scales[:, 0], rows) for parts, rows in ((x, m), (w, n))]
    codes = [parts.codes.view(np.uint8) for parts in (x, w)]
    if name == "mma_int4":
        codes[1] = np.stack([codes[1] & 15, codes[1] >> 4], -1).reshape(n, k)
    wanted = finished(
        sums(kinds[0], kinds[1], codes[0], codes[1]),
        scales[0],
        scales[1],
        alpha,
        0 if bias is None else bias,
        activation,
        residual,
    )
    np.testing.assert_array_equal(out, wanted.astype(out.dtype))
    del run  # scales of its own that the argument points to


def problem(name: str = "mma_int8", **changed: Any) -> Problem:
    x, w = (lb.format(f"{kind}_row") for kind in FORMATS[name])
    given: dict[str, Any] = {"m": 512, "n": 512, "k": 512, "x": x, "w": w, "out": "bfloat16"}
    return Problem(**{**given, "device": ADA, **changed})


REFUSALS: dict[str, tuple[str, dict[str, Any]]] = {
    "capabilities 8.0, 8.6": ("mma_int8", {"device": "cuda:90:132"}),
    "capabilities 8.9, 12.0": ("mma_float8", {"device": AMPERE}),
    "lowbit's own kernels": ("mma_int8", {"device": "cuda:80:4:plain"}),
    "wants int8 on both sides, x is": ("mma_int8", {"x": "bfloat16"}),
    "without zero points": ("mma_int8", {"w": lb.format("int8_row_asym")}),
    "wants int8 for x and int4": ("mma_int4", {"w": lb.format("uint4_row")}),
    "wants float8_e4m3fn or": ("mma_float8", {"w": lb.format("int8_row")}),
    "one float32 scale": ("mma_int8", {"w": lb.format("int8_row_bf16")}),
    "scales must not change": ("mma_int4", {"w": lb.format("int4_g128")}),
    "do not surely fit": ("mma_int8", {"k": 1 << 17}),
    "multiple of 16 columns": ("mma_int8", {"k": 520}),
    "multiple of 32 columns": ("mma_int4", {"k": 528}),
    "numbers of the result": ("mma_int8", {"n": 516}),
    "numbers of the residual": ("mma_int8", {"n": 516, "out": "float32", "residual": "bfloat16"}),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_is_refused_is_said_why(words: str) -> None:
    name, changed = REFUSALS[words]
    kernel = {k.name: k for k in kernels.registered()}[f"matmul.cutlass.{name}"]
    assert kernel.accepts(problem(name)) is None
    assert words in str(kernel.accepts(problem(name, **changed)))


def test_without_headers_only_what_the_package_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.kernels.cuda import archive, compile

    monkeypatch.setattr(package, "headers", lambda: None)
    monkeypatch.setattr(archive, "exists", lambda arch, key: False)
    compile.lacking.cache_clear()
    try:
        assert "lowbit[cutlass]" in str(mma.KERNELS[0].accepts(problem()))
    finally:
        compile.lacking.cache_clear()


@pytest.mark.parametrize("odd", ["x", "w", "w_scale", "bias"])
def test_memory_that_is_not_read_in_pieces_goes_to_another_kernel(odd: str) -> None:
    p = problem(bias=True)
    x, w = quantized("int8_row", (512, 512), 1), quantized("int8_row", (512, 512), 2)
    bias, out = aligned((512,), np.float32), aligned((512, 512), DTYPES["bfloat16"])

    def moved(array: Array) -> Array:
        raw = aligned((array.nbytes + 16,), np.uint8)
        found = raw[4 : 4 + array.nbytes].view(array.dtype).reshape(array.shape)
        found[...] = array
        return found

    if odd == "x":
        x = replace(x, codes=moved(x.codes))
    elif odd == "w":
        w = replace(w, codes=moved(w.codes))
    elif odd == "w_scale":
        w = replace(w, scales=moved(w.scales))
    else:
        bias = moved(bias)
    machine = Watching(launch.parse(ADA))
    build = kernels.choose(p, "matmul.cutlass.mma_int8").kernel.build(p)
    with launch.pretending(machine):
        build(w)(x, Epilogue(bias=bias), out)
    assert [source.headers for source, *_ in machine.launched] == [None]


def test_few_rows_take_small_tiles() -> None:
    found = [mma.FAMILIES["mma_int8"].spec_of(problem(m=m, n=8192)).tile[0] for m in (1, 40, 16384)]
    assert found[0] == 16
    assert found == sorted(found)
    kernel = mma.KERNELS[0]
    assert kernel.describe is not None
    assert kernel.describe(problem(m=1)).startswith("tile 16x128x128, warps of 16x32, ")


def test_batch_invariance_keeps_the_tile() -> None:
    found = {
        mma.FAMILIES["mma_float8"].spec_of(problem("mma_float8", m=m, batch_invariant=True))
        for m in (1, 64, 8192)
    }
    assert len(found) == 1


def test_fast_sums_are_bounded_worse() -> None:
    p = problem("mma_float8", m=8192, n=8192, k=8192)
    exact, fast = mma.KERNELS[2:]
    assert fast.by_name
    assert fast.roundings(p).count > 30 * exact.roundings(p).count

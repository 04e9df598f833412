"""W8A8 on CUTLASS: what is launched, read back from the arguments and computed in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from absence import needs_headers
from computed import DTYPES, aligned, finished, placed, quantized, sums
from host import Watching
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import OfDense

import lowbit as lb
from lowbit import kernels
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import launch
from lowbit.kernels.cutlass import package, tiles, w8a8

Array = Any
HOPPER = "cuda:90:132"
X_FORMATS = [
    "int8_row", "int8_tensor", "int8_row_asym", "uint8_row_asym", "uint8_tensor_asym", "fp8_row",
    "fp8_tensor",
]  # fmt: skip


@needs_headers
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_launched_computes_the_product(data: st.DataObject) -> None:
    fmt = data.draw(st.sampled_from(X_FORMATS))
    kind = "fp8" if fmt.startswith("fp8") else "int8"
    w_fmt = data.draw(st.sampled_from([f"{kind}_row", f"{kind}_tensor"]))
    m, n = data.draw(st.integers(1, 300)), 8 * data.draw(st.integers(1, 40))
    k = 16 * data.draw(st.integers(1, 40))
    out_dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    biased, added = data.draw(st.booleans()), data.draw(st.booleans())
    activation = data.draw(st.sampled_from([None, "relu"]))
    alpha = data.draw(st.sampled_from([1.0, -0.75]))
    x, w = quantized(fmt, (m, k), 1), quantized(w_fmt, (n, k), 2)
    rng = np.random.default_rng(3)
    bias = placed(rng.standard_normal(n, np.float32)) if biased else None
    residual = placed(rng.standard_normal((m, n)).astype(DTYPES[out_dtype])) if added else None
    p = Problem(
        m, n, k, x.format, w.format, out_dtype, biased, activation, out_dtype if added else None,
        device=HOPPER,
    )  # fmt: skip
    name = f"matmul.cutlass.{'int8' if 'int8' in fmt else 'float8'}"
    run, out = kernels.choose(p, name).kernel.build(p), aligned((m, n), DTYPES[out_dtype])
    machine = Watching(launch.parse(HOPPER))
    epilogue = Epilogue(alpha, bias, activation, residual)
    with launch.pretending(machine):
        run(w)(x, epilogue, out)
    *others, (source, grid, argument) = machine.launched
    for _, _, (codes, _, _, _, held) in others:
        held[...] = codes.sum(1)
    assert len(others) == (x.zeros is not None)
    spec = w8a8.FAMILIES[name.rpartition(".")[2]].spec_of(p)
    assert source == w8a8.source(spec)
    assert np.prod(grid) <= 132
    assert grid[0] % spec.cluster[0] == grid[1] % spec.cluster[1] == 0
    OfDense(spec, argument).compute(fmt, w_fmt)
    scales = [np.broadcast_to(parts.scales[:, 0], len(parts.codes)) for parts in (x, w)]
    left, right = (parts.codes.view(np.uint8) for parts in (x, w))
    wanted = finished(
        sums(fmt, w_fmt, left, right, 0 if x.zeros is None else x.zeros.astype(np.float64)),
        scales[0],
        scales[1],
        alpha,
        0 if bias is None else bias,
        activation,
        residual,
    )
    np.testing.assert_array_equal(out, wanted.astype(out.dtype))


def problem(**changed: Any) -> Problem:
    fmt = lb.format("int8_row")
    given: dict[str, Any] = {
        "m": 512,
        "n": 512,
        "k": 512,
        "x": fmt,
        "w": fmt,
        "out": "bfloat16",
        "device": HOPPER,
    }
    return Problem(**{**given, **changed})


REFUSALS: dict[str, dict[str, Any]] = {
    "capability 9.0": {"device": "cuda:89:128"},
    "lowbit's own kernels": {"device": "cuda:90:4:plain"},
    "wants codes of 8 bits": {"x": "bfloat16"},
    "got int8_row_asym": {"w": lb.format("int8_row_asym")},
    "w without zero points": {"x": lb.format("int8_row_asym"), "w": lb.format("int8_row_asym")},
    "wants int8 on both sides": {"x": lb.format("uint8_row")},
    "wants int8": {"w": lb.format("fp8_row")},
    "one float32 scale": {"w": lb.format("int8_row_bf16")},
    "scales must not change": {"w": lb.format("int8_g128")},
    "do not surely fit": {"k": 1 << 18},
    "rows of 520 columns": {"k": 520},
    "numbers of the result": {"n": 516},
    "numbers of the residual": {"n": 516, "out": "float32", "residual": "bfloat16"},
    "across the contraction axis": {"w_along": False},
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_is_refused_is_said_why(words: str) -> None:
    kernel = {k.name: k for k in kernels.registered()}["matmul.cutlass.int8"]
    assert kernel.accepts(problem()) is None
    refusal = kernel.accepts(problem(**REFUSALS[words]))
    assert refusal is not None
    assert words in refusal


def test_without_headers_only_what_the_package_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.kernels.cuda import archive, compile

    monkeypatch.setattr(package, "headers", lambda: None)
    monkeypatch.setattr(archive, "exists", lambda arch, key: False)
    compile.lacking.cache_clear()
    try:
        refusal = w8a8.KERNELS[0].accepts(problem())
        assert refusal is not None
        assert 'pip install "lowbit[cutlass]"' in refusal
    finally:
        compile.lacking.cache_clear()


def test_fast_sums_are_chosen_by_name_only() -> None:
    fmt = lb.format("fp8_row")
    p = problem(m=8192, n=8192, k=8192, x=fmt, w=fmt)
    assert kernels.choose(p).kernel.name == "matmul.cutlass.float8"
    fast = kernels.choose(p, "matmul.cutlass.float8_fast").kernel
    exact = kernels.choose(p).kernel
    assert fast.roundings(p).count > 30 * exact.roundings(p).count
    assert fast.cost(p) < exact.cost(p)


def test_memory_that_tma_does_not_read_goes_to_another_kernel() -> None:
    p = problem()
    x, w = quantized("int8_row", (512, 512), 1), quantized("int8_row", (512, 512), 2)
    raw = np.zeros(512 * 512 + 17, np.uint8)
    odd = raw[(-raw.ctypes.data % 16) + 1 :][: 512 * 512].reshape(512, 512)
    machine = Watching(launch.parse(HOPPER))
    out = aligned((512, 512), ml_dtypes.bfloat16)
    build = kernels.choose(p, "matmul.cutlass.int8").kernel.build(p)
    with launch.pretending(machine):
        build(w)(replace(x, codes=odd), Epilogue(), out)
        build(replace(w, codes=odd))(x, Epilogue(), out)
    assert [source.headers for source, *_ in machine.launched] == [None, None]


def test_explain_shows_tile_and_waves() -> None:
    found = {tile.waves(problem(m=4096, n=4096)) for tile in tiles.listed("int8")}
    assert len(found) > 2
    kernel = kernels.choose(problem(m=4096, n=4096)).kernel
    assert kernel.describe is not None
    words = kernel.describe(problem(m=4096, n=4096))
    assert words.startswith("tile ")
    assert words.endswith(" waves")


def test_batch_invariance_keeps_the_tile() -> None:
    fmt = lb.format("fp8_row")
    spec_of = w8a8.FAMILIES["float8"].spec_of
    found = {spec_of(problem(m=m, x=fmt, w=fmt, batch_invariant=True)) for m in (1, 64, 8192)}
    assert len(found) == 1


def launched(p: Problem, x: Any, w: Any, epilogue: Epilogue, out: Any) -> list[Any]:
    machine = Watching(launch.parse(HOPPER))
    run = kernels.choose(p, "matmul.cutlass.int8").kernel.build(p)
    with launch.pretending(machine):
        run(w)(x, epilogue, out)
    return [source.headers for source, *_ in machine.launched]


def test_a_residual_that_goes_backwards_or_repeats_goes_to_another_kernel() -> None:
    p = problem(residual="bfloat16")
    x, w = quantized("int8_row", (512, 512), 1), quantized("int8_row", (512, 512), 2)
    out = aligned((512, 512), ml_dtypes.bfloat16)
    rows = aligned((512, 512), ml_dtypes.bfloat16)
    for residual in (rows[::-1], np.broadcast_to(rows[:1], (512, 512)), rows[:, ::-1]):
        assert launched(p, x, w, Epilogue(residual=residual), out) == [None]
    assert launched(p, x, w, Epilogue(residual=rows), out) == ["cutlass"]


def test_what_lies_between_one_row_and_no_next_one_is_anything() -> None:
    p = problem(m=1, residual="bfloat16")
    x, w = quantized("int8_row", (1, 512), 1), quantized("int8_row", (512, 512), 2)
    out, residual = aligned((2, 512), ml_dtypes.bfloat16)
    x = replace(x, codes=x.codes[0][None])
    assert launched(p, x, w, Epilogue(residual=residual[None]), out[None]) == ["cutlass"]


def test_an_alpha_beyond_float32_is_infinite_as_in_every_other_kernel() -> None:
    p = problem()
    x, w = quantized("int8_row", (512, 512), 1), quantized("int8_row", (512, 512), 2)
    out = aligned((512, 512), ml_dtypes.bfloat16)
    assert launched(p, x, w, Epilogue(alpha=1e39), out) == ["cutlass"]


def test_zero_points_have_the_bound_of_both_ways() -> None:
    p = problem(x=lb.format("int8_row_asym"))
    kernel = kernels.choose(p, "matmul.cutlass.int8").kernel
    other = next(k for k in kernels.registered() if k.name == "matmul.cuda.cublas")
    assert kernel.roundings(p).count == other.roundings(p).count
    refusal = kernel.accepts(replace(p, batch_invariant=True))
    assert refusal is not None
    assert "not aligned" in refusal


@pytest.mark.parametrize("family", ["int8", "float8", "float8_fast"])
def test_a_gpu_smaller_than_a_cluster(family: str) -> None:
    fmt = lb.format("int8_row" if family == "int8" else "fp8_row")
    p = problem(m=4096, n=4096, x=fmt, w=fmt, device="cuda:90:1")
    kernel = kernels.choose(p, f"matmul.cutlass.{family}").kernel
    assert kernel.cost(p) > 0

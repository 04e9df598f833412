"""What kernels on CUTLASS say to products of every declared format: reasons, never exceptions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import lowbit as lb
from lowbit import formats, kernels
from lowbit.kernels import Kernel, Problem, Roundings
from lowbit.kernels.cutlass import package, scaled

ON_CUTLASS = [k for k in kernels.registered() if k.name.startswith("matmul.cutlass.")]
OTHERS = {k.name: k for k in kernels.registered()}
NAMES = [
    *(name for name, named in formats.declared().items() if named.summary != "user codebook"),
    *("int8_tensor", "fp8_tensor", "int8_row_asym", "uint8_row_asym", "int4_row", "fp8_128x128"),
    *("int4_g64", "int4_g128_bf16", "int4_g128_e4m3", "int4_row_zuint8", "int8_g64_zuint8"),
    *("uint4_g128_asym", "uint4_row_asym", "int8_128x128", "fp8_g128", "int4_2x128"),
]
DEVICES = ("cuda:80:108", "cuda:89:128", "cuda:90:132", "cuda:90:1", "cuda:100:148", "cuda:120:170")
SIZES = ((1, 8, 16), (64, 128, 128), (7, 24, 4096), (4096, 4096, 512), (33, 100, 1000), (3, 5, 7))


def problems(kernel: Kernel) -> Any:
    """Those that a kernel accepts."""
    dense = ("float32", "float16", "bfloat16", "float64")
    left: list[Any] = [*dense, *map(lb.format, NAMES)]
    for x, w, device, (m, n, k) in itertools.product(left, map(lb.format, NAMES), DEVICES, SIZES):
        p = Problem(m, n, k, x, w, "bfloat16", device=device)
        if kernel.accepts(p) is None:
            yield p


@pytest.mark.parametrize("kernel", ON_CUTLASS, ids=lambda k: k.name)
def test_what_is_accepted_has_a_price_a_bound_and_words(kernel: Kernel) -> None:
    found = 0
    for p in problems(kernel):
        assert kernel.cost(p) > 0
        assert kernel.roundings(p).count > 0
        assert kernel.describe is not None
        assert kernel.describe(p)
        found += 1
    assert found or package.headers() is None


@pytest.mark.parametrize("kernel", ON_CUTLASS, ids=lambda k: k.name)
def test_what_computes_where_memory_is_not_aligned_accepts_it_too(kernel: Kernel) -> None:
    """And its errors are within what the kernel promises."""
    blackwell = kernel.name.rpartition(".")[2] in scaled.FAMILIES
    for p in problems(kernel):
        whole = not isinstance(p.x, str) and p.x.element.integral and p.w.element.integral
        if blackwell or (whole and not isinstance(p.x, str) and p.x.zero is not None):
            other = OTHERS["matmul.cuda.cublas"]
        else:
            other = OTHERS["matmul.cuda.integer" if whole else "matmul.cuda.mma"]
        assert other.accepts(p) is None, p
        ours, theirs = (error(each.roundings(p)) for each in (kernel, other))
        assert all(mine >= its for mine, its in zip(ours, theirs, strict=True)), p


def error(found: Roundings) -> tuple[float, float]:
    """Relative to the sum of sizes, and what is lost besides."""
    growth = lb.testing.gamma(found.count, found.accumulator)
    return growth + found.weight * (1 + growth), found.flushed


def test_nothing_is_lost_where_the_package_has_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.kernels.cuda import compile

    monkeypatch.setattr(package, "headers", lambda: None)
    compile.lacking.cache_clear()
    try:
        for kernel in ON_CUTLASS:
            for p in problems(kernel):
                assert kernel.cost(p) > 0
    finally:
        compile.lacking.cache_clear()

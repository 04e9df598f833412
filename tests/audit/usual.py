"""What GPUs are usually asked for, and the kernels that this takes: those of every format named
here which the choice of kernels can come to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from recorder import Recorder

import lowbit as lb
from lowbit import kernels
from lowbit.formats import Format, reference, scaling
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import dequantize, fused, quantize
from lowbit.kernels.cuda.launch import Device, Source
from lowbit.kernels.declare import Epilogue, Problem

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DEVICES = {
    "sm_80": Device(80, 108, plain=True),
    "sm_89": Device(89, 128, plain=True),
    "sm_90a": Device(90, 132, plain=True),
}
"""A100, L40 and RTX 4090, H100 and H200, by architecture, without kernels on CUTLASS."""
ROWS = (1, 8, 16, 32, 64, 128, 512, 4096)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
"""N and K: one of few tiles, one of many, one of long rows."""


class Work(NamedTuple):
    """Products of one kind, over ROWS and SHAPES."""

    x: str
    """dtype or format."""
    w: str
    out: str

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.x} x {self.w} -> {self.out}"


HALVES = ("float16", "bfloat16")
SHIPPED = (
    *(Work(x, w, x) for w in ("int4_g128", "int8_row", "fp8_row") for x in HALVES),
    Work("int8_row", "int8_row", "bfloat16"),
)
"""What the package has machine code for."""
AUDITED = (
    *SHIPPED,
    *(Work(x, "uint4_g128_asym", x) for x in HALVES),
    *(Work(x, "nf4_g64", x) for x in HALVES),
    Work("float16", "int3_g128", "float16"),
    *(Work("bfloat16", w, "bfloat16") for w in ("mxfp4", "mxfp8", "nvfp4")),
    *(Work("float32", w, "float32") for w in ("int4_g128", "int8_row", "fp8_row")),
    Work("int8_row", "int4_g128", "bfloat16"),
    Work("fp8_row", "fp8_row", "bfloat16"),
)
"""What `make audit` looks at."""


def packed(fmt: Format, shape: tuple[int, int]) -> Packed:
    """Parts of zeros, which take no memory."""
    grid, kept = fmt.grid(shape), scaling.scale_dtype(fmt)
    return Packed(
        fmt,
        shape,
        np.zeros((shape[0], fmt.row_bytes(shape[1])), np.uint8),
        np.zeros(grid, kept),
        None if fmt.zero is None else np.zeros(grid, reference.zero_dtype(fmt)),
        np.zeros(grid, kept) if fmt.bias else None,
        np.zeros((), np.float32) if fmt.tensor_scale else None,
    )


def products(recorder: Recorder, works: Iterable[Work]) -> None:
    """Launch the chosen kernel of every product."""
    for work, (n, k), m in itertools.product(works, SHAPES, ROWS):
        product(recorder, work, m, n, k)


def product(
    recorder: Recorder, work: Work, m: int, n: int, k: int, name: str | None = None
) -> None:
    """Launch one product by the chosen kernel, or by the named one."""
    x, w = work.x if work.x in DTYPES else lb.format(work.x), lb.format(work.w)
    problem = Problem(m, n, k, x, w, work.out, device=recorder.device.name)
    kernel = kernels.choose(problem, name).kernel
    run = kernel.build(problem)
    left: Any = np.zeros((m, k), DTYPES[x]) if isinstance(x, str) else packed(x, (m, k))
    with recorder.asked_by(f"{work.label}, M = {m}, {kernel.name}"):
        run(packed(w, (n, k)))(left, Epilogue(), np.zeros((m, n), DTYPES[work.out]))


def conversions(recorder: Recorder, formats: Iterable[str]) -> None:
    """Launch what quantizes and dequantizes matrices of these formats."""
    for name, dtype in itertools.product(formats, HALVES):
        fmt, values = lb.format(name), np.zeros((64, 4096), DTYPES[dtype])
        with recorder.asked_by(f"{dtype} -> {name}"):
            quantize.enqueue(fmt, values)
        with recorder.asked_by(f"{name} -> {dtype}"):
            dequantize.dequantize_to(packed(fmt, values.shape), values)


def layers(recorder: Recorder, formats: Iterable[str]) -> None:
    """Launch what quantizes the results of a layer as it computes them."""
    for name, dtype in itertools.product(formats, HALVES):
        fmt, values = lb.format(name), np.zeros((64, 4096), DTYPES[dtype])
        with recorder.asked_by(f"silu(gate) * up, {dtype} -> {name}"):
            fused.silu_mul_quantize(values, values, fmt)
        for residual in (None, values):
            added = "" if residual is None else " of x + residual"
            with recorder.asked_by(f"rmsnorm{added}, {dtype} -> {name}"):
                fused.rmsnorm_quantize(values, values[0], 1e-6, fmt, residual)


@cache
def shipped(arch: str) -> dict[Source, str]:
    """Kernels whose machine code comes with the package, and what each is for."""
    recorder = Recorder(DEVICES[arch])
    products(recorder, SHIPPED)
    conversions(recorder, sorted({work.w for work in SHIPPED}))
    return recorder.sources


@cache
def audited(arch: str) -> dict[Source, str]:
    """Kernels that `make audit` compiles and looks at."""
    recorder = Recorder(DEVICES[arch])
    products(recorder, AUDITED)
    conversions(recorder, sorted({work.w for work in AUDITED}))
    layers(recorder, ("int8_row", "fp8_row", "mxfp8"))
    return recorder.sources

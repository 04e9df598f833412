"""The kernels that groups will launch, known before anything is: compiled on all cores at once.

A machine that only notes what it is asked for takes the place of the GPU. Arrays are memory that
nobody touches, so that large ones cost nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import ml_dtypes  # noqa: F401  (names bfloat16 to NumPy)
import numpy as np
import numpy.typing as npt
import peers.gpu

import lowbit as lb
from harness.records import OURS, Group
from harness.work import Work
from lowbit.formats import Format, reference, scaling
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue, Problem, choose
from lowbit.kernels.cuda import dequantize, fused, launch, quantize
from lowbit.kernels.cuda.launch import Device, Source
from lowbit.kernels.cuda.tensor_maps import TensorMap

Point = tuple[str, Work, int]
"""Contender, work, rows of x."""


class Recorder:
    """A `launch.Machine` that launches nothing."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.sources: dict[Source, None] = {}

    def function(self, source: Source) -> Any:
        """Note it."""
        self.sources[source] = None
        return lambda *arguments, **options: None

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Memory."""
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Memory."""
        return np.zeros(shape, dtype)

    def counters(self, count: int) -> Any:
        """Memory."""
        return np.zeros(count, np.int32)

    def scratch(self, count: int) -> Any:
        """Memory."""
        return np.zeros(1, np.int32)

    def number(self, kind: type[np.generic], value: float) -> Any:
        """A number as launches here take it."""
        return kind(value)

    def matmul(self, x: Any, w: Any) -> Any:
        """Memory for the vendor's product."""
        return np.empty((x.shape[0], w.shape[0]), np.float32)

    def encode(self, wanted: TensorMap) -> bytes:
        """Nothing of the right size."""
        return bytes(128)

    def by_value(self, data: bytes) -> Any:
        """Nothing."""
        return None

    def settle(self) -> None:
        """Nothing is under way."""

    def address(self, array: Any) -> int:
        """Where CuPy's arrays begin: at multiples of 512."""
        return 0

    def tensor_map(self, array: Any, box: tuple[int, int], *, swizzle: int) -> Any:
        """What stands for one."""
        return array


def sources(points: Iterable[Point], device: Device) -> list[Source]:
    """Everything that lowbit's contenders launch, in the order in which it is met."""
    recorder = Recorder(device)
    with launch.pretending(recorder):
        for name, work, m in dict.fromkeys(points):
            if name.partition(".")[0] == OURS and not peers.gpu.refusal(name, work):
                _launch(name.partition(".")[2], work, m, device)
    return list(recorder.sources)


def points_of(groups: Iterable[Group]) -> Iterator[Point]:
    """Contender, work and rows of all that groups measure."""
    for group in groups:
        for turn in group.turns:
            yield from ((entrant.name, entrant.work, m) for entrant, m in turn)


def _launch(step: str, work: Work, m: int, device: Device) -> None:
    fmt = lb.format(work.weight)
    if step in ("silu_mul", "rmsnorm"):
        rows = np.empty((work.n, work.k), work.x)
        if step == "silu_mul":
            fused.silu_mul_quantize(rows, rows, fmt)
        else:
            fused.rmsnorm_quantize(rows, rows[0], 1e-6, fmt, rows)
        return
    if step in ("quantize", "dequantize"):
        parts = quantize.enqueue(fmt, np.empty((work.n, work.k), work.x)).parts
        if step == "dequantize":
            dequantize.dequantize_to(parts, np.empty((work.n, work.k), work.x))
        return
    quantize.enqueue(fmt, np.empty((work.n, work.k), np.float32))
    dense = work.x in ("float32", "float16", "bfloat16")
    out = work.x if dense else "bfloat16"
    left: Format | str = work.x if dense else lb.format(work.x)
    x: Any = np.empty((m, work.k), out)
    if isinstance(left, Format):
        x = quantize.enqueue(left, x).parts
    problem = Problem(m, work.n, work.k, left, fmt, out, device=device.name)
    kernel = choose(problem).kernel
    if kernel.device == "cuda":
        bound = kernel.build(problem)(memory(fmt, work.n, work.k))
        bound(x, Epilogue(), np.empty((m, work.n), out))


def memory(fmt: Format, rows: int, columns: int) -> Packed:
    """Parts of a matrix that nobody has written."""
    grid, kept = fmt.grid((rows, columns)), scaling.scale_dtype(fmt)
    return Packed(
        fmt,
        (rows, columns),
        np.empty((rows, fmt.row_bytes(columns)), np.uint8),
        np.empty(grid, kept),
        None if fmt.zero is None else np.empty(grid, reference.zero_dtype(fmt)),
        np.empty(grid, kept) if fmt.bias else None,
        np.empty((), np.float32) if fmt.tensor_scale else None,
    )


def compiled(points: Iterable[Point], device: Device) -> str:
    """Put machine code of everything into the cache; how much that was, and what failed."""
    begin, wanted = time.perf_counter(), sources(points, device)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    # Processes of their own: a fork of one that has CUDA open could not be trusted.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        said = list(pool.map(_compile, wanted, [device.capability] * len(wanted)))
    failed = [why for why in said if why]
    seconds = time.perf_counter() - begin
    return "\n".join([f"{len(wanted)} kernels compiled or found in {seconds:.0f} s", *failed])


def _compile(source: Source, capability: int) -> str:
    from lowbit.kernels.cuda import compile

    try:
        compile.cubin(source, capability)
    except compile.CompileError as error:
        return f"{source.name}: {str(error).splitlines()[0]}"
    return ""

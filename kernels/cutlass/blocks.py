"""float8 whose scales change every 128 columns, on Hopper: text and arguments.

The tensor cores add up 128 columns; those sums meet the product of both scales in float32. CUTLASS
brings scales in by cp.async, in the order that lowbit holds them in: those of a row, or of a block
of rows, side by side. TMA would want them turned, which costs x a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from lowbit.kernels.cuda.tensor_maps import TensorMap
from lowbit.kernels.cutlass import dense, epilogue
from lowbit.kernels.cutlass.dense import Matrices, Vectors
from lowbit.kernels.cutlass.epilogue import Node
from lowbit.kernels.cutlass.records import MAP, Layout, Value, pack, record

DEPTH = 128
"""Columns that share scales."""


@dataclass(frozen=True)
class Spec(dense.Spec):
    """What is compiled into a kernel: `tile` has 128 columns."""

    x_rows: int = 1
    """Rows that share a scale."""
    w_rows: int = 128


@dataclass(frozen=True, kw_only=True)
class Call(dense.Call):
    """Operands of one launch."""

    x_scales: Matrices
    """float32, (ceil(rows / x_rows), ceil(k / 128))."""
    w_scales: Matrices


@lru_cache(maxsize=256)
def finish(spec: Spec) -> Node:
    """activation(alpha * sum + bias) + residual."""
    return dense.finished(spec, epilogue.SUM)


def operands(alpha: float, bias: int) -> tuple[tuple[str, Value], ...]:
    """Operands of `finish`."""
    unscaled = dense.operands(Vectors(0), Vectors(0), alpha, bias)
    return tuple(each for each in unscaled if each[0].split(".")[0] in ("alpha", "bias"))


@lru_cache(maxsize=256)
def text(spec: Spec) -> str:
    """C++ of the kernel ``lowbit_gemm``."""
    first, second = (spec.w_rows, spec.x_rows) if spec.turned else (spec.x_rows, spec.w_rows)
    scales = f"""using Scales = cutlass::detail::Sm90BlockwiseScaleConfig<
    {first}, {second}, {DEPTH}, cute::GMMA::Major::K, cute::GMMA::Major::K>;
using First = cute::tuple<cutlass::layout::RowMajor, decltype(Scales::deduce_layoutSFA())>;
using Second = cute::tuple<cutlass::layout::ColumnMajor, decltype(Scales::deduce_layoutSFB())>;
"""
    return dense.written(spec, finish(spec), scales, ("First", "Second"), "FP8BlockScaledAccum")


_SCALES = record(*((name, "i") for name in ("rows", "columns", "batches", "pitch", "batch")))


@lru_cache(maxsize=256)
def layout(spec: Spec) -> Layout:
    """Of the kernel's only argument."""
    mainloop = record(
        ("first", MAP), ("second", MAP), ("no_map_first", "Q"), ("no_map_second", "Q"),
        ("bytes", "I"), ("bytes_first", "I"), ("bytes_second", "I"),
        ("scales_first", "Q"), ("scales_second", "Q"),
        ("shape_first", _SCALES), ("shape_second", _SCALES),
    )  # fmt: skip
    return dense.laid_out(spec, finish(spec), mainloop)


def values(spec: Spec, call: Call, processors: int) -> dict[str, Value]:
    """Members of the kernel's argument, descriptors aside."""
    x = call.x_scales, -(-call.m // spec.x_rows)
    w = call.w_scales, -(-call.n // spec.w_rows)
    first, second = (w, x) if spec.turned else (x, w)
    found = dense.common(spec, call, processors, finish(spec))
    for side, (scales, rows) in (("first", first), ("second", second)):
        name = f"mainloop.shape_{side}"
        found |= {
            f"mainloop.scales_{side}": scales.address,
            f"{name}.rows": rows,
            f"{name}.columns": -(-call.k // DEPTH),
            f"{name}.batches": call.batches,
            f"{name}.pitch": scales.pitch // 4,
            f"{name}.batch": scales.batch // 4,
        }
    return found


def arguments(
    spec: Spec, call: Call, processors: int, encode: Callable[[TensorMap], bytes]
) -> bytearray:
    """The kernel's argument; `encode` makes descriptors."""
    described = {name: encode(each) for name, each in dense.maps(spec, call).items()}
    return pack(layout(spec), values(spec, call, processors) | described)

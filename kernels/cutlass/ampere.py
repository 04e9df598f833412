"""8-bit operands, or 8-bit ones with 4-bit weights, on GPUs without TMA: text and arguments.

CUTLASS 2.x: blocks of warps copy tiles by cp.async and multiply them by mma.sync. For the compute
capabilities 8.0 (integers) and 8.9 (float8 too).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lowbit.kernels.cutlass import elements, visitors
from lowbit.kernels.cutlass.dense import Call, Matrices, Vectors
from lowbit.kernels.cutlass.epilogue import FMA, Node
from lowbit.kernels.cutlass.records import Layout, Value, pack, record
from lowbit.kernels.cutlass.schedulers import log_swizzle

_PIECE = 16  # bytes that cp.async copies at a time
_SWIZZLE = 8  # most tiles side by side that blocks take before they go on
_INT4 = ("cutlass::int4b_t", "cutlass::uint4b_t")


@dataclass(frozen=True)
class Spec:
    """What is compiled into a kernel."""

    x: str
    """C++ type of x's codes."""
    w: str
    out: str
    """dtype of the result."""
    tile: tuple[int, int, int]
    """Rows of x, rows of w, columns of a block."""
    warp: tuple[int, int]
    """Rows of x and of w of a warp."""
    stages: int
    """Tiles of columns that are held at a time."""
    fast: bool = False
    """float8: sums stay in the tensor cores' registers over all columns, not over a tile's."""
    activation: str | None = None
    residual: str | None = None

    @property
    def integral(self) -> bool:
        """Sums are whole numbers."""
        return self.x == "int8_t"

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.tile[0] // self.warp[0]) * (self.tile[1] // self.warp[1])

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the codes of all stages, and later sums on their way out."""
        m, n, k = self.tile
        return self.stages * k * (m * bits(self.x) + n * bits(self.w)) // 8


def bits(kind: str) -> int:
    """Of one code."""
    return 4 if kind in _INT4 else 8


@lru_cache(maxsize=256)
def finish(spec: Spec) -> Node:
    """activation(alpha * x_scale * (w_scale * sum) + bias) + residual, written to out."""
    number = elements.DTYPES[spec.out]
    scaled = visitors.compute(
        "cutlass::multiplies", visitors.along("columns", "w_scale"), visitors.SUM
    )
    # As fma(x_scale, w_scale * sum, 0), which the kernels of the other backends compute.
    scaled = visitors.compute(
        FMA, visitors.along("rows", "x_scale"), scaled, visitors.scalar("zero")
    )
    steps = [(FMA, [visitors.scalar("alpha"), None, visitors.along("columns", "bias")])]
    if spec.activation is not None:
        steps.append((f"lb::visitors::{spec.activation}", [None]))
    if spec.residual is not None:
        steps.append(("cutlass::plus", [None, visitors.source("residual", spec.residual)]))
    for i, (function, children) in enumerate(steps):
        given = number if i == len(steps) - 1 else "float"
        scaled = visitors.compute(
            function, *(scaled if c is None else c for c in children), out=given
        )
    return visitors.store("out", spec.out, scaled)


def operands(
    x_scale: Vectors, w_scale: Vectors, alpha: float, bias: int
) -> tuple[tuple[str, Value], ...]:
    """Operands of `finish`, matrices aside; w has a scale for every row, `bias` is an address."""
    return (
        ("x_scale", x_scale.address), ("x_scale.step", x_scale.step), ("x_scale.default", 0.0),
        ("x_scale.batch", x_scale.batch), ("w_scale", w_scale.address), ("w_scale.default", 0.0),
        ("w_scale.batch", w_scale.batch),
        # Adding -0 changes nothing, not even the sign of a zero.
        ("bias", bias), ("bias.default", -0.0), ("bias.batch", 0), ("alpha", alpha), ("zero", 0.0),
    )  # fmt: skip


@lru_cache(maxsize=256)
def text(spec: Spec) -> str:
    """C++ of the kernel ``lowbit_gemm``."""
    number = elements.DTYPES[spec.out]
    at_once = _PIECE // _size(spec.out)
    m, n, k = spec.tile
    sum_ = "int32_t" if spec.integral else "float"
    if spec.w in _INT4:
        operation = "MixedInputUpcast"
    elif spec.integral:
        operation = "Saturate"  # the only one that CUTLASS has; sums that are too long never come
    else:
        operation = "FastAccum" if spec.fast else ""
    more = "" if spec.activation is None else '#include "cutlass_activation.cuh"\n'
    return f"""#include "cutlass_gemm.cuh"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"
{more}using Tile = cutlass::gemm::GemmShape<{m}, {n}, {k}>;
using Warp = cutlass::gemm::GemmShape<{spec.warp[0]}, {spec.warp[1]}, {k}>;
using Threads = cutlass::epilogue::threadblock::OutputTileThreadLayout<
    Tile, Warp, {number}, {at_once}, 1>;
using Finish = {finish(spec).text};
using Kernel = cutlass::gemm::kernel::DefaultGemmWithVisitor<
    {spec.x}, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, {_at_once(spec.x)},
    {spec.w}, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, {_at_once(spec.w)},
    {number}, cutlass::layout::RowMajor, {at_once}, {sum_}, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::{"Sm80" if spec.integral else "Sm89"},
    Tile, Warp, cutlass::gemm::GemmShape<16, 8, 32>, Finish,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<{_SWIZZLE}>, {spec.stages},
    cutlass::arch::OpMultiplyAdd{operation}, 1>::GemmKernel;
extern "C" __global__ __launch_bounds__({spec.threads})
void lowbit_gemm(__grid_constant__ const Kernel::Params params) {{
    extern __shared__ char shared[];
    Kernel::invoke(params, *reinterpret_cast<Kernel::SharedStorage*>(shared));
}}
"""


def _at_once(kind: str) -> int:
    return _PIECE * 8 // bits(kind)


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


@lru_cache(maxsize=256)
def layout(spec: Spec) -> Layout:
    """Of the kernel's only argument."""
    return record(
        ("shape", _COORDINATES), ("tiles", _COORDINATES), ("log_swizzle", "i"), ("mode", "i"),
        ("batches", "i"), ("columns", "i"), ("out_batch", "q"), ("semaphore", "Q"),
        ("extents", record(*((axis, "i") for axis in "mnl"))),
        ("first", _STEPS), ("second", _STEPS), ("finish", finish(spec).layout),
        ("x", "Q"), ("w", "Q"), ("x_batch", "q"), ("w_batch", "q"), ("gather_x", "Q"),
        ("gather_w", "Q"),
    )  # fmt: skip


_COORDINATES = record(*((axis, "i") for axis in "mnk"))
_STEPS = record(("pitch", "q"), ("strided", "q"), ("next", "q"), ("advance", "q"))
_SINGLE, _BATCHED = 0, 2  # of cutlass::gemm::GemmUniversalMode


def values(spec: Spec, call: Call) -> dict[str, Value]:
    """Members of the kernel's argument."""
    tiles_m, tiles_n = _tiles(spec, call)
    batched = call.batches > 1
    named = dict(call.finish) | _matrix("out", call.out, spec.out)
    if call.residual is not None and spec.residual is not None:
        named |= _matrix("residual", call.residual, spec.residual)
    return {
        "shape.m": call.m, "shape.n": call.n, "shape.k": call.k,
        "tiles.m": tiles_m, "tiles.n": tiles_n, "tiles.k": call.batches,
        "log_swizzle": log_swizzle(tiles_n),
        "mode": _BATCHED if batched else _SINGLE,
        "batches": call.batches,
        "columns": call.k,
        "extents.m": call.m, "extents.n": call.n, "extents.l": call.batches,
        **_steps("first", call.x, spec.x, spec, spec.tile[0]),
        **_steps("second", call.w, spec.w, spec, spec.tile[1]),
        **{f"finish.{path}": named[name] for name, path in finish(spec).operands.items()},
        "x": call.x.address, "w": call.w.address,
        "x_batch": call.x.batch, "w_batch": call.w.batch,
    }  # fmt: skip


def _tiles(spec: Spec, call: Call) -> tuple[int, int]:
    m, n, _ = spec.tile
    return -(-call.m // m), -(-call.n // n)


def _matrix(name: str, found: Matrices, dtype: str) -> dict[str, Value]:
    size = _size(dtype)
    return {
        name: found.address,
        f"{name}.row": found.pitch // size,
        f"{name}.batch": found.batch // size,
    }


def _steps(name: str, codes: Matrices, kind: str, spec: Spec, rows: int) -> dict[str, Value]:
    """How a thread goes through a tile: its pieces lie side by side for a warp."""
    width = spec.tile[2] * bits(kind) // 8
    apart = 32 // (width // _PIECE)  # rows that a warp copies at a time
    times = rows // apart // min(spec.threads // 32, rows // apart)
    strided = apart * codes.pitch
    return {
        f"{name}.pitch": codes.pitch * 8 // bits(kind),
        f"{name}.strided": strided,
        f"{name}.next": width - (times - 1) * strided,
        f"{name}.advance": width,
    }


def arguments(spec: Spec, call: Call) -> bytearray:
    """The kernel's argument."""
    return pack(layout(spec), values(spec, call))


def grid(spec: Spec, call: Call) -> tuple[int, int, int]:
    """Blocks to launch."""
    tiles_m, tiles_n = _tiles(spec, call)
    wide = 1 << log_swizzle(tiles_n)
    return tiles_m * wide, -(-tiles_n // wide), call.batches

"""Operands that tensor cores multiply as they lie in memory, on Hopper: text and arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

from lowbit.kernels.cuda.tensor_maps import TensorMap
from lowbit.kernels.cutlass import elements, epilogue, schedulers, streamk
from lowbit.kernels.cutlass.epilogue import Node
from lowbit.kernels.cutlass.records import MAP, Layout, Value, pack, record
from lowbit.kernels.cutlass.schedulers import Tiling
from lowbit.kernels.cutlass.streamk import Sharing

THREADS = 384
"""Of a block: those that load, and two groups that multiply."""
SHARED = 227 * 1024
"""Bytes of shared memory: one block has a multiprocessor for itself."""
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int32": 32, "float8_e4m3fn": 8}
"""Of a result's or residual's number."""
_KINDS = {"float8_e4m3fn": "uint8"}  # of descriptors, where it is not the dtype
_ROW = 128  # bytes of columns that a box takes


@dataclass(frozen=True)
class Spec:
    """What is compiled into a kernel."""

    x: str
    """C++ type of x's codes."""
    w: str
    out: str
    """dtype of the result."""
    tile: tuple[int, int, int]
    """Rows of the first operand, of the second, columns."""
    cluster: tuple[int, int]
    schedule: str
    """"Pingpong" or "Cooperative"."""
    turned: bool = False
    """w is the first operand: for few rows of x, of which a tile then has as few."""
    fast: bool = False
    """float8: sums stay in the tensor cores' registers over all columns."""
    activation: str | None = None
    residual: str | None = None
    x_zero: str | None = None
    """dtype of x's zero points: they are taken off whole sums, by the sums of w's rows."""

    shared: bool = False
    """Blocks share the columns of tiles."""
    swizzle: int = 1
    """Most tiles side by side that blocks take before they go on; no part of the text."""
    grouped: ClassVar[bool] = False
    """Groups of rows each have a matrix w; see grouped.py."""

    @property
    def integral(self) -> bool:
        """Sums are whole numbers."""
        return self.x in ("int8_t", "uint8_t")


@lru_cache(maxsize=256)
def finish(spec: Spec) -> Node:
    """activation(alpha * x_scale * (w_scale * sum) + bias) + residual.

    As float8 the result is multiplied by out_scale first; as int32 it is the sum itself.
    """
    x, w = ("columns", "rows") if spec.turned else ("rows", "columns")
    total = epilogue.SUM
    if spec.x_zero is not None:
        zero = epilogue.along(x, "x_zero", spec.x_zero, "int32_t")
        sums = epilogue.along(w, "w_sum", "int32", "int32_t")
        whole = {"out": "int32_t", "number": "int32_t"}
        off = epilogue.compute("cutlass::multiplies", zero, sums, **whole)
        total = epilogue.compute("cutlass::minus", total, off, **whole)
    if spec.out == "int32":
        identity = "cutlass::epilogue::thread::Identity"
        return epilogue.compute(identity, total, out="int32_t", number="int32_t")
    scaled = epilogue.compute("cutlass::multiplies", epilogue.along(w, "w_scale"), total)
    # As fma(x_scale, w_scale * sum, 0), which the kernels of the other backends compute.
    x_scale = epilogue.along(x, "x_scale", pointers=spec.grouped)
    scaled = epilogue.compute(epilogue.FMA, x_scale, scaled, epilogue.scalar("zero"))
    return finished(spec, scaled)


def finished(spec: Spec, scaled: Node, alpha: Node | None = None) -> Node:
    """activation(alpha * scaled + bias) + residual."""
    w = "rows" if spec.turned else "columns"
    alpha = epilogue.scalar("alpha") if alpha is None else alpha
    steps = [(epilogue.FMA, [alpha, None, epilogue.along(w, "bias")])]
    if spec.activation is not None:
        steps.append((f"lb::visitors::{spec.activation}", [None]))
    if spec.residual is not None:
        steps.append(("cutlass::plus", [None, epilogue.source(spec.residual)]))
    if spec.out == "float8_e4m3fn":
        steps.append(("cutlass::multiplies", [None, epilogue.scalar("out_scale")]))
    for i, (function, children) in enumerate(steps):
        given = elements.DTYPES[spec.out] if i == len(steps) - 1 else "float"
        scaled = epilogue.compute(
            function, *(scaled if c is None else c for c in children), out=given
        )
    return scaled


@lru_cache(maxsize=256)
def text(spec: Spec) -> str:
    """C++ of the kernel ``lowbit_gemm``."""
    return written(spec, finish(spec))


def written(
    spec: Spec,
    after: Node,
    before: str = "",
    layouts: tuple[str, str] = ("cutlass::layout::RowMajor", "cutlass::layout::ColumnMajor"),
    variant: str | None = None,
    together: tuple[int, int] = (16, 16),
) -> str:
    """C++ of a kernel.

    `before` declares what the operands' `layouts` name; `variant` ends the name of the main loop's
    schedule; `together` are the codes of either operand that lie at multiples of 16 bytes.
    """
    first, second = (spec.w, spec.x) if spec.turned else (spec.x, spec.w)
    layout = "ColumnMajor" if spec.turned else "RowMajor"
    out = elements.DTYPES[spec.out]
    added = "void" if spec.residual is None else elements.DTYPES[spec.residual]
    at_once = 128 // BITS[spec.out]
    added_at_once = at_once if spec.residual is None else 128 // BITS[spec.residual]
    if variant is None:
        variant = "FP8FastAccum" if spec.fast else ""
    array, pointer, stored = "", "", "" if spec.schedule == "Pingpong" else "Cooperative"
    if spec.grouped:
        array, pointer, stored = "PtrArray", "*", spec.schedule
    shape = ", ".join(f"cute::_{each}" for each in spec.tile)
    cluster = ", ".join(f"cute::_{each}" for each in (*spec.cluster, 1))
    sum_ = "int32_t" if spec.integral else "float"
    more = "" if spec.activation is None else '#include "cutlass_activation.cuh"\n'
    if spec.shared:
        more += '#include "cutlass_streamk.cuh"\n'
    scheduler = "lb::StreamK" if spec.shared else "cutlass::gemm::PersistentScheduler"
    sizes = "cute::Shape<int, int, int, int>"
    if spec.grouped:
        scheduler = "cutlass::gemm::GroupScheduler"
        sizes = "cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>"
    operands = (
        f"{codes}, {laid}{pointer}, {each}"
        for codes, laid, each in zip((first, second), layouts, together, strict=True)
    )
    return f"""#include "cutlass_gemm.cuh"
{more}using Tile = cute::Shape<{shape}>;
using Cluster = cute::Shape<{cluster}>;
using Finish = {after.text};
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, {sum_}, float,
    {added}, cutlass::layout::{layout}{pointer}, {added_at_once},
    {out}, cutlass::layout::{layout}{pointer}, {at_once},
    cutlass::epilogue::{array}TmaWarpSpecialized{stored}, Finish>::CollectiveOp;
{before}using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
    {", ".join(operands)}, {sum_},
    Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<sizeof(Epilogue::SharedStorage)>,
    cutlass::gemm::Kernel{array}TmaWarpSpecialized{spec.schedule}{variant}>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<
    {sizes}, Mainloop, Epilogue, {scheduler}>;
""" + epilogue.KERNEL.format(clusters=", ".join(map(str, (*spec.cluster, 1))))


@lru_cache(maxsize=256)
def layout(spec: Spec) -> Layout:
    """Of the kernel's only argument."""
    counts = [("bytes", "I"), ("bytes_first", "I"), ("bytes_second", "I")]
    if not spec.integral and not spec.fast:
        counts.append(("promotion", "I"))
    return laid_out(spec, finish(spec), record(("first", MAP), ("second", MAP), *counts))


_CLUSTER = record(*((axis, "I") for axis in "xyz"))
HARDWARE = record(
    ("device", "i"), ("processors", "i"), ("clusters", "i"), ("shape", _CLUSTER),
    ("fallback", _CLUSTER),
)  # fmt: skip
"""cutlass::KernelHardwareInfo."""


def laid_out(spec: Spec, after: Node, mainloop: Layout) -> Layout:
    """Of the argument of a kernel with these arguments of its main loop."""
    stores = record(("thread", after.layout), ("c", MAP), ("d", MAP), ("bytes", "I"))
    shape = record(*((axis, "i") for axis in "mnkl"))
    scheduler = streamk.PARAMETERS if spec.shared else schedulers.PERSISTENT
    return record(
        ("mode", "i"), ("shape", shape), ("mainloop", mainloop), ("epilogue", stores),
        ("hardware", HARDWARE), ("scheduler", scheduler),
        *([("workspace", "Q")] if spec.schedule == "Cooperative" else []),
    )  # fmt: skip


@dataclass(frozen=True)
class Matrices:
    """Matrices of one shape, rows without gaps: where they are, and how far apart."""

    address: int
    pitch: int
    """Bytes from a row to the next."""
    batch: int = 0
    """Bytes from a matrix to the next."""


class Vectors(NamedTuple):
    """A number for every row of matrices, or for all of one: where they are, and how far apart."""

    address: int
    step: int = 0
    """Numbers from a row's to the next one's: 0 where one is for all rows."""
    batch: int = 0
    """Numbers from a matrix to the next."""


@dataclass(frozen=True)
class Call:
    """Operands of one launch."""

    m: int
    n: int
    k: int
    x: Matrices
    w: Matrices
    out: Matrices
    finish: tuple[tuple[str, Value], ...]
    """Operands of the epilogue by name."""
    residual: Matrices | None = None
    batches: int = 1
    sharing: Sharing | None = None
    """How blocks share the columns of tiles, where they do; see streamk.parameters."""
    partial: int = 0
    locks: int = 0


def operands(
    x_scale: Vectors, w_scale: Vectors, alpha: float, bias: int
) -> tuple[tuple[str, Value], ...]:
    """Operands of `finish`; `bias` is an address."""
    return (
        *_operand("x_scale", x_scale, 0.0), *_operand("w_scale", w_scale, 0.0),
        # Adding -0 changes nothing, not even the sign of a zero.
        ("bias", bias), ("bias.step", 1), ("bias.default", -0.0), ("bias.batch", 0),
        ("alpha", alpha), ("zero", 0.0),
    )  # fmt: skip


def zero_operands(zero: Vectors, sums: Vectors) -> tuple[tuple[str, Value], ...]:
    """Operands of `finish` for zero points of x: they, and the sums of w's rows."""
    return *_operand("x_zero", zero, 0), *_operand("w_sum", sums, 0)


def _operand(name: str, given: Vectors, default: Value) -> tuple[tuple[str, Value], ...]:
    return (
        (name, given.address), (f"{name}.step", given.step), (f"{name}.default", default),
        (f"{name}.batch", given.batch),
    )  # fmt: skip


def tiling(spec: Spec, call: Call) -> Tiling:
    """Tiles of the result."""
    return _tiling(spec, call.m, call.n, call.batches)


def _tiling(spec: Spec, m: int, n: int, batches: int = 1) -> Tiling:
    first, second = (n, m) if spec.turned else (m, n)
    rows, columns, _ = spec.tile
    return Tiling(-(-first // rows), -(-second // columns), batches, spec.cluster, spec.swizzle)


def sharing(spec: Spec, m: int, n: int, k: int, processors: int) -> Sharing | None:
    """How blocks share the columns of a product's tiles; None where its kernel's do not."""
    if not spec.shared:
        return None
    return streamk.chosen(_tiling(spec, m, n), -(-k // spec.tile[2]), processors)


def words(spec: Spec, m: int, n: int, found: Sharing | None) -> dict[str, int]:
    """32-bit words that blocks share: where sums wait, and locks."""
    tiles = 0 if found is None else found.partial(_tiling(spec, m, n))
    return {"partial": tiles * spec.tile[0] * spec.tile[1], "locks": 2 * tiles}


def grid(spec: Spec, call: Call, processors: int) -> tuple[int, int, int]:
    """Blocks to launch."""
    chosen = streamk.grid if spec.shared else schedulers.grid
    return chosen(tiling(spec, call), processors)


def maps(spec: Spec, call: Call) -> dict[str, TensorMap]:
    """What TMA reads and writes, by the member that describes it."""
    (m, n, depth), (a, b) = spec.tile, spec.cluster
    x, w = (call.x, call.m), (call.w, call.n)
    first, second = (w, x) if spec.turned else (x, w)
    # A cluster's blocks read a tile once: each a part, for all.
    found = {
        "mainloop.first": _codes(*first, call, m // b, depth),
        "mainloop.second": _codes(*second, call, n // a, depth),
        "epilogue.d": _result(spec, call, call.out, spec.out),
    }
    if call.residual is not None and spec.residual is not None:
        found["epilogue.c"] = _result(spec, call, call.residual, spec.residual)
    return {f"{name}.descriptor": each for name, each in found.items()}


def _codes(codes: Matrices, rows: int, call: Call, box: int, depth: int) -> TensorMap:
    return TensorMap(
        "uint8", codes.address, (call.k, rows, call.batches), (codes.pitch, codes.batch),
        (min(depth, _ROW), box, 1), _ROW,
    )  # fmt: skip


def _result(spec: Spec, call: Call, given: Matrices, dtype: str) -> TensorMap:
    rows, columns = stored(spec)
    size = BITS[dtype] // 8
    box = (min(rows, _ROW // size), columns) if spec.turned else (columns, rows)
    return TensorMap(
        _KINDS.get(dtype, dtype), given.address, (call.n, call.m, call.batches),
        (given.pitch, given.batch), (*box, 1), box[0] * size,
    )  # fmt: skip


def stored(spec: Spec) -> tuple[int, int]:
    """Rows and columns of a tile that are written at a time."""
    if spec.schedule != "Pingpong":
        return min(128, spec.tile[0]), min(32, spec.tile[1])
    wide = 64 if BITS[spec.out] == 8 and spec.tile[1] % 64 == 0 else 32
    return 64, min(wide, spec.tile[1])


def values(spec: Spec, call: Call, processors: int) -> dict[str, Value]:
    """Members of the kernel's argument, descriptors aside."""
    found = common(spec, call, processors, finish(spec))
    return found if spec.integral or spec.fast else found | {"mainloop.promotion": 4}


def common(spec: Spec, call: Call, processors: int, after: Node) -> dict[str, Value]:
    """Members that every kernel's argument has, descriptors aside."""
    first, second = (call.n, call.m) if spec.turned else (call.m, call.n)
    m, n, depth = spec.tile
    added = 0 if spec.residual is None else BITS[spec.residual] // 8
    rows, columns = stored(spec)
    named = dict(call.finish)
    return {
        "shape.m": first, "shape.n": second, "shape.k": call.k, "shape.l": call.batches,
        "mainloop.bytes": (m + n) * depth,
        "mainloop.bytes_first": m * depth,
        "mainloop.bytes_second": n * depth,
        "epilogue.bytes": rows * columns * (added or BITS[spec.out] // 8),
        **{f"epilogue.thread.{path}": named[name] for name, path in after.operands.items()},
        "hardware.processors": processors,
        **_scheduled(spec, call),
    }  # fmt: skip


def steps(spec: Spec, call: Call) -> int:
    """Steps of a tile along the columns."""
    return -(-call.k // spec.tile[2])


def _scheduled(spec: Spec, call: Call) -> dict[str, Value]:
    if call.sharing is None:
        return schedulers.persistent("scheduler", tiling(spec, call))
    return {
        **streamk.parameters(
            "scheduler", tiling(spec, call), steps(spec, call), call.sharing, call.partial,
            call.locks,
        ),
        "workspace": call.partial,
    }  # fmt: skip


def arguments(
    spec: Spec, call: Call, processors: int, encode: Callable[[TensorMap], bytes]
) -> bytearray:
    """The kernel's argument; `encode` makes descriptors."""
    described = {name: encode(each) for name, each in maps(spec, call).items()}
    return pack(layout(spec), values(spec, call, processors) | described)

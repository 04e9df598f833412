"""Operands of Blackwell's tensor cores, which multiply blocks by their scales: text and arguments.

Codes lie as lowbit has them, their scales as interleave.py of kernels/cuda leaves them. Or float8
codes with a scale for a row, as dense.py has them, where there is tensor memory (compute capability
10.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from lowbit.kernels.cuda.tensor_maps import TensorMap
from lowbit.kernels.cutlass import dense, elements, epilogue
from lowbit.kernels.cutlass.dense import BITS, HARDWARE, Matrices
from lowbit.kernels.cutlass.epilogue import Node
from lowbit.kernels.cutlass.records import MAP, Layout, Value, pack, record

_ATOM = (128, 4)  # rows and scales of a row that lie together
_ROW = 128  # bytes of columns that a box takes
_KINDS = {4: "uint4", 8: "uint8"}
_LIMIT = (1 << 16) - 1  # blocks of a grid's second axis


@dataclass(frozen=True)
class Codes:
    """What is known of an operand by its C++ type."""

    bits: int
    group: int = 0
    """Columns that share a scale; 0 where a row does."""


KINDS = {
    "cutlass::nv_float4_t<cutlass::float_e2m1_t>": Codes(4, 16),
    "cutlass::mx_float4_t<cutlass::float_e2m1_t>": Codes(4, 32),
    "cutlass::mx_float8_t<cutlass::float_e4m3_t>": Codes(8, 32),
    "cutlass::mx_float8_t<cutlass::float_e5m2_t>": Codes(8, 32),
    "cutlass::float_e4m3_t": Codes(8),
    "cutlass::float_e5m2_t": Codes(8),
}


@dataclass(frozen=True)
class Spec(dense.Spec):
    """What is compiled into a kernel.

    `tile` is that of a pair of blocks where it has 256 rows. With scales of blocks it has no more
    than 192 of the second operand's: two tiles' sums and the scales fill the tensor memory.
    """

    @property
    def tensor_memory(self) -> bool:
        """Sums lie there: compute capability 10.0, `schedule` "Sm100", else "Sm120"."""
        return self.schedule == "Sm100"

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 where a row does."""
        return KINDS[self.x].group

    @property
    def rows(self) -> int:
        """Of the first operand for one block."""
        return self.tile[0] // 2 if self.tensor_memory and self.tile[0] == 256 else self.tile[0]

    @property
    def threads(self) -> int:
        """Of a block."""
        return 256 if self.tensor_memory else 384

    @property
    def room(self) -> int:
        """Bytes of shared memory: one block has a multiprocessor for itself."""
        return dense.SHARED if self.tensor_memory else 99 * 1024

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the first operand's and the second's that are written at a time."""
        return (128 if self.tensor_memory else 64), min(32, self.tile[1])


@dataclass(frozen=True)
class Call(dense.Call):
    """Operands of one launch."""

    x_scales: int = 0
    """Where x's scales are, as interleave.py leaves them."""
    w_scales: int = 0


def factors(name: str, *others: str) -> Node:
    """The product of float32 numbers: `name` by value, `others` where they are.

    The operands `others` are addresses, 0 for other.default.
    """
    count = 1 + len(others)
    stride = "cute::Stride<cute::_0, cute::_0, int64_t>"
    text = f"cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, {stride}, {count}>"
    parts = (("scalars", "f"), ("pointers", "Q"), ("strides", "q"))
    layout = record(
        *((part, record(*((str(i), kind) for i in range(count)))) for part, kind in parts)
    )
    operands = {name: "scalars.0"}
    for i, other in enumerate(others, 1):
        operands |= {other: f"pointers.{i}", f"{other}.default": f"scalars.{i}"}
    return Node(text, layout, operands)


@lru_cache(maxsize=256)
def finish(spec: Spec) -> Node:
    """activation(alpha * sum + bias) + residual; with scales of rows what dense.py computes.

    alpha is multiplied by the operands' second scales.
    """
    if not spec.group:
        return dense.finish(spec)
    return dense.finished(spec, epilogue.SUM, factors("alpha", "x_factor", "w_factor"))


@lru_cache(maxsize=256)
def text(spec: Spec) -> str:
    """C++ of the kernel ``lowbit_gemm``."""
    first, second = (spec.w, spec.x) if spec.turned else (spec.x, spec.w)
    layout = "ColumnMajor" if spec.turned else "RowMajor"
    out = elements.DTYPES[spec.out]
    added = "void" if spec.residual is None else elements.DTYPES[spec.residual]
    at_once = 128 // BITS[spec.out]
    added_at_once = at_once if spec.residual is None else 128 // BITS[spec.residual]
    more = "" if spec.activation is None else '#include "cutlass_activation.cuh"\n'
    processor = f"cutlass::arch::{spec.schedule}"
    operation = f"cutlass::arch::OpClass{'BlockScaled' if spec.group else ''}TensorOp"

    stores = "cutlass::epilogue::collective::EpilogueScheduleAuto"
    if spec.tensor_memory:
        stores = f"cutlass::epilogue::TmaWarpSpecialized{spec.tile[0] // spec.rows}Sm"

    def shape(*sizes: int) -> str:
        return f"cute::Shape<{', '.join(f'cute::_{each}' for each in sizes)}>"

    return f"""#include "cutlass_blackwell.cuh"
{more}using Tile = {shape(spec.rows, *spec.tile[1:])};
using TileOfPair = {shape(*spec.tile)};
using Cluster = {shape(*spec.cluster, 1)};
using Finish = {finish(spec).text};
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    {processor}, {operation}, TileOfPair, Cluster,
    {shape(*spec.stored)}, float, float,
    {added}, cutlass::layout::{layout}, {added_at_once},
    {out}, cutlass::layout::{layout}, {at_once},
    {stores}, Finish>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    {processor}, {operation},
    {first}, cutlass::layout::RowMajor, {128 // KINDS[first].bits},
    {second}, cutlass::layout::ColumnMajor, {128 // KINDS[second].bits}, float,
    TileOfPair, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<
        static_cast<int>(sizeof(Epilogue::SharedStorage))>,
    cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<
    cute::Shape<int, int, int, int>, Mainloop, Epilogue, void>;
""" + epilogue.KERNEL.format(clusters=", ".join(map(str, (*spec.cluster, 1))))


_DIVISOR = record(("divisor", "i"), ("multiplier", "I"), ("shift", "I"))
_SCHEDULER = record(
    *((f"tiles_{axis}", "I") for axis in "mnl"),
    ("cluster_m", _DIVISOR), ("cluster_n", _DIVISOR), ("swizzle", _DIVISOR),
    ("raster", "i"), ("log_swizzle", "i"),
)  # fmt: skip
_SCALES = record(("rows", "i"), ("columns", "i"), ("batches", "i"), ("row", "i"), ("batch", "i"))
"""Atoms along the axes, and from one to the next; what else a layout says is in its type."""


@lru_cache(maxsize=256)
def layout(spec: Spec) -> Layout:
    """Of the kernel's only argument."""
    names = ["first", "second"]
    if spec.group:
        names += ["first_scales", "second_scales"]
    held: list[tuple[str, Layout | str]] = [(name, MAP) for name in names]
    laid: list[tuple[str, Layout | str]] = []
    if spec.group:
        laid = [("first_atoms", _SCALES), ("second_atoms", _SCALES)]
    axes = record(*((axis, "I") for axis in "xyz"))
    shape = ("shape", record(*((axis, "i") for axis in "mnkl")))
    stores = [("thread", finish(spec).layout), ("c", MAP), ("d", MAP)]
    count: list[tuple[str, Layout | str]] = [("bytes", "I")]
    if not spec.tensor_memory:
        counts = [*count, ("bytes_first", "I"), ("bytes_second", "I")]
        return record(
            ("mode", "i"), shape, ("mainloop", record(*held, *laid, *counts)),
            ("epilogue", record(*stores, *count)), ("hardware", HARDWARE),
            ("scheduler", _SCHEDULER), ("workspace", "Q"),
        )  # fmt: skip
    again: list[tuple[str, Layout | str]] = [(f"{name}_again", MAP) for name in names]
    rest: list[tuple[str, Layout | str]] = [
        ("cluster", axes),
        ("first_type", "Q"),
        ("second_type", "Q"),
    ]
    return record(
        ("mode", "i"), shape, ("mainloop", record(*held, *again, *laid, *rest)),
        ("epilogue", record(*stores)), ("scheduler", _SCHEDULER), ("hardware", HARDWARE),
    )  # fmt: skip


def _sides(spec: Spec, call: Call) -> list[tuple[str, Matrices, int, int, int, int]]:
    """Of both operands: name, codes, rows, scales, rows of a tile for a block and of those."""
    (a, b), n = spec.cluster, spec.tile[1]
    x, w = (call.x, call.m, call.x_scales), (call.w, call.n, call.w_scales)
    first, second = (w, x) if spec.turned else (x, w)
    # Blocks of a cluster read a tile once: each a part, for all.
    return [("first", *first, spec.rows, b), ("second", *second, n, a)]


def maps(spec: Spec, call: Call) -> dict[str, TensorMap]:
    """What TMA reads and writes, by the member that describes it."""
    found = {}
    for name, codes, rows, scales, tile, parts in _sides(spec, call):
        found[name] = _codes(spec, call, codes, rows, tile // parts)
        if spec.group:
            found[f"{name}_scales"] = _scales(spec, call, scales, rows, tile, parts)
    if spec.tensor_memory:
        found |= {f"{name}_again": each for name, each in found.items()}
    found = {f"mainloop.{name}": each for name, each in found.items()}
    found["epilogue.d"] = _result(spec, call, call.out, spec.out)
    if call.residual is not None and spec.residual is not None:
        found["epilogue.c"] = _result(spec, call, call.residual, spec.residual)
    return {f"{name}.descriptor": each for name, each in found.items()}


def _codes(spec: Spec, call: Call, codes: Matrices, rows: int, box: int) -> TensorMap:
    bits = KINDS[spec.x].bits
    width = min(spec.tile[2] * bits // 8, _ROW)
    return TensorMap(
        _KINDS[bits], codes.address, (call.k, rows, call.batches), (codes.pitch, codes.batch),
        (width * 8 // bits, box, 1), width,
    )  # fmt: skip


def _atoms(spec: Spec, call: Call, rows: int) -> tuple[int, int]:
    high, wide = _ATOM
    return -(-rows // high), -(-call.k // (spec.group * wide))


def _scales(spec: Spec, call: Call, address: int, rows: int, tile: int, parts: int) -> TensorMap:
    high, wide = _ATOM
    size = high * wide
    down, across = _atoms(spec, call, rows)
    box = [size // 2, -(-tile // high), spec.tile[2] // (spec.group * wide), 1]
    sizes, strides = [size // 2, down, across, call.batches], [size * across, size]
    if box[1] == 1 < box[2]:  # axes are in the order of their steps in shared memory
        for pair, at in ((box, 1), (sizes, 1), (strides, 0)):
            pair[at], pair[at + 1] = pair[at + 1], pair[at]
    for axis in (2, 1, 0):
        shared = min(parts, box[axis])
        box[axis], parts = box[axis] // shared, parts // shared
    return TensorMap("uint16", address, tuple(sizes), (*strides, size * down * across), tuple(box))


def _result(spec: Spec, call: Call, given: Matrices, dtype: str) -> TensorMap:
    (rows, columns), size = spec.stored, BITS[dtype] // 8
    wide, high = (rows, columns) if spec.turned else (columns, rows)
    wide = min(wide, _ROW // size)
    # Tensor memory hands 32-bit numbers over by columns in pieces of 32 bytes.
    piece = 32 if spec.tensor_memory and spec.turned and size == 4 else 16
    return TensorMap(
        dtype, given.address, (call.n, call.m, call.batches), (given.pitch, given.batch),
        (wide, high, 1), wide * size, piece,
    )  # fmt: skip


def _divisor(name: str, by: int) -> dict[str, Value]:
    """Members of a cutlass::FastDivmod; of 0 all are zero."""
    bits = 31 + (by - 1).bit_length()
    numbers = (by, -(-(1 << bits) // by), bits - 32) if by > 1 else (by, 0, 0)
    return {f"{name}.{m}": v for m, v in zip(_DIVISOR.members, numbers, strict=True)}


def _blocks(spec: Spec, call: Call) -> tuple[int, int]:
    """Along both axes, whole clusters."""
    first, second = (call.n, call.m) if spec.turned else (call.m, call.n)
    (a, b), n = spec.cluster, spec.tile[1]
    return -(-first // (spec.rows * a)) * a, -(-second // (n * b)) * b


def _along_n(spec: Spec, call: Call) -> bool:
    """Whether neighbours follow each other along the second operand's rows."""
    (m, n), (a, b) = _blocks(spec, call), spec.cluster
    return n // b <= m // a and m // a * b <= _LIMIT


def values(spec: Spec, call: Call, processors: int) -> dict[str, Value]:
    """Members of the kernel's argument, descriptors aside."""
    first, second = (call.n, call.m) if spec.turned else (call.m, call.n)
    (m, n), (a, b), thread = _blocks(spec, call), spec.cluster, finish(spec)
    named = dict(call.finish)
    found: dict[str, Value] = {
        "shape.m": first, "shape.n": second, "shape.k": call.k, "shape.l": call.batches,
        **{f"epilogue.thread.{path}": named[name] for name, path in thread.operands.items()},
        "hardware.processors": processors,
        "scheduler.tiles_m": m // a, "scheduler.tiles_n": n // b,
        "scheduler.tiles_l": call.batches,
        **_divisor("scheduler.cluster_m", a), **_divisor("scheduler.cluster_n", b),
        **_divisor("scheduler.swizzle", spec.swizzle if spec.swizzle > 1 else 0),
        "scheduler.raster": int(_along_n(spec, call)),
    }  # fmt: skip
    for name, _, rows, _, _, _ in _sides(spec, call) if spec.group else ():
        down, across = _atoms(spec, call, rows)
        row = across * _ATOM[0] * _ATOM[1]
        numbers = (down, across, call.batches, row, down * row)
        for member, number in zip(_SCALES.members, numbers, strict=True):
            found[f"mainloop.{name}_atoms.{member}"] = number
    if not spec.tensor_memory:
        found |= _transactions(spec)
    return found


def _transactions(spec: Spec) -> dict[str, Value]:
    """Bytes that arrive together."""
    m, n, depth = spec.tile
    row = depth * KINDS[spec.x].bits // 8 + depth // spec.group
    rows, columns = spec.stored
    return {
        "mainloop.bytes": (m + n) * row, "mainloop.bytes_first": m * row,
        "mainloop.bytes_second": n * row,
        "epilogue.bytes": rows * columns * BITS[spec.residual or spec.out] // 8,
    }  # fmt: skip


def arguments(
    spec: Spec, call: Call, processors: int, encode: Callable[[TensorMap], bytes]
) -> bytearray:
    """The kernel's argument; `encode` makes descriptors."""
    described = {name: encode(each) for name, each in maps(spec, call).items()}
    return pack(layout(spec), values(spec, call, processors) | described)


def grid(spec: Spec, call: Call) -> tuple[int, int, int]:
    """Blocks to launch: all, of which those that run take over others that wait."""
    (m, n), (a, b) = _blocks(spec, call), spec.cluster
    if _along_n(spec, call):
        m, n = n // b * a, m // a * b
    return m, n, call.batches

"""Products on tensor cores: one class of them as C++ text, bound to a weight, launched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lowbit.formats import Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import emit, launch, tiles
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cuda.tiles import Tile
from lowbit.kernels.declare import Array, Bind, Epilogue, Problem, Run

MOST_ROWS = 65535 * 128  # of tiles along a grid's second axis
MOST_COLUMNS = 2**28  # bytes of a row are counted in int
_USUAL = 64
_DENSE = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class Spec:
    """What is compiled into a kernel; sizes, pitches and block shapes are arguments."""

    method: str
    """"segments": sums of a segment meet their scales. "folded": w's numbers do. "integer":
    segments of whole numbers, exactly. "float8": codes of both sides as they are."""
    operand: str
    """"Half" or "Bfloat16", what tensor cores multiply; "Byte" for whole numbers."""
    x: Format | str
    w: Format
    tile: Tile
    run: int
    """Octets that lie side by side in a lane's hands."""
    out: str
    bias: bool = False
    activation: str | None = None
    residual: str | None = None
    octets: bool = True
    """No block of w ends within an octet of columns."""
    shared: bool = False
    """Blocks share the columns of a tile."""
    partial_sums: bool = False
    """Shares of the columns are added up before scales meet the sum."""
    w_piece: int = 16
    """Bytes that w is brought in at a time, to which its rows are aligned."""
    x_piece: int = 16

    @property
    def w_octet(self) -> int:
        """Bytes of eight codes of w."""
        return self.w.element.bits

    @property
    def x_octet(self) -> int:
        """Bytes of eight numbers of x."""
        return octet_bytes(self.x)

    @property
    def stage(self) -> int:
        """Bytes of shared memory of a stage."""
        return tiles.stage_bytes(self.tile, self.run, self.w_octet, self.x_octet)

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return tiles.stages_for(self.tile, self.stage)

    @property
    def shared_memory(self) -> int:
        """Bytes of a block: the stages, then the result in their place; a ticket."""
        return max(self.stage * self.stages, 4 * self.tile.columns * (self.tile.rows + 4)) + 16


def octet_bytes(x: Format | str) -> int:
    """Bytes of eight numbers of x."""
    return _DENSE[x] if isinstance(x, str) else x.element.bits


def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    tile, w, x = spec.tile, spec.w, spec.x
    before, of_w, of_x = _operands(spec)
    x_scale = "float32" if isinstance(x, str) else x.scale.element
    values: dict[str, object] = {
        "threads": tile.threads,
        "resident": 1,
        "rows": tile.rows,
        "columns": tile.columns,
        "depth": tile.depth,
        "stages": spec.stages,
        "run": spec.run,
        "w_tiles": tile.w_tiles,
        "x_tiles": tile.x_tiles,
        "w_warps": tile.w_warps,
        "w_octet": spec.w_octet,
        "x_octet": spec.x_octet,
        "w_piece": spec.w_piece,
        "x_piece": spec.x_piece,
    }
    flags = {
        "folded": spec.method == "folded",
        "x_scaled": isinstance(x, Format),
        "x_sums": spec.method == "integer" and w.zero is not None,
        "shared": spec.shared,
        "partial_sums": spec.partial_sums,
        "w_factor": w.tensor_scale,
        "x_factor": isinstance(x, Format) and x.tensor_scale,
        "bias": spec.bias,
        "residual": spec.residual is not None,
    }
    fields = [f"    static constexpr int {name} = {value};\n" for name, value in values.items()]
    fields += [
        f"    static constexpr bool {name} = {str(value).lower()};\n"
        for name, value in flags.items()
    ]
    text = (
        '#include "gemm.cuh"\n'
        + before
        + emit.scale(w.scale.element, "WeightScale")
        + emit.scale(x_scale, "LeftScale")
        + emit.zero(w, "WeightZero")
        + "struct Config {\n"
        + "    using Scale = WeightScale;\n    using XScale = LeftScale;\n"
        + "    using Zero = WeightZero;\n    using Blocks = lb::WeightBlocks<Scale, Zero, "
        + f"{str(w.bias).lower()}, {str(spec.octets).lower()}>;\n"
        + f"    using W = {of_w};\n    using X = {of_x};\n"
        + "".join(fields)
        + after(spec.out, spec.activation, spec.residual)
        + "};\n"
    )
    return Source(text, "lb::gemm<Config>", tile.threads, spec.shared_memory)


def after(out: str, activation: str | None, residual: str | None) -> str:
    """Members of a configuration: what follows the sum, see epilogue.cuh."""
    return (
        f"    using Out = {emit.NUMBERS[out]};\n"
        f"    using Residual = {emit.NUMBERS[residual or 'float32']};\n"
        "    static constexpr lb::Activation activation = "
        f"lb::Activation::{activation or 'none'};\n"
        f"{emit.widen(residual or 'float32')}{emit.narrow(out)}"
    )


def _operands(spec: Spec) -> tuple[str, str, str]:
    """Text to declare before, and the types that w and x become operands by."""
    w, x = spec.w, spec.x
    if spec.method == "integer":
        assert isinstance(x, Format)
        unsigned = w.element.bits == 8 and emit.whole(w.element) is False
        return (
            "",
            f"lb::Wholes<{emit.octets(w.element)}, {str(unsigned).lower()}>",
            f"lb::CodedBytes<{x.element.bits}>",
        )
    if spec.method == "float8":
        assert isinstance(x, Format)
        wide = (str(side.element.name == "float8_e5m2").lower() for side in (w, x))
        return "", f"lb::Float8s<{', '.join(wide)}>", "lb::CodedFloat8"
    before, element = emit.numbers(w.element, spec.operand, "WeightTable")
    if spec.method == "folded":
        of_w = f"lb::Folded<{element}, Blocks>"
    else:
        of_w = f"lb::Numbers<{element}, {str(w.zero is not None).lower()}>"
    if isinstance(x, str):
        return before, of_w, f"lb::Dense<lb::{spec.operand}, {emit.NUMBERS[x]}>"
    more, coded = emit.numbers(x.element, spec.operand, "LeftTable")
    return before + more, of_w, f"lb::Coded<{coded}>"


def run_of(segment: int, k: int) -> int:
    """Octets side by side: two where a segment has room for them."""
    return 2 if segment >= k or segment % 64 == 0 else 1


def piece_of(address: int, pitch: int, row: int) -> int:
    """Bytes that rows can be brought in at a time: 16, 8, 4 or, by plain copies, 1."""
    common = address | pitch | 16
    found = min(common & -common, 16)
    while row % found:
        found //= 2
    return found if found >= 4 else 1


_source = lru_cache(maxsize=4096)(source)


def pitch_of(machine: Machine, rows: Array) -> Any:
    """Numbers from one row to the next, as an argument."""
    return machine.number(np.int64, rows.strides[0] // rows.itemsize)


def bind(p: Problem, spec: Spec, segment: int) -> Bind:
    """Bind a class of products, pieces aside, to weights."""
    tile, shares = spec.tile, shares_of(p, spec)
    spec = replace(spec, shared=shares > 1, partial_sums=spec.partial_sums and shares > 1)
    grid = (-(-p.n // tile.rows), -(-p.m // tile.columns), shares)
    w_row, x_row = tile.depth // 8 * spec.w_octet, tile.depth // 8 * spec.x_octet

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        number = machine.number
        codes = w.codes.view(np.uint8)
        pitch = codes.strides[0]
        bound = replace(spec, w_piece=piece_of(machine.address(codes), pitch, w_row))
        absent = w.scales  # stands where an operand is not there: never read
        weight = (
            codes,
            number(np.int64, pitch),
            w.scales,
            absent if w.zeros is None else w.zeros,
            absent if w.biases is None else w.biases,
            *(number(np.int32, size) for size in (w.scales.shape[-1], *block_of(w))),
        )
        factor = absent if w.tensor_scale is None else w.tensor_scale
        sizes = [number(np.int32, size) for size in (p.m, p.n, p.k, segment)]
        one, none = number(np.float64, 1), number(np.int64, 0)
        without_scales = (absent, *(number(np.int32, entry) for entry in (0, 1, 1))), absent
        shared, threads = spec.shared_memory, (tile.threads,)

        @lru_cache(maxsize=64)
        def reading(offset: int, pitch: int) -> tuple[launch.Function, Any]:
            """For rows of x that begin there, modulo 16, and lie so far apart: kernel, argument."""
            piece = piece_of(offset, pitch, x_row)
            return machine.function(_source(replace(bound, x_piece=piece))), number(np.int64, pitch)

        def run(x: Any, epilogue: Epilogue, out: Array) -> None:
            left, x_factor = without_scales
            if isinstance(x, Packed):
                left, x_factor = _scales(machine, x, absent)
                x = x.codes.view(np.uint8)
            x = steady(x)
            function, x_pitch = reading(machine.address(x) % 16, x.strides[0])
            partial = arrived = out
            if shares > 1:
                partial = machine.scratch(shares * p.m * p.n)
                arrived = machine.counters(grid[0] * grid[1])
            bias, residual = epilogue.bias, epilogue.residual
            function(
                grid,
                threads,
                (
                    x,
                    x_pitch,
                    *weight,
                    *left,
                    factor,
                    x_factor,
                    one if epilogue.alpha == 1 else np.float64(epilogue.alpha),
                    absent if bias is None else bias,
                    absent if residual is None else residual,
                    none if residual is None else pitch_of(machine, residual),
                    out,
                    pitch_of(machine, out),
                    partial,
                    arrived,
                    *sizes,
                ),
                shared_mem=shared,
            )

        return run

    return to


def _scales(machine: Machine, x: Packed, absent: Array) -> tuple[tuple[Any, ...], Array]:
    """x's scales and their blocks; its tensor scale."""
    sizes = (x.scales.shape[-1], *block_of(x))
    scales = (x.scales, *(machine.number(np.int32, size) for size in sizes))
    return scales, absent if x.tensor_scale is None else x.tensor_scale


def steady(x: Array) -> Array:
    """Rows without gaps, one behind the other in memory."""
    (pitch, step), columns, size = x.strides, x.shape[1], x.itemsize
    apart = step == size and pitch >= columns * size
    return x if apart or (columns == 1 and pitch > 0) else x.copy()


def block_of(parts: Packed) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    (rows, columns), (m, k) = parts.format.scale.block, parts.matrix
    return rows or m, columns or k


def refuse_sizes(p: Problem) -> str | None:
    """Why a product is too large for one launch, in words; None if it is not."""
    if p.k > MOST_COLUMNS:
        return f"counts columns up to {MOST_COLUMNS}, got {p.k}"
    if max(p.m, p.n) > MOST_ROWS:
        return f"a launch has tiles for {MOST_ROWS} rows of either operand, got {max(p.m, p.n)}"
    return None


def rows_of(p: Problem) -> int:
    """Rows of x that tiles are chosen for: where bits must not depend on them, always the same."""
    return _USUAL if p.batch_invariant else p.m


def shares_of(p: Problem, spec: Spec) -> int:
    """Blocks that share the columns; one where the order of float sums would not stay."""
    if spec.method == "integer" and not spec.partial_sums:
        return 1
    tile = spec.tile
    blocks = -(-p.n // tile.rows) * -(-rows_of(p) // tile.columns)
    room = 2 * launch.parse(p.device).processors
    return tiles.shares_for(blocks, -(-p.k // tile.depth), room)

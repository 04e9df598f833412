"""16-bit x times weights of any even width on Hopper's tensor cores: TMA, mbarriers, wgmma.

The order of the sum is that of gemm.py: the tensor core's own over 16 columns, those ascending
within a segment, segments ascending by fma. Where the operands' memory is not aligned as TMA wants
it, gemm.py's kernel computes the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lowbit.formats import Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import costs, emit, gemm, launch, product, wgmma
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cuda.tiles import shares_for
from lowbit.kernels.declare import Array, Bind, Epilogue, Kernel, Problem, Roundings, Run
from lowbit.kernels.segments import segment_of

ROWS, DEPTH, THREADS = 128, 64, 384
_ROOM = 224 * 1024  # bytes of shared memory
_KINDS = {"Half": "f16", "Bfloat16": "bf16"}


@dataclass(frozen=True)
class Spec:
    """What is compiled into a kernel."""

    operand: str
    w: Format
    columns: int
    """Rows of x in a block's tile."""
    whole: bool
    """No scale changes along the columns."""
    out: str
    bias: bool
    activation: str | None
    residual: str | None
    shared: bool = False
    """Blocks share the columns of a tile."""

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return min(8, (_ROOM - 1024) // self.stage)

    @property
    def stage(self) -> int:
        """Bytes of shared memory of a stage."""
        return 128 * self.columns + ROWS * 8 * self.w.element.bits

    @property
    def shared_memory(self) -> int:
        """Bytes of a block: the stages or the result, and barriers in whole KiB."""
        return max(self.stages * self.stage, 4 * self.columns * (ROWS + 4)) + 1024


@lru_cache(maxsize=1024)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    w = spec.w
    before, element = emit.numbers(w.element, spec.operand, "WeightTable")
    flags = {
        "whole": spec.whole,
        "shared": spec.shared,
        "w_factor": w.tensor_scale,
        "bias": spec.bias,
        "residual": spec.residual is not None,
    }
    text = (
        '#include "gemm_sm90.cuh"\n'
        + wgmma.declare(spec.columns, _KINDS[spec.operand])
        + before
        + emit.scale(w.scale.element, "WeightScale")
        + emit.zero(w, "WeightZero")
        + "struct Config {\n"
        + f"    using Element = {element};\n"
        + "    using Scale = WeightScale;\n    using Zero = WeightZero;\n"
        + f"    static constexpr int columns = {spec.columns}, stages = {spec.stages};\n"
        + "".join(
            f"    static constexpr bool {name} = {str(value).lower()};\n"
            for name, value in flags.items()
        )
        + product.after(spec.out, spec.activation, spec.residual)
        + "};\n"
    )
    return Source(text, "lb::gemm_sm90<Config>", THREADS, spec.shared_memory)


def _spec(p: Problem) -> Spec:
    whole = segment_of(p) >= p.k
    rows = product.rows_of(p)
    columns = 64 if rows <= 64 else 256 if whole and rows >= 256 else 128
    after = p.bias, p.activation, p.residual
    shared = _shares(p, columns) > 1
    return Spec(gemm.operand_of(p), p.w, columns, whole, p.out, *after, shared)


def _shares(p: Problem, columns: int) -> int:
    """Blocks that share the columns of a tile."""
    blocks = -(-p.n // ROWS) * -(-product.rows_of(p) // columns)
    return shares_for(blocks, -(-p.k // DEPTH), launch.parse(p.device).processors)


def _accepts(p: Problem) -> str | None:
    device = launch.parse(p.device)
    if device.capability != 90:
        return f"runs on compute capability 9.0, this is {device.capability / 10}"
    if p.x not in ("float16", "bfloat16"):
        return f"multiplies float16 and bfloat16 numbers as they come, x is {p.x}"
    refusal = gemm.refuse(p)
    if refusal is not None:
        return refusal
    if gemm.folded(p) or (p.x == "float16") != (gemm.operand_of(p) == "Half"):
        return f"multiplies x's own numbers by those of {p.w.name} before scales meet the sum"
    segment, bits = segment_of(p), p.w.element.bits
    if segment < p.k and segment % DEPTH:
        return f"scales must change at multiples of {DEPTH} columns, they change every {segment}"
    if bits % 2:
        return f"stages of {DEPTH} codes of {bits} bits are no whole number of 16 bytes"
    if p.k * bits % 128 or p.k % 8:
        return f"rows of {p.k} columns do not begin at multiples of 16 bytes"
    return None


def _cost(p: Problem) -> float:
    spec, device = _spec(p), launch.parse(p.device)
    rates = costs.rates(device.capability)
    shares = _shares(p, spec.columns)
    blocks = -(-p.n // ROWS) * -(-p.m // spec.columns) * shares
    waves = -(-blocks // device.processors)
    # A tile of fewer columns leaves the tensor cores waiting for what is decoded.
    rate = 0.8 * rates.dense / device.processors * min(1.0, spec.columns / 128)
    computed = waves * 2 * ROWS * spec.columns * p.k / shares / rate
    moved = p.bytes / (rates.bandwidth * min(1.0, blocks / device.processors))
    return costs.LAUNCH + 2e-6 + max(moved, computed)


def _build(p: Problem) -> Bind:
    spec, segment = _spec(p), segment_of(p)
    otherwise = gemm.build(p)
    shares = _shares(p, spec.columns)
    grid = (-(-p.m // spec.columns), -(-p.n // ROWS), shares)

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        codes = w.codes.view(np.uint8)
        if not _aligned(machine.address(codes), codes.strides[0]):
            return otherwise(w)
        number = machine.number
        w_map = machine.tensor_map(codes, (ROWS, DEPTH // 8 * w.format.element.bits), swizzle=0)
        absent = w.scales  # stands where an operand is not there: never read
        weight = (
            w.scales,
            absent if w.zeros is None else w.zeros,
            *(number(np.int32, size) for size in (w.scales.shape[-1], *product.block_of(w))),
            absent if w.tensor_scale is None else w.tensor_scale,
        )
        sizes = [number(np.int32, size) for size in (p.m, p.n, p.k, segment)]
        one = number(np.float64, 1)
        function = machine.function(source(spec))

        def run(x: Any, epilogue: Epilogue, out: Array) -> None:
            x = product.steady(x)
            if not _aligned(machine.address(x), x.strides[0]):
                otherwise(w)(x, epilogue, out)
                return
            residual = epilogue.residual
            partial = arrived = out
            if shares > 1:
                partial = machine.scratch(shares * p.m * p.n)
                arrived = machine.counters(grid[0] * grid[1])
            arguments = (
                machine.tensor_map(x, (spec.columns, DEPTH), swizzle=128),
                w_map,
                *weight,
                one if epilogue.alpha == 1 else np.float64(epilogue.alpha),
                absent if epilogue.bias is None else epilogue.bias,
                absent if residual is None else residual,
                product.pitch_of(machine, out if residual is None else residual),
                out,
                product.pitch_of(machine, out),
                partial,
                arrived,
                *sizes,
            )
            function(grid, (THREADS,), arguments, shared_mem=spec.shared_memory)

        return run

    return to


def _aligned(address: int, pitch: int) -> bool:
    return address % 16 == 0 and pitch % 16 == 0


def _roundings(p: Problem) -> Roundings:
    return gemm.roundings(p, _shares(p, _spec(p).columns))


KERNELS = (
    Kernel(
        "matmul.cuda.wgmma",
        "cuda",
        accepts=_accepts,
        cost=_cost,
        build=_build,
        roundings=_roundings,
    ),
)

"""Scaled blocks of both operands on Blackwell's tensor cores: nvfp4, mxfp4, mxfp8, rows of float8.

The launches of blackwell.py. x's scales are put in order before each of them, w's once. They take
scales of nvfp4 for positive, as quantizing makes them.

The tensor cores add up all columns. How many bits of a sum Blackwell's keep is not published: the
bound is as if they were Hopper's, and these kernels are chosen by name only until somebody has
measured them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from lowbit.formats import Format, get
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import compile, cublas, float8, interleave, launch
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cutlass import blackwell, dense, elements, families, launcher, tiles
from lowbit.kernels.cutlass.blackwell import Call, Spec
from lowbit.kernels.cutlass.launcher import Places
from lowbit.kernels.cutlass.package import Shipped
from lowbit.kernels.cutlass.tiles import Tile
from lowbit.kernels.declare import (
    ACTIVATION_ERROR,
    Array,
    Bind,
    Epilogue,
    Problem,
    Roundings,
    Run,
)
from lowbit.kernels.segments import FINAL_ROUNDINGS

_E4M3, _E5M2 = "cutlass::float_e4m3_t", "cutlass::float_e5m2_t"


@dataclass(frozen=True)
class Family:
    """What one kernel multiplies."""

    name: str
    usual: str
    """The format of most operands."""
    elements: tuple[str, ...]
    """C++ types of codes."""
    faster: float
    """Than tensor cores on 16-bit numbers."""
    widest: int
    """Rows of the second operand in the largest tile."""
    group: int = 0
    """Columns of a scale; 0: all."""
    scale: str = "float32"
    pair: str = "{}"
    """C++ type of codes and their scales."""
    capabilities: tuple[int, ...] = (100, 120)


_FAMILIES = (
    Family(
        "nvfp4", "nvfp4", ("cutlass::float_e2m1_t",), 4.0, 192, 16, "float8_e4m3fn",
        "cutlass::nv_float4_t<{}>",
    ),
    Family(
        "mxfp4", "mxfp4", ("cutlass::float_e2m1_t",), 4.0, 192, 32, "float8_e8m0fnu",
        "cutlass::mx_float4_t<{}>",
    ),
    Family(
        "mxfp8", "mxfp8", (_E4M3, _E5M2), 2.0, 128, 32, "float8_e8m0fnu",
        "cutlass::mx_float8_t<{}>",
    ),
    Family("float8_rows", "fp8_row", (_E4M3, _E5M2), 2.0, 256, capabilities=(100,)),
)  # fmt: skip


@lru_cache(maxsize=512)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    return Source(blackwell.text(spec), "lowbit_gemm", spec.threads, spec.room, "cutlass")


def ways(family: Family, capability: int) -> tuple[Tile, ...]:
    """Tiles of a block, small ones first."""
    if capability == 120:
        return (Tile((128, 128, 128), (1, 1), "Sm120", False, 0.7),)
    depth = 256 if family.faster > 2 else 128
    return (
        Tile((128, 64, depth), (1, 1), "Sm100", True, 0.3),
        Tile((128, 128, depth), (1, 1), "Sm100", False, 0.5),
        Tile((128, family.widest, depth), (2, 1), "Sm100", False, 0.7),
    )


def shipped(arch: str) -> dict[Source, Shipped]:
    """Kernels whose machine code comes with the package."""
    capability = {"sm_100a": 100, "sm_120a": 120}.get(arch)
    found = {}
    for family in _FAMILIES:
        if capability in family.capabilities and family.name != "mxfp4":
            fmt = get(family.usual)
            p = Problem(1, 8, 32, fmt, fmt, "bfloat16", device=f"cuda:{capability}:1")
            for tile in ways(family, capability):
                spec = spec_with(family, p, tile)
                label = f"{family.name} -> bfloat16, {tile}"
                size = blackwell.layout(spec).size
                found[source(spec)] = Shipped(label, size, tile.cluster)
    return found


def _codes(family: Family, fmt: Format) -> str:
    name = elements.name(fmt.element)
    assert name is not None
    return family.pair.format(name)


def spec_with(family: Family, p: Problem, tile: Tile) -> Spec:
    """The kernel that computes a product by some tile."""
    assert isinstance(p.x, Format)
    rows, columns, depth = tile.shape
    return Spec(
        _codes(family, p.x), _codes(family, p.w), p.out, (rows * tile.cluster[0], columns, depth),
        tile.cluster, tile.schedule, tile.turned, activation=p.activation, residual=p.residual,
        swizzle=tile.swizzle,
    )  # fmt: skip


def spec_of(family: Family, p: Problem) -> Spec:
    """The kernel that an accepted product runs."""
    return spec_with(family, p, families.found(_best(family, p)))


def _best(family: Family, p: Problem) -> Tile | None:
    capability = launch.parse(p.device).capability
    asked = tiles.asked(p)
    usable = (
        tile
        for tile in ways(family, capability)
        if compile.lacking(source(spec_with(family, p, tile)), capability) is None
    )
    return min(usable, key=lambda tile: _seconds(family, asked, tile), default=None)


def _seconds(family: Family, p: Problem, tile: Tile) -> float:
    return tiles.seconds(p, tile, family.faster)


def _refuse_side(family: Family, fmt: Format) -> str | None:
    if elements.name(fmt.element) not in family.elements:
        return f"wants elements as {family.usual} has them, {fmt.name} has others"
    if fmt.zero is not None or fmt.bias:
        return f"wants no zero points, {fmt.name} has them"
    (rows, columns), scale = fmt.scale.block, fmt.scale.element
    if family.group:
        kind = scale if isinstance(scale, str) else scale.name
        if (kind, rows, columns) != (family.scale, 1, family.group):
            columns = family.group
            return f"wants a scale of {family.scale} for {columns} columns, {fmt.name} has others"
    elif rows not in (1, None) or columns is not None or scale != "float32" or fmt.tensor_scale:
        return f"reads one float32 scale for a row or for all rows, {fmt.name} has others"
    return None


def _accepts(family: Family, p: Problem) -> str | None:
    refusal = families.refuse(p, family.capabilities)
    if refusal is not None:
        return refusal
    if isinstance(p.x, str):
        return f"wants {family.usual} on both sides, x is {p.x}"
    for side in (p.x, p.w):
        refusal = _refuse_side(family, side)
        if refusal is not None:
            return refusal
    if p.batch_invariant:
        return "where memory is not aligned, the vendor's library computes"
    refusal = launcher.refuse_rows(p)
    if refusal is not None:
        return refusal
    if _best(family, p) is None:
        capability = launch.parse(p.device).capability
        tile = ways(family, capability)[0]
        return compile.lacking(source(spec_with(family, p, tile)), capability)
    return None


def _build(family: Family, p: Problem) -> Bind:
    return bind(p, spec_of(family, p))


def bind(p: Problem, spec: Spec) -> Bind:
    """Bind an accepted product to weights, by any of its kernels."""
    otherwise = cublas.build(p)
    processors = launch.parse(p.device).processors
    blocks = -(-p.k // spec.group) if spec.group else 0

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        raw: Run = otherwise(w)
        weight = launcher.placed(machine, w.codes)
        if weight is None:
            return raw
        scales = _interleaved(machine, w.scales) if blocks else w.scales
        w_factor = 0 if w.tensor_scale is None else machine.address(w.tensor_scale)

        def argument(at: Places) -> tuple[launcher.Grid, bytearray]:
            w_scale = launcher.vectors(machine, w.scales)._replace(address=machine.address(scales))
            finish = dict(dense.operands(at.x_scale, w_scale, at.alpha, at.bias))
            for name, factor in (("x_factor", at.x_factor), ("w_factor", w_factor)):
                finish |= {name: factor, f"{name}.default": 1.0}
            call = Call(
                p.m, p.n, p.k, at.x, weight, at.out, tuple(finish.items()), at.residual,
                x_scales=at.partial, w_scales=w_scale.address,
            )  # fmt: skip
            made = blackwell.arguments(spec, call, processors, machine.encode)
            return blackwell.grid(spec, call), made

        words = interleave.words(p.m, blocks)
        run = launcher.runner(p, machine, source(spec), raw, argument, partial=words)

        def ordered(x: Any, epilogue: Epilogue, out: Array) -> None:
            interleave.interleave(x.scales, machine.scratch(words))
            run(x, epilogue, out)

        return ordered if blocks else run

    return to


def _interleaved(machine: Machine, scales: Array) -> Array:
    found: Array = machine.empty((interleave.words(*scales.shape),), np.uint32)
    interleave.interleave(scales, found)
    return found


def _roundings(family: Family, p: Problem) -> Roundings:
    return Roundings(
        "float32",
        float8.cut(p.k) + 4 + FINAL_ROUNDINGS,
        f"Blackwell's tensor cores over {p.k} columns, as if they kept what Hopper's keep",
        ACTIVATION_ERROR[p.activation],
    )


KERNELS = tuple(
    families.kernel(
        family.name,
        accepts=partial(_accepts, family),
        best=partial(_best, family),
        seconds=partial(_seconds, family),
        build=partial(_build, family),
        roundings=partial(_roundings, family),
        by_name=True,
        stacks=False,
    )
    for family in _FAMILIES
)

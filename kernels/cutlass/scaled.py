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
from lowbit.kernels.cuda import cublas, float8, interleave, launch
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cutlass import blackwell, dense, elements, families, launcher
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
class Kind:
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


_KINDS = (
    Kind(
        "nvfp4", "nvfp4", ("cutlass::float_e2m1_t",), 4.0, 192, 16, "float8_e4m3fn",
        "cutlass::nv_float4_t<{}>",
    ),
    Kind(
        "mxfp4", "mxfp4", ("cutlass::float_e2m1_t",), 4.0, 192, 32, "float8_e8m0fnu",
        "cutlass::mx_float4_t<{}>",
    ),
    Kind(
        "mxfp8", "mxfp8", (_E4M3, _E5M2), 2.0, 128, 32, "float8_e8m0fnu",
        "cutlass::mx_float8_t<{}>",
    ),
    Kind("float8_rows", "fp8_row", (_E4M3, _E5M2), 2.0, 256, capabilities=(100,)),
)  # fmt: skip


@lru_cache(maxsize=512)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    return Source(blackwell.text(spec), "lowbit_gemm", spec.threads, spec.room, "cutlass")


def ways(kind: Kind, capability: int) -> tuple[Tile, ...]:
    """Tiles of a block, small ones first."""
    if capability == 120:
        return (Tile((128, 128, 128), (1, 1), "Sm120", False, 0.7),)
    depth = 256 if kind.faster > 2 else 128
    return (
        Tile((128, 64, depth), (1, 1), "Sm100", True, 0.3),
        Tile((128, 128, depth), (1, 1), "Sm100", False, 0.5),
        Tile((128, kind.widest, depth), (2, 1), "Sm100", False, 0.7),
    )


def shipped(arch: str) -> dict[Source, Shipped]:
    """Kernels whose machine code comes with the package."""
    capability = {"sm_100a": 100, "sm_120a": 120}.get(arch)
    found = {}
    for kind in _KINDS:
        if capability in kind.capabilities and kind.name != "mxfp4":
            fmt = get(kind.usual)
            p = Problem(1, 8, 32, fmt, fmt, "bfloat16", device=f"cuda:{capability}:1")
            for tile in ways(kind, capability):
                spec = spec_with(kind, p, tile)
                label = f"{kind.name} -> bfloat16, {tile}"
                size = blackwell.layout(spec).size
                found[source(spec)] = Shipped(label, size, tile.cluster)
    return found


def _codes(kind: Kind, fmt: Format) -> str:
    name = elements.name(fmt.element)
    assert name is not None
    return kind.pair.format(name)


def spec_with(kind: Kind, p: Problem, tile: Tile) -> Spec:
    """The kernel that computes a product by some tile."""
    assert isinstance(p.x, Format)
    rows, columns, depth = tile.shape
    return Spec(
        _codes(kind, p.x), _codes(kind, p.w), p.out, (rows * tile.cluster[0], columns, depth),
        tile.cluster, tile.schedule, tile.turned, activation=p.activation, residual=p.residual,
        swizzle=tile.swizzle,
    )  # fmt: skip


def _refuse_side(kind: Kind, fmt: Format) -> str | None:
    if elements.name(fmt.element) not in kind.elements:
        return f"wants elements as {kind.usual} has them, {fmt.name} has others"
    if fmt.zero is not None or fmt.bias:
        return f"wants no zero points, {fmt.name} has them"
    (rows, columns), scale = fmt.scale.block, fmt.scale.element
    if kind.group:
        name = scale if isinstance(scale, str) else scale.name
        if (name, rows, columns) != (kind.scale, 1, kind.group):
            columns = kind.group
            return f"wants a scale of {kind.scale} for {columns} columns, {fmt.name} has others"
    elif rows not in (1, None) or columns is not None or scale != "float32" or fmt.tensor_scale:
        return f"reads one float32 scale for a row or for all rows, {fmt.name} has others"
    return None


def _refuse(kind: Kind, p: Problem) -> str | None:
    refusal = families.refuse(p, kind.capabilities)
    if refusal is not None:
        return refusal
    if isinstance(p.x, str):
        return f"wants {kind.usual} on both sides, x is {p.x}"
    for side in (p.x, p.w):
        refusal = _refuse_side(kind, side)
        if refusal is not None:
            return refusal
    if p.batch_invariant:
        return "where memory is not aligned, the vendor's library computes"
    return launcher.refuse_rows(p)


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


def _roundings(p: Problem, _: Tile) -> Roundings:
    return Roundings(
        "float32",
        float8.cut(p.k) + 4 + FINAL_ROUNDINGS,
        f"Blackwell's tensor cores over {p.k} columns, as if they kept what Hopper's keep",
        ACTIVATION_ERROR[p.activation],
    )


def _family(kind: Kind) -> families.Family[Tile, Spec]:
    return families.Family(
        kind.name,
        refuse=partial(_refuse, kind),
        ways=lambda p: ways(kind, launch.parse(p.device).capability),
        faster=kind.faster,
        spec=partial(spec_with, kind),
        source=source,
        bind=bind,
        roundings=_roundings,
        by_name=True,
        stacks=False,
    )


FAMILIES = {kind.name: _family(kind) for kind in _KINDS}
KERNELS = tuple(family.kernel for family in FAMILIES.values())

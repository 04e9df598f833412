"""float8 with a scale for 128 columns of x and for 128 x 128 blocks of w, on Hopper's tensor cores.

The tensor cores add up 128 columns (kernels/cuda/float8.py has what they lose); those sums meet the
product of both scales, and go on, in float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lowbit.formats import Format, get
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import float8, gemm, launch
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cutlass import blocks, dense, elements, families, launcher, tiles
from lowbit.kernels.cutlass.blocks import Call, Spec
from lowbit.kernels.cutlass.dense import Matrices
from lowbit.kernels.cutlass.launcher import Grid, Places
from lowbit.kernels.cutlass.package import Shipped
from lowbit.kernels.cutlass.tiles import Tile
from lowbit.kernels.declare import ACTIVATION_ERROR, Bind, Problem, Roundings, Run
from lowbit.kernels.segments import FINAL_ROUNDINGS

_NAME = "float8_blocks"
_X, _W = (1, blocks.DEPTH), (128, blocks.DEPTH)
_CODES = ("cutlass::float_e4m3_t", "cutlass::float_e5m2_t")
_LOST = 57344.0**2 * 2.0**-149  # of a product, where that of both scales is subnormal


@lru_cache(maxsize=512)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    return Source(blocks.text(spec), "lowbit_gemm", dense.THREADS, dense.SHARED, "cutlass")


def shipped(arch: str) -> dict[Source, Shipped]:
    """Kernels whose machine code comes with the package."""
    if arch != "sm_90a":
        return {}
    found = {}
    p = Problem(1, 8, 16, get("fp8_g128"), get("fp8_128x128"), "bfloat16")
    for tile in tiles.listed(_NAME):
        spec = spec_with(p, tile)
        label = f"float8 g128 x 128x128 -> bfloat16, {tile}"
        found[source(spec)] = Shipped(label, blocks.layout(spec).size, tile.cluster)
    return found


def spec_with(p: Problem, tile: Tile) -> Spec:
    """The kernel that computes a product by some tile."""
    assert isinstance(p.x, Format)
    x, w = (elements.name(fmt.element) for fmt in (p.x, p.w))
    assert x is not None
    assert w is not None
    # A tile has no part of a block of w: where its rows are fewer, blocks are cut.
    rows = min(_W[0], tile.shape[0 if tile.turned else 1])
    return Spec(
        x, w, p.out, tile.shape, tile.cluster, tile.schedule, tile.turned,
        activation=p.activation, residual=p.residual, shared=tile.shared, swizzle=tile.swizzle,
        w_rows=rows,
    )  # fmt: skip


def _refuse(p: Problem) -> str | None:
    refusal = families.refuse(p, (90,))
    if refusal is not None:
        return refusal
    if isinstance(p.x, str):
        return f"wants float8 on both sides, x is {p.x}"
    for side, name, wanted in ((p.x, "x", _X), (p.w, "w", _W)):
        if elements.name(side.element) not in _CODES or side.zero is not None or side.bias:
            return f"wants float8_e4m3fn or float8_e5m2 on both sides, got {side.name}"
        if side.scale.block != wanted or side.tensor_scale or side.scale.element != "float32":
            rows, columns = wanted
            return (
                f"reads one float32 scale for {rows} x {columns} codes of {name}, {side.name} has "
                "others"
            )
    if max(p.m, p.n) * -(-p.k // blocks.DEPTH) * p.batches >= 2**31:
        return "counts scales up to 2**31"
    return launcher.refuse_rows(p)


def bind(p: Problem, spec: Spec) -> Bind:
    """Bind an accepted product to weights, by any of its kernels."""
    otherwise, named = launcher.matrix_by_matrix(gemm.build, p), source(spec)
    processors, pitch = launch.parse(p.device).processors, 4 * -(-p.k // blocks.DEPTH)
    sharing = dense.sharing(spec, p.m, p.n, p.k, processors)

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        raw: Run = otherwise(w)
        weight = launcher.placed(machine, w.codes)
        if weight is None:
            return raw
        scales: Any = w.scales
        if spec.w_rows < _W[0]:
            scales = scales.repeat(_W[0] // spec.w_rows, -2)
            machine.settle()
        rows, whole = scales.shape[-2], p.batches > 1

        def argument(at: Places) -> tuple[Grid, bytearray]:
            call = Call(
                p.m, p.n, p.k, at.x, weight, at.out, blocks.operands(at.alpha, at.bias),
                at.residual, p.batches, sharing=sharing, partial=at.partial, locks=at.locks,
                x_scales=Matrices(at.x_scale.address, pitch, p.m * pitch * whole),
                w_scales=Matrices(machine.address(scales), pitch, rows * pitch * whole),
            )  # fmt: skip
            made = blocks.arguments(spec, call, processors, machine.encode)
            return dense.grid(spec, call, processors), made

        words = dense.words(spec, p.m, p.n, sharing)
        return launcher.runner(p, machine, named, raw, argument, **words)

    return to


def _roundings(p: Problem, tile: Tile) -> Roundings:
    columns = min(p.k, float8.LONGEST)
    segments, most = -(-p.k // blocks.DEPTH), tile.sharing(p).most
    return Roundings(
        "float32",
        float8.cut(columns) + segments + most + FINAL_ROUNDINGS,
        f"float8 tensor cores over {columns} columns, those ascending by fma"
        + (f", up to {most} shares of them ascending" if most > 1 else ""),
        ACTIVATION_ERROR[p.activation],
        flushed=_LOST,
    )


_FAMILY = families.Family[Tile, Spec](
    _NAME,
    refuse=_refuse,
    ways=lambda p: tiles.listed(_NAME),
    faster=2,
    spec=spec_with,
    source=source,
    bind=bind,
    roundings=_roundings,
)
FAMILIES = {_NAME: _FAMILY}
KERNELS = (_FAMILY.kernel,)

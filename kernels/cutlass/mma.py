"""8-bit codes on the tensor cores of GPUs without wgmma: int8, with int4 weights, float8.

The launches of ampere.py. Of float8 the tensor cores keep about 14 bits of a sum, see
kernels/cuda/float8.py. matmul.cutlass.mma_float8 takes their sums of at most 128 columns over into
float32; matmul.cutlass.mma_float8_fast lets them add up all columns, and is chosen by name only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from lowbit.formats import Format, get
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import float8, gemm, integer, launch
from lowbit.kernels.cuda.launch import Machine, Source
from lowbit.kernels.cutlass import ampere, elements, families, launcher
from lowbit.kernels.cutlass.ampere import Spec
from lowbit.kernels.cutlass.dense import Call
from lowbit.kernels.cutlass.launcher import Grid, Places
from lowbit.kernels.cutlass.package import Shipped
from lowbit.kernels.cutlass.tiles import Tile
from lowbit.kernels.declare import (
    ACTIVATION_ERROR,
    Array,
    Bind,
    Problem,
    Roundings,
    Run,
)
from lowbit.kernels.segments import FINAL_ROUNDINGS, integer_roundings, segment_of

_LONGEST = (2**31 - 1) // 2**14  # columns of int8 whose sums surely fit in int32
_MOST = 65535  # blocks of a grid's third axis
_FLOAT8 = ("cutlass::float_e4m3_t", "cutlass::float_e5m2_t")


@dataclass(frozen=True)
class Way:
    """A tile, and how warps share it."""

    tile: Tile
    warp: tuple[int, int]
    """Rows of x and of w."""

    def __str__(self) -> str:
        shape, warp = ("x".join(map(str, each)) for each in (self.tile.shape, self.warp))
        return f"tile {shape}, warps of {warp}"


def _way(shape: tuple[int, int, int], warp: tuple[int, int], share: float) -> Way:
    return Way(Tile(shape, (1, 1), "mma", False, share), warp)


# Small tiles first: they are taken where a product waits for memory with any.
_SMALL = (
    _way((16, 128, 128), (16, 32), 0.2),
    _way((32, 128, 128), (32, 32), 0.35),
    _way((64, 128, 128), (32, 64), 0.6),
)
_LARGE = (_way((128, 128, 64), (64, 64), 0.85), _way((256, 128, 64), (64, 64), 0.9))


@dataclass(frozen=True)
class Kind:
    """What one kernel multiplies."""

    name: str
    x: tuple[str, ...]
    """C++ types of x's codes."""
    w: tuple[str, ...]
    words: str
    together: int
    """Columns whose codes of either side are whole pieces."""
    capabilities: tuple[int, ...]
    ways: tuple[Way, ...]


_INTEGERS = (80, 86, 87, 88, 89, 120, 121)
_INT8 = Kind(
    "mma_int8", ("int8_t",), ("int8_t",), "int8 on both sides", 16, _INTEGERS, _SMALL + _LARGE
)
_INT4 = Kind(
    "mma_int4", ("int8_t",), ("cutlass::int4b_t",), "int8 for x and int4 for w", 32, _INTEGERS,
    _SMALL + _LARGE,
)  # fmt: skip
_EXACT = Kind(
    "mma_float8", _FLOAT8, _FLOAT8, "float8_e4m3fn or float8_e5m2 on both sides", 16,
    # Sums of a tile beside all sums: twice the registers.
    (89, 120, 121), (*_SMALL, _way((128, 128, 64), (64, 32), 0.75)),
)  # fmt: skip
_FAST = replace(_EXACT, name="mma_float8_fast", ways=_SMALL + _LARGE)


@lru_cache(maxsize=512)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    return Source(ampere.text(spec), "lowbit_gemm", spec.threads, spec.shared, "cutlass")


def shipped(arch: str) -> dict[Source, Shipped]:
    """Kernels whose machine code comes with the package."""
    kinds = {"sm_80": (_INT8, _INT4), "sm_89": (_INT8, _INT4, _EXACT)}
    found = {}
    for kind in kinds.get(arch, ()):
        x, w = {"int8_t": "int8_row"}.get(kind.x[0], "fp8_row"), kind.w[0]
        w_format = get("int4_row" if w == "cutlass::int4b_t" else x)
        p = Problem(1, 8, 32, get(x), w_format, "bfloat16", device=f"cuda:{arch[3:]}:1")
        for way in kind.ways:
            spec = spec_with(kind, p, way)
            label = f"{kind.name} rows -> bfloat16, {way}"
            found[source(spec)] = Shipped(label, ampere.layout(spec).size)
    return found


def spec_with(kind: Kind, p: Problem, way: Way) -> Spec:
    """The kernel that computes a product by some tile."""
    assert isinstance(p.x, Format)
    x, w = (elements.name(fmt.element) for fmt in (p.x, p.w))
    assert x is not None
    assert w is not None
    # Multiprocessors of 8.0 have room for four stages, the others for three.
    stages = 4 if launch.parse(p.device).capability == 80 else 3
    return Spec(
        x, w, p.out, way.tile.shape, way.warp, stages, kind is _FAST, p.activation, p.residual
    )


def _refuse(kind: Kind, p: Problem) -> str | None:
    refusal = families.refuse(p, kind.capabilities)
    if refusal is not None:
        return refusal
    if isinstance(p.x, str):
        return f"wants {kind.words}, x is {p.x}"
    for side, wanted in ((p.x, kind.x), (p.w, kind.w)):
        if elements.name(side.element) not in wanted or side.zero is not None or side.bias:
            return f"wants {kind.words}, without zero points, got {side.name}"
        rows, _ = side.scale.block
        if rows not in (1, None) or side.tensor_scale or side.scale.element != "float32":
            return f"reads one float32 scale for a row or for all rows, {side.name} has others"
    if segment_of(p) < p.k:
        return f"scales must not change along the columns, they change every {segment_of(p)}"
    if kind.x == ("int8_t",) and p.k > _LONGEST:
        return f"sums of {p.k} columns do not surely fit in int32"
    if p.k % kind.together:
        return f"wants rows of a multiple of {kind.together} columns, got {p.k}"
    if p.batches > _MOST:
        return f"a launch has room for {_MOST} matrices, got {p.batches}"
    return launcher.refuse_result(p)


def bind(p: Problem, spec: Spec) -> Bind:
    """Bind an accepted product to weights, by any of its kernels."""
    otherwise = launcher.matrix_by_matrix((integer if spec.integral else gemm).build, p)
    named = source(spec)

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        raw: Run = otherwise(w)
        weight, scales = launcher.placed(machine, w.codes), _scales(machine, w.scales, p.n)
        if weight is None or machine.address(scales) % launcher.PIECE:
            return raw

        def argument(at: Places) -> tuple[Grid, bytearray] | None:
            if at.bias % launcher.PIECE:
                return None
            w_scale = launcher.vectors(machine, scales)
            finish = ampere.operands(at.x_scale, w_scale, at.alpha, at.bias)
            call = Call(p.m, p.n, p.k, at.x, weight, at.out, finish, at.residual, p.batches)
            return ampere.grid(spec, call), ampere.arguments(spec, call)

        return launcher.runner(p, machine, named, raw, argument)

    return to


def _scales(machine: Machine, scales: Array, rows: int) -> Array:
    """One for every row, as kernels read four at a time."""
    if scales.shape[-2] == rows:
        return scales
    found: Array = machine.empty((*scales.shape[:-2], rows, 1), np.float32)
    found[...] = scales
    machine.settle()
    return found


def _roundings(kind: Kind, p: Problem, _: Way) -> Roundings:
    if kind in (_INT8, _INT4):
        return integer_roundings(p, p.k)
    depths = [p.k] if kind is _FAST else [way.tile.shape[2] for way in kind.ways]
    longest, segments = min(max(depths), p.k), -(-p.k // min(depths)) + 1
    return Roundings(
        "float32",
        float8.cut(longest) + segments + 2 + FINAL_ROUNDINGS,
        f"float8 tensor cores over {longest} columns"
        + ("" if kind is _FAST else ", those ascending in float32"),
        ACTIVATION_ERROR[p.activation],
    )


def _family(kind: Kind) -> families.Family[Way, Spec]:
    return families.Family(
        kind.name,
        refuse=partial(_refuse, kind),
        ways=lambda p: kind.ways,
        faster=2,
        spec=partial(spec_with, kind),
        source=source,
        bind=bind,
        roundings=partial(_roundings, kind),
        by_name=kind is _FAST,
    )


FAMILIES = {kind.name: _family(kind) for kind in (_INT8, _INT4, _EXACT, _FAST)}
KERNELS = tuple(family.kernel for family in FAMILIES.values())

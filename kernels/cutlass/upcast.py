"""Weights of fewer bits than x on Hopper's tensor cores, which multiply numbers of x's type.

matmul.cutlass.upcast16: bfloat16 or float16 x. Where scales change along the columns, w's values
are rounded to x's type on their way, which kernels/cuda/hopper.py does not need.
matmul.cutlass.upcast_int8: int8 x, exactly.
matmul.cutlass.upcast_float8: float8 x, whose sums the tensor cores alone add up over all columns;
chosen by name only. Scales of groups are multiplied into int4's 16 codes beforehand, and rounded to
float8; by matmul.cutlass.upcast_float8_scaled on their way, to the same numbers: 2 bytes of a group
are read there instead of 8, and each code takes more instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

from lowbit.formats import Element, Format, get
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import float8, gemm, integer, launch
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cutlass import dense, elements, families, launcher, mixed, tiles, weights
from lowbit.kernels.cutlass.dense import Matrices, Vectors
from lowbit.kernels.cutlass.launcher import Grid, Places
from lowbit.kernels.cutlass.mixed import TABLE, Call, Spec
from lowbit.kernels.cutlass.package import Shipped
from lowbit.kernels.cutlass.tiles import Tile
from lowbit.kernels.cutlass.weights import ROOM
from lowbit.kernels.declare import (
    ACTIVATION_ERROR,
    Bind,
    Problem,
    Roundings,
    Run,
)
from lowbit.kernels.segments import FINAL_ROUNDINGS, integer_roundings

_TERMS = 16  # of one instruction on 16-bit numbers
_FLOAT = "cutlass::float_e4m3_t"
_LARGEST = 448.0  # number of float8_e4m3fn
_X = {"bfloat16": "cutlass::bfloat16_t", "float16": "cutlass::half_t"}
_UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
_FOURS = "cutlass::int4b_t", "cutlass::uint4b_t"


@dataclass(frozen=True)
class Kind:
    """What one kernel multiplies."""

    name: str
    weights: tuple[str, ...]
    """C++ types of w's codes."""
    words: str
    faster: float
    """Than tensor cores on 16-bit numbers."""


_SIXTEEN = Kind(
    "upcast16",
    (*_FOURS, "int8_t", "cutlass::float_e4m3_t"),
    "int4, uint4, int8 or float8_e4m3fn",
    1,
)
_INT8 = Kind("upcast_int8", _FOURS, "int4 or uint4", 2)
_FLOAT8 = Kind("upcast_float8", _FOURS, "int4 or uint4", 2)
_SCALED = Kind("upcast_float8_scaled", _FOURS[:1], "int4", 2)
_FLOATS = _FLOAT8, _SCALED


@lru_cache(maxsize=512)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    return Source(mixed.text(spec), "lowbit_gemm", dense.THREADS, dense.SHARED, "cutlass")


def shipped(arch: str) -> dict[Source, Shipped]:
    """Kernels whose machine code comes with the package."""
    if arch != "sm_90a":
        return {}
    found = {}
    for kind, x, w in (
        (_SIXTEEN, "bfloat16", get("int4_g128")),
        (_INT8, get("int8_row"), get("int4_row")),
    ):
        p = Problem(1, 8, 256, x, w, "bfloat16")
        for tile in tiles.listed(kind.name):
            # Of 16-bit x, which kernels/cuda/hopper.py multiplies as soon: many rows, and few.
            if kind is _SIXTEEN and tile.shape[1] not in (16, 256):
                continue
            spec = spec_with(kind, p, tile)
            label = f"{_named(x)} by {w.name} -> bfloat16, {tile}"
            found[source(spec)] = Shipped(label, mixed.layout(spec).size, tile.cluster)
    return found


def spec_with(kind: Kind, p: Problem, tile: Tile) -> Spec:
    """The kernel that computes a product by some tile."""
    x = _X[p.x] if isinstance(p.x, str) else elements.name(p.x.element)
    w, (scale, zero) = elements.name(p.w.element), _met(kind, p)
    assert x is not None
    assert w is not None
    return Spec(
        x, w, p.out, tile.shape, tile.cluster, tile.schedule, turned=True, activation=p.activation,
        residual=p.residual, shared=tile.shared, swizzle=tile.swizzle, scale=scale, zero=zero,
    )  # fmt: skip


def _group(p: Problem) -> int:
    """Columns of w that share a scale."""
    width = p.w.scale.block[1]
    return p.k if width is None else min(width, p.k)


def _grouped(p: Problem) -> bool:
    """Whether codes meet their scales before they are added up."""
    return _group(p) < p.k or p.w.bias or isinstance(p.w.scale.element, Element)


def _met(kind: Kind, p: Problem) -> tuple[str | None, bool]:
    """C++ type of the numbers that codes meet on their way, and whether addends are among them."""
    added = p.w.zero is not None or p.w.bias
    if kind is _SCALED:
        return _X["bfloat16"], False
    if kind is _FLOAT8:
        return (TABLE if _grouped(p) else None), False
    if kind is _INT8:
        return ("int8_t", True) if added else (None, False)
    own = _X[str(p.x)]
    if not _grouped(p):
        return (own, True) if added else (None, False)
    return ("float" if added or p.w.scale.element != p.x else own), added


def _refuse(kind: Kind, p: Problem) -> str | None:
    refusal = families.refuse(p, (90,)) or _refuse_x(kind, p)
    if refusal is not None:
        return refusal
    if elements.name(p.w.element) not in kind.weights:
        return f"wants weights of {kind.words}, got {p.w.name}"
    return _refuse_scales(kind, p) or launcher.refuse_rows(p) or _refuse_otherwise(kind, p)


def _refuse_otherwise(kind: Kind, p: Problem) -> str | None:
    """What the kernel refuses that computes where memory is not aligned."""
    return integer.KERNELS[0].accepts(p) if kind is _INT8 else gemm.refuse(p)


def _refuse_x(kind: Kind, p: Problem) -> str | None:
    if kind is _SIXTEEN:
        return None if p.x in _X else f"wants bfloat16 or float16 x, got {_named(p.x)}"
    wanted, given = ("int8_t", "int8") if kind is _INT8 else (_FLOAT, "float8_e4m3fn")
    coded = not isinstance(p.x, str) and elements.name(p.x.element) == wanted
    if isinstance(p.x, str) or not coded or p.x.zero is not None or p.x.bias:
        return f"wants x of {given} without zero points, got {_named(p.x)}"
    rows, columns = p.x.scale.block
    if p.x.scale.element != "float32" or p.x.tensor_scale or rows not in (1, None):
        return f"reads one float32 scale for a row of x or for all rows, {p.x.name} has others"
    if columns is not None and columns < p.k:
        return f"scales of x must not change along the columns, they change every {columns}"
    return None


def _named(x: Format | str) -> str:
    return x if isinstance(x, str) else x.name


def _refuse_scales(kind: Kind, p: Problem) -> str | None:
    w, grouped, tabled = p.w, _grouped(p), isinstance(p.w.scale.element, Element)
    if isinstance(w.zero, str):
        return f"takes off zero points that are whole numbers, {w.name} has others"
    if kind in _FLOATS and (w.zero is not None or w.bias):
        return f"wants no zero points and no block biases, {w.name} has them"
    if kind is _SCALED and not grouped:
        return f"scales codes in groups, {w.name} has none; upcast_float8 takes it"
    if kind in _FLOATS and grouped:
        scale = w.scale.element
        tables = isinstance(scale, Element) and elements.name(scale) == _FLOAT
        if elements.name(w.element) != _FOURS[0] or not tables:
            return f"wants int4 with float8_e4m3fn scales where they are of groups, got {w.name}"
    elif tabled or w.tensor_scale:
        return f"reads scales of a float dtype and no second one for all, got {w.name}"
    if kind is _INT8:
        return f"exact sums meet one scale, {w.name} has more" if grouped else _refuse_numbers(p)
    if kind is _SIXTEEN and w.bias and p.x == "float16":
        return f"codes times scales plus biases of {w.name} may leave float16's range"
    depth = 64 if kind is _SIXTEEN else 128
    if _group(p) < p.k and _group(p) % depth:
        return f"scales must change at multiples of {depth} columns, they change every {_group(p)}"
    return None


def _refuse_numbers(p: Problem) -> str | None:
    """Why whole numbers of w are not exact on their way, in words; None if they are."""
    least, most = p.w.element.min, p.w.element.max
    if isinstance(p.w.zero, Element):
        least, most = least - p.w.zero.max, most - p.w.zero.min
        if least < -128 or max(most, -p.w.zero.min) > 127:
            return f"codes of {p.w.name} less their zero points do not surely fit in int8"
    if p.k * 128 * max(-least, most) >= 2**31:
        return f"sums of {p.k} columns do not surely fit in int32"
    return None


def bind(p: Problem, spec: Spec) -> Bind:
    """Bind an accepted product to weights, by any of its kernels."""
    build, named = (integer if spec.integral else gemm).build, source(spec)
    otherwise = launcher.matrix_by_matrix(build, p)
    processors = launch.parse(p.device).processors
    sharing = dense.sharing(spec, p.m, p.n, p.k, processors)

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        raw: Run = otherwise(w)
        if launcher.placed(machine, w.codes) is None:
            return raw
        weight = weights.laid(machine, spec, w)
        machine.settle()
        if weight is None:
            return raw
        codes, scales, zeros = (
            Matrices(0, 0) if each is None else families.found(launcher.placed(machine, each))
            for each in (weight.codes, weight.scales, weight.zeros)
        )
        rows = weight.row_scales
        w_scale = Vectors(0) if rows is None else launcher.vectors(machine, rows)

        def argument(at: Places) -> tuple[Grid, bytearray]:
            alpha = at.alpha * weight.factor
            finish = dict(dense.operands(at.x_scale, w_scale, alpha, at.bias))
            # What has no scales has 1.
            finish |= {"x_scale.default": 1.0, "w_scale.default": 1.0}
            call = Call(
                p.m, p.n, p.k, at.x, codes, at.out, tuple(finish.items()), at.residual, p.batches,
                sharing=sharing, partial=at.partial, locks=at.locks, group=_group(p),
                scales=scales, zeros=zeros,
            )  # fmt: skip
            made = mixed.arguments(spec, call, processors, machine.encode)
            return dense.grid(spec, call, processors), made

        words = dense.words(spec, p.m, p.n, sharing)
        return launcher.runner(p, machine, named, raw, argument, **words)

    return to


def _roundings(kind: Kind, p: Problem, tile: Tile) -> Roundings:
    if kind is _INT8:
        return integer_roundings(p, p.k)
    grouped, most = _grouped(p), tile.sharing(p).most
    after, shares = most + 1 + FINAL_ROUNDINGS, f", {most} shares ascending" if most > 1 else ""
    if kind in _FLOATS:
        # Numbers of a table are multiples of 2**-9: where they are small, half of that is lost.
        lost = _LARGEST * 2.0**-10 * ROOM if grouped else 0.0
        return Roundings(
            "float32",
            float8.cut(p.k) + after,
            f"float8 tensor cores over {p.k} columns{shares}",
            ACTIVATION_ERROR[p.activation],
            weight=2.0**-4 * 1.01 if grouped else 0.0,
            flushed=lost,
        )
    # Every instruction cuts its terms and their sum, see kernels/cuda/gemm.py, which computes where
    # memory is not aligned.
    count = 2 * (_TERMS + 2) * (-(-p.k // _TERMS) + 2) + after
    return Roundings(
        "float32",
        max(count, gemm.roundings(p).count),
        f"tensor cores over 16 columns, those ascending{shares}",
        ACTIVATION_ERROR[p.activation],
        weight=_UNIT[str(p.x)] + 2.0**-14 if grouped else 0.0,
    )


def _family(kind: Kind) -> families.Family[Tile, Spec]:
    return families.Family(
        kind.name,
        refuse=partial(_refuse, kind),
        ways=lambda p: tiles.listed(kind.name),
        faster=kind.faster,
        spec=partial(spec_with, kind),
        source=source,
        bind=bind,
        roundings=partial(_roundings, kind),
        exact=kind is _INT8,
        by_name=kind in _FLOATS,
    )


FAMILIES = {kind.name: _family(kind) for kind in (_SIXTEEN, _INT8, *_FLOATS)}
KERNELS = tuple(family.kernel for family in FAMILIES.values())

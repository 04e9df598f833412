"""8-bit codes of both operands on Hopper's tensor cores: int8 exactly, float8 in two precisions.

Of float8 the tensor cores keep about 14 bits of a sum (kernels/cuda/float8.py).
matmul.cutlass.float8 takes their sums of 128 columns over into float32; matmul.cutlass.float8_fast
lets them add up all columns, as cuBLAS does by default, and is chosen by name only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from lowbit.formats import Element, Format, get, reference
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import cublas, float8, gemm, integer, launch
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cuda.row_sums import row_sums
from lowbit.kernels.cutlass import dense, elements, families, launcher, tiles
from lowbit.kernels.cutlass.dense import Call, Spec, Vectors
from lowbit.kernels.cutlass.launcher import Places
from lowbit.kernels.cutlass.package import Shipped
from lowbit.kernels.cutlass.tiles import Tile
from lowbit.kernels.declare import (
    ACTIVATION_ERROR,
    Bind,
    Problem,
    Roundings,
    Run,
)
from lowbit.kernels.segments import FINAL_ROUNDINGS, integer_roundings, segment_of


@lru_cache(maxsize=512)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    return Source(dense.text(spec), "lowbit_gemm", dense.THREADS, dense.SHARED, "cutlass")


def shipped(arch: str) -> dict[Source, Shipped]:
    """Kernels whose machine code comes with the package."""
    if arch != "sm_90a":
        return {}
    found = {}
    for family, fmt in (("int8", "int8_row"), ("float8", "fp8_row"), ("float8_fast", "fp8_row")):
        p = Problem(1, 8, 16, get(fmt), get(fmt), "bfloat16")
        for tile in tiles.listed(family):
            spec = spec_with(p, tile, fast=family == "float8_fast")
            label = f"{family} rows -> bfloat16, {tile}"
            found[source(spec)] = Shipped(label, dense.layout(spec).size, tile.cluster)
    return found


def spec_with(p: Problem, tile: Tile, *, fast: bool = False) -> Spec:
    """The kernel that computes a product by some tile."""
    assert isinstance(p.x, Format)
    x, w = (elements.name(fmt.element) for fmt in (p.x, p.w))
    assert x is not None
    assert w is not None
    zero = None if p.x.zero is None else reference.zero_dtype(p.x).name
    return Spec(
        x, w, p.out, tile.shape, tile.cluster, tile.schedule, tile.turned, fast, p.activation,
        p.residual, zero, tile.shared, tile.swizzle,
    )  # fmt: skip


def _refuse(family: str, p: Problem) -> str | None:
    refusal = families.refuse(p, (90,))
    if refusal is not None:
        return refusal
    if isinstance(p.x, str):
        return f"wants codes of 8 bits on both sides, x is {p.x}"
    wanted = ("int8_t",) if family == "int8" else ("cutlass::float_e4m3_t", "cutlass::float_e5m2_t")
    shifted = family == "int8" and isinstance(p.x.zero, Element)
    for side, may_shift in ((p.x, shifted), (p.w, False)):
        known = (*wanted, "uint8_t") if may_shift else wanted
        zero = side.zero is not None and not may_shift
        if elements.name(side.element) not in known or zero or side.bias:
            kind = "int8" if family == "int8" else "float8_e4m3fn or float8_e5m2"
            return f"wants {kind} on both sides, w without zero points, got {side.name}"
        rows, _ = side.scale.block
        if rows not in (1, None) or side.tensor_scale or side.scale.element != "float32":
            return f"reads one float32 scale for a row or for all rows, {side.name} has others"
    if segment_of(p) < p.k:
        return f"scales must not change along the columns, they change every {segment_of(p)}"
    if shifted and p.batch_invariant:
        return "where memory is not aligned, x with zero points goes to the vendor's library"
    if family == "int8" and _longest(p) < p.k:
        return f"sums of {p.k} columns do not surely fit in int32"
    return launcher.refuse_rows(p)


def _longest(p: Problem) -> int:
    """Columns whose sums of x * w, of x's zero points * w and their difference fit in int32."""
    assert isinstance(p.x, Format)
    largest = max(abs(p.x.element.min), abs(p.x.element.max))
    if isinstance(p.x.zero, Element):
        largest += max(abs(p.x.zero.min), abs(p.x.zero.max))
    return int((2**31 - 1) // (largest * max(abs(p.w.element.min), abs(p.w.element.max))))


def bind(p: Problem, spec: Spec) -> Bind:
    """Bind an accepted product to weights, by any of its kernels."""
    other = integer if spec.integral else gemm
    build = other.build if spec.x_zero is None else cublas.build
    otherwise = launcher.matrix_by_matrix(build, p)
    named = source(spec)
    processors = launch.parse(p.device).processors
    sharing = dense.sharing(spec, p.m, p.n, p.k, processors)

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        raw: Run = otherwise(w)
        weight = launcher.placed(machine, w.codes)
        if weight is None:
            return raw
        w_scale, sums = launcher.vectors(machine, w.scales), None
        if spec.x_zero is not None:
            sums = row_sums(w.codes.view(np.int8).reshape(-1, p.k))
            machine.settle()

        def argument(at: Places) -> tuple[launcher.Grid, bytearray]:
            finish = dense.operands(at.x_scale, w_scale, at.alpha, at.bias)
            if sums is not None:
                of_rows = Vectors(machine.address(sums), 1, p.n if p.batches > 1 else 0)
                finish += dense.zero_operands(at.x_zero, of_rows)
            call = Call(
                p.m, p.n, p.k, at.x, weight, at.out, finish, at.residual, p.batches,
                sharing=sharing, partial=at.partial, locks=at.locks,
            )  # fmt: skip
            made = dense.arguments(spec, call, processors, machine.encode)
            return dense.grid(spec, call, processors), made

        words = dense.words(spec, p.m, p.n, sharing)
        return launcher.runner(p, machine, named, raw, argument, **words)

    return to


def _roundings(family: str, p: Problem, tile: Tile) -> Roundings:
    if family == "int8":
        exact = integer_roundings(p, p.k)
        if getattr(p.x, "zero", None) is None:
            return exact
        other = cublas.KERNELS[0].roundings(p)
        return replace(other, note=f"{exact.note}; or, where memory is not aligned, {other.note}")
    longest = p.k if family == "float8_fast" else float8.LONGEST
    segments, most = -(-p.k // longest), tile.sharing(p).most
    return Roundings(
        "float32",
        float8.cut(min(longest, p.k)) + segments + most + 1 + FINAL_ROUNDINGS,
        f"float8 tensor cores over {min(longest, p.k)} columns"
        + (", those ascending in float32" if segments > 1 else "")
        + (f", up to {most} shares of them ascending" if most > 1 else ""),
        ACTIVATION_ERROR[p.activation],
    )


def _family(name: str) -> families.Family[Tile, Spec]:
    return families.Family(
        name,
        refuse=partial(_refuse, name),
        ways=lambda p: tiles.listed(name),
        faster=2,
        spec=partial(spec_with, fast=name == "float8_fast"),
        source=source,
        bind=bind,
        roundings=partial(_roundings, name),
        exact=name == "int8",
        by_name=name == "float8_fast",
    )


FAMILIES = {name: _family(name) for name in ("int8", "float8", "float8_fast")}
KERNELS = tuple(family.kernel for family in FAMILIES.values())

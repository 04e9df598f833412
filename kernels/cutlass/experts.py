"""Products of a mixture of experts in one launch on Hopper, int8 and float8.

What kernels/cutlass/w8a8.py multiplies, here by a stack of weights: rows sorted by expert and where
each one's end, or a room of as many rows for each expert and how many are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from typing import Any

from lowbit.formats import get
from lowbit.formats.reference import Packed
from lowbit.kernels.cuda import compile, emit, launch, product
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cutlass import dense, grouped, launcher, w8a8
from lowbit.kernels.cutlass.dense import Vectors
from lowbit.kernels.cutlass.grouped import Call, Rows, Spec
from lowbit.kernels.cutlass.package import Shipped
from lowbit.kernels.cutlass.tiles import Tile
from lowbit.kernels.declare import Array, Epilogue, Problem

Run = Callable[[Packed, Array, int, Epilogue, Array], bool]
"""run(x, rows, most, epilogue, out): rows of each expert, and the most that each has room for or 0,
as `grouped.Rows` has them; bias (experts, n). False: memory is not as TMA wants it, nothing was
launched."""

COUNTS = tuple(grouped.COUNTS)
"""dtypes of numbers of rows."""
_SMALL = ((16, (64, 16, 128)), (32, (64, 32, 128)), (64, (64, 64, 128)))
"""Rows of an expert up to which a tile, w first, is taken."""
_LARGE = 192  # rows from which two groups of warps share a tile
_WORDS = 128  # bytes that what is in scratch memory is aligned to


@lru_cache(maxsize=512)
def source(spec: Spec) -> Source:
    """The kernel of a class of products."""
    return Source(grouped.text(spec), "lowbit_gemm", dense.THREADS, dense.SHARED, "cutlass")


def shipped(arch: str) -> dict[Source, Shipped]:
    """Kernels whose machine code comes with the package."""
    if arch != "sm_90a":
        return {}
    found = {}
    for fmt in ("int8_row", "fp8_row"):
        for rows in (*(most for most, _ in _SMALL), _LARGE - 1, _LARGE):
            p = Problem(rows, 8, 16, get(fmt), get(fmt), "bfloat16", device="cuda:90:132")
            spec = spec_of(p, 1)
            shape, order = "x".join(map(str, spec.tile)), ", w first" if spec.turned else ""
            label = f"experts of {fmt} -> bfloat16, tile {shape}, {spec.schedule.lower()}{order}"
            found[source(spec)] = Shipped(label, grouped.layout(spec).size)
    return found


def spec_of(p: Problem, experts: int) -> Spec:
    """The kernel of p.m rows that experts share."""
    # Where bits must not depend on the number of rows, neither may the tile.
    rows = product.rows_of(p) if p.batch_invariant else p.m / experts
    shape = next((shape for most, shape in _SMALL if rows <= most), None)
    if shape is not None:
        tile = Tile(shape, (1, 1), "Pingpong", True, 1.0)
    elif rows < _LARGE:
        tile = Tile((64, 128, 128), (1, 1), "Pingpong", False, 1.0)
    else:
        # Pingpong has two sums of float8 for every number, and spills.
        schedule = "Pingpong" if emit.whole(p.w.element) else "Cooperative"
        tile = Tile((128, 128, 128), (1, 1), schedule, False, 1.0)
    found = w8a8.spec_with(p, tile)
    return Spec(**{each.name: getattr(found, each.name) for each in fields(found)})


def refuse(p: Problem, experts: int) -> str | None:
    """Why there is no such kernel, in words; None if there is.

    p.m are the rows of all experts, p.w the format of the stack.
    """
    family = "int8" if emit.whole(p.w.element) else "float8"
    refusal = w8a8.FAMILIES[family].refuse(p)
    if refusal is not None:
        return refusal
    if p.residual is not None or getattr(p.x, "zero", None) is not None:
        return "experts in one launch have no residual, and x no zero points"
    return compile.lacking(source(spec_of(p, experts)), launch.parse(p.device).capability)


def bind(p: Problem, spec: Spec, experts: int) -> Callable[[Packed], Run]:
    """Bind an accepted product, of any number of rows, to a stack of weights (experts, n, k)."""
    named, processors = source(spec), launch.parse(p.device).processors
    maps = -(-grouped.map_bytes(processors) // _WORDS) * _WORDS
    words = (maps + grouped.table_bytes(experts) + 7) // 4

    def to(w: Packed) -> Run:
        machine = launch.machine_of(w.codes)
        function, address = machine.function(named), machine.address
        weight, w_scale = launcher.placed(machine, w.codes), launcher.vectors(machine, w.scales)

        @lru_cache(maxsize=256)
        def argument(memory: int, step: int, alpha: float, bias: int) -> Any:
            finish = dict(dense.operands(Vectors(0, step), w_scale, alpha, bias))
            finish["bias.batch"] = p.n
            call = Call(experts, p.n, p.k, memory + maps, memory, tuple(finish.items()))
            made = grouped.arguments(spec, call, processors, machine.encode)
            return machine.by_value(bytes(made))

        def run(x: Packed, rows: Array, most: int, epilogue: Epilogue, out: Array) -> bool:
            left, result = (launcher.placed(machine, each) for each in (x.codes, out))
            if weight is None or left is None or result is None:
                return False
            step = int(x.scales.size > 1)
            setup, numbers = grouped.setup(spec, rows.dtype.name)
            memory = machine.scratch(words)
            given = Rows(
                experts, most, len(x.codes), p.n, p.k, weight, left, result, address(x.scales), step
            )
            machine.function(setup)(
                (-(-experts // grouped.SETUP),),
                (grouped.SETUP,),
                (rows, *numbers(given), memory[maps // 4 :]),
            )
            bias = 0 if epilogue.bias is None else address(epilogue.bias)
            function(
                grouped.grid(spec, processors),
                (dense.THREADS,),
                (argument(address(memory), step, epilogue.alpha, bias),),
                shared_mem=dense.SHARED,
            )
            return True

        return run

    return to

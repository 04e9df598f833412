"""The smallest and the largest number of each block, in registers.

Floats are compared as integers of the same order, so that NaN and infinities come out on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lowbit.kernels.cpu.encode_lanes import (
    SIZES,
    lanes_below,
    load_numbers,
    prefetch,
    store_lanes,
    widened,
)
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, VECTOR, Function, Module, Value, constant
from lowbit.kernels.cpu.quantize_rule import raise_flag

if TYPE_CHECKING:
    from lowbit.kernels.cpu.quantize_ir import Spec

WORK = 2 * LANES * VECTOR  # bytes of scratch
_MOST, _LEAST, _INFINITE = 2**31 - 1, -(2**31), 0x7F800000


def _ordered(f: Function, bits: Value) -> Value:
    """int32 lanes in the order of the floats, -0 below 0; its own inverse."""
    return f.op("xor", bits, f.op("lshr", f.op("ashr", bits, 31), 1))


def _larger(f: Function, a: Value, b: Value) -> Value:
    return f.call("llvm.smax.v16i32", INT, a, b)


def _smaller(f: Function, a: Value, b: Value) -> Value:
    return f.call("llvm.smin.v16i32", INT, a, b)


def extremes(spec: Spec, module: Module) -> Function:
    """Extremes of the blocks of some rows; only whole entries of low and high are written.

    A pattern of NaN or infinity in any block sets the flag. `low` is written only if `signed`.
    Numbers `ahead` bytes behind those looked at are asked for.
    """
    pointers = ("low", "high", "work", "flag")
    numbers = ("stride", "rows", "columns", "block", "ahead")
    f = module.function(
        "find",
        {"x": "ptr"} | dict.fromkeys(numbers, "i64") | dict.fromkeys(pointers, "ptr"),
        "apart",
    )
    x, stride, rows, columns, block, ahead, low, high, work, flag = f.parameters
    size = SIZES[spec.dtype]
    folds = [(_larger, _LEAST), (_smaller, _MOST)] if spec.signed else [(_larger, 0)]

    def key(address: Value, mask: Value | None) -> Value:
        if mask is None:
            prefetch(f, f.at(address, ahead), near=False)
        bits = f.bits(load_numbers(f, spec.dtype, address, mask), INT)
        return _ordered(f, bits) if spec.signed else f.op("and", bits, _MOST)

    def fold(held: list[Value], address: Value, mask: Value | None) -> list[Value]:
        found = key(address, mask)
        if mask is None:
            return [do(f, each, found) for (do, _), each in zip(folds, held, strict=True)]
        return [
            do(f, each, f.select(mask, found, each))
            for (do, _), each in zip(folds, held, strict=True)
        ]

    def whole_group(group: Value) -> list[Value]:
        """16 blocks of `vectors` vectors each."""
        base = f.at(x, f.mul(f.mul(group, spec.vectors * LANES), size))
        step = LANES * size

        def lanes(number: int) -> list[Value]:
            at = f.at(base, number * spec.vectors * step)
            first = key(at, None)
            held = [first for _ in folds]
            for i in range(1, spec.vectors):
                held = fold(held, f.at(at, i * step), None)
            return held

        return _of_sixteen(f, [do for do, _ in folds], lanes)

    def whole_group_of_halves(group: Value) -> list[Value]:
        """The same for magnitudes of 16 bits, which have the order of their patterns."""
        base = f.at(x, f.mul(f.mul(group, spec.vectors * LANES), size))
        wide = f"<{2 * LANES} x i16>"

        def lanes(number: int) -> list[Value]:
            at = f.at(base, number * spec.vectors * LANES * size)
            held = constant(wide, 0)
            for i in range(spec.vectors // 2):
                place = f.at(at, 2 * LANES * size * i)
                prefetch(f, f.at(place, ahead), near=False)
                part = f.op("and", f.load(wide, place, 1), 0x7FFF)
                held = f.call("llvm.umax.v32i16", wide, held, part)
            pairs = f.bits(held, INT)
            return [_larger(f, f.op("and", pairs, 0xFFFF), f.op("lshr", pairs, 16))]

        most = _of_sixteen(f, [_larger], lanes)[0]
        return [f.bits(widened(f, spec.dtype, f.cast("trunc", most, f"<{LANES} x i16>")), INT)]

    def any_group(group: Value) -> list[Value]:
        left = f.least(f.op("sub", f.over(columns, block), group), LANES)
        with f.loop(0, left) as loop:
            start = f.mul(f.add(group, loop.index), block)
            length = f.least(f.op("sub", columns, start), block)
            begin = [constant(INT, worst) for _, worst in folds]
            with f.loop(0, rows, carried=begin) as down:
                row = f.at(x, f.add(f.mul(down.index, stride), f.mul(start, size)))
                down.carried = _along(f, row, size, length, down.carried, fold)
            for i, each in enumerate(down.results):
                place = f.add(f.mul(loop.index, VECTOR), i * LANES * VECTOR)
                f.store(each, f.at(work, place), 64)

        def lanes(number: int) -> list[Value]:
            at = f.at(work, number * VECTOR)
            return [f.load(INT, f.at(at, i * LANES * VECTOR), 64) for i in range(len(folds))]

        return _of_sixteen(f, [do for do, _ in folds], lanes)

    halves = size == 2 and not spec.signed and spec.vectors % 2 == 0
    blocks = f.over(columns, block)
    with f.loop(0, blocks, LANES) as loop:
        group = loop.index
        if spec.vectors:
            end = f.mul(f.add(group, LANES), spec.vectors * LANES)
            found = f.either(
                f.compare("sle", end, columns),
                lambda: whole_group_of_halves(group) if halves else whole_group(group),
                lambda: any_group(group),
            )
        else:
            found = any_group(group)
        mask = lanes_below(f, f.op("sub", blocks, group))
        _finish(spec, f, found, mask, f.at(low, f.mul(group, 4)), f.at(high, f.mul(group, 4)), flag)
    return f


def _along(
    f: Function,
    row: Value,
    size: int,
    length: Value,
    held: list[Value],
    fold: Callable[[list[Value], Value, Value | None], list[Value]],
) -> list[Value]:
    """Fold `length` numbers of a row into the lanes that are held."""
    wide = 4 * LANES
    turns = f.mul(f.op("udiv", length, wide), wide)
    with f.loop(0, turns, wide, carried=held) as loop:
        for i in range(4):
            at = f.at(row, f.mul(f.add(loop.index, i * LANES), size))
            loop.carried = fold(loop.carried, at, None)
    whole = f.mul(f.op("udiv", length, LANES), LANES)
    with f.loop(turns, whole, LANES, carried=loop.results) as rest:
        rest.carried = fold(rest.carried, f.at(row, f.mul(rest.index, size)), None)

    def masked() -> list[Value]:
        mask = lanes_below(f, f.op("sub", length, whole))
        return fold(rest.results, f.at(row, f.mul(whole, size)), mask)

    return f.either(f.compare("slt", whole, length), masked, lambda: rest.results)


def _of_sixteen(
    f: Function,
    folds: list[Callable[[Function, Value, Value], Value]],
    lanes: Callable[[int], list[Value]],
) -> list[Value]:
    """Fold the lanes of 16 vectors: lane i of the result is that of vector i.

    Vectors meet in pairs and keep half of their lanes each, so that 15 folds do for all.
    """

    def tree(first: int, distance: int) -> list[Value]:
        if distance == LANES:
            return lanes(first)
        a, b = tree(first, 2 * distance), tree(first + distance, 2 * distance)
        starts = range(0, LANES, 2 * distance)
        front = [s + v + i for s in starts for v in (0, LANES) for i in range(distance)]
        back = [lane + distance for lane in front]
        return [
            do(f, f.shuffle(one, other, front), f.shuffle(one, other, back))
            for do, one, other in zip(folds, a, b, strict=True)
        ]

    return tree(0, 1)


def _finish(
    spec: Spec,
    f: Function,
    found: list[Value],
    mask: Value,
    low: Value,
    high: Value,
    flag: Value,
) -> None:
    """Patterns to numbers, zero counted in, and a look for what is not finite."""
    bad = f.compare("sge", found[0], _INFINITE)
    if spec.signed:
        bad = f.op("or", bad, f.compare("sle", found[1], (_INFINITE ^ _MOST) - 2**31))
        if spec.bias:
            # Which zero is the least of zeros of both signs, and the bias's sign with it, depends
            # on the order in which NumPy looks at them.
            bad = f.op("or", bad, f.compare("eq", found[1], -1))
    raise_flag(f, f.op("and", bad, mask), flag)
    most = found[0]
    if spec.signed:
        least = found[1]
        if not (isinstance(spec.zero, str) or spec.bias):
            most, least = _larger(f, most, constant(INT, 0)), _smaller(f, least, constant(INT, 0))
        store_lanes(f, f.bits(_ordered(f, least), FLOAT), low, mask)
        most = _ordered(f, most)
    store_lanes(f, f.bits(most, FLOAT), high, mask)

"""What all micro-kernels have in common: some rows of x times some panels of w over a stretch of k.

    for each segment (columns of k between two changes of scale):
        g[r, n] = sum over k of x[r, k] * (value(code[n, k]) - zero[n])      in registers
        sums[r, n] += x_scale[r] * (w_scale[n] * g[r, n])                    in scratch

k ascends, so an output's bits depend on nothing but its own row and column. A segment that the
stretch cuts is carried to the next one in scratch. Positions and lengths along k count granules,
or tiles of AMX.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from lowbit.kernels.cpu.ir import FLOAT, INT, VECTOR, Module, Value, constant
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.steps import Steps
from lowbit.kernels.layouts import GROUP

ROW = VECTOR * GROUP  # bytes of one row of sums
AHEAD = 2048
"""Bytes that words streaming from memory are asked for ahead: on one Granite Rapids core reading
rises from 16 to 22 GB/s and more (bench/roofs.py)."""


@dataclass(frozen=True)
class Shape:
    """Size of a micro-kernel."""

    rows: int
    panels: int


class Micro(ABC):
    """Builds one micro-kernel; `function` is the result."""

    def __init__(self, spec: Spec, module: Module, shape: Shape) -> None:
        self.spec, self.module, self.shape = spec, module, shape
        self.rows, self.panels = shape.rows, shape.panels
        self.steps = Steps(spec, module.isa)
        self.integer = spec.inner == "dot"
        self.kind = INT if self.integer else FLOAT
        parameters = {"x": "ptr", "x_stride": "i64"}
        parameters |= {f"codes{p}": "ptr" for p in range(shape.panels)}
        parameters |= dict.fromkeys(("sums", "carry", "stage"), "ptr")
        parameters |= dict.fromkeys(("scales", "zeros", "biases"), "ptr")
        parameters |= {"x_scales": "ptr", "x_scales_stride": "i64", "x_block": "i64"}
        parameters |= {"x_sums": "ptr", "x_sums_stride": "i64"}
        parameters |= dict.fromkeys(("first", "last", "total", "segment", "tile"), "i64")
        parameters |= {"fetch0": "ptr", "fetch1": "ptr", "lines": "i64", "rows": "i64"}
        parameters |= {"leap": "i64", "granules": "i64"}
        name = f"rows{shape.rows}x{shape.panels}"
        self.function = module.function(name, parameters, "apart")
        self.values = dict(zip(parameters, self.function.parameters, strict=True))
        self._write()

    def _write(self) -> None:
        f, v = self.function, self.values
        start = f.op("udiv", v["first"], v["segment"])
        stop = f.over(v["last"], v["segment"])
        self._begin()
        with f.loop(start, stop) as outer:
            begin = f.mul(outer.index, v["segment"])
            end = f.add(begin, v["segment"])
            at = f.greatest(begin, v["first"])
            until = f.least(end, v["last"])
            fresh = f.compare("eq", at, begin)
            whole = f.compare("sge", until, f.least(end, v["total"]))
            self._segment(outer.index, f.op("sub", outer.index, start), at, until, fresh, whole)

    def _ahead(self, granule: Value, total: Value) -> Value:
        """Distance to the words that are asked for beside those of a granule.

        Behind a panel's end it leaps to the panel that takes its place in the next tile: a tile
        would else begin with a wait for memory in each of its panels.
        """
        f = self.function
        end = f.add(f.mul(granule, self.steps.words * VECTOR), AHEAD)
        inside = f.compare("slt", end, f.mul(total, self.steps.words * VECTOR))
        return f.add(f.select(inside, constant("i64", 0), self.values["leap"]), AHEAD)

    def _begin(self) -> None:  # noqa: B027  (most have nothing to do)
        """What comes before the first segment."""

    @abstractmethod
    def _segment(
        self, segment: Value, within: Value, at: Value, stop: Value, fresh: Value, whole: Value
    ) -> None:
        """Multiply [at, stop), which begins a segment where `fresh` and ends one where `whole`.

        `within` counts segments from the first one of the stretch.
        """

    def _place(self, base: Value, row: int, panel: int) -> Value:
        return self.function.at(base, row * ROW + panel * VECTOR)

    def _block(self, name: str, within: Value, panel: int, kind: str) -> Value:
        """The sixteen scales, zero points or biases of a segment."""
        f = self.function
        offset = f.mul(within, ROW)
        return f.load(kind, f.at(f.at(self.values[name], offset), panel * VECTOR), 64)

    def _blocks(self, segment: Value, within: Value) -> Blocks:
        """Everything that one segment's sums are scaled by, the same for all rows."""
        f, spec = self.function, self.spec
        panels = range(self.panels)
        biases = zeros = x_block = None
        if spec.biases:
            biases = [self._block("biases", within, p, FLOAT) for p in panels]
        if self.integer and spec.zero is not None:
            zeros = [self._block("zeros", within, p, INT) for p in panels]
        if spec.x_scale:
            x_block = f.mul(f.op("udiv", segment, self.values["x_block"]), 4)
        scales = None
        if not spec.folded:
            scales = [self._block("scales", within, p, FLOAT) for p in panels]
        return Blocks(scales, zeros, biases, x_block, f.mul(segment, 4))

    def _finish(
        self, blocks: Blocks, x_scales: Value, x_sums: Value, sums: Value, g: list[Value]
    ) -> None:
        """Scale a row's sums of one segment and add them up; the pointers are the row's."""
        f, spec = self.function, self.spec
        x_scale = x_sum = None
        if blocks.x_block is not None:
            x_scale = f.splat(f.load("float", f.at(x_scales, blocks.x_block), 4))
        if wants_x_sums(spec, self.steps):
            kind = "i32" if self.integer else "float"
            x_sum = f.splat(f.load(kind, f.at(x_sums, blocks.x_sum), 4))
        for p, each in enumerate(g):
            if self.integer:
                each = self._centre(each, x_sum, blocks.zeros[p] if blocks.zeros else None)
            place = f.at(sums, p * VECTOR)
            total = f.load(FLOAT, place, 64)
            if blocks.scales is not None:
                scale = blocks.scales[p]
                if x_scale is None:
                    total = f.fma(scale, each, total)
                else:
                    total = f.fma(x_scale, f.op("fmul", scale, each), total)
            elif x_scale is None:
                total = f.op("fadd", total, each)
            else:
                total = f.fma(x_scale, each, total)
            if blocks.biases is not None and x_sum is not None:
                total = f.fma(x_sum, blocks.biases[p], total)
            f.store(total, place, 64)

    def _centre(self, g: Value, x_sum: Value | None, zero: Value | None) -> Value:
        """sum x (stored - offset - zero) = sum x stored - (offset + zero) sum x, mod 2**32."""
        f = self.function
        if x_sum is not None:
            # The packed zero points include the offset; without any, the sums are times it.
            g = f.op("sub", g, x_sum if zero is None else f.mul(x_sum, zero))
        return f.cast("sitofp", g, FLOAT)


@dataclass(frozen=True)
class Blocks:
    """Scales, zero points and biases of a segment: one vector a panel, and offsets into x's."""

    scales: list[Value] | None
    zeros: list[Value] | None
    biases: list[Value] | None
    x_block: Value | None
    x_sum: Value


def wants_x_sums(spec: Spec, steps: Steps) -> bool:
    """The kernel reads the sums of x over each segment."""
    if spec.inner != "dot":
        return spec.biases
    return spec.zero is not None or steps.offset != 0

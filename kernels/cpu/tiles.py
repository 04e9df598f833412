"""Micro-kernels of AMX: tiles of 16 rows by 64 bytes, multiplied as a whole.

    C (16 x 16) += A (16 rows of x, `tile` steps) . B (`tile` steps of a panel)

Tiles 0..3 are sums, 4 and 5 rows of x, 6 and 7 panels. `tile` steps is what the configuration at
run time says, at most 16, so a segment of any length is a whole number of tiles.

After each step of the tiles a kernel asks for some cache lines of the panels that come next, so
that memory works while they multiply.
"""

from __future__ import annotations

import struct

from lowbit.kernels.cpu.ir import FLOAT, INT, VECTOR, Module, Value, constant
from lowbit.kernels.cpu.micro import ROW, Blocks, Micro, Shape
from lowbit.kernels.cpu.spec import Spec

TALL = 16  # rows of a tile
TILE = TALL * VECTOR  # bytes
SUMS = 4  # tiles
STAGE = (1 + 4) * SUMS * TILE
"""Bytes of a segment's sums on their way to vectors, and of four steps of panels on theirs."""
_X, _W = (4, 5), (6, 7)
_UNROLLED = 4  # rows whose sums are scaled at a time
# Steps between decoding a tile and loading it, which has to wait until its stores have retired.
_EARLY = 2


def shapes(spec: Spec) -> tuple[Shape, ...]:
    """Two tiles of rows by two panels read the least; a single one takes four panels."""
    single = Shape(TALL, 4)
    return (single,) if spec.method == "single" else (Shape(2 * TALL, 2), single)


def configuration(steps: int, tall: int) -> bytes:
    """The 64 bytes that `ldtilecfg` reads, for tiles of so many steps and rows of x."""
    columns = [64] * 4 + [4 * steps] * 2 + [64] * 2 + [0] * 8
    rows = [tall] * 6 + [steps] * 2 + [0] * 8
    return struct.pack("<BB14x16H16B", 1, 0, *columns, *rows)


class Tiles(Micro):
    """One or two tiles of rows by four or two panels."""

    def __init__(self, spec: Spec, module: Module, shape: Shape) -> None:
        self.single = spec.method == "single"
        self.centred = spec.zero is not None and spec.inner != "dot"
        super().__init__(spec, module, shape)

    def _begin(self) -> None:
        if self.single and not self.centred:
            f, v = self.function, self.values
            for step in range(_EARLY):
                index = f.add(v["first"], step)
                with f.when(f.compare("slt", index, v["last"])):
                    self._decode(index, [None] * self.panels)

    def _segment(
        self, segment: Value, within: Value, at: Value, stop: Value, fresh: Value, whole: Value
    ) -> None:
        f = self.function

        def clear() -> list[Value]:
            for c in range(SUMS):
                f.tile("tilezero", c)
            return []

        def resume() -> list[Value]:
            for c in range(SUMS):
                f.tile("tileloadd64", c, self._carry(c), _bytes(VECTOR))
            return []

        f.either(fresh, clear, resume)
        zeros: list[Value | None] = [None] * self.panels
        if self.single and self.centred:
            zeros = [self._block("zeros", within, p, FLOAT) for p in range(self.panels)]
        with f.loop(at, stop) as inner:
            if self.single and self.centred:
                self._decode(inner.index, zeros)
            elif self.single:
                following = f.add(inner.index, _EARLY)
                with f.when(f.compare("slt", following, self.values["last"])):
                    self._decode(following, zeros)
            self._multiply(inner.index)

        def suspend() -> list[Value]:
            for c in range(SUMS):
                f.tile("tilestored64", c, self._carry(c), _bytes(VECTOR))
            return []

        def finish() -> list[Value]:
            for c in range(SUMS):
                place = f.at(self.values["stage"], c * TILE)
                f.tile("tilestored64", c, place, _bytes(VECTOR))
            self._scale(self._blocks(segment, within))
            return []

        f.either(whole, finish, suspend)

    def _carry(self, c: int) -> Value:
        block, panel = divmod(c, self.panels)
        return self.function.at(self.values["carry"], block * TALL * ROW + panel * TILE)

    def _multiply(self, index: Value) -> None:
        f, v = self.function, self.values
        within = f.op("sub", index, v["first"])
        x = f.at(v["x"], f.mul(index, TILE))
        for block in range(self.rows // TALL):
            rows = f.at(x, f.mul(v["x_stride"], TALL * block)) if block else x
            # x streams by (T1): it should not push the panels out of the nearest cache.
            f.tile("tileloaddt164", _X[block], rows, _bytes(VECTOR))
            for p in range(self.panels):
                if not block or self.panels > len(_W):
                    w = self._decoded(p, index) if self.single else self._panel(p, within)
                    f.tile("tileloadd64", _W[p % 2], w, _bytes(VECTOR))
                f.tile(self._product(), block * self.panels + p, _X[block], _W[p % 2])
        if self.panels == len(_W):
            offset = f.mul(f.mul(within, v["lines"]), VECTOR)
            ahead = [f.at(v[name], offset) for name in ("fetch0", "fetch1")]
            with f.loop(0, v["lines"]) as line:
                for each in ahead:
                    f.prefetch(f.at(each, f.mul(line.index, VECTOR)))

    def _panel(self, p: int, within: Value) -> Value:
        f, v = self.function, self.values
        return f.at(v[f"codes{p}"], f.mul(f.mul(within, v["tile"]), VECTOR))

    def _decoded(self, p: int, index: Value) -> Value:
        """Scratch of one panel's tile, in turn one of four."""
        f = self.function
        turn = f.mul(f.op("and", index, 3), SUMS * TILE)
        return f.at(f.at(self.values["stage"], (SUMS + p) * TILE), turn)

    def _decode(self, index: Value, zeros: list[Value | None]) -> None:
        """One tile of every panel, decoded into scratch; zeros for granules behind the last one."""
        f, v = self.function, self.values
        granules = self.spec.tile // self.steps.count
        left = f.op("sub", v["granules"], f.mul(index, granules))

        def whole() -> list[Value]:
            for p in range(self.panels):
                for granule in range(granules):
                    self._granule(index, p, granule, zeros[p])
            return []

        def part() -> list[Value]:
            for p in range(self.panels):
                for granule in range(granules):
                    there = f.compare("sgt", left, granule)
                    with f.when(there):
                        self._granule(index, p, granule, zeros[p])
                    with f.when(f.op("xor", there, 1)):
                        to = self._place_of(index, p, granule)
                        for i in range(self.steps.count):
                            f.store(constant(INT, 0), f.at(to, i * VECTOR), 64)
            return []

        f.either(f.compare("sge", left, granules), whole, part)

    def _place_of(self, index: Value, panel: int, granule: int) -> Value:
        """Scratch of one granule of a tile."""
        return self.function.at(self._decoded(panel, index), granule * self.steps.count * VECTOR)

    def _granule(self, index: Value, panel: int, granule: int, zero: Value | None) -> None:
        """Decode one granule of a tile."""
        f, v, steps = self.function, self.values, self.steps
        granules, size = self.spec.tile // steps.count, steps.words * VECTOR
        first = f.mul(f.op("sub", index, v["first"]), granules * size)
        source = f.at(f.at(v[f"codes{panel}"], first), granule * size)
        if self.spec.layout == "words16":
            ahead = self._ahead(f.mul(index, granules), v["granules"])
            fetched = f.at(source, ahead)
            for i in range(steps.words):
                f.prefetch(f.at(fetched, i * VECTOR))
        held = [f.load(INT, f.at(source, i * VECTOR), 4) for i in range(steps.words)]
        to = self._place_of(index, panel, granule)
        scale = self._folded(index, granules, granule, panel)
        for i, vector in enumerate(steps.emit(f, held, zero, scale)):
            f.store(vector, f.at(to, i * VECTOR), 64)

    def _folded(self, index: Value, granules: int, granule: int, panel: int) -> Value | None:
        """The scale that one granule of a tile is multiplied by."""
        f, v, many = self.function, self.values, self.spec.folded
        if not many:
            return None
        first = f.op("udiv", f.mul(v["first"], granules), many)
        block = f.op("udiv", f.add(f.mul(index, granules), granule), many)
        place = f.add(f.mul(f.op("sub", block, first), ROW), panel * VECTOR)
        return f.load(FLOAT, f.at(v["scales"], place), 64)

    def _product(self) -> str:
        if not self.integer:
            return "tdpbf16ps"
        return "tdpbssd" if self.steps.tiles_signed else "tdpbsud"

    def _scale(self, blocks: Blocks) -> None:
        """Scale a segment's sums and add them up, row by row."""
        f, v = self.function, self.values
        for block in range(self.rows // TALL):
            top = block * TALL
            base = f.at(v["stage"], block * self.panels * TILE)
            scales, sums = (
                f.at(v[name], f.mul(v[f"{name}_stride"], top)) for name in ("x_scales", "x_sums")
            )
            if self.single:
                with f.loop(0, v["rows"]) as row:
                    self._rows(blocks, base, scales, sums, row.index, 0, 1)
                continue
            with f.loop(0, TALL, _UNROLLED) as row:
                self._rows(blocks, base, scales, sums, row.index, top, _UNROLLED)

    def _rows(
        self,
        blocks: Blocks,
        stage: Value,
        x_scales: Value,
        x_sums: Value,
        first: Value,
        top: int,
        many: int,
    ) -> None:
        """Some rows of one tile, which lies `top` rows down."""
        f, v = self.function, self.values
        source = f.at(stage, f.mul(first, VECTOR))
        target = f.at(v["sums"], f.mul(first, ROW))
        scales = f.at(x_scales, f.mul(first, v["x_scales_stride"]))
        sums = f.at(x_sums, f.mul(first, v["x_sums_stride"]))
        for row in range(many):
            g = [
                f.load(self.kind, f.at(source, row * VECTOR + p * TILE), 64)
                for p in range(self.panels)
            ]
            own = f.mul(v["x_scales_stride"], row), f.mul(v["x_sums_stride"], row)
            place = f.at(target, (top + row) * ROW)
            self._finish(blocks, f.at(scales, own[0]), f.at(sums, own[1]), place, g)


def _bytes(stride: int) -> Value:
    """A stride between the rows of a tile."""
    return Value("i64", str(stride))

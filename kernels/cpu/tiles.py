"""Micro-kernels of AMX: tiles of 16 rows by 64 bytes, multiplied as a whole.

    C (16 x 16) += A (16 rows of x, `tile` steps) . B (`tile` steps of a panel)

Tiles 0..3 are sums, 4 and 5 rows of x, 6 and 7 panels. `tile` steps is what the configuration at
run time says, at most 16, so a segment of any length is a whole number of tiles.
"""

from __future__ import annotations

import struct

from lowbit.kernels.cpu.ir import Value
from lowbit.kernels.cpu.micro import ROW, VECTOR, Micro, Shape

TALL = 16  # rows of a tile
SHAPES = (Shape(32, 2), Shape(16, 4))
STAGE = 4 * TALL * VECTOR  # bytes that the sums of a segment take on their way to vectors
_X, _W = (4, 5), (6, 7)


def configuration(steps: int) -> bytes:
    """The 64 bytes that `ldtilecfg` reads, for tiles of so many steps."""
    columns = [64] * 4 + [4 * steps] * 2 + [64] * 2 + [0] * 8
    rows = [TALL] * 6 + [steps] * 2 + [0] * 8
    return struct.pack("<BB14x16H16B", 1, 0, *columns, *rows)


class Tiles(Micro):
    """Two tiles of rows by two panels, or one by four."""

    def _segment(
        self, segment: Value, within: Value, at: Value, stop: Value, fresh: Value, whole: Value
    ) -> None:
        f, v = self.function, self.values
        stride = constant_stride(ROW)

        def clear() -> list[Value]:
            for c in range(4):
                f.tile("tilezero", c)
            return []

        def resume() -> list[Value]:
            for c in range(4):
                f.tile("tileloadd64", c, self._sums("carry", c), stride)
            return []

        f.either(fresh, clear, resume)
        with f.loop(at, stop) as inner:
            self._multiply(inner.index)

        def suspend() -> list[Value]:
            for c in range(4):
                f.tile("tilestored64", c, self._sums("carry", c), stride)
            return []

        def finish() -> list[Value]:
            for c in range(4):
                place = f.at(v["stage"], c * TALL * VECTOR)
                f.tile("tilestored64", c, place, constant_stride(VECTOR))
            self._scale(segment, within)
            return []

        f.either(whole, finish, suspend)

    def _cell(self, c: int) -> tuple[int, int]:
        """Tile of rows and panel of the sums c."""
        return divmod(c, self.panels)

    def _sums(self, name: str, c: int) -> Value:
        block, panel = self._cell(c)
        return self._place(self.values[name], block * TALL, panel)

    def _multiply(self, index: Value) -> None:
        f, v = self.function, self.values
        step = constant_stride(VECTOR)
        x = f.at(v["x"], f.mul(f.mul(index, v["tile"]), 4))
        blocks = self.rows // TALL
        for b in range(blocks):
            rows = f.at(x, f.mul(v["x_stride"], TALL * b)) if b else x
            f.tile("tileloadd64", _X[b], rows, v["x_stride"])
        offset = f.mul(f.mul(f.op("sub", index, v["first"]), v["tile"]), VECTOR)
        for p in range(self.panels):
            w = _W[p % 2]
            f.tile("tileloadd64", w, f.at(v[f"codes{p}"], offset), step)
            for b in range(blocks):
                f.tile(self._product(), b * self.panels + p, _X[b], w)

    def _product(self) -> str:
        if not self.integer:
            return "tdpbf16ps"
        return "tdpbssd" if self.steps.tiles_signed else "tdpbsud"

    def _scale(self, segment: Value, within: Value) -> None:
        f, v = self.function, self.values
        blocks = self._blocks(segment, within)
        for b in range(self.rows // TALL):
            with f.loop(0, TALL) as loop:
                row = f.add(loop.index, b * TALL)
                place = f.at(v["stage"], f.mul(loop.index, VECTOR))
                g = [
                    f.load(self.kind, f.at(place, (b * self.panels + p) * TALL * VECTOR), 64)
                    for p in range(self.panels)
                ]
                self._finish(
                    blocks,
                    f.at(v["x_scales"], f.mul(row, v["x_scales_stride"])),
                    f.at(v["x_sums"], f.mul(row, v["x_sums_stride"])),
                    f.at(v["sums"], f.mul(row, ROW)),
                    g,
                )


def constant_stride(bytes_: int) -> Value:
    """A stride between the rows of a tile."""
    return Value("i64", str(bytes_))

"""One product as a module: a function `tile(arguments, number, scratch)` for the thread pool.

A tile is up to 64 columns of the result (four panels of w) by some rows. Stretch of k by stretch
of k it brings the panels' codes and scales into scratch, runs the micro-kernels over its rows, and
in the end writes the result. The pool has set the standard floating-point mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lowbit.formats.declare import Element
from lowbit.kernels.cpu import pack, tile, tiles
from lowbit.kernels.cpu.decode import decoder
from lowbit.kernels.cpu.epilogue import EDGE, writer
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, VECTOR, Function, Module, Value, constant
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.micro import ROW, Micro, Shape
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.steps import Steps
from lowbit.kernels.cpu.tile import Vectors
from lowbit.kernels.cpu.tiles import TALL, TILE, Tiles
from lowbit.kernels.cpu.unroll import unroller
from lowbit.kernels.layouts import GROUP, PANEL, WIDTHS


class Arguments(NamedTuple):
    """The block that `tile` reads: 64-bit integers and addresses, and alpha at the end.

    Strides of x and of codes are bytes, others elements; `*_at` are offsets into scratch. A unit is
    a granule of codes, or a tile of AMX, which has `unit_granules` of them; the last unit of a
    segment need not be full.
    """

    m: int
    n: int
    total: int  # units
    segment: int  # units
    stretch: int  # units
    span: int  # units: one segment, or as many as a stretch has
    granules: int  # of a row
    segment_granules: int
    unit_granules: int
    tile: int  # steps of an AMX tile
    plain: int  # 1: the words are tiles already
    tile_rows: int
    columns: int  # tiles side by side
    x: int
    x_stride: int  # bytes
    codes: int
    codes_stride: int
    codes_size: int  # bytes of a row of codes
    scales: int
    zeros: int
    biases: int
    scales_stride: int
    block_rows: int
    block_segments: int
    x_scales: int
    x_scales_stride: int
    x_block_segments: int
    x_sums: int
    x_sums_stride: int
    bias: int
    residual: int
    residual_stride: int
    out: int
    out_stride: int
    carry_at: int
    stage_at: int
    scales_at: int
    zeros_at: int
    biases_at: int
    codes_at: int
    lines_at: int
    work_at: int
    operands_at: int
    stretch_words: int  # of canonical rows, that a panel copies at a time
    alpha: float


FORMAT = f"<{len(Arguments._fields) - 1}qf4x"
WIDTH = GROUP * LANES  # columns of a group
CONFIGURATION = 8 * len(Arguments._fields)  # where the shape of AMX's tiles follows, 64 bytes
ADDRESSES = ("x", "codes", "scales", "zeros", "biases", "x_scales", "x_sums", "bias", "residual")
ITEM_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8}
# Scratch of a tile starts with what the epilogue needs and the table of row addresses.
HEAD = EDGE + pack.POINTERS


def item_bits(kind: Element | str) -> int:
    """Width of a stored scale; codes of elements fill a byte."""
    return 8 if isinstance(kind, Element) else ITEM_BITS[kind]


def text(spec: Spec, isa: Isa) -> str:
    """The module's IR."""
    module = Module(isa)
    _Tile(spec, module)
    return module.text()


def _arguments(
    f: Function, block: Value, names: tuple[str, ...], addresses: tuple[str, ...]
) -> dict[str, Value]:
    found = {}
    for i, name in enumerate(names):
        kind = "ptr" if name in addresses else "float" if name == "alpha" else "i64"
        found[name] = f.load(kind, f.at(block, 8 * i), 4)
    return found


class _Tile:
    """Builds the tile's body."""

    def __init__(self, spec: Spec, module: Module) -> None:
        self.spec, self.module = spec, module
        self.steps = Steps(spec, module.isa)
        self.tiles = spec.tiled
        build: type[Micro] = Tiles if self.tiles else Vectors
        sizes = tiles.shapes(spec) if self.tiles else tile.shapes(spec, module.isa)
        self.kernels = [(each, build(spec, module, each).function) for each in sizes]
        self.transpose = pack.transposer(module)
        self.row_table = pack.row_table(module)
        bits = spec.element.bits
        expanded = spec.layout == "rows" and bits not in WIDTHS
        self.expand = pack.expander(module, bits) if expanded else None
        self.decode = unroller(spec, module) if spec.method in ("decoded", "tiles") else None
        self.unpack = {name: self._unpacker(name, kind) for name, kind in self._blocks().items()}
        self.finish = writer(spec, module)
        names = {"a": "ptr", "number": "i64", "scratch": "ptr"}
        self.function = module.function("tile", names, "external")
        self.block, self.number, self.scratch = self.function.parameters
        addresses = (*ADDRESSES, "out")
        self.a = _arguments(self.function, self.block, Arguments._fields, addresses)
        self._write()

    def _blocks(self) -> dict[str, Element | str]:
        """What goes with each block of codes, and how it is stored."""
        spec = self.spec
        kinds = {"scales": spec.scale, "zeros": spec.zero}
        kinds["biases"] = spec.scale if spec.biases else None
        return {name: kind for name, kind in kinds.items() if kind is not None}

    def _unpacker(self, name: str, kind: Element | str) -> Function:
        offset = None
        if name == "zeros" and self.spec.inner == "dot":
            offset = self.steps.offset
        return pack.unpacker(
            self.module,
            f"unpack_{name}",
            decoder(kind, self.module),
            item_bits(kind),
            panels=self.spec.scale_layout == "panels16",
            integer_offset=offset,
        )

    def _at(self, name: str) -> Value:
        return self.function.at(self.scratch, self.a[f"{name}_at"])

    def _write(self) -> None:
        f, a = self.function, self.a
        column = f.mul(f.op("urem", self.number, a["columns"]), WIDTH)
        row = f.mul(f.op("udiv", self.number, a["columns"]), a["tile_rows"])
        rows = f.least(f.op("sub", a["m"], row), a["tile_rows"])
        tall = f.mul(f.over(rows, TALL), TALL) if self.tiles else rows
        sums = f.at(self.scratch, HEAD)
        with f.loop(0, f.mul(tall, GROUP)) as loop:
            f.store(constant(FLOAT, 0.0), f.at(sums, f.mul(loop.index, VECTOR)), 64)
        if self.tiles:
            f.call("llvm.x86.ldtilecfg", "void", f.at(self.block, CONFIGURATION))
        with f.loop(0, a["total"], a["span"]) as spans:
            end = f.least(f.add(spans.index, a["span"]), a["total"])
            with f.loop(spans.index, end, a["stretch"]) as loop:
                last = f.least(f.add(loop.index, a["stretch"]), end)
                self._stretch(row, tall, column, loop.index, last)
        if self.tiles:
            f.call("llvm.x86.tilerelease", "void")
        self._result(row, rows, column, sums)

    def _stretch(self, row: Value, rows: Value, column: Value, first: Value, last: Value) -> None:
        """Bring a stretch of the panels into scratch and multiply it."""
        f, a = self.function, self.a
        table = f.at(self.scratch, EDGE)
        columns = f.least(f.op("sub", a["n"], column), WIDTH)
        panels = f.over(columns, LANES)
        with f.loop(0, panels) as panel:
            at = f.add(column, f.mul(panel.index, LANES))
            for name in self.unpack:
                self._scales(name, at, panel.index, first, last, table)
            self._operands(at, panel.index, first, last, table)
        self._missing(panels, first, last)
        self._products(row, rows, column, panels, first, last)

    def _missing(self, panels: Value, first: Value, last: Value) -> None:
        """Scales of 0 for panels that the group lacks.

        Their sums are computed and dropped. What scratch holds could be subnormal numbers, and
        those take x86 a hundred cycles each.
        """
        f = self.function
        start, stop, *_ = self._scaled(first, last)
        with f.loop(panels, GROUP) as panel, f.loop(0, f.op("sub", stop, start)) as block:
            place = f.add(f.mul(block.index, ROW), f.mul(panel.index, VECTOR))
            for name in self.unpack:
                f.store(constant(INT, 0), f.at(self._at(name), place), 64)

    def _scaled(self, first: Value, last: Value) -> tuple[Value, Value, Value, Value]:
        """Blocks of codes with a scale, from one to another; their length, and the row's.

        Of segments, or where scales are folded into the codes of their own.
        """
        f, a = self.function, self.a
        length, total = a["segment"], a["total"]
        if self.spec.folded:
            first, last = self._granule(first), self._granule(last)
            length, total = constant("i64", self.spec.folded), a["granules"]
        return f.op("udiv", first, length), f.over(last, length), length, total

    def _result(self, row: Value, rows: Value, column: Value, sums: Value) -> None:
        """Write the result."""
        f, a = self.function, self.a
        columns = f.least(f.op("sub", a["n"], column), WIDTH)
        place = f.add(f.mul(row, a["out_stride"]), column)
        out = f.at(a["out"], f.mul(place, ITEM_BITS[self.spec.out] // 8))
        shifted = f.at(a["bias"], f.mul(column, 4))
        null = Value("ptr", "null")
        bias = f.select(f.compare("eq", a["bias"], null), null, shifted)
        residual = a["residual"]
        if self.spec.residual is not None:
            place = f.add(f.mul(row, a["residual_stride"]), column)
            residual = f.at(residual, f.mul(place, ITEM_BITS[self.spec.residual] // 8))
        f.run(
            self.finish,
            sums,
            bias,
            residual,
            out,
            self.scratch,
            a["residual_stride"],
            a["out_stride"],
            rows,
            columns,
            a["alpha"],
        )

    def _granule(self, unit: Value) -> Value:
        """The granule that a unit begins with."""
        if not self.tiles:
            return unit
        f, a = self.function, self.a
        segment, within = f.op("udiv", unit, a["segment"]), f.op("urem", unit, a["segment"])
        before = f.mul(segment, a["segment_granules"])
        return f.least(f.add(before, f.mul(within, a["unit_granules"])), a["granules"])

    def _operands(self, row: Value, panel: Value, first: Value, last: Value, table: Value) -> None:
        """Codes of one panel as the micro-kernels read them."""
        f, a = self.function, self.a
        begin, end = self._granule(first), self._granule(last)
        if self.spec.layout == "rows":
            self._codes(row, panel, begin, end, table)
        if self.decode is None:
            return

        def decode() -> None:
            assert self.decode is not None
            f.run(
                self.decode,
                self._words(row, panel, first),
                self._unrolled(panel),
                f.at(self._at("zeros"), f.mul(panel, VECTOR)),
                f.at(self._at("scales"), f.mul(panel, VECTOR)),
                first,
                last,
                a["segment"],
                a["granules"],
                a["segment_granules"],
                a["unit_granules"],
            )

        if not self.steps.plain:
            decode()
            return
        with f.when(f.compare("eq", a["plain"], 0)):
            decode()

    def _codes(self, row: Value, panel: Value, begin: Value, end: Value, table: Value) -> None:
        """The words of one panel, from canonical rows; positions count granules."""
        f, a, bits = self.function, self.a, self.spec.element.bits
        one = constant("i64", 1)
        f.run(self.row_table, a["codes"], table, a["codes_stride"], row, a["n"], one)
        out = self._copied(panel)
        left = f.op("sub", a["n"], row)
        first, last = (f.mul(each, self.steps.words) for each in (begin, end))
        if self.expand is None:
            stop = f.least(f.mul(last, 4), a["codes_size"])
            f.run(self.transpose, table, left, f.mul(first, 4), stop, out)
            return
        # Words are four codes here; groups of eight codes fill whole bytes, so an odd first word
        # is brought along.
        start = f.mul(f.op("lshr", first, 1), bits)
        stop = f.least(f.mul(f.over(last, 2), bits), a["codes_size"])
        lines, stride = self._at("lines"), f.mul(f.add(a["stretch_words"], 4), 4)
        with f.loop(0, PANEL) as loop:
            place = f.at(table, f.mul(loop.index, 8))
            line = f.at(lines, f.mul(loop.index, stride))
            source = f.load("ptr", place, 8)
            f.run(self.expand, source, start, stop, a["codes_size"], line)
            f.store(f.at(line, f.mul(f.op("and", first, 1), 4)), place, 8)
        size = f.mul(f.op("sub", last, first), 4)
        f.run(self.transpose, table, left, constant("i64", 0), size, out)

    def _scales(
        self, name: str, row: Value, panel: Value, first: Value, last: Value, table: Value
    ) -> None:
        """One vector a segment of the stretch, next to the other panels' vectors."""
        f, a = self.function, self.a
        start, stop, length, total = self._scaled(first, last)
        begin = f.op("udiv", start, a["block_segments"])
        end = f.over(stop, a["block_segments"])
        size = item_bits(self._blocks()[name]) // 8
        if self.spec.scale_layout == "panels16":
            blocks = f.over(f.over(total, length), a["block_segments"])
            place = f.mul(f.mul(f.op("udiv", row, LANES), blocks), LANES * size)
            source = f.at(a[name], place)
            further = f.mul(blocks, GROUP * LANES * size)  # those of the next tile
        else:
            further = constant("i64", 0)
            source = self._at("work")
            stride = f.mul(a["scales_stride"], size)
            f.run(self.row_table, a[name], table, stride, row, a["n"], a["block_rows"])
            left = f.op("sub", a["n"], row)
            ends = f.mul(begin, size), f.mul(end, size)
            f.run(self.transpose, table, left, *ends, source)
        out = f.at(self._at(name), f.mul(panel, VECTOR))
        f.run(
            self.unpack[name],
            source,
            out,
            begin,
            start,
            stop,
            a["block_segments"],
            further,
        )

    def _products(
        self,
        row: Value,
        rows: Value,
        column: Value,
        panels: Value,
        first: Value,
        last: Value,
    ) -> None:
        """All rows times all panels of the stretch.

        Rows are the inner loop: what a micro-kernel reads of w stays in the nearest cache.
        """
        f, a = self.function, self.a
        done = constant("i64", 0)
        for shape, kernel in self.kernels:
            some = f.mul(f.op("udiv", f.op("sub", rows, done), shape.rows), shape.rows)
            until = f.add(done, some)
            with f.loop(0, panels, shape.panels) as panel:
                codes = self._panels(shape, column, panel.index, panels, first)
                blocks = self._blocks_of(panel.index)
                fetch = self._fetch(shape, column, panel.index, first, last, some)
                with f.loop(done, until, shape.rows) as part:
                    at = f.add(row, part.index)
                    place = f.mul(part.index, ROW)
                    # Tiles are carried as they are, each in a piece.
                    each = TILE if self.tiles else VECTOR
                    f.run(
                        kernel,
                        f.at(a["x"], f.mul(at, a["x_stride"])),
                        a["x_stride"],
                        *codes,
                        f.at(f.at(self.scratch, HEAD), f.add(place, f.mul(panel.index, VECTOR))),
                        f.at(self._at("carry"), f.add(place, f.mul(panel.index, each))),
                        self._at("stage"),
                        *blocks,
                        *self._of_x(at),
                        first,
                        last,
                        a["total"],
                        a["segment"],
                        a["tile"],
                        *fetch(part.index),
                        a["m"],
                        f.mul(a["granules"], (GROUP - 1) * self.steps.words * VECTOR),
                        a["granules"],
                    )
            done = until

    def _fetch(
        self,
        shape: Shape,
        column: Value,
        panel: Value,
        first: Value,
        last: Value,
        rows: Value,
    ) -> Callable[[Value], list[Value]]:
        """By the row: what a micro-kernel fetches of the panels that come next.

        Two addresses, and the cache lines of each to every unit that it multiplies; all
        micro-kernels of a pair of panels together fetch their next stretch, or in the end the
        first one of their neighbours.
        """
        f, a = self.function, self.a
        nothing = constant("i64", 0)
        if self.spec.layout == "rows" or not self.tiles or shape.panels != 2:
            return lambda _: [a["codes"], a["codes"], nothing]
        more = f.compare("slt", last, a["total"])
        column = f.select(more, column, f.add(column, WIDTH))
        begin = f.select(more, last, 0)
        bases = []
        for p in range(2):
            number = f.add(panel, p)
            bases.append(self._words(f.add(column, f.mul(number, LANES)), number, begin))
        units = f.op("sub", last, first)
        lines = f.mul(f.mul(units, a["unit_granules"]), self.steps.words)
        calls = f.greatest(f.op("udiv", rows, shape.rows), 1)
        each = f.over(f.over(lines, calls), units)
        real = f.compare("slt", column, a["n"])
        each = f.select(real, each, 0)

        def of(row: Value) -> list[Value]:
            offset = f.mul(f.mul(f.op("udiv", row, shape.rows), f.mul(each, units)), VECTOR)
            return [*(f.at(base, offset) for base in bases), each]

        return of

    def _blocks_of(self, panel: Value) -> list[Value]:
        """Scales and their kin of some panels."""
        f, across = self.function, self.function.mul(panel, VECTOR)
        return [f.at(self._at(name), across) for name in ("scales", "zeros", "biases")]

    def _of_x(self, row: Value) -> list[Value]:
        """Scales and sums of x from a row on, and their strides."""
        f, a = self.function, self.a
        scales, sums = a["x_scales_stride"], a["x_sums_stride"]
        return [
            f.at(a["x_scales"], f.mul(f.mul(row, scales), 4)),
            f.mul(scales, 4),
            a["x_block_segments"],
            f.at(a["x_sums"], f.mul(f.mul(row, sums), 4)),
            f.mul(sums, 4),
        ]

    def _panels(
        self, shape: Shape, column: Value, panel: Value, panels: Value, first: Value
    ) -> list[Value]:
        """Where the micro-kernel reads each panel; for one that is missing, the last one."""
        f = self.function
        found = []
        for p in range(shape.panels):
            number = f.least(f.add(panel, p), f.op("sub", panels, 1))
            row = f.add(column, f.mul(number, LANES))
            if self.decode is None:
                found.append(self._words(row, number, first))
                continue
            place = self._unrolled(number)
            if self.steps.plain:
                words = self._words(row, number, first)
                place = f.select(f.compare("eq", self.a["plain"], 0), place, words)
            found.append(place)
        return found

    def _copied(self, panel: Value) -> Value:
        """Scratch for the words of a panel of canonical rows."""
        f = self.function
        return f.at(self._at("codes"), f.mul(f.mul(panel, self.a["stretch_words"]), VECTOR))

    def _unrolled(self, panel: Value) -> Value:
        """Scratch for the operands of a panel."""
        f, a = self.function, self.a
        steps = f.mul(f.mul(a["stretch"], a["unit_granules"]), self.steps.count)
        return f.at(self._at("operands"), f.mul(f.mul(panel, steps), VECTOR))

    def _words(self, row: Value, panel: Value, first: Value) -> Value:
        """Where the words of a panel stand, from unit `first` on."""
        f, a = self.function, self.a
        if self.spec.layout == "rows":
            return self._copied(panel)
        # Columns beyond the last panel repeat it; nothing is stored for them.
        final = f.op("sub", f.over(a["n"], LANES), 1)
        number = f.least(f.op("udiv", row, LANES), final)
        granule = f.add(f.mul(number, a["granules"]), self._granule(first))
        return f.at(a["codes"], f.mul(granule, self.steps.words * VECTOR))

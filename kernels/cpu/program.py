"""One product as a module: a function `tile(arguments, number, scratch)` for the thread pool.

A tile is up to 64 columns of the result (four panels of w) by some rows. Stretch of k by stretch
of k it brings the panels' codes and scales into scratch, runs the micro-kernels over its rows, and
in the end writes the result. The pool has set the standard floating-point mode.
"""

from __future__ import annotations

from typing import NamedTuple

from lowbit.formats.declare import Element
from lowbit.kernels.cpu import pack
from lowbit.kernels.cpu.decode import decoder
from lowbit.kernels.cpu.epilogue import EDGE, writer
from lowbit.kernels.cpu.ir import FLOAT, LANES, Function, Module, Value, constant
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.tile import (
    DOTS,
    ROW,
    VECTOR,
    Micro,
    Shape,
    shapes,
    stored_offset,
    word_steps,
)
from lowbit.kernels.layouts import GROUP, PANEL, WIDTHS


class Arguments(NamedTuple):
    """The block that `tile` reads: 64-bit integers and addresses, and alpha at the end.

    Strides are bytes for codes and elements for the rest; `*_at` are offsets into scratch.
    """

    m: int
    n: int
    words: int
    segment: int  # words
    stretch: int  # words
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
    scales_at: int
    zeros_at: int
    biases_at: int
    codes_at: int
    lines_at: int
    work_at: int
    x_at: int
    alpha: float


FORMAT = f"<{len(Arguments._fields) - 1}qf4x"
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


def pack_text(isa: Isa) -> str:
    """IR of `tile` that turns one panel of canonical rows into words16; see `PackArguments`."""
    module = Module(isa)
    f = module.function("tile", {"a": "ptr", "number": "i64", "scratch": "ptr"}, "external")
    a, number, scratch = f.parameters
    got = _arguments(f, a, PackArguments._fields, ("codes", "out"))
    first = f.mul(number, PANEL)
    f.run(
        pack.row_table(module),
        got["codes"],
        scratch,
        got["stride"],
        first,
        got["n"],
        constant("i64", 1),
    )
    words = f.over(got["size"], 4)
    out = f.at(got["out"], f.mul(f.mul(number, words), VECTOR))
    left = f.op("sub", got["n"], first)
    f.run(pack.transposer(module), scratch, left, constant("i64", 0), got["size"], out)
    return module.text()


class PackArguments(NamedTuple):
    """The block that the packing `tile` reads."""

    codes: int
    stride: int
    n: int
    size: int
    out: int


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
        self.kernels = [(each, Micro(spec, module, each).function) for each in shapes(module.isa)]
        self.transpose = pack.transposer(module)
        self.row_table = pack.row_table(module)
        bits = spec.element.bits
        self.expand = None if bits in WIDTHS else pack.expander(module, bits)
        self.unpack = {name: self._unpacker(name, kind) for name, kind in self._blocks().items()}
        self.finish = writer(spec, module)
        names = {"a": "ptr", "number": "i64", "scratch": "ptr"}
        self.function = module.function("tile", names, "external")
        block, self.number, self.scratch = self.function.parameters
        addresses = (*ADDRESSES, "out")
        self.a = _arguments(self.function, block, Arguments._fields, addresses)
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
            offset = stored_offset(self.spec, DOTS[self.module.isa.dot])[1]
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
        column = f.mul(f.op("urem", self.number, a["columns"]), GROUP * LANES)
        row = f.mul(f.op("udiv", self.number, a["columns"]), a["tile_rows"])
        rows = f.least(f.op("sub", a["m"], row), a["tile_rows"])
        columns = f.least(f.op("sub", a["n"], column), GROUP * LANES)
        panels = f.over(columns, LANES)
        edge, table = self.scratch, f.at(self.scratch, EDGE)
        sums = f.at(self.scratch, HEAD)
        with f.loop(0, f.mul(rows, GROUP)) as loop:
            f.store(constant(FLOAT, 0.0), f.at(sums, f.mul(loop.index, VECTOR)), 64)
        with f.loop(0, a["words"], a["stretch"]) as loop:
            first = loop.index
            last = f.least(f.add(first, a["stretch"]), a["words"])
            with f.loop(0, panels) as panel:
                at = f.add(column, f.mul(panel.index, LANES))
                if self.spec.layout == "rows":
                    self._codes(at, panel.index, first, last, table)
                for name in self.unpack:
                    self._scales(name, at, panel.index, first, last, table)
            self._products(row, rows, column, panels, first, last, sums, table)
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
            edge,
            a["residual_stride"],
            a["out_stride"],
            rows,
            columns,
            a["alpha"],
        )

    def _codes(self, row: Value, panel: Value, first: Value, last: Value, table: Value) -> None:
        """The words of one panel, from canonical rows."""
        f, a, bits = self.function, self.a, self.spec.element.bits
        one = constant("i64", 1)
        f.run(self.row_table, a["codes"], table, a["codes_stride"], row, a["n"], one)
        out = f.at(self._at("codes"), f.mul(f.mul(panel, a["stretch"]), VECTOR))
        left = f.op("sub", a["n"], row)
        if self.expand is None:
            stop = f.least(f.mul(last, 4), a["codes_size"])
            f.run(self.transpose, table, left, f.mul(first, 4), stop, out)
            return
        # Words are four codes here, and a stretch begins with a group of eight codes.
        start = f.mul(f.op("lshr", first, 1), bits)
        stop = f.least(f.mul(f.over(last, 2), bits), a["codes_size"])
        lines, stride = self._at("lines"), f.mul(f.add(a["stretch"], 1), 4)
        with f.loop(0, PANEL) as loop:
            place = f.at(table, f.mul(loop.index, 8))
            line = f.at(lines, f.mul(loop.index, stride))
            source = f.load("ptr", place, 8)
            f.run(self.expand, source, start, stop, a["codes_size"], line)
            f.store(line, place, 8)
        size = f.mul(f.op("sub", last, first), 4)
        f.run(self.transpose, table, left, constant("i64", 0), size, out)

    def _scales(
        self, name: str, row: Value, panel: Value, first: Value, last: Value, table: Value
    ) -> None:
        """One vector a segment of the stretch, next to the other panels' vectors."""
        f, a = self.function, self.a
        start, stop = f.op("udiv", first, a["segment"]), f.over(last, a["segment"])
        begin = f.op("udiv", start, a["block_segments"])
        end = f.over(stop, a["block_segments"])
        size = item_bits(self._blocks()[name]) // 8
        if self.spec.scale_layout == "panels16":
            blocks = f.over(f.over(a["words"], a["segment"]), a["block_segments"])
            place = f.mul(f.mul(f.op("udiv", row, LANES), blocks), LANES * size)
            source = f.at(a[name], place)
        else:
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
        )

    def _products(
        self,
        row: Value,
        rows: Value,
        column: Value,
        panels: Value,
        first: Value,
        last: Value,
        sums: Value,
        table: Value,
    ) -> None:
        """All rows times all panels of the stretch, the tallest micro-kernel first."""
        f, a = self.function, self.a
        done = constant("i64", 0)
        for shape, kernel in self.kernels:
            some = f.mul(f.op("udiv", f.op("sub", rows, done), shape.rows), shape.rows)
            end = f.add(done, some)
            with f.loop(done, end, shape.rows) as part:
                at = f.add(row, part.index)
                x = f.at(a["x"], f.mul(at, a["x_stride"]))
                if shape.packed:
                    x = self._x(x, first, last, shape.rows, table)
                with f.loop(0, panels, shape.panels) as panel:
                    place = f.add(f.mul(part.index, ROW), f.mul(panel.index, VECTOR))
                    f.run(
                        kernel,
                        x,
                        a["x_stride"],
                        *self._panels(shape, column, panel.index, first),
                        f.at(sums, place),
                        f.at(self._at("carry"), place),
                        *self._blocks_of(panel.index),
                        *self._of_x(at),
                        first,
                        last,
                        a["words"],
                        a["segment"],
                    )
            done = end

    def _x(self, x: Value, first: Value, last: Value, rows: int, table: Value) -> Value:
        """Some rows of x as words16."""
        f, out = self.function, self._at("x")
        count, one = constant("i64", rows), constant("i64", 1)
        size = 4 * word_steps(self.spec, self.module.isa)
        start = constant("i64", 0)
        f.run(self.row_table, x, table, self.a["x_stride"], start, count, one)
        f.run(self.transpose, table, count, f.mul(first, size), f.mul(last, size), out)
        return out

    def _blocks_of(self, panel: Value) -> list[Value]:
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

    def _panels(self, shape: Shape, column: Value, panel: Value, first: Value) -> list[Value]:
        add = self.function.add
        return [self._panel(column, add(panel, p), first) for p in range(shape.panels)]

    def _panel(self, column: Value, panel: Value, first: Value) -> Value:
        """Where the words of a panel stand, from `first` on."""
        f, a = self.function, self.a
        if self.spec.layout == "rows":
            return f.at(self._at("codes"), f.mul(f.mul(panel, a["stretch"]), VECTOR))
        # Columns beyond the last panel repeat it; nothing is stored for them.
        final = f.op("sub", f.over(a["n"], LANES), 1)
        number = f.least(f.add(f.op("udiv", column, LANES), panel), final)
        return f.at(a["codes"], f.mul(f.add(f.mul(number, a["words"]), first), VECTOR))

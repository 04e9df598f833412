"""The micro-kernel: some rows of x times some panels of w, over one stretch of k.

    for each segment (columns of k between two changes of scale):
        g[r, n] = sum over k of x[r, k] * (value(code[n, k]) - zero[n])      in registers
        sums[r, n] += x_scale[r] * (w_scale[n] * g[r, n])                    in scratch

Every output has one accumulator and k ascends, so its bits depend on nothing but its own row and
column. A segment that the stretch cuts is carried to the next one in scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from lowbit.kernels.cpu.decode import consecutive, decoder
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, Module, Value, constant
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.layouts import GROUP, codes_per_word, word_bits

VECTOR = 4 * LANES  # bytes
ROW = VECTOR * GROUP  # bytes of one row of sums


@dataclass(frozen=True)
class Shape:
    """Size of a micro-kernel."""

    rows: int
    panels: int
    packed: bool = False
    """Its rows of x are words16 in scratch. Many rows that lie a power of two apart would push
    each other out of the nearest cache."""


def shapes(isa: Isa) -> tuple[Shape, ...]:
    """The micro-kernels, tallest first; the last one has a single row.

    Accumulators, a word and a decoded vector for each panel, a table and a splat have to fit.
    """
    vectors = isa.registers * isa.lanes // LANES
    if vectors >= 32:
        # One panel, so that each splat of x is an operand of the one fma that wants it.
        return Shape(16, 1, packed=True), Shape(4, 4), Shape(2, 4), Shape(1, 4)
    if vectors >= 8:
        return Shape(4, 1), Shape(1, 4)
    return Shape(2, 1), Shape(1, 1)


@dataclass(frozen=True)
class Dot:
    """How an instruction set multiplies integers: `parts` operands side by side in a lane."""

    parts: int
    signed: bool
    """The codes' operand is signed where a code fills its part."""

    @property
    def x_type(self) -> str:
        """Type of x's operands."""
        return {4: "int8", 2: "int16", 1: "int32"}[self.parts]

    @property
    def x_size(self) -> int:
        """Bytes of one."""
        return 4 // self.parts


DOTS = {
    "vpdpbusd512": Dot(4, False),
    "sdot": Dot(4, True),
    "pmaddwd": Dot(2, False),
    "widen": Dot(1, False),
}


def stored_offset(spec: Spec, dot: Dot) -> tuple[int, int]:
    """(flip, offset): code ^ flip, read as the operand of the dot product, is value + offset."""
    found = consecutive(spec.element)
    assert found is not None
    half = 2 ** (spec.element.bits - 1)
    signed = found[0]
    if dot.signed and spec.element.bits == 8:
        return (0, 0) if signed else (half, -half)
    return (half, half) if signed else (0, 0)


def word_steps(spec: Spec, isa: Isa) -> int:
    """32-bit numbers of x that go with one word of codes."""
    return codes_per_word(spec.element) // (DOTS[isa.dot].parts if spec.inner == "dot" else 1)


class Micro:
    """Builds one micro-kernel; `function` is the result."""

    def __init__(self, spec: Spec, module: Module, shape: Shape) -> None:
        self.spec, self.module, self.shape = spec, module, shape
        self.rows, self.panels = rows, panels = shape.rows, shape.panels
        self.integer = spec.inner == "dot"
        self.kind = INT if self.integer else FLOAT
        self.dot = DOTS[module.isa.dot]
        self.steps = word_steps(spec, module.isa)
        parameters = {"x": "ptr", "x_stride": "i64"}
        parameters |= {f"codes{p}": "ptr" for p in range(panels)}
        parameters |= dict.fromkeys(("sums", "carry", "scales", "zeros", "biases"), "ptr")
        parameters |= {"x_scales": "ptr", "x_scales_stride": "i64", "x_block": "i64"}
        parameters |= {"x_sums": "ptr", "x_sums_stride": "i64"}
        parameters |= dict.fromkeys(("first", "last", "words", "segment"), "i64")
        self.function = module.function(f"rows{rows}x{panels}", parameters, "apart")
        self.values = dict(zip(parameters, self.function.parameters, strict=True))
        self._write()

    def _write(self) -> None:
        f, v = self.function, self.values
        start = f.op("udiv", v["first"], v["segment"])
        with f.loop(start, f.over(v["last"], v["segment"])) as outer:
            begin = f.mul(outer.index, v["segment"])
            end = f.add(begin, v["segment"])
            at = f.greatest(begin, v["first"])
            stop = f.least(end, v["last"])
            within = f.op("sub", outer.index, start)
            zeros = self._zeros(within)
            nothing = [constant(self.kind, 0)] * (self.rows * self.panels)
            fresh = f.compare("eq", at, begin)
            carried = f.either(fresh, lambda: nothing, self._resume)
            with f.loop(at, stop, carried=carried) as inner:
                inner.carried = self._step(inner.index, inner.carried, zeros)
            whole = f.compare("sge", stop, f.least(end, v["words"]))
            f.either(
                whole,
                lambda: self._finish(outer.index, within, inner.results),
                lambda: self._suspend(inner.results),
            )

    def _place(self, base: Value, row: int, panel: int) -> Value:
        return self.function.at(base, row * ROW + panel * VECTOR)

    def _cells(self) -> list[tuple[int, int]]:
        return list(product(range(self.rows), range(self.panels)))

    def _resume(self) -> list[Value]:
        f, carry = self.function, self.values["carry"]
        return [f.load(self.kind, self._place(carry, r, p), 64) for r, p in self._cells()]

    def _suspend(self, sums: Sequence[Value]) -> list[Value]:
        for (r, p), each in zip(self._cells(), sums, strict=True):
            self.function.store(each, self._place(self.values["carry"], r, p), 64)
        return []

    def _zeros(self, within: Value) -> list[Value]:
        if self.spec.zero is None or self.integer:
            return []
        return [self._block("zeros", within, p, FLOAT) for p in range(self.panels)]

    def _block(self, name: str, within: Value, panel: int, kind: str) -> Value:
        """The sixteen scales, zero points or biases of a segment."""
        f = self.function
        offset = f.mul(within, ROW)
        return f.load(kind, f.at(f.at(self.values[name], offset), panel * VECTOR), 64)

    def _row(self, name: str, row: int) -> Value:
        f = self.function
        return f.at(self.values[name], f.mul(self.values[f"{name}_stride"], row) if row else 0)

    # One word of every panel.

    def _step(self, word: Value, sums: list[Value], zeros: list[Value]) -> list[Value]:
        f, v = self.function, self.values
        offset = f.mul(f.op("sub", word, v["first"]), VECTOR)
        words = [f.load(INT, f.at(v[f"codes{p}"], offset), 4) for p in range(self.panels)]
        steps = self.steps
        if self.shape.packed:
            x = [f.at(v["x"], f.mul(f.op("sub", word, v["first"]), VECTOR * steps))]
        else:
            x = [f.at(self._row("x", r), f.mul(word, 4 * steps)) for r in range(self.rows)]
        if self.integer:
            flip, _ = stored_offset(self.spec, self.dot)
            if flip:
                mask = _repeat(flip, word_bits(self.spec.element))
                words = [f.op("xor", each, mask) for each in words]
        decode = None if self.integer else decoder(self.spec.element, self.module)
        for step in range(steps):
            shift = step * word_bits(self.spec.element)
            if decode is None:
                operands = [self._operand(each, shift) for each in words]
            else:
                operands = [decode.emit(f, each, shift) for each in words]
                for p, zero in enumerate(zeros):
                    operands[p] = f.op("fsub", operands[p], zero)
            for r in range(self.rows):
                kind = "i32" if self.integer else "float"
                if self.shape.packed:
                    at = f.at(x[0], VECTOR * step + 4 * r)
                else:
                    at = f.at(x[r], 4 * step)
                one = f.splat(f.load(kind, at, 4))
                for p in range(self.panels):
                    i = r * self.panels + p
                    sums[i] = self._multiply(one, operands[p], sums[i])
        return sums

    def _operand(self, word: Value, shift: int) -> Value:
        """Every `32 / parts` bits of a lane hold one code, unsigned."""
        f, bits = self.function, word_bits(self.spec.element)
        part = 32 // self.dot.parts
        lowered = f.op("lshr", word, shift) if shift else word
        return lowered if bits == part else f.op("and", lowered, _repeat(2**bits - 1, part))

    def _multiply(self, x: Value, w: Value, total: Value) -> Value:
        f, method = self.function, self.module.isa.dot
        if not self.integer:
            return f.fma(x, w, total)
        if method == "vpdpbusd512":
            octets = "<64 x i8>"
            name = "llvm.x86.avx512.vpdpbusd.512"
            return f.call(name, INT, total, f.bits(w, octets), f.bits(x, octets))
        if method == "sdot":
            return self._quarters(x, w, total)
        if method == "pmaddwd":
            return f.add(total, self._halves(x, w))
        return f.add(total, f.mul(w, x))

    def _halves(self, x: Value, w: Value) -> Value:
        f, pairs = self.function, "<32 x i16>"
        parts = []
        for start in (0, 16):
            lanes = list(range(start, start + 16))
            a, b = (f.bits(v, pairs) for v in (w, x))
            a, b = f.shuffle(a, a, lanes), f.shuffle(b, b, lanes)
            parts.append(f.call("llvm.x86.avx2.pmadd.wd", "<8 x i32>", a, b))
        return f.shuffle(parts[0], parts[1], list(range(LANES)))

    def _quarters(self, x: Value, w: Value, total: Value) -> Value:
        f, octets = self.function, "<64 x i8>"
        a, b = f.bits(w, octets), f.bits(x, octets)
        parts = []
        for quarter in range(4):
            lanes = list(range(4 * quarter, 4 * quarter + 4))
            deep = list(range(16 * quarter, 16 * quarter + 16))
            operands = f.shuffle(total, total, lanes), f.shuffle(a, a, deep), f.shuffle(b, b, deep)
            parts.append(f.call("llvm.aarch64.neon.sdot.v4i32.v16i8", "<4 x i32>", *operands))
        pairs = [f.shuffle(parts[i], parts[i + 1], list(range(8))) for i in (0, 2)]
        return f.shuffle(pairs[0], pairs[1], list(range(LANES)))

    # The end of a segment.

    def _finish(self, segment: Value, within: Value, sums: Sequence[Value]) -> list[Value]:
        f, spec = self.function, self.spec
        scales = [self._block("scales", within, p, FLOAT) for p in range(self.panels)]
        biases = offsets = None
        if spec.biases:
            biases = [self._block("biases", within, p, FLOAT) for p in range(self.panels)]
        if self.integer and spec.zero is not None:
            offsets = [self._block("zeros", within, p, INT) for p in range(self.panels)]
        for r in range(self.rows):
            x_scale = x_sum = None
            if spec.x_scale:
                block = f.op("udiv", segment, self.values["x_block"])
                x_scale = f.splat(self._entry("x_scales", r, block, "float"))
            if wants_x_sums(spec, self.module):
                kind = "i32" if self.integer else "float"
                x_sum = f.splat(self._entry("x_sums", r, segment, kind))
            for p in range(self.panels):
                g = sums[r * self.panels + p]
                if self.integer:
                    g = self._centre(g, x_sum, offsets[p] if offsets else None)
                place = self._place(self.values["sums"], r, p)
                total = f.load(FLOAT, place, 64)
                if x_scale is None:
                    total = f.fma(scales[p], g, total)
                else:
                    total = f.fma(x_scale, f.op("fmul", scales[p], g), total)
                if biases is not None and x_sum is not None:
                    total = f.fma(x_sum, biases[p], total)
                f.store(total, place, 64)
        return []

    def _entry(self, name: str, row: int, index: Value, kind: str) -> Value:
        f = self.function
        return f.load(kind, f.at(self._row(name, row), f.mul(index, 4)), 4)

    def _centre(self, g: Value, x_sum: Value | None, zero: Value | None) -> Value:
        """sum x (stored - offset - zero) = sum x stored - (offset + zero) sum x, mod 2**32."""
        f = self.function
        if x_sum is not None:
            # The packed zero points already include the offset.
            _, offset = stored_offset(self.spec, self.dot)
            g = f.op("sub", g, f.mul(x_sum, offset if zero is None else zero))
        return f.cast("sitofp", g, FLOAT)


def wants_x_sums(spec: Spec, module: Module) -> bool:
    """The kernel reads the sums of x over each segment."""
    if spec.inner == "fma":
        return spec.biases
    return spec.zero is not None or stored_offset(spec, DOTS[module.isa.dot])[1] != 0


def _repeat(pattern: int, bits: int) -> int:
    """The pattern in every `bits` bits of a word, as a signed number."""
    word = sum(pattern << shift for shift in range(0, 32, bits))
    return word - 2**32 if word >= 2**31 else word

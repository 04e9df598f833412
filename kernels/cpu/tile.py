"""Micro-kernels of vector registers: a few rows of x, each 32 bits splatted, times panels of w."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, Module, Value, constant
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.micro import ROW, VECTOR, Micro, Shape
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.steps import OCTETS, PAIRS, dot_of

Part = Callable[[Value, Value, Value | None], Value]
"""product(w, x, sum) of one register; the sum is None where it is added apart."""


def shapes(spec: Spec, isa: Isa) -> tuple[Shape, ...]:
    """The micro-kernels, tallest first; the last one has a single row.

    Accumulators, a vector of w for each panel, tables and a splat have to fit into registers.
    """
    vectors = isa.registers * isa.lanes // LANES
    decoded = spec.method == "decoded"
    if vectors >= 32:
        if decoded:
            return Shape(6, 4), Shape(4, 4), Shape(2, 4), Shape(1, 4)
        return Shape(4, 4), Shape(2, 4), Shape(1, 4)
    if vectors >= 8:
        if decoded:
            narrow = spec.inner == "dot" and isa.dot == "pmaddubsw"
            return Shape(4 if narrow else 6, 1), Shape(1, 4)
        return Shape(4, 1), Shape(1, 4)
    return Shape(2, 1), Shape(1, 1)


class Vectors(Micro):
    """The sums of a segment stay in registers."""

    def __init__(self, spec: Spec, module: Module, shape: Shape) -> None:
        self.method = dot_of(spec, module.isa)
        super().__init__(spec, module, shape)

    def _segment(
        self, segment: Value, within: Value, at: Value, stop: Value, fresh: Value, whole: Value
    ) -> None:
        f, v = self.function, self.values
        zeros: list[Value] = []
        if self.spec.zero is not None and not self.integer and self.spec.method == "direct":
            zeros = [self._block("zeros", within, p, FLOAT) for p in range(self.panels)]
        nothing = [constant(self.kind, 0)] * (self.rows * self.panels)
        carried = f.either(fresh, lambda: nothing, self._resume)
        # A loop over single steps would spend more on counting than on multiplying.
        unrolled = max(1, 4 // self.steps.count)
        if unrolled > 1:
            rest = f.op("urem", f.op("sub", stop, at), unrolled)
            even = f.op("sub", stop, rest)
            with f.loop(at, even, unrolled, carried=carried) as inner:
                for i in range(unrolled):
                    inner.carried = self._granule(f.add(inner.index, i), inner.carried, zeros)
            at, carried = even, inner.results
        with f.loop(at, stop, carried=carried) as inner:
            inner.carried = self._granule(inner.index, inner.carried, zeros)

        def finish() -> list[Value]:
            blocks = self._blocks(segment, within)
            for r in range(self.rows):
                row = [f.mul(v[f"{name}_stride"], r) if r else 0 for name in ("x_scales", "x_sums")]
                self._finish(
                    blocks,
                    f.at(v["x_scales"], row[0]),
                    f.at(v["x_sums"], row[1]),
                    f.at(v["sums"], r * ROW),
                    inner.results[r * self.panels : (r + 1) * self.panels],
                )
            return []

        f.either(whole, finish, lambda: self._suspend(inner.results))

    def _cells(self) -> list[tuple[int, int]]:
        return list(product(range(self.rows), range(self.panels)))

    def _resume(self) -> list[Value]:
        f, carry = self.function, self.values["carry"]
        return [f.load(self.kind, self._place(carry, r, p), 64) for r, p in self._cells()]

    def _suspend(self, sums: Sequence[Value]) -> list[Value]:
        for (r, p), each in zip(self._cells(), sums, strict=True):
            self.function.store(each, self._place(self.values["carry"], r, p), 64)
        return []

    def _granule(self, granule: Value, sums: list[Value], zeros: list[Value]) -> list[Value]:
        """One granule of every panel."""
        f, v, count = self.function, self.values, self.steps.count
        within = f.op("sub", granule, v["first"])
        operands = [
            self._operands(v[f"codes{p}"], within, zeros[p] if zeros else None)
            for p in range(self.panels)
        ]
        place = f.mul(granule, 4 * count)
        x = [
            f.at(f.at(v["x"], f.mul(v["x_stride"], r) if r else 0), place) for r in range(self.rows)
        ]
        sums = list(sums)
        for step in range(count):
            w = [next(each) for each in operands]
            for r in range(self.rows):
                one = f.splat(
                    f.load("float" if self.kind == FLOAT else "i32", f.at(x[r], 4 * step), 4)
                )
                for p in range(self.panels):
                    i = r * self.panels + p
                    sums[i] = self._multiply(one, w[p], sums[i])
        return sums

    def _operands(self, codes: Value, within: Value, zeros: Value | None) -> Iterator[Value]:
        f, steps = self.function, self.steps
        if self.spec.method == "decoded":
            base = f.at(codes, f.mul(within, steps.count * VECTOR))
            kind = FLOAT if self.spec.inner == "fma" else INT
            for step in range(steps.count):
                yield f.load(kind, f.at(base, step * VECTOR), 64)
            return
        base = f.at(codes, f.mul(within, steps.words * VECTOR))
        words = [f.load(INT, f.at(base, i * VECTOR), 4) for i in range(steps.words)]
        yield from steps.emit(f, words, zeros)

    def _multiply(self, x: Value, w: Value, total: Value) -> Value:
        f, method = self.function, self.method
        if self.spec.inner == "fma":
            return f.fma(x, w, total)
        if self.spec.inner == "bf16":
            kind = "<32 x bfloat>"
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            return f.call(name, FLOAT, total, f.bits(w, kind), f.bits(x, kind))
        if method == "vpdpbusd512":
            name = "llvm.x86.avx512.vpdpbusd.512"
            return f.call(name, INT, total, f.bits(w, OCTETS), f.bits(x, OCTETS))
        if method == "widen":
            return f.add(total, f.mul(w, x))
        if method == "pmaddwd":
            return f.add(total, self._by_parts(x, w, None, 2, PAIRS, self._words))
        if method == "pmaddubsw":
            return f.add(total, self._by_parts(x, w, None, 2, OCTETS, self._octets))
        name, parts = {
            "vpdpbusd256": ("llvm.x86.avx512.vpdpbusd.256", 2),
            "sdot": ("llvm.aarch64.neon.sdot.v4i32.v16i8", 4),
        }[method]
        lane = f"<{LANES // parts} x i32>"

        def one(a: Value, b: Value, c: Value | None) -> Value:
            assert c is not None
            return f.call(name, lane, c, a, b)

        return self._by_parts(x, w, total, parts, OCTETS, one)

    def _by_parts(
        self, x: Value, w: Value, total: Value | None, parts: int, kind: str, one: Part
    ) -> Value:
        """Products of whole registers, where a register has fewer than 16 lanes."""
        f = self.function
        a, b = f.bits(w, kind), f.bits(x, kind)
        deep, lanes = int(kind[1:3]) // parts, LANES // parts
        found = []
        for part in range(parts):
            inside = list(range(deep * part, deep * (part + 1)))
            own = list(range(lanes * part, lanes * (part + 1)))
            c = None if total is None else f.shuffle(total, total, own)
            found.append(one(f.shuffle(a, a, inside), f.shuffle(b, b, inside), c))
        while len(found) > 1:
            both = list(range(2 * int(found[0].type[1:].split()[0])))
            found = [f.shuffle(found[i], found[i + 1], both) for i in range(0, len(found), 2)]
        return found[0]

    def _words(self, a: Value, b: Value, _: Value | None) -> Value:
        return self.function.call("llvm.x86.avx2.pmadd.wd", "<8 x i32>", a, b)

    def _octets(self, a: Value, b: Value, _: Value | None) -> Value:
        f = self.function
        halves = f.call("llvm.x86.avx2.pmadd.ub.sw", "<16 x i16>", a, b)
        return f.call("llvm.x86.avx2.pmadd.wd", "<8 x i32>", halves, constant("<16 x i16>", 1))

"""Micro-kernels of vector registers: a few rows of x, each 32 bits splatted, times panels of w."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import overload

from lowbit.kernels.cpu.ir import (
    FLOAT,
    INT,
    LANES,
    VECTOR,
    Function,
    Module,
    Value,
    constant,
    scalar,
)
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.micro import AHEAD, ROW, Micro, Shape
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
        few = Shape(4, 4), Shape(2, 4), Shape(1, 4)
        return (Shape(6, 4), *few) if decoded else few
    if isa.lanes == 4:
        return (Shape(4, 1), Shape(1, 2)) if isa.registers == 32 else (Shape(2, 1), Shape(1, 1))
    if spec.inner == "dot" and isa.dot == "pmaddubsw":
        return Shape(3, 1), Shape(1, 4)  # its constants take registers as well
    return Shape(6 if decoded else 4, 1), Shape(1, 4)


class _Words(Sequence[Value]):
    """Words in memory, loaded where they are used: held, they would push sums out of registers."""

    def __init__(self, f: Function, address: Value, count: int) -> None:
        self._f, self._address, self._count = f, address, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | Sequence[Value]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if index >= self._count:
            raise IndexError(index)
        return self._f.load(INT, self._f.at(self._address, index * VECTOR), 4)


class Vectors(Micro):
    """The sums of a segment stay in registers."""

    def __init__(self, spec: Spec, module: Module, shape: Shape) -> None:
        self.method = dot_of(spec, module.isa)
        if self.method == "smmla" and shape.rows == 1:
            self.method = "sdot"  # it takes rows in pairs
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
                inner.carried = self._granules(inner.index, unrolled, inner.carried, zeros)
            at, carried = even, inner.results
        with f.loop(at, stop, carried=carried) as inner:
            inner.carried = self._granules(inner.index, 1, inner.carried, zeros)

        def finish() -> list[Value]:
            blocks = self._blocks(segment, within)
            sums = self._by_rows(inner.results)
            for r in range(self.rows):
                row = [f.mul(v[f"{name}_stride"], r) if r else 0 for name in ("x_scales", "x_sums")]
                self._finish(
                    blocks,
                    f.at(v["x_scales"], row[0]),
                    f.at(v["x_sums"], row[1]),
                    f.at(v["sums"], r * ROW),
                    sums[r * self.panels : (r + 1) * self.panels],
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

    def _granules(
        self, granule: Value, many: int, sums: list[Value], zeros: list[Value]
    ) -> list[Value]:
        """Some granules of every panel."""
        f, v, count = self.function, self.values, self.steps.count
        within = f.op("sub", granule, v["first"])
        place = f.mul(granule, 4 * count)
        x = [
            f.at(f.at(v["x"], f.mul(v["x_stride"], r) if r else 0), place) for r in range(self.rows)
        ]
        # One row waits for memory; more of them would lose registers to the leap.
        ahead = self._ahead(granule, v["total"]) if self.rows == 1 else constant("i64", AHEAD)
        operands = [
            self._operands(v[f"codes{p}"], within, many, zeros[p] if zeros else None, ahead)
            for p in range(self.panels)
        ]
        if self.method == "smmla" and self.integer:
            return self._pairs(x, operands, many * count, list(sums))
        sums = list(sums)
        if self.rows == 1 and self.module.isa.lanes < LANES:
            # Few registers: one panel's vectors after the other's.
            for p, each in enumerate(operands):
                for step, w in enumerate(each):
                    self._step(x, step, {p: w}, sums)
            return sums
        for step in range(many * count):
            self._step(x, step, {p: next(each) for p, each in enumerate(operands)}, sums)
        return sums

    def _step(self, x: list[Value], step: int, w: dict[int, Value], sums: list[Value]) -> None:
        """One step of some panels times all rows."""
        f, kind = self.function, scalar(self.kind)
        for r in range(self.rows):
            one = f.splat(f.load(kind, f.at(x[r], 4 * step), 4))
            for p, each in w.items():
                i = r * self.panels + p
                sums[i] = self._multiply(one, each, sums[i])
        f.apart()  # else LLVM loads w of all steps first, and has to spill the sums

    def _pairs(
        self, x: list[Value], operands: list[Iterator[Value]], count: int, sums: list[Value]
    ) -> list[Value]:
        """Two steps of two rows of w by two steps of two rows of x: 2 x 2 sums an instruction.

        In place of the sums of rows r and r + 1 stand those of rows 0, 1 and of rows 2, 3 of each
        four of w: [w0 x0, w0 x1, w1 x0, w1 x1].
        """
        f = self.function
        held = [list(each) for each in operands]
        for step in range(0, count, 2):
            both = step + 1 < count
            wide = "i64" if both else "i32"
            loaded = [f.load(wide, f.at(row, 4 * step), 4) for row in x]
            octets = [f.cast("zext", each, "i64") for each in loaded]
            for p in range(self.panels):
                w0 = held[p][step]
                w1 = held[p][step + 1] if both else constant(INT, 0)
                for r in range(0, self.rows, 2):
                    pair = f.let("<2 x i64>", f"insertelement <2 x i64> poison, {octets[r]}, i64 0")
                    pair = f.let("<2 x i64>", f"insertelement {pair}, {octets[r + 1]}, i64 1")
                    pair = f.bits(pair, "<16 x i8>")
                    for which, lanes in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
                        i = (r + which) * self.panels + p
                        sums[i] = self._smmla(w0, w1, pair, lanes, sums[i])
        return sums

    def _smmla(self, w0: Value, w1: Value, x: Value, lanes: list[int], total: Value) -> Value:
        f, name = self.function, "llvm.aarch64.neon.smmla.v4i32.v16i8"
        parts = []
        for quarter in range(4):
            own = list(range(4 * quarter, 4 * quarter + 4))
            a, b, c = (f.shuffle(each, each, own) for each in (w0, w1, total))
            w = f.bits(f.shuffle(a, b, lanes), "<16 x i8>")
            parts.append(f.call(name, "<4 x i32>", c, w, x))
        return self._joined(parts)

    def _by_rows(self, sums: Sequence[Value]) -> list[Value]:
        """The sums of each row of x, from pairs of rows."""
        if self.method != "smmla" or not self.integer:
            return list(sums)
        f, found = self.function, list(sums)
        for r in range(0, self.rows, 2):
            for p in range(self.panels):
                i, j = r * self.panels + p, (r + 1) * self.panels + p
                for k, odd in ((i, 0), (j, 1)):
                    lanes = [4 * q + n + odd for q in range(4) for n in (0, 2, LANES, LANES + 2)]
                    found[k] = f.shuffle(sums[i], sums[j], lanes)
        return found

    def _operands(
        self, codes: Value, within: Value, many: int, zeros: Value | None, ahead: Value
    ) -> Iterator[Value]:
        f, steps = self.function, self.steps
        if self.spec.method == "decoded":
            base = f.at(codes, f.mul(within, steps.count * VECTOR))
            kind = FLOAT if self.spec.inner == "fma" else INT
            for step in range(many * steps.count):
                yield f.load(kind, f.at(base, step * VECTOR), 64)
            return
        base = f.at(codes, f.mul(within, steps.words * VECTOR))
        for i in range(many):
            at = f.at(base, i * steps.words * VECTOR)
            if self.spec.layout == "words16":
                fetched = f.at(at, ahead)
                for word in range(steps.words):
                    f.prefetch(f.at(fetched, word * VECTOR))
            words = _Words(f, at, steps.words)
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
        return self._joined(found)

    def _joined(self, parts: list[Value]) -> Value:
        """One vector of the parts' lanes."""
        while len(parts) > 1:
            both = list(range(2 * int(parts[0].type[1:].split()[0])))
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.function.shuffle(a, b, both) for a, b in pairs]
        return parts[0]

    def _words(self, a: Value, b: Value, _: Value | None) -> Value:
        return self.function.call("llvm.x86.avx2.pmadd.wd", "<8 x i32>", a, b)

    def _octets(self, a: Value, b: Value, _: Value | None) -> Value:
        f = self.function
        halves = f.call("llvm.x86.avx2.pmadd.ub.sw", "<16 x i16>", a, b)
        return f.call("llvm.x86.avx2.pmadd.wd", "<8 x i32>", halves, constant("<16 x i16>", 1))

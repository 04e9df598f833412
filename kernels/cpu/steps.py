"""From packed words to the vectors that are multiplied.

A step is one vector of w, 16 lanes of 32 bits: lane n holds `parts` operands of row n side by
side, and meets 32 bits of each row of x with as many operands.

    dot    4 int8      2 int16 or 1 int32 where the instruction set multiplies no bytes
    bf16   2 bfloat16
    fma    1 float32

Which codes lie side by side follows from the shifts that are cheapest: see `Steps.order`. x is
brought into that order once, where it is prepared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from lowbit.formats.declare import Element, codebook
from lowbit.formats.scaling import float_dtype
from lowbit.kernels.cpu.decode import consecutive, decoder
from lowbit.kernels.cpu.ir import INT, Function, Value
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.layouts import WIDTHS, planes

OCTETS, PAIRS = "<64 x i8>", "<32 x i16>"


@dataclass(frozen=True)
class Dot:
    """How an instruction set multiplies integers: `parts` operands side by side in a lane."""

    parts: int
    signed: bool
    """Of w's operands; x's are always signed."""

    @property
    def x_type(self) -> str:
        """Type of x's operands."""
        return {4: "int8", 2: "int16", 1: "int32"}[self.parts]


DOTS = {
    "vpdpbusd512": Dot(4, False),
    "vpdpbusd256": Dot(4, False),
    "pmaddubsw": Dot(4, False),
    "pmaddwd": Dot(2, False),
    "sdot": Dot(4, True),
    "smmla": Dot(4, True),
    "widen": Dot(1, False),
    "tiles": Dot(4, True),
}


def dot_of(spec: Spec, isa: Isa) -> str:
    """Name of the integer product."""
    if spec.tiled:
        return "tiles"
    if isa.dot == "pmaddubsw" and spec.element.bits == 8:
        # It saturates: two products of 255 and 127 are beyond int16, of 127 and 128 they are not.
        return "pmaddwd"
    return isa.dot


@dataclass(frozen=True)
class Steps:
    """The steps of one granule: the fewest codes that fill whole words of every bit plane."""

    spec: Spec
    isa: Isa

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """Widths of the bit planes; odd widths of canonical rows are a byte each."""
        bits = self.spec.element.bits
        if self.spec.layout == "rows" and bits not in WIDTHS:
            return (8,)
        return planes(bits)

    @cached_property
    def codes(self) -> int:
        """Codes of a granule."""
        return 32 // min(self.cells)

    @property
    def words(self) -> int:
        """32-bit words of a granule."""
        return self.codes * sum(self.cells) // 32

    @cached_property
    def dot(self) -> Dot:
        """How integers are multiplied."""
        return DOTS[dot_of(self.spec, self.isa)]

    @property
    def parts(self) -> int:
        """Operands of a lane."""
        return {"fma": 1, "bf16": 2, "dot": self.dot.parts}[self.spec.inner]

    @property
    def count(self) -> int:
        """Steps of a granule."""
        return self.codes // self.parts

    @property
    def x_type(self) -> str:
        """dtype of x's operands."""
        return {"fma": "float32", "bf16": "bfloat16", "dot": self.dot.x_type}[self.spec.inner]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Code of a granule by its place in x: `parts` places a step.

        Step s of a 32-bit word shifts it by s codes; part j then lies j * 32 / parts bits up.
        """
        cell = self.cells[0] if len(self.cells) == 1 else 8
        each = 32 // cell
        shifts = each // self.parts
        return tuple(
            word * each + part * shifts + shift
            for word in range(self.codes // each)
            for shift in range(shifts)
            for part in range(self.parts)
        )

    @property
    def offset(self) -> int:
        """What an integer operand of w is above its value."""
        return self._stored[1]

    @cached_property
    def _stored(self) -> tuple[int, int]:
        """(flip, offset): code ^ flip, read as an unsigned number, is value + offset."""
        found = consecutive(self.spec.element)
        assert found is not None
        half = 2 ** (self.spec.element.bits - 1)
        signed = found[0]
        if self.tiles_signed is not None:
            return 0, 0
        if self.dot.signed and self.spec.element.bits == 8:
            return (0, 0) if signed else (half, -half)
        return (half, half) if signed else (0, 0)

    @property
    def tiles_signed(self) -> bool | None:
        """For integer tiles, which take both: whether the operands of w are signed."""
        if not self.spec.tiled or self.spec.inner != "dot":
            return None
        found = consecutive(self.spec.element)
        assert found is not None
        return found[0]

    @property
    def plain(self) -> bool:
        """The words are integer tiles already."""
        return self.tiles_signed is not None and self.spec.element.bits == 8

    # Emitting.

    def emit(
        self,
        f: Function,
        words: Sequence[Value],
        zeros: Value | None = None,
        scale: Value | None = None,
    ) -> Iterator[Value]:
        """The operands of each step, in order.

        Float operands have their zero points taken off, and are multiplied by a scale.
        """
        spec = self.spec
        if scale is not None and self._raised:
            for vector in self.emit(f, words, zeros):
                yield _raise(f, vector, scale)
            return
        cell = self.cells[0] if len(self.cells) == 1 else 8
        shifts = 32 // cell // self.parts
        for word in self._whole(f, words):
            if spec.inner == "dot":
                yield from self._integers(f, word, cell, shifts)
                continue
            if spec.inner == "bf16" and zeros is scale is None and cell == 8:
                table = octets(spec.element, self.isa)
                if table is not None:
                    yield from table.emit(f, word)
                    continue
            for s in range(shifts):
                if spec.inner == "bf16":
                    yield pairs(f, spec.element, word, cell * s, zeros, scale)
                else:
                    value = decoder(spec.element, f.module).emit(f, word, cell * s)
                    yield value if zeros is None else f.op("fsub", value, zeros)

    @cached_property
    def _raised(self) -> bool:
        """Scales are powers of two, and add to the exponents of numbers that are finite."""
        scale = self.spec.scale
        if isinstance(scale, str) or not all(map(math.isfinite, self.spec.element.values)):
            return False
        return all(math.frexp(v)[0] == 0.5 for v in scale.values if math.isfinite(v))

    def _whole(self, f: Function, words: Sequence[Value]) -> Iterator[Value]:
        """Words in which every code is in one piece; of bit planes, a byte for each code."""
        if len(self.cells) == 1:
            yield from words
            return
        for word in range(self.codes // 4):
            total: Value | None = None
            low = first = 0
            for width in self.cells:
                each = 8 // width
                source = words[first + word // each]
                up = low - width * (word % each)
                moved = source
                if up:
                    moved = f.op("shl" if up > 0 else "lshr", source, abs(up))
                piece = f.op("and", moved, repeat((2**width - 1) << low, 8))
                total = piece if total is None else f.op("or", total, piece)
                low, first = low + width, first + self.codes * width // 32
            assert total is not None
            yield total

    def _integers(self, f: Function, word: Value, cell: int, shifts: int) -> Iterator[Value]:
        bits, part = self.spec.element.bits, 32 // self.parts
        half = 2 ** (bits - 1)
        extend = self.tiles_signed and bits < 8
        flip = half if extend else self._stored[0]
        if flip:
            word = f.op("xor", word, repeat(flip, cell))
        for s in range(shifts):
            lowered = f.op("lshr", word, s * cell) if s else word
            if cell != part:
                lowered = f.op("and", lowered, repeat(2**bits - 1, part))
            if extend:
                # (code ^ half) - half extends the sign.
                octets = f.op("sub", f.bits(lowered, OCTETS), half)
                lowered = f.bits(octets, INT)
            yield lowered


def repeat(pattern: int, bits: int) -> int:
    """The pattern in every `bits` bits of a word, as a signed number."""
    word = sum(pattern << shift for shift in range(0, 32, bits))
    return word - 2**32 if word >= 2**31 else word


# Pairs of bfloat16.


def narrowed(element: Element) -> Element:
    """The element with every value rounded to bfloat16: itself where all are such numbers."""
    with np.errstate(over="ignore"):
        values = np.array(element.values, np.float32).astype(float_dtype("bfloat16"))
    rounded = values.astype(np.float64).tolist()
    same = np.array_equal(np.array(element.values), np.array(rounded), equal_nan=True)
    return element if same else codebook(f"{element.name}.bfloat16", rounded)


def pairs(
    f: Function,
    element: Element,
    word: Value,
    shift: int,
    zeros: Value | None,
    scale: Value | None = None,
) -> Value:
    """bfloat16 of the codes `shift` bits up in both halves of each lane."""
    element = narrowed(element)
    if zeros is scale is None and element.bits <= 5 and f.module.isa.permute == "vpermps512":
        index = f.op("lshr", word, shift) if shift else word
        found = f.call(
            "llvm.x86.avx512.permvar.hi.512", PAIRS, _table(element), f.bits(index, PAIRS)
        )
        return f.bits(found, INT)
    decode = decoder(element, f.module)
    low, high = (decode.emit(f, word, shift + up) for up in (0, 16))
    if zeros is not None:
        low, high = (f.op("fsub", v, zeros) for v in (low, high))
    if scale is not None:
        low, high = (f.op("fmul", v, scale) for v in (low, high))
    # Both are bfloat16 numbers: their lower halves are zero.
    return f.op("or", f.op("lshr", f.bits(low, INT), 16), f.bits(high, INT))


def _raise(f: Function, vector: Value, scale: Value) -> Value:
    """Pairs of bfloat16 times a float32 power of two of each lane; zeros stay zeros."""
    power = f.op("sub", f.op("lshr", f.bits(scale, INT), 16), 0x3F80)
    both = f.op("or", f.op("and", power, 0xFFFF), f.op("shl", power, 16))
    held = f.bits(vector, PAIRS)
    some = f.compare("ne", f.op("and", held, 0x7FFF), 0)
    moved = f.add(held, f.bits(both, PAIRS))
    return f.bits(f.select(some, moved, held), INT)


def _table(element: Element) -> Value:
    """32 entries, repeated where the element has fewer: the permute reads 5 bits of an index."""
    count = len(element.values)
    values = np.array([element.values[i % count] for i in range(32)], np.float32)
    lanes = ", ".join(f"i16 {int(v)}" for v in values.view(np.uint32) >> 16)
    return Value(PAIRS, f"<{lanes}>")


@dataclass(frozen=True)
class Octets:
    """bfloat16 of 64 codes, a byte each, looked up half by half."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    signed: bool
    """The codes' top bit is the number's sign, and not looked up."""

    def emit(self, f: Function, word: Value) -> list[Value]:
        """Codes 0 and 2 of each lane, then 1 and 3."""
        index = f.bits(word, OCTETS)
        low, high = (self._look_up(f, index, table) for table in (self.low, self.high))
        if self.signed:
            high = f.op("or", high, f.op("and", index, -128))
        a, b = (f.bits(each, PAIRS) for each in (low, high))
        even = f.op("or", f.op("and", a, 255), f.op("shl", b, 8))
        odd = f.op("or", f.op("lshr", a, 8), f.op("and", b, -256))
        return [f.bits(even, INT), f.bits(odd, INT)]

    def _look_up(self, f: Function, index: Value, table: tuple[int, ...]) -> Value:
        parts = [table[i : i + 64] for i in range(0, len(table), 64)]
        held = [Value(OCTETS, f"<{', '.join(f'i8 {each}' for each in part)}>") for part in parts]
        if len(held) == 1:
            return f.call("llvm.x86.avx512.permvar.qi.512", OCTETS, held[0], index)
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        return f.call(name, OCTETS, held[0], index, held[1])


@lru_cache(maxsize=64)
def octets(element: Element, isa: Isa) -> Octets | None:
    """Tables of the two bytes of an element's bfloat16 numbers, if two registers hold each."""
    if not isa.vbmi or element.bits < 6:
        return None
    values = np.array(narrowed(element).values, np.float32)
    patterns = values.view(np.uint32) >> 16
    signed = element.bits == 8
    if signed:
        above, below = patterns[:128], patterns[128:]
        nan = np.isnan(values[:128]) & np.isnan(values[128:])
        if not (nan | (above | 0x8000 == below)).all() or (above & 0x8000)[~nan].any():
            return None
        patterns = above & 0x7FFF
    if element.bits == 7:
        patterns = np.resize(patterns, 128)
    low, high = (tuple(int(v) for v in each) for each in (patterns & 255, patterns >> 8))
    return Octets(low, high, signed)

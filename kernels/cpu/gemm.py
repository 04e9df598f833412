"""Products with a quantized weight, compiled for one class of problems: `build`, then call.

Order of arithmetic, for every tile, number of rows and threads:

    fma:   g = 0; for k ascending in the segment: g = fma(x, value(code) - zero, g)
           sum = fma(w_scale, g, sum), with scales of x: sum = fma(x_scale, w_scale * g, sum)
           with block biases, then: sum = fma(x_sum, bias, sum)
    dot:   g = the exact integer, then as above with float(g)
    bf16:  g = the instruction's own sum of pairs, then as above
    out:   round(activation(fma(alpha, sum, bias[n])) + residual), without a bias alpha * sum

fma and dot give the same bits on every instruction set.
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lowbit.formats.declare import Element
from lowbit.kernels import layouts
from lowbit.kernels.cpu import native, pool, program
from lowbit.kernels.cpu.decode import consecutive
from lowbit.kernels.cpu.ir import VECTOR
from lowbit.kernels.cpu.isa import RECORDS, Isa
from lowbit.kernels.cpu.micro import ROW
from lowbit.kernels.cpu.program import HEAD
from lowbit.kernels.cpu.spec import INTEGERS, Spec
from lowbit.kernels.cpu.steps import Steps
from lowbit.kernels.cpu.tiles import STAGE, TALL, configuration
from lowbit.kernels.layouts import GROUP, PANEL, WIDTHS

_BLOCK = struct.Struct(program.FORMAT)
# What a call brings stands in three places: x and its stride; its scales up to the result; alpha.
_put_x, _put_call, _put_alpha = (struct.Struct(f).pack_into for f in ("<2q", "<10q", "<f"))
_X_AT, _CALL_AT, _ALPHA_AT = (
    8 * program.Arguments._fields.index(name) for name in ("x", "x_scales", "alpha")
)
_TILE_STEPS = 16  # 32-bit steps of the widest AMX tile
# Vectors of a panel that are decoded at a time, to stay in the first level cache. Fewer where sums
# are scaled in between, which need room as well.
_DECODED = 128
_SCALED = 64
# Rows of a tile, at least and at most, and 32-bit steps of each lane that stay below a hundredth of
# a second.
_TALLEST = {
    "tiles": (64, 256, 2**28),
    "single": (TALL, TALL, 2**28),
    "decoded": (TALL, 256, 2**21),
    "direct": (TALL, 64, 2**21),
}
_NEAR = 1 << 20  # bytes of x that a tile works on: half of the second level cache
_LONGEST = 4096  # granules of packed words that a tile goes through at a time
_COPIED = 256  # words of canonical rows that are brought into scratch at a time


def refuse(spec: Spec, *, segment: int, k: int) -> str | None:
    """Why this product cannot be compiled, in words; None if it can."""
    element, step = spec.element, granule(spec)
    if segment < k and segment % step:
        return (
            f"scales must change at multiples of {step} columns for {element.name}, "
            f"they change every {segment}"
        )
    if not math.isfinite(element.values[0]):
        return f"{element.name} has no finite value at code 0, which pads its rows"
    if spec.inner == "dot":
        found = consecutive(element)
        if found is None or found[1] != 1:
            return f"{element.name} is not a plain integer element"
        if spec.zero is not None and spec.zero not in INTEGERS:
            return f"zero points of {spec.zero} are not whole numbers"
        if spec.biases:
            return "block biases need float32 sums"
    return None


def granule(spec: Spec) -> int:
    """Codes that are decoded together: scales change at multiples of it."""
    return Steps(spec, RECORDS[-1]).codes


def for_tiles(spec: Spec, isa: Isa, *, m: int, segment: int, k: int) -> Spec:
    """The same product in AMX's tiles: few rows decode just before they multiply."""
    tiles = replace(spec, method="tiles")
    steps = Steps(tiles, isa)
    units = Units.of(tiles, steps, segment, k)
    # Only the last tile of a row may lack granules.
    full = units.segment * units.each == units.segment_granules or units.total <= units.segment
    if m <= TALL and not steps.plain and full:
        return replace(spec, method="single", tile=units.each * steps.count)
    return tiles


def longest_segment(x: Element, w: Element, zero: str | None = None) -> int:
    """Columns whose sum of x * (w - zero) surely fits in int32."""
    low, high = w.min, w.max
    if zero is not None:
        least, most = (-128, 127) if zero == "int8" else (0, 255)
        low, high = low - most, high - least
    largest = int(max(abs(low), abs(high)) * max(abs(x.min), abs(x.max)))
    return (2**31 - 1) // max(largest, 1)


@dataclass(frozen=True)
class Gemm:
    """A compiled class of products. Calling it computes one; it may be called concurrently."""

    spec: Spec
    isa: Isa
    entry: int

    @property
    def steps(self) -> Steps:
        """How its words become operands."""
        return Steps(self.spec, self.isa)

    def bind(
        self,
        *,
        m: int,
        n: int,
        k: int,
        segment: int,
        codes: int,
        codes_stride: int,
        scales: int,
        scales_stride: int,
        block_rows: int,
        block_segments: int,
        zeros: int = 0,
        biases: int = 0,
        x_block_segments: int = 1,
        threads: int | None = None,
    ) -> Bound:
        """Fix the sizes and the weight; what comes back computes one product a call.

        Parameters
        ----------
        m, n, k : int
            Any number, 0 included.
        segment : int
            Columns between any two changes of a scale; see `refuse`.
        codes, codes_stride : int
            Address of w. The stride is in bytes; words16 ignores it.
        scales, scales_stride, block_rows, block_segments : int
            One scale for `block_rows` rows of w and `block_segments` segments (a whole axis: any
            number not below its length). The stride counts entries and serves zeros and biases
            too; panels16 ignores it and the rows.
        zeros, biases : int
            As many as scales.
        x_block_segments : int
            Segments that share one scale of x.
        threads : int, optional
            Most threads to use.
        """
        spec, steps = self.spec, self.steps
        if spec.method == "single" and m > TALL:
            raise ValueError(f"gemm: m is {m}; a single tile has {TALL} rows, use for_tiles")
        units = Units.of(spec, steps, segment, k, m)
        tall = _tile_rows(spec, self.isa, m, units.columns(steps) // steps.parts)
        columns = -(-n // (GROUP * PANEL))
        tiles = spec.tiled
        held = -(-tall // TALL) * TALL if tiles else tall
        places = _Places()
        places.take("", held * ROW)  # the sums
        carried = units.stretch % units.segment
        places.take("carry_at", held * ROW if carried else 0)
        places.take("stage_at", STAGE if tiles else 0)
        blocks = units.stretch // units.segment + 1
        if spec.folded:
            blocks = units.stretch * units.each // spec.folded + 2
        block = blocks * ROW if k else 0
        places.take("scales_at", block)
        places.take("zeros_at", block if spec.zero is not None else 0)
        places.take("biases_at", block if spec.biases else 0)
        rows = spec.layout == "rows"
        words = units.stretch * units.each * steps.words
        places.take("codes_at", words * ROW if rows else 0)
        odd = rows and spec.element.bits not in WIDTHS
        places.take("lines_at", (words + 4) * VECTOR if odd else 0)
        places.take("work_at", block if spec.scale_layout == "rows" else 0)
        unrolled = units.stretch * units.each * steps.count * ROW
        places.take("operands_at", unrolled if spec.method in ("tiles", "decoded") else 0)
        argument = _BLOCK.pack(
            m, n, units.total, units.segment, units.stretch, units.span, units.granules,
            units.segment_granules, units.each, units.each * steps.count,
            int(steps.plain and not units.padded), tall, columns,
            0, 0,
            codes, codes_stride, -(-k * spec.element.bits // 8),
            scales, zeros, biases, scales_stride, block_rows, block_segments,
            *[0] * 10,
            *places.found, words,
            0.0,
        )  # fmt: skip
        argument += configuration(units.each * steps.count, min(m, TALL)) if tiles else b""
        return Bound(
            self.entry,
            columns * -(-m // tall) if m > 0 and n > 0 else 0,
            places.end,
            threads,
            x_block_segments,
            argument,
            ctypes.c_char * len(argument),
        )

    def __call__(self, **arguments: Any) -> None:
        """Bind and compute once: the arguments of `bind` and of `Bound` together."""
        fixed = {k: arguments.pop(k) for k in _FIXED if k in arguments}
        self.bind(**fixed)(**arguments)


_FIXED = tuple(name for name in Gemm.bind.__annotations__ if name != "return")


@dataclass(frozen=True, slots=True)
class Bound:
    """A class of products with its sizes and its weight; the weight's memory must stay."""

    entry: int
    tiles: int
    scratch: int
    threads: int | None
    x_block_segments: int
    block: bytes
    """The argument of `tile`, where what a call brings is 0."""
    memory: Any
    """ctypes array of as many bytes."""

    def __call__(
        self,
        *,
        x: int,
        x_stride: int,
        out: int,
        out_stride: int,
        x_scales: int = 0,
        x_scales_stride: int = 0,
        x_sums: int = 0,
        x_sums_stride: int = 0,
        alpha: float = 1.0,
        bias: int = 0,
        residual: int = 0,
        residual_stride: int = 0,
    ) -> None:
        """Compute out[m, n]. Arrays are given by address; strides count elements, x's bytes.

        Parameters
        ----------
        x, x_stride : int
            What `arrange` makes of x: operands in the order of `Steps`, and zeros behind them.
        out, out_stride : int
            Result, contiguous along n.
        x_scales, x_scales_stride : int
            float32 [m, blocks] of x.
        x_sums, x_sums_stride : int
            [m, segments]: int32 sums of x's codes ("dot"; times `Steps.offset` where w has no zero
            points), float32 sums of x (biases).
        alpha : float
            Rounded to float32.
        bias : int
            float32 [n], or 0.
        residual, residual_stride : int
            [m, n] of the dtype `spec.residual`.
        """
        if not self.tiles:
            return
        held = self.memory.from_buffer_copy(self.block)
        _put_x(held, _X_AT, x, x_stride)
        _put_call(
            held, _CALL_AT,
            x_scales, x_scales_stride, self.x_block_segments, x_sums, x_sums_stride,
            bias, residual, residual_stride, out, out_stride,
        )  # fmt: skip
        _put_alpha(held, _ALPHA_AT, alpha)
        pool.run(self.entry, ctypes.addressof(held), self.tiles, self.scratch, self.threads)


@dataclass(frozen=True)
class Units:
    """How a row of codes is cut; see `program.Arguments`."""

    granules: int
    segment_granules: int
    each: int
    """Granules of a unit."""
    segment: int
    total: int
    stretch: int
    span: int

    @classmethod
    def of(cls, spec: Spec, steps: Steps, segment: int, k: int, m: int = 1) -> Units:
        """Cut k columns whose scales change every `segment`, for m rows of x."""
        granules = -(-k // steps.codes)
        own = max(1, -(-min(segment, k) // steps.codes))
        each, many = 1, own
        segments = -(-granules // own)
        if spec.tiled:
            # Odd widths of canonical rows are cut where their planes would be: a tile adds up its
            # pairs before it meets the sum, so other tiles would give other bits.
            whole = layouts.granule(spec.element.bits) // steps.codes
            if segments > 1 and own % whole:
                whole = 1
            wide = -(-own // whole)
            many = -(-wide // (_TILE_STEPS // (steps.count * whole)))
            each = -(-wide // many) * whole
        final = granules - (segments - 1) * own
        total = (segments - 1) * many + -(-final // each) if granules else 0
        stretch = span = max(1, min(_limit(spec, steps, m, scaled=segments > 1) // each, total))
        if many <= stretch:
            stretch = span = stretch // many * many
        else:
            # Evenly, so that the last part of a segment is not a small rest.
            stretch = -(-many // -(-many // stretch))
            span = many
        return cls(granules, own, each, many, total, stretch, span)

    @property
    def padded(self) -> bool:
        """Some unit is not full."""
        full = self.segment * self.each
        return (full != self.segment_granules and self.total > 1) or bool(self.granules % self.each)

    def columns(self, steps: Steps) -> int:
        """Operands of a row of x."""
        return self.total * self.each * steps.codes


def _limit(spec: Spec, steps: Steps, m: int, *, scaled: bool) -> int:
    """Granules that a tile decodes at a time."""
    found = _LONGEST
    if spec.method in ("tiles", "decoded") and not (steps.plain and m <= TALL):
        vectors = _SCALED if spec.method == "tiles" and scaled else _DECODED
        found = max(1, vectors // steps.count)
    if spec.layout == "rows":
        found = min(found, max(1, _COPIED // steps.words))
    return found


class _Places:
    """Offsets into the scratch memory of a tile, one behind the other."""

    def __init__(self) -> None:
        self.end = HEAD
        self.found: list[int] = []

    def take(self, name: str, size: int) -> None:
        """Reserve memory; a name that the arguments have is remembered."""
        if name:
            self.found.append(self.end)
        self.end += size


def _tile_rows(spec: Spec, isa: Isa, m: int, steps: int) -> int:
    """Rows of a tile: decoding once for many pays, yet x should stay in the second level cache."""
    least, most, products = _TALLEST[spec.method]
    longest = min(products * isa.lanes // (64 * max(steps, 1)), _NEAR // (4 * max(steps, 1)))
    longest = max(least, min(most, longest // TALL * TALL))
    blocks = max(1, -(-m // longest))
    return -(-m // blocks // TALL) * TALL if blocks > 1 else max(1, m)


@lru_cache(maxsize=1024)
def build(spec: Spec, isa: Isa) -> Gemm:
    """Compile, or take from the object cache. Hold on to the result: a look-up hashes the spec."""
    reason = refuse(spec, segment=32, k=32)
    if reason is not None:
        raise ValueError(f"gemm: {reason}")
    return Gemm(spec, isa, native.load(program.text(spec, isa), isa).address("tile"))

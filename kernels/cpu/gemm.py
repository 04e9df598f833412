"""Products with a quantized weight, compiled for one class of problems: `build`, then call.

Order of arithmetic, the same for every tile, number of rows, thread and instruction set:

    fma:   g = 0; for k ascending in the segment: g = fma(x, value(code) - zero, g)
           sum = fma(w_scale, g, sum), with scales of x: sum = fma(x_scale, w_scale * g, sum)
           with block biases, then: sum = fma(x_sum, bias, sum)
    dot:   g = the exact integer, then as above with float(g)
    out:   round(activation(fma(alpha, sum, bias[n])) + residual), without a bias alpha * sum
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit.formats.declare import Element
from lowbit.kernels.cpu import native, pool, program
from lowbit.kernels.cpu.decode import consecutive
from lowbit.kernels.cpu.isa import Isa
from lowbit.kernels.cpu.program import HEAD, PackArguments
from lowbit.kernels.cpu.spec import INTEGERS, Spec
from lowbit.kernels.cpu.tile import DOTS, ROW, VECTOR, shapes, word_steps
from lowbit.kernels.layouts import GROUP, PANEL, WIDTHS, codes_per_word, word_bits, word_columns

Array = npt.NDArray[Any]

_TALLEST = 128  # rows of a tile, a multiple of all micro-kernels' heights
_BLOCK = struct.Struct(program.FORMAT)
_PACK_BLOCK = struct.Struct(f"<{len(PackArguments._fields)}q")


def refuse(spec: Spec, *, segment: int, k: int) -> str | None:
    """Why this product cannot be compiled, in words; None if it can."""
    element, step = spec.element, codes_per_word(spec.element)
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


def longest_segment(x: Element, w: Element, zero: str | None = None) -> int:
    """Columns whose sum of x * (w - zero) surely fits in int32."""
    low, high = w.min, w.max
    if zero is not None:
        least, most = (-128, 127) if zero == "int8" else (0, 255)
        low, high = low - most, high - least
    largest = int(max(abs(low), abs(high)) * max(abs(x.min), abs(x.max)))
    return (2**31 - 1) // max(largest, 1)


class Arranged(NamedTuple):
    """An integer x as `dot` kernels read it."""

    x: Array
    """[..., m, word_columns], in the order and width of the instruction set."""
    sums: Array
    """int32 [..., m, segments]."""


def arrange(codes: Array, element: Element, isa: Isa, segment: int) -> Arranged:
    """Order int8 [..., m, k] the way the codes of w, `element`, come out of their words.

    A lane has `parts` operands side by side; part j of word w after p shifts is code
    j * (codes / parts) + p of the word.
    """
    k = codes.shape[-1]
    per_word, parts = codes_per_word(element), DOTS[isa.dot].parts
    width = word_columns(element, k)
    padded = np.zeros((*codes.shape[:-1], width), DOTS[isa.dot].x_type)
    padded[..., :k] = codes
    if k:
        sums = np.add.reduceat(codes, np.arange(0, k, segment), axis=-1, dtype=np.int32)
    else:
        sums = np.zeros((*codes.shape[:-1], 0), np.int32)
    words = padded.reshape(*codes.shape[:-1], width // per_word, parts, per_word // parts)
    ordered = np.ascontiguousarray(words.swapaxes(-1, -2)).reshape(padded.shape)
    return Arranged(ordered, sums)


@dataclass(frozen=True)
class Gemm:
    """A compiled class of products. Calling it computes one; it may be called concurrently."""

    spec: Spec
    isa: Isa
    entry: int

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
        spec = self.spec
        bits = word_bits(spec.element)
        words = -(-k * bits // 32)
        piece = max(1, -(-min(segment, k) * bits // 32))
        tallest = shapes(self.isa)[0]
        packed = tallest.packed and m >= tallest.rows
        steps = word_steps(spec, self.isa)
        stretch = _stretch(spec, words, piece, 65536 // (VECTOR * steps) if packed else 4096)
        blocks = -(-m // _tile_rows(self.isa, k))
        tall = -(-m // blocks // tallest.rows) * tallest.rows if blocks > 1 else m
        columns = -(-n // (GROUP * PANEL))
        # Sums, carried sums, the packed blocks of a stretch, its codes, expanded lines, work.
        sums = tall * ROW
        carry_at = HEAD + sums
        scales_at = carry_at + (sums if piece > stretch or stretch % piece else 0)
        block = (min(-(-stretch // piece) + 1, -(-words // piece)) if words else 0) * ROW
        zeros_at = scales_at + block
        biases_at = zeros_at + (block if spec.zero is not None else 0)
        codes_at = biases_at + (block if spec.biases else 0)
        lines_at = codes_at + (stretch * ROW if spec.layout == "rows" else 0)
        expanded = 0 if spec.element.bits in WIDTHS else (stretch + 1) * VECTOR
        work_at = lines_at + expanded
        x_at = work_at + (block if spec.scale_layout == "rows" else 0)
        scratch = x_at + (stretch * steps * VECTOR if packed else 0)
        return Bound(
            self.entry,
            columns * -(-m // tall) if m > 0 and n > 0 else 0,
            scratch,
            DOTS[self.isa.dot].x_size if spec.inner == "dot" else 4,
            threads,
            x_block_segments,
            (m, n, words, piece, stretch, tall, columns),
            (
                codes, codes_stride, -(-k * spec.element.bits // 8),
                scales, zeros, biases, scales_stride, block_rows, block_segments,
            ),
            (carry_at, scales_at, zeros_at, biases_at, codes_at, lines_at, work_at, x_at),
        )  # fmt: skip

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
    x_size: int
    threads: int | None
    x_block_segments: int
    sizes: tuple[int, ...]
    weight: tuple[int, ...]
    places: tuple[int, ...]

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
        """Compute out[m, n]. Arrays are given by address; strides count elements.

        Parameters
        ----------
        x, x_stride : int
            float32 [m, word_columns(element, k)], zeros from column k on; for "dot" what
            `arrange` gives.
        out, out_stride : int
            Result, contiguous along n.
        x_scales, x_scales_stride : int
            float32 [m, blocks] of x.
        x_sums, x_sums_stride : int
            [m, segments]: int32 sums of the codes of x ("dot"), float32 sums of x (biases).
        alpha : float
            Rounded to float32.
        bias : int
            float32 [n], or 0.
        residual, residual_stride : int
            [m, n] of the dtype `spec.residual`.
        """
        if not self.tiles:
            return
        argument = _BLOCK.pack(
            *self.sizes,
            x, x_stride * self.x_size,
            *self.weight,
            x_scales, x_scales_stride, self.x_block_segments, x_sums, x_sums_stride,
            bias, residual, residual_stride, out, out_stride,
            *self.places,
            alpha,
        )  # fmt: skip
        held = ctypes.create_string_buffer(argument, _BLOCK.size)
        pool.run(self.entry, ctypes.addressof(held), self.tiles, self.scratch, self.threads)


def _stretch(spec: Spec, words: int, piece: int, limit: int) -> int:
    """Words of k that a tile works on at a time: what it packs should stay in the nearest cache."""
    most = min(limit, 256 if spec.layout == "rows" else 256 * piece)
    whole = most // piece * piece or most
    return max(2, min(whole + whole % 2, words + words % 2))


def _tile_rows(isa: Isa, k: int) -> int:
    """Rows of a tile: a multiple of 16 where a tile stays below a hundredth of a second."""
    products = 2**21 * isa.lanes
    return max(16, min(_TALLEST, products // (64 * max(k, 1)) // 16 * 16))


@lru_cache(maxsize=1024)
def build(spec: Spec, isa: Isa) -> Gemm:
    """Compile, or take from the object cache. Hold on to the result: a look-up hashes the spec."""
    reason = refuse(spec, segment=32, k=32)
    if reason is not None:
        raise ValueError(f"gemm: {reason}")
    return Gemm(spec, isa, native.load(program.text(spec, isa), isa).address("tile"))


@dataclass(frozen=True)
class Pack:
    """Canonical rows of codes to words16, compiled."""

    entry: int

    def __call__(self, *, codes: int, stride: int, n: int, size: int, out: int) -> None:
        """`size` bytes of each of `n` rows, `stride` bytes apart, to uint32 [panels, words, 16]."""
        argument = _PACK_BLOCK.pack(codes, stride, n, size, out)
        held = ctypes.create_string_buffer(argument, _PACK_BLOCK.size)
        pool.run(self.entry, ctypes.addressof(held), -(-n // PANEL), 8 * PANEL)


@lru_cache(maxsize=16)
def build_pack(isa: Isa) -> Pack:
    """Compile the packing of weights, or take it from the object cache."""
    return Pack(native.load(program.pack_text(isa), isa).address("tile"))


__all__ = [
    "Arranged",
    "Gemm",
    "Pack",
    "Spec",
    "arrange",
    "build",
    "build_pack",
    "codes_per_word",
    "longest_segment",
    "refuse",
    "word_columns",
]

"""What the compiled kernels share: x is arranged, the weight is bound, the product runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit.formats import Format
from lowbit.formats.reference import Packed
from lowbit.kernels.cpu import arrange, gemm, operands
from lowbit.kernels.cpu.arrange import Arrangement
from lowbit.kernels.cpu.micro import wants_x_sums
from lowbit.kernels.cpu.operands import FLOAT32
from lowbit.kernels.cpu.pool import address
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.tiles import TALL
from lowbit.kernels.declare import NOT_FINITE, Array, Bind, Epilogue, Problem
from lowbit.kernels.segments import blocks_of

# Rows that lie a power of two apart would push each other out of the nearest cache.
_APART = 64
Given = tuple[dict[str, int], Any]
"""Arguments of `gemm.Bound`, and what has to stay in memory until it returns."""


def bind(p: Problem, spec: Spec, segment: int, dense: str | None = None) -> Bind:
    """Bind one class of products to weights; `dense` is the dtype of an x that it quantizes."""
    compiled = gemm.build(spec, operands.isa_of(p))
    left = _Left(p, compiled, segment, dense)
    blocks = 1
    if isinstance(p.x, Format):
        blocks = blocks_of(p.x.scale.block[1], segment, p.k)

    # Scales that are folded into w's numbers change on their own.
    own = p.w.scale.block[1] if spec.folded else segment
    assert own is not None

    def to(w: Any) -> Callable[[Any, Epilogue, Array], Any]:
        call = compiled.bind(
            m=p.m,
            n=p.n,
            k=p.k,
            segment=segment,
            x_block_segments=blocks,
            **operands.weight_arguments(w, own),
        )
        second = None if w.tensor_scale is None else w

        def run(x: Any, epilogue: Epilogue, out: Array) -> Any:
            given = left(x)
            if given is None:
                return NOT_FINITE
            scale = operands.second_level(x, second)
            call(**given[0], **operands.output_arguments(epilogue, out, scale))
            return None

        if isinstance(p.x, Format) or not left.as_it_is or left.biases or second is not None:
            return run

        def quick(x: Array, epilogue: Epilogue, out: Array) -> None:
            bias, residual = epilogue.bias, epilogue.residual
            if bias is not None or residual is not None or not _readable(x, left.columns):
                run(x, epilogue, out)
                return
            call(
                x=address(x),
                x_stride=x.strides[0],
                out=address(out),
                out_stride=out.strides[0] // out.itemsize,
                alpha=operands.single(epilogue.alpha),
            )

        return quick

    return to


class _Left:
    """Brings x of one class of products into the form that its micro-kernels read."""

    def __init__(self, p: Problem, compiled: gemm.Gemm, segment: int, dense: str | None) -> None:
        spec, steps = compiled.spec, compiled.steps
        units = gemm.Units.of(spec, steps, segment, p.k)
        self.p, self.segment, self.dense = p, segment, dense
        item = arrange.SIZES[steps.x_type]
        self.columns = units.columns(steps)
        self.tiled = spec.tiled
        self.units = units
        self.tile = units.each * steps.count * 4
        if self.tiled:
            # Sixteen rows lie together, a chunk of each for a tile.
            self.chunks = units.total
            self.stride = self.chunks * arrange.CHUNK
        else:
            self.chunks = -(-self.columns * item // arrange.CHUNK)
            self.stride = self.chunks * arrange.CHUNK + (_APART if p.m > 1 else 0)
        self.rows = -(-p.m // TALL) * TALL if self.tiled else p.m
        self.segments = -(-p.k // segment)
        self.summed = spec.inner == "dot" and wants_x_sums(spec, steps)
        self.factor = steps.offset if self.summed and spec.zero is None else 1
        self.biases = spec.biases
        self.block, self.blocks, self.largest = p.k, 1, 0.0
        self.repeat = 1
        if isinstance(p.x, Format):
            self.block = p.x.scale.block[1] or p.k
            self.blocks = -(-p.k // self.block)
            self.largest = p.x.element.max
            self.repeat = blocks_of(p.x.scale.block[1], segment, p.k)
        source = _source(p, steps.x_type, dense)
        self.valued = isinstance(p.x, Format) and source == "float32" and dense is None
        self.arrangement = Arrangement(
            source, steps.x_type, steps.order, dense is not None, self.tiled, self.summed
        )
        self.as_it_is = source == steps.x_type == "float32"
        self.arrange = arrange.build(self.arrangement, compiled.isa)

    def __call__(self, x: Any) -> Given | None:
        """Arguments of the product; None where a number to quantize is not finite."""
        scales = None
        if self.dense is None and isinstance(x, Packed):
            scales = operands.x_blocks(x, self.rows)
        if self.valued:
            rows = operands.x_values(x)
        else:
            rows = x.codes if isinstance(x, Packed) else x
        if self.as_it_is and _readable(rows, self.columns):
            arguments = {"x": address(rows), "x_stride": rows.strides[0]}
            held: list[Any] = [rows]
        else:
            found = self._arranged(rows)
            if found is None:
                return None
            arguments, held = found
        if scales is not None:
            arguments |= {"x_scales": address(scales), "x_scales_stride": scales.shape[1]}
        if self.biases:
            sums = _sums(x, self.p, self.segment, scales, self.repeat, self.rows)
            arguments |= {"x_sums": address(sums), "x_sums_stride": sums.shape[1]}
            held.append(sums)
        return arguments, (held, scales)

    def _arranged(self, rows: Array) -> tuple[dict[str, int], list[Any]] | None:
        p = self.p
        if rows.strides[1] != rows.itemsize or not rows.dtype.isnative:
            rows = np.ascontiguousarray(rows, rows.dtype.newbyteorder("="))
        out = np.empty(self.rows * self.stride + arrange.CHUNK, np.uint8)
        base = -(-address(out) // arrange.CHUNK) * arrange.CHUNK
        held: list[Any] = [rows, out]
        scales = sums = 0
        mark: Array | None = None
        arguments = {"x": base, "x_stride": self.stride}
        if self.dense is not None:
            made = np.empty((self.rows, self.blocks), FLOAT32)
            scales = address(made)
            arguments |= {"x_scales": scales, "x_scales_stride": self.blocks}
            mark = np.zeros(1, np.int64)
            held += [made, mark]
        if self.summed:
            added = np.empty((self.rows, self.segments), np.int32)
            sums = address(added)
            arguments |= {"x_sums": sums, "x_sums_stride": self.segments}
            held.append(added)
        self.arrange(
            p.m,
            arrange.Arguments(
                x=address(rows),
                x_stride=rows.strides[0],
                k=p.k,
                out=base,
                out_stride=self.stride,
                chunks=self.chunks,
                tile=self.tile,
                segment=self.segment,
                segments=self.segments,
                segment_tiles=self.units.segment,
                padded=int(self.units.padded),
                scales=scales,
                scales_stride=self.blocks,
                block=self.block,
                blocks=self.blocks,
                sums=sums,
                sums_stride=self.segments,
                factor=self.factor,
                flag=0 if mark is None else address(mark),
                natural_at=0,
                largest=self.largest,
            ),
        )
        if mark is not None and mark[0]:
            return None
        return arguments, held


def _source(p: Problem, target: str, dense: str | None) -> Any:
    """What `arrange` reads."""
    if dense is not None or isinstance(p.x, str):
        return dense or p.x
    if p.x.zero is not None:
        return "float32"  # zero points are taken off before
    element = p.x.element
    return "int8" if element.name == "int8" and target.startswith("int") else element


def _readable(x: Array, width: int) -> bool:
    """The micro-kernels can read the rows where they lie."""
    strides = x.strides
    return (
        x.dtype == FLOAT32  # in native byte order
        and strides[1] == 4
        and x.shape[1] == width
        and strides[0] >= 4 * width
        and x.flags.aligned
    )


def _sums(x: Any, p: Problem, segment: int, scales: Array | None, repeat: int, rows: int) -> Array:
    """float32 sums of x over each segment, added up and scaled in float64."""
    values = operands.x_values(x) if isinstance(x, Packed) else x
    starts = np.arange(0, p.k, segment)
    sums = np.add.reduceat(values.astype(np.float64), starts, axis=1)
    if scales is not None:
        sums *= np.repeat(scales[: p.m], repeat, axis=1)[:, : sums.shape[1]]
    padded = np.zeros((rows, sums.shape[1]), FLOAT32)
    with np.errstate(over="ignore"):
        padded[: p.m] = sums
    return padded


def fuses(fmt: Format) -> bool:
    """Rows of numbers become codes of this format while they are arranged."""
    element, rows = fmt.element, fmt.scale.block[0]
    plain = fmt.zero is None and not fmt.bias and not fmt.tensor_scale
    signed = element.integral and element.bits > 1 and element.min == -element.max - 1
    return plain and signed and rows == 1 and fmt.scale.element == "float32"

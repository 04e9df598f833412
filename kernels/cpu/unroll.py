"""Decoding once for all rows of x: a panel's words to the vectors that are multiplied."""

from __future__ import annotations

from lowbit.kernels.cpu.ir import FLOAT, INT, VECTOR, Function, Module, Value, constant
from lowbit.kernels.cpu.micro import ROW
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.steps import Steps


def unroller(spec: Spec, module: Module) -> Function:
    """Operands of the units [first, last) of one panel, vector behind vector.

    `words` stand at the granule that unit `first` begins with, `zeros` at the first segment's, and
    `scales` that are folded in at the block of that granule. A segment whose granules do not fill
    its last unit is filled up with vectors of zeros, since tiles are multiplied whole.
    """
    f = module.function(
        "unroll",
        {
            **dict.fromkeys(("words", "out", "zeros", "scales"), "ptr"),
            **dict.fromkeys(("first", "last", "segment", "granules"), "i64"),
            **dict.fromkeys(("segment_granules", "unit_granules"), "i64"),
        },
        "apart",
    )
    words, out, zeros, scales, first, last, segment, granules, segment_granules, unit = f.parameters
    steps = Steps(spec, module.isa)
    start = f.op("udiv", first, segment)
    centred = spec.zero is not None and spec.inner != "dot"
    origin = f.add(
        f.mul(start, segment_granules), f.mul(f.op("sub", first, f.mul(start, segment)), unit)
    )
    with f.loop(start, f.over(last, segment)) as loop:
        begin = f.mul(loop.index, segment)
        at = f.greatest(begin, first)
        stop = f.least(f.add(begin, segment), last)
        base = f.mul(loop.index, segment_granules)
        end = f.least(f.add(base, segment_granules), granules)
        g0 = f.add(base, f.mul(f.op("sub", at, begin), unit))
        g1 = f.least(f.add(base, f.mul(f.op("sub", stop, begin), unit)), end)
        to = f.at(out, f.mul(f.mul(f.op("sub", at, first), unit), steps.count * VECTOR))
        zero = None
        if centred:
            within = f.op("sub", loop.index, start)
            zero = f.load(FLOAT, f.at(zeros, f.mul(within, ROW)), 64)

        def decode(begin: Value, end: Value, scale: Value | None) -> None:
            with f.loop(begin, end) as inner:
                source = f.at(words, f.mul(f.op("sub", inner.index, origin), steps.words * VECTOR))
                place = f.at(to, f.mul(f.op("sub", inner.index, g0), steps.count * VECTOR))
                _granule(f, steps, source, place, zero, scale)

        if spec.folded:
            block = f.op("udiv", g0, spec.folded)
            with f.loop(block, f.over(g1, spec.folded)) as own:
                begin = f.greatest(f.mul(own.index, spec.folded), g0)
                end = f.least(f.mul(f.add(own.index, 1), spec.folded), g1)
                place = f.mul(f.op("sub", own.index, block), ROW)
                decode(begin, end, f.load(FLOAT, f.at(scales, place), 64))
        else:
            decode(g0, g1, None)
        if spec.tiled:
            have = f.op("sub", g1, g0)
            want = f.mul(f.op("sub", stop, at), unit)
            with f.loop(f.mul(have, steps.count), f.mul(want, steps.count)) as rest:
                f.store(constant(INT, 0), f.at(to, f.mul(rest.index, VECTOR)), 64)
    return f


def _granule(
    f: Function,
    steps: Steps,
    source: Value,
    to: Value,
    zero: Value | None,
    scale: Value | None,
) -> None:
    held = [f.load(INT, f.at(source, i * VECTOR), 4) for i in range(steps.words)]
    for i, vector in enumerate(steps.emit(f, held, zero, scale)):
        f.store(vector, f.at(to, i * VECTOR), 64)

"""lowbit's quantize and dequantize, without the wait that `lowbit.quantize` ends with."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.checking import Wrong
from harness.gpu_work import Operands, host
from harness.work import Array, Work

import lowbit as lb
from lowbit.formats import reference
from peers.gpu import Built

NAMES = ("lowbit.quantize", "lowbit.dequantize")


def missing() -> str | None:
    """Never."""
    return None


def version() -> str:
    """The release."""
    return f"lowbit {lb.__version__}"


def refusal(name: str, work: Work) -> str | None:
    """None: every format is taken."""
    return None


def build(name: str, operands: Operands) -> Built:
    """One of the two; x is (n, k) of the work's dtype."""
    return (_quantize if name.endswith(".quantize") else _dequantize)(operands)


def _quantize(operands: Operands) -> Built:
    from lowbit.kernels.cuda import quantize

    work = operands.work
    fmt = lb.format(work.weight)
    sources = [operands.weight().astype(work.x)]

    def check(answer: Any, m: int) -> float:
        got = answer.settled()
        if got is None:
            raise Wrong("the kernels left the numbers to the reference")
        wanted = lb.quantize(host(sources[0]), work.weight)
        for name in ("codes", "scales", "zeros", "tensor_scale"):
            mine, truth = getattr(got, name), getattr(wanted, name)
            if truth is not None:
                same(name, host(mine), truth)
        return 0.0

    moved = sources[0].nbytes + parts_bytes(quantize.enqueue(fmt, sources[0]).parts)
    return Built(
        weight_bytes=sources[0].nbytes,
        copy=lambda: sources.append(sources[0].copy()),
        take=lambda m: None,
        call=lambda _, i: quantize.enqueue(fmt, sources[i]),
        check=check,
        moved=lambda m: moved,
    )


def _dequantize(operands: Operands) -> Built:
    from lowbit.kernels.cuda import dequantize, quantize

    work, xp = operands.work, operands.xp
    fmt = lb.format(work.weight)

    def pair() -> tuple[reference.Packed, Any]:
        parts = quantize.enqueue(fmt, operands.weight().astype(work.x)).settled()
        if parts is None:
            raise Wrong("the kernels left the numbers to the reference")
        return parts, xp.empty((work.n, work.k), work.x)

    sets = [pair()]

    def call(_: None, i: int) -> Any:
        dequantize.dequantize_to(*sets[i])
        return sets[i][1]

    def check(answer: Any, m: int) -> float:
        source = host(operands.weight().astype(work.x))
        wanted = lb.quantize(source, work.weight).dequantize(work.x)
        same("values", host(answer), wanted)
        return 0.0

    moved = parts_bytes(sets[0][0]) + sets[0][1].nbytes
    return Built(
        weight_bytes=moved,
        copy=lambda: sets.append(pair()),
        take=lambda m: None,
        call=call,
        check=check,
        moved=lambda m: moved,
    )


def parts_bytes(parts: reference.Packed) -> int:
    """Bytes of codes and whatever belongs to them."""
    held = (parts.codes, parts.scales, parts.zeros, parts.biases, parts.tensor_scale)
    return sum(part.nbytes for part in held if part is not None)


def same(what: str, got: Array, wanted: Array) -> None:
    """Raise `Wrong` unless all bytes are."""
    got, wanted = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (got, wanted))
    if got.size != wanted.size:
        raise Wrong(f"{what} have {got.size} bytes, the CPU's {wanted.size}")
    wrong = np.flatnonzero(got != wanted)
    if wrong.size:
        raise Wrong(f"{wrong.size} bytes of {what} differ from the CPU's, first byte {wrong[0]}")

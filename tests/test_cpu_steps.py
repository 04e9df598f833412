"""Words become operands: every code, in its place, is what the instruction has to multiply."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from lowbit.formats import codes as bitstream
from lowbit.formats.codebook import NF4
from lowbit.formats.declare import Element, codebook, floating, integer, power_of_two
from lowbit.kernels import layouts
from lowbit.kernels.cpu import native
from lowbit.kernels.cpu.cases import address, records
from lowbit.kernels.cpu.ir import FLOAT, INT, Module
from lowbit.kernels.cpu.isa import RECORDS, Isa
from lowbit.kernels.cpu.spec import LAYOUTS, Spec
from lowbit.kernels.cpu.steps import DOTS, Steps, narrowed
from lowbit.kernels.layouts import PANEL

Array = npt.NDArray[Any]
GRANULES = 9
INTEGERS = [integer(b, signed=s) for s in (True, False) for b in range(1, 9)]
OTHERS = [
    NF4,
    floating(2, 1, specials="none"),
    floating(3, 2, specials="none"),
    floating(4, 3, specials="fn"),
    floating(4, 3, specials="fnuz"),
    floating(5, 2, specials="ieee"),
    codebook("odd3", (0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8)),
    codebook("odd5", (np.arange(32) - 7.25) ** 3),
    codebook("odd6", np.sqrt(np.arange(64)) - 2),
    codebook("odd7", np.cbrt(np.arange(128) - 60.0)),
    codebook("odd8", np.sin(np.arange(256))),
    codebook("mirrored8", np.concatenate([np.arange(128) / 3, -np.arange(128) / 3])),
]


def specs(element: Element) -> list[Spec]:
    """Every kind of operand, from either layout."""
    kinds = [Spec("fma", element), Spec("bf16", element)]
    if element.integral:
        kinds += [Spec("dot", element), Spec("dot", element, "tiles")]
        kinds += [replace(each, zero="int8") for each in kinds[:2]]
    folded = Spec("bf16", element, "tiles", folded=1)
    if element.bits <= 4 and narrowed(element) is element:
        kinds += [replace(folded, scale=power_of_two())]
        kinds += [replace(folded, scale=floating(4, 3, specials="fn"))]
    return [replace(each, layout=layout) for each in kinds for layout in LAYOUTS]


def packed(spec: Spec, steps: Steps, codes: Array) -> Array:
    """uint32 [granules, words, 16] as the kernels find them."""
    bits = spec.element.bits
    if spec.layout == "words16":
        return layouts.words16(bitstream.pack(codes, bits), bits, codes.shape[1])
    # Odd widths of canonical rows have been expanded to a byte each.
    wide = bitstream.pack(codes, bits if bits in layouts.WIDTHS else 8)
    return np.ascontiguousarray(wide.view("<u4").T)[None]


def emitted(spec: Spec, isa: Isa, words: Array, zeros: Array, scales: Array) -> Array:
    """uint32 [granules, steps, 16]: what `Steps.emit` makes of the words."""
    steps, module = Steps(spec, isa), Module(isa)
    names = dict.fromkeys(("words", "zeros", "scales", "out"), "ptr") | {"count": "i64"}
    f = module.function("emit", names, "external")
    source, z, s, out, count = f.parameters
    zero = f.load(FLOAT, z, 4) if spec.zero else None
    scale = f.load(FLOAT, s, 4) if spec.folded else None
    with f.loop(0, count) as loop:
        place = f.at(source, f.mul(loop.index, 64 * steps.words))
        held = [f.load(INT, f.at(place, 64 * i), 4) for i in range(steps.words)]
        to = f.at(out, f.mul(loop.index, 64 * steps.count))
        for i, vector in enumerate(steps.emit(f, held, zero, scale)):
            f.store(vector, f.at(to, 64 * i), 4)
    found = np.zeros((GRANULES, steps.count, PANEL), np.uint32)
    kinds = [ctypes.c_void_p] * 4 + [ctypes.c_int64]
    run = ctypes.CFUNCTYPE(None, *kinds)(native.load(module.text(), isa).address("emit"))
    run(*(address(a) for a in (words, zeros, scales, found)), GRANULES)
    return found


def operands(steps: Steps, words: Array) -> Array:
    """Numbers [granules, 16, codes] in the order of the codes."""
    signed = steps.dot.signed if steps.tiles_signed is None else steps.tiles_signed
    kind = {
        "fma": np.dtype(np.float32),
        "bf16": np.dtype(ml_dtypes.bfloat16),
        "dot": np.dtype(f"{'i' if signed else 'u'}{4 // steps.parts}"),
    }[steps.spec.inner]
    parts = np.ascontiguousarray(words).view(kind).reshape(len(words), steps.count, PANEL, -1)
    found = np.empty((len(words), PANEL, steps.codes), np.float64)
    found[:, :, list(steps.order)] = parts.swapaxes(1, 2).reshape(len(words), PANEL, steps.codes)
    return found


@pytest.mark.parametrize("element", [*INTEGERS, *OTHERS], ids=lambda e: e.name)
def test_every_code_becomes_its_operand(element: Element) -> None:
    rng = np.random.default_rng(0)
    finite = np.array([c for c, v in enumerate(element.values) if np.isfinite(v)], np.uint8)
    zeros = rng.integers(-8 if element.min < 0 else 0, 8, PANEL).astype(np.float32)
    for spec in specs(element):
        for isa in records(spec, every=False):
            steps = Steps(spec, isa)
            codes = rng.choice(finite, (PANEL, GRANULES * steps.codes))
            codes.ravel()[: len(finite)] = finite
            scales = np.exp2(rng.integers(-3, 4, PANEL)).astype(np.float32)
            if spec.folded and spec.scale != power_of_two():
                scales *= rng.choice([1, -1.5, 1.875, 0], PANEL).astype(np.float32)
            words = packed(spec, steps, codes)
            got = operands(steps, emitted(spec, isa, words, zeros, scales))
            table = np.array((narrowed(element) if spec.inner == "bf16" else element).values)
            wanted = table[codes].astype(np.float64)
            if spec.zero:
                wanted -= zeros[:, None]
            if spec.folded:
                wanted *= scales[:, None]
            if spec.inner == "dot":
                wanted += steps.offset
            wanted = wanted.reshape(PANEL, GRANULES, steps.codes).swapaxes(0, 1)
            assert (got == wanted.astype(np.float32)).all(), f"{spec} on {isa.name}"


@pytest.mark.parametrize("isa", RECORDS, ids=lambda isa: isa.name)
def test_a_granule_is_ordered_once(isa: Isa) -> None:
    """x's order is a permutation, the same that the layout's granule has room for."""
    for element in INTEGERS:
        for spec in specs(element):
            steps = Steps(spec, isa)
            assert sorted(steps.order) == list(range(steps.codes))
            assert steps.count * steps.parts == steps.codes
            assert steps.words * 32 == steps.codes * sum(steps.cells)
            if spec.layout == "words16":
                assert steps.codes == layouts.granule(element.bits)
                assert steps.words == layouts.granule_words(element.bits)
            if spec.inner == "fma":
                assert steps.order == tuple(range(steps.codes)), "k ascends"


def test_bytes_that_could_saturate_are_multiplied_as_words() -> None:
    """Two products of 255 and 127 are beyond int16: vpmaddubsw serves fewer than 8 bits."""
    avx2 = next(isa for isa in RECORDS if isa.dot == "pmaddubsw")
    for element in INTEGERS:
        steps = Steps(Spec("dot", element), avx2)
        assert steps.dot is DOTS["pmaddwd" if element.bits == 8 else "pmaddubsw"]
        if steps.dot is DOTS["pmaddubsw"]:
            assert 2 * (2**element.bits - 1) * 128 < 2**15

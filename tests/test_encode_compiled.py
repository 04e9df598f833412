"""Compiled encoders: the nearest code of every element, and bit streams of every width."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.formats import Element, codes, declared
from lowbit.formats.declare import codebook, floating, integer
from lowbit.kernels.cpu import encode_bits, native
from lowbit.kernels.cpu.encode import encoder
from lowbit.kernels.cpu.ir import FLOAT, Module
from lowbit.kernels.cpu.isa import Isa, runnable

Array = npt.NDArray[Any]


def distinct() -> list[Isa]:
    """Records that this machine runs and whose code differs here; the best one first."""
    found: dict[Any, Isa] = {}
    for isa in runnable():
        found.setdefault((isa.permute, isa.pdep, isa.lanes), isa)
    return list(found.values())


ISAS = distinct()


def elements() -> list[Element]:
    """Of all declared formats and their scales, and tables that nobody declared."""
    found: dict[str, Element] = {}
    for named in declared().values():
        for each in (named.format.element, named.format.scale.element):
            if isinstance(each, Element):
                found[each.name] = each
    rng = np.random.default_rng(0)
    more = [codebook(f"odd{bits}", rng.standard_normal(2**bits)) for bits in range(1, 9)]
    more += [
        codebook("twice", [0.5, -1, 0.5, 3]),
        codebook("signed_zeros", [0.0, 1, -0.0, -3]),
        codebook("no_zero", [-1, 1]),
        codebook("minus_zero_alone", [-0.0, 2, 5, 7]),
        codebook("far", [0, 2.0**-140, 2.0**127, -(2.0**-20)]),
        Element("coarse", 4, tuple(v * 4.0 for v in integer(4).values)),
        Element("with_gaps", 3, (0, 1, float("nan"), 4, float("inf"), -1, -2, -3)),
    ]
    more += [
        floating(e, m, specials=s)
        for e, m, s in (
            (4, 3, "ieee"),
            (3, 4, "none"),
            (2, 2, "fnuz"),
            (5, 0, "none"),
            (1, 2, "none"),
        )
    ]
    for each in more:
        found[each.name + each.digest] = each
    return list(found.values())


ELEMENTS = elements()


def numbers_for(element: Element) -> Array:
    """Every upper half of a float32, every edge of the ladder, and what lies next to them."""
    halves = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    edges = codes.ladder(element).edges
    with np.errstate(over="ignore"):
        near = np.concatenate([edges, np.array(element.values)]).astype(np.float32)
    finite = near[np.isfinite(near)]
    around = [np.nextafter(finite, np.float32(s)) for s in (-np.inf, np.inf)]
    y = np.concatenate([halves, finite, *around, -finite])
    y = y[~np.isnan(y)].astype(np.float32)
    return np.resize(y, -(-len(y) // 16) * 16)


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
@pytest.mark.parametrize("element", ELEMENTS, ids=[each.name for each in ELEMENTS])
def test_every_number_becomes_the_nearest_code(element: Element, isa: Isa) -> None:
    module = Module(isa)
    choice = encoder(element, module)
    f = module.function("encode", {"y": "ptr", "count": "i64", "out": "ptr"}, "external")
    y, count, out = f.parameters
    with f.loop(0, count) as loop:
        place = f.mul(loop.index, 64)
        f.store(choice.emit(f, f.load(FLOAT, f.at(y, place), 4)), f.at(out, place), 4)
    numbers = numbers_for(element)
    got = np.empty(len(numbers), np.int32)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    run = kind(native.load(module.text(), isa).address("encode"))
    run(numbers.ctypes.data, len(numbers) // 16, got.ctypes.data)
    expected = codes.encode(element, numbers)
    wrong = np.flatnonzero(got != expected)
    first = wrong[:1]
    assert not wrong.size, (
        f"{choice.method}: {numbers[first]} is {got[first]}, not {expected[first]}"
    )
    tiny = numbers[np.abs(numbers) < choice.smallest]
    zeros = codes.encode(element, np.copysign(np.float32(0), tiny))
    assert (codes.encode(element, tiny) == zeros).all()


def test_the_shortest_encoder_is_chosen() -> None:
    module = Module(ISAS[0])
    methods = {each.name: encoder(each, module).method for each in ELEMENTS}
    assert {methods[f"int{b}"] for b in range(1, 9)} == {"integer"}
    assert methods["fixed8"] == methods["coarse"] == "integer"
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float4_e2m1fn"):
        assert methods[name] == "minifloat"
    assert methods["nf4"] == methods["with_gaps"] == methods["float6_e5m0fn"] == "ladder"


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
@pytest.mark.parametrize("bits", range(1, 8))
def test_bit_streams_there_and_back(bits: int, isa: Isa) -> None:
    module = Module(isa)
    names = {"source": "ptr", "count": "i64", "out": "ptr"}
    pack, unpack = encode_bits.packer(module, bits), encode_bits.unpacker(module, bits)
    f = module.function("pack", names, "external")
    f.run(pack, *f.parameters)
    f = module.function("unpack", names, "external")
    source, count, out = f.parameters
    f.run(unpack, source, count, f.over(f.mul(count, bits), 8), out)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    module_ = native.load(module.text(), isa)
    rng = np.random.default_rng(bits)
    for length in (*range(1, 140), 200, 1000):
        one = rng.integers(0, 2**bits, length).astype(np.uint8)
        padded = rng.integers(0, 256, length + 64).astype(np.uint8)
        padded[:length] = one
        expected = codes.pack(one, bits)
        stream = np.full(len(expected) + 16, 0xA5, np.uint8)
        kind(module_.address("pack"))(padded.ctypes.data, length, stream[8:].ctypes.data)
        assert stream[8:-8].tobytes() == expected.tobytes()
        assert (stream[:8] == 0xA5).all()
        assert (stream[-8:] == 0xA5).all()
        back = np.full(-(-length // 64) * 64 + 8, 0xA5, np.uint8)
        kind(module_.address("unpack"))(stream[8:].ctypes.data, length, back.ctypes.data)
        assert (back[:length] == one).all()
        assert (back[-8:] == 0xA5).all()

"""Every code of every element is decoded exactly, and the oracle's fma rounds once."""

from __future__ import annotations

import ctypes
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import formats
from lowbit.formats.declare import Element, codebook, floating, integer
from lowbit.kernels.cpu import native, oracle
from lowbit.kernels.cpu.decode import decoder
from lowbit.kernels.cpu.ir import INT, Module
from lowbit.kernels.cpu.isa import Isa, runnable

Array = npt.NDArray[Any]


def elements() -> list[Element]:
    """Of all declared formats and their scales, plus tables that nobody declared."""
    found: dict[str, Element] = {}
    for named in formats.declared().values():
        for each in (named.format.element, named.format.scale.element):
            if isinstance(each, Element):
                found[each.name] = each
    rng = np.random.default_rng(0)
    for bits in range(1, 9):
        table = codebook(f"odd{bits}", rng.standard_normal(2**bits))
        found[table.name] = table
    for exponent in range(1, 6):
        for mantissa in range(1, 8 - exponent):
            each = floating(exponent, mantissa, specials="ieee")
            found[f"{each.name}_ieee"] = each
    for bits in (2, 5, 8):
        found[f"step{bits}"] = Element(
            f"step{bits}", bits, tuple(v * 2.0**-20 for v in integer(bits).values)
        )
    return list(found.values())


KINDS: list[Element | str] = [*elements(), "float16", "bfloat16", "int8", "uint8"]


@pytest.mark.parametrize("isa", runnable(), ids=[isa.name for isa in runnable()])
@pytest.mark.parametrize("kind", KINDS, ids=[k if isinstance(k, str) else k.name for k in KINDS])
def test_every_code_is_decoded_from_every_place(kind: Element | str, isa: Isa) -> None:
    if isinstance(kind, Element):
        bits, table = kind.bits, np.array(kind.values, np.float32)
    else:
        bits = np.dtype(kind).itemsize * 8
        table = np.arange(2**bits).astype(f"u{bits // 8}").view(kind).astype(np.float32)
    room = bits if 32 % bits == 0 else 8
    module = Module(isa)
    f = module.function("decode", {"a": "ptr", "rounds": "i64", "s": "ptr"}, "external")
    codes, rounds, out = f.parameters
    choice = decoder(kind, module)
    with f.loop(0, rounds) as loop:
        lanes = f.load(INT, f.at(codes, f.mul(loop.index, 64)), 4)
        for place in range(32 // room):
            number = choice.emit(f, lanes, place * room)
            to = f.mul(f.add(f.mul(loop.index, 32 // room), place), 64)
            f.store(number, f.at(out, to), 4)
    rng = np.random.default_rng(0)
    every = rng.permutation(np.arange(-(-(2**bits) // 512) * 512) % 2**bits).astype(np.uint32)
    words = every.reshape(-1, 32 // room, 16) << (np.arange(32 // room)[:, None] * room)
    packed = np.bitwise_or.reduce(words.astype(np.uint32), axis=1)
    got = np.empty((len(packed), 32 // room, 16), np.float32)
    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    run = entry(native.load(module.text(), isa).address("decode"))
    run(packed.ctypes.data, len(packed), got.ctypes.data)
    a, b = got.ravel(), table[every]
    same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
    assert same.all(), f"{choice.method}: code {every[~same][0]} is {a[~same][0]}"


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), st.integers(-40, 40))
def test_the_oracle_rounds_fma_once(patterns: list[int], nudge: int) -> None:
    a, b, c = (np.array([p], np.uint32).view(np.float32) for p in patterns)
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return
    with np.errstate(all="ignore"):
        product = float(a[0]) * float(b[0])
        # Next to a halfway point between two float32: where rounding twice goes wrong.
        near = np.float32(product * 2.0**nudge) if abs(product) < 2.0**60 else c[0]
    for addend in (c, np.array([near])):
        if not np.isfinite(addend).all():
            continue
        exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(addend[0]))
        got = float(oracle.fma(a, b, addend)[0])
        low, high = (float(np.nextafter(np.float32(got), np.float32(s))) for s in (-np.inf, np.inf))
        limit = Fraction(2) ** 128 - Fraction(2) ** 103
        if np.isinf(got):
            assert abs(exact) >= limit
            continue
        half_up = (Fraction(got) + (Fraction(high) if np.isfinite(high) else 2**128)) / 2
        half_down = (Fraction(got) + (Fraction(low) if np.isfinite(low) else -(2**128))) / 2
        assert half_down <= exact <= half_up
        if exact in (half_up, half_down):
            assert np.float32(got).view(np.uint32) % 2 == 0

"""Bugs planted in the kernels' own source, each killed by a named check that the tests run.

A mutant is a change of a few characters. Its module is executed once more with the change, and
whatever another module has imported from it is replaced. A text that is no longer there fails: the
mutant has to follow the code.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import lowbit as lb
from lowbit import binding, dispatch, kernels
from lowbit.kernels.cpu import arrange, bf16, gemm, isa, packing, pool, steps
from lowbit.kernels.cpu.cases import BFLOAT16, address
from lowbit.testing import assert_within_bound, random_qarray
from lowbit.testing.conformance import (
    SHAPES,
    bounded_products,
    dense_or_quantized,
    documented_order,
    exact_products,
    extreme_integers,
    finished_products,
    independent_rows,
    long_rows,
    long_sums,
    refusal,
    rounded_once,
    same_bits,
    same_when_prepared,
)

# What checks say; an assertion of the generator itself would not count.
KILLED = r"not exact|outside of the bound|numbers differ|came out as|want \["
FMA, BF16, DOT = "matmul.cpu.fma", "matmul.cpu.bf16", "matmul.cpu.dot"


@dataclass(frozen=True)
class Mutant:
    bug: str
    module: str  # below lowbit.kernels
    changes: tuple[tuple[str, str], ...]
    check: Callable[..., object]
    arguments: tuple[str, ...]
    isa: str | None = None  # only there; else on what this machine runs


def change(bug, module, old, new, check, *arguments):
    return Mutant(bug, module, ((old, new),), check, arguments)


def on_amx(*arguments):
    return replace(change(*arguments), isa="amx")


def poisoned(check, *arguments):
    """A check whose every tile finds NaN in its scratch memory."""

    def run(entry, argument, tiles, scratch=0, threads=None):
        kinds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
        tile = ctypes.CFUNCTYPE(None, *kinds)(entry)
        for number in range(tiles):
            memory = np.full(scratch + 64, 0xFF, np.uint8)
            tile(argument, number, address(memory) + -address(memory) % 64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "run", run)
        check(*arguments)


def exact_products_in_poisoned_memory(*arguments):
    poisoned(exact_products, *arguments)


def quantized_inside(kernel, w_format, x_format):
    """Quantizing x on the way gives the bits of quantizing it first."""
    for m, n, k in SHAPES:
        x, w = dense_or_quantized("float32", m, k), random_qarray(w_format, n, k)
        first = lb.matmul(lb.quantize(x, x_format), w.T, kernel=kernel)
        same_bits(lb.matmul(x, w.T, x_format=x_format, kernel=kernel), first)


def ragged_rows_in_poisoned_memory(kernel, m):
    """A second tile that lacks granules, in memory that nobody has written."""

    def check():
        x, w = dense_or_quantized("bfloat16", int(m), 36), random_qarray("int4_g32", 17, 36)
        assert_within_bound(lb.matmul(x, w.T, kernel=kernel), x, w.T, kernel=kernel)

    poisoned(check)


def tiny_products(kernel):
    """Numbers that are subnormal, within the bound."""
    x = np.full((1, 64), 2.0**-127, np.float32).astype(BFLOAT16)
    w = lb.from_parts("int8_row", np.ones((1, 64), np.int8), np.ones((1, 1), np.float32))
    assert_within_bound(lb.matmul(x, w.T, kernel=kernel), x, w.T, kernel=kernel)


MUTANTS = (
    # Words to operands.
    change(
        "nibble order swapped", "cpu.steps",
        "f.module).emit(f, word, cell * s)", "f.module).emit(f, word, cell * (s ^ 1))",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "nibble order swapped in integer sums", "cpu.steps",
        'f.op("lshr", word, s * cell) if s else word', 'f.op("lshr", word, (s ^ 1) * cell)',
        exact_products, DOT, "uint4_g64_asym", "int8_row",
    ),
    change(
        "nibble order swapped in pairs", "cpu.steps",
        "word, cell * s, zeros, scale)", "word, cell * (s ^ 1), zeros, scale)",
        exact_products, BF16, "int4_g32", "bfloat16",
    ),
    change(
        "order of x in a granule", "cpu.steps",
        "for shift in range(shifts)\n            for part",
        "for shift in reversed(range(shifts))\n            for part",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "planes of a code exchanged", "cpu.steps",
        "for width in self.cells:", "for width in reversed(self.cells):",
        same_when_prepared, FMA, "int7_g32",
    ),
    change(
        "halves of a pair exchanged", "cpu.steps",
        'f.op("or", f.op("lshr", f.bits(low, INT), 16), f.bits(high, INT))',
        'f.op("or", f.op("lshr", f.bits(high, INT), 16), f.bits(low, INT))',
        exact_products, BF16, "uint4_g64_asym", "bfloat16",
    ),
    change(
        "zero point not taken off", "cpu.steps",
        'yield value if zeros is None else f.op("fsub", value, zeros)', "yield value",
        exact_products, FMA, "uint4_g64_asym",
    ),
    on_amx(
        "sign of 4-bit codes in tiles", "cpu.steps",
        "extend = self.tiles_signed and bits < 8", "extend = False",
        exact_products, DOT, "int4_g32", "int8_row",
    ),
    Mutant(
        "vpmaddubsw saturates", "cpu.steps",
        (('isa.dot == "pmaddubsw" and spec.element.bits == 8', 'isa.dot == ""'),),
        extreme_integers, (DOT, "int8_row"), "avx2",
    ),
    on_amx(
        "scales of one half of a pair", "cpu.steps",
        'f.op("or", f.op("and", power, 0xFFFF), f.op("shl", power, 16))',
        'f.op("and", power, 0xFFFF)',
        exact_products, BF16, "mxfp4", "bfloat16",
    ),
    on_amx(
        "zeros become powers of two", "cpu.steps",
        "f.select(some, moved, held)", "moved",
        exact_products, BF16, "mxfp4", "bfloat16",
    ),
    change(
        "sign of -8 lost", "cpu.decode",
        "    assert isinstance(element, Element)\n    for choose",
        "    from lowbit.formats.declare import codebook\n"
        "    element = codebook('lost', [8.0 if v == -8 else v for v in element.values])\n"
        "    for choose",
        exact_products, FMA, "int4_g32",
    ),
    # Packing.
    change(
        "transposed scale tile", "layouts",
        "padded.reshape(panels, PANEL, count).transpose(0, 2, 1)",
        "padded.reshape(panels, count, PANEL)",
        same_when_prepared, FMA, "int4_g32",
    ),
    change(
        "words of two panels exchanged", "cpu.packing",
        "first = f.mul(number, PANEL)", 'first = f.mul(f.op("udiv", number, 2), PANEL)',
        same_when_prepared, FMA, "int4_g32",
    ),
    change(
        "planes exchanged", "cpu.packing", "low += width", "low += 1",
        same_when_prepared, FMA, "int7_g32",
    ),
    change(
        "a code across two words of the stream", "cpu.packing",
        'codes = f.op("or", codes, _shifted(f, stream[word + 1], 32 - place))', "pass",
        same_when_prepared, FMA, "int3_g32",
    ),
    change(
        "last row of w replaced", "cpu.pack",
        'row = f.least(f.add(first, loop.index), f.op("sub", count, 1))',
        'row = f.op("urem", f.add(first, loop.index), f.op("sub", count, 1))',
        exact_products, FMA, "int4_4x32_asym",
    ),
    change(
        "bfloat16-rounded scales", "cpu.pack",
        "number = decode.emit(f, word, 0)",
        "number = decode.emit(f, word, 0)\n"
        '        number = f.bits(f.op("and", f.bits(number, INT), -65536), number.type)',
        bounded_products, FMA, "int4_g32",
    ),
    # x.
    change(
        "padding columns of x are not zero", "cpu.arrange",
        "f.store(constant(INT, 0), f.at(to, offset), 1)",
        "f.store(constant(INT, 0x01010101), f.at(to, offset), 1)",
        exact_products, DOT, "int4_g32", "int8_row",
    ),
    change(
        "sums of x without w's offset", "cpu.product",
        "self.factor = steps.offset if self.summed and spec.zero is None else 1",
        "self.factor = 1",
        exact_products, DOT, "int4_g32", "int8_row",
    ),
    change(
        "scale of x's first block for all", "cpu.arrange",
        "f.at(scales, f.mul(loop.index, 4)),", "scales,",
        quantized_inside, DOT, "int4_g32", "int8_g32",
    ),
    change(
        "codes of x's first block for all", "cpu.arrange",
        "            f.at(codes, first),", "            codes,",
        quantized_inside, DOT, "int4_g32", "int8_g32",
    ),
    change(
        "block biases without x's scale", "cpu.product",
        "sums *= np.repeat(scales[: p.m], repeat, axis=1)[:, : sums.shape[1]]", "pass",
        exact_products, FMA, "int4_g32_bias", "int8_row",
    ),
    change(
        "tensor scale of one operand only", "cpu.product",
        "operands.second_level(x, second)", "operands.second_level(second)",
        exact_products, FMA, "nvfp4", "nvfp4",
    ),
    # Blocks.
    change(
        "last k dropped", "cpu.gemm",
        "-(-k * spec.element.bits // 8)", "-(-(k - 1) * spec.element.bits // 8)",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "int32 overflow of K", "cpu.gemm", "return (2**31 - 1) //", "return 2**40 //",
        long_sums, DOT, "int8_row",
    ),
    change(
        "wrong group's scale", "segments",
        "else block // segment", "else block // segment + 1",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "wrong group's scale of x", "cpu.micro",
        'f.op("udiv", segment, self.values["x_block"])',
        'f.op("udiv", segment, f.add(self.values["x_block"], 1))',
        exact_products, DOT, "int8_row", "int8_g32",
    ),
    change(
        "scale of a stretch's first group for all", "cpu.micro",
        'f.op("sub", outer.index, start)', 'f.op("sub", outer.index, outer.index)',
        exact_products, FMA, "int4_g32",
    ),
    change(
        "zero point off by one", "cpu.program",
        "offset = self.steps.offset", "offset = self.steps.offset + 1",
        exact_products, DOT, "int4_g32_asym", "int8_row",
    ),
    change(
        "zero point of the wrong group, decoded for many rows", "cpu.unroll",
        'within = f.op("sub", loop.index, start)', 'within = f.op("sub", start, start)',
        exact_products, FMA, "int4_g32_asym",
    ),
    on_amx(
        "zero point of the wrong group, decoded for few rows", "cpu.tiles",
        'zeros = [self._block("zeros", within, p, FLOAT)',
        'zeros = [self._block("zeros", f.op("sub", within, within), p, FLOAT)',
        exact_products, BF16, "int4_g32_asym", "bfloat16",
    ),
    on_amx(
        "folded scale of the wrong group, decoded for many rows", "cpu.unroll",
        'f.mul(f.op("sub", own.index, block), ROW)', 'f.mul(f.op("sub", block, block), ROW)',
        exact_products, BF16, "mxfp4", "bfloat16",
    ),
    on_amx(
        "folded scale of the wrong group, decoded for few rows", "cpu.tiles",
        'f.mul(f.op("sub", block, first), ROW)', 'f.mul(f.op("sub", first, first), ROW)',
        exact_products, BF16, "mxfp4", "bfloat16",
    ),
    # Sums.
    change(
        "accumulation with the digits of float16", "cpu.tile",
        "return f.fma(x, w, total)",
        'return f.bits(f.op("and", f.bits(f.fma(x, w, total), INT), -(2**13)), FLOAT)',
        bounded_products, FMA, "int4_g32",
    ),
    change(
        "two roundings where one is promised", "cpu.tile",
        "return f.fma(x, w, total)",
        'return f.fma(x, w, total) if self.rows > 1 else f.op("fadd", f.op("fmul", x, w), total)',
        independent_rows, FMA, "nf4",
    ),
    change(
        "scales applied in another order", "cpu.micro",
        'f.fma(x_scale, f.op("fmul", scale, each), total)',
        'f.fma(scale, f.op("fmul", x_scale, each), total)',
        documented_order, DOT, "int4_g32",
    ),
    change(
        "sums carried over are lost", "cpu.micro",
        'fresh = f.compare("eq", at, begin)', 'fresh = f.compare("sge", at, begin)',
        long_rows, FMA, "int8_row",
    ),
    change(
        "carried sums are not loaded again", "cpu.tile",
        "f.either(fresh, lambda: nothing, self._resume)",
        "f.either(fresh, lambda: nothing, lambda: nothing)",
        long_rows, FMA, "int8_row",
    ),
    on_amx(
        "carried tiles are not loaded again", "cpu.tiles",
        "f.either(fresh, clear, resume)", "f.either(fresh, clear, clear)",
        long_rows, BF16, "int4_row", "bfloat16",
    ),
    change(
        "stale padding row", "cpu.program",
        "with f.loop(0, f.mul(tall, GROUP)) as loop:",
        'with f.loop(0, f.mul(f.op("sub", tall, 1), GROUP)) as loop:',
        exact_products_in_poisoned_memory, FMA, "int4_g32",
    ),
    # Tiles.
    Mutant(
        "a step of every tile is left out", "cpu.tiles",
        (("[4 * steps] * 2", "[4 * steps - 4] * 2"), ("+ [steps] * 2", "+ [steps - 1] * 2")),
        exact_products, (BF16, "int4_g32", "bfloat16"), "amx",
    ),
    on_amx(
        "tiles have a row less than x", "cpu.tiles",
        "rows = [tall] * 6", "rows = [max(1, tall - 1)] * 6",
        exact_products_in_poisoned_memory, DOT, "int4_row", "int8_row",
    ),
    on_amx(
        "a tile is decoded over one in use", "cpu.tiles",
        'f.op("and", index, 3)', 'f.op("and", index, 1)',
        exact_products, BF16, "int4_g32", "bfloat16",
    ),
    on_amx(
        "a tile's padding is not zeroed", "cpu.unroll",
        "f.store(constant(INT, 0), f.at(to, f.mul(rest.index, VECTOR)), 64)", "pass",
        ragged_rows_in_poisoned_memory, BF16, "20",
    ),
    on_amx(
        "a single tile's padding is not zeroed", "cpu.tiles",
        "f.store(constant(INT, 0), f.at(to, i * VECTOR), 64)", "pass",
        ragged_rows_in_poisoned_memory, BF16, "5",
    ),
    on_amx(
        "canonical rows are cut into other tiles", "cpu.gemm",
        "whole = layouts.granule(spec.element.bits) // steps.codes", "whole = 1",
        same_when_prepared, BF16, "uint5_row", "bfloat16",
    ),
    # What is promised.
    change(
        "rounded values are not counted", "cpu.bf16",
        "weight=0.0 if exact else 2.0**-8", "weight=0.0",
        bounded_products, BF16, "nf4", "bfloat16",
    ),
    change(
        "numbers taken for zero are not counted", "cpu.bf16",
        "flushed=_SMALLEST * largest", "flushed=0.0",
        tiny_products, BF16,
    ),
    change(
        "differences that are no bfloat16 numbers", "cpu.bf16",
        "farthest <= 256", "farthest <= 512",
        bounded_products, BF16, "uint8_g32_zint8", "bfloat16",
    ),
    # The result.
    change(
        "bias of the first columns for all", "cpu.program",
        'shifted = f.at(a["bias"], f.mul(column, 4))', 'shifted = a["bias"]',
        exact_products, FMA, "int4_g32",
    ),
    change(
        "residual before the activation", "cpu.epilogue",
        "v = activate(f, spec.activation, v)", "v = activate(f, None, v)",
        finished_products, FMA, "int4_g32", "relu",
    ),
    change(
        "float16 ties rounded up", "cpu.epilogue",
        "f.add(size, odd), 0xFFF", "f.add(size, 1), 0xFFF",
        rounded_once, FMA, "int4_g32", "float16",
    ),
)  # fmt: skip


def source(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text()


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> dict[type, tuple[type, ...]]:
    """Plant a bug; gives the classes whose bases were replaced, with the bases they had."""
    module = import_module(f"lowbit.kernels.{mutant.module}")
    text = source(module)
    for old, new in mutant.changes:
        assert text.count(old) == 1, f"{mutant.bug}: {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    turned: dict[type, tuple[type, ...]] = {}
    changed = ModuleType(module.__name__)
    changed.__file__ = module.__file__
    monkeypatch.setitem(sys.modules, module.__name__, changed)
    exec(compile(text, f"{module.__file__} ({mutant.bug})", "exec"), changed.__dict__)
    own = {
        id(each): vars(changed)[name]
        for name, each in vars(module).items()
        if getattr(each, "__module__", module.__name__) == module.__name__
        and not isinstance(each, str | int | ModuleType)
        and not name.startswith("__")
    }
    for name, other in list(sys.modules.items()):
        if name.startswith("lowbit.") and other is not changed:
            for attribute, value in list(vars(other).items()):
                if id(value) in own and other is not module:
                    monkeypatch.setattr(other, attribute, own[id(value)])
                elif value is module:
                    monkeypatch.setattr(other, attribute, changed)
                elif isinstance(value, type) and not own.keys().isdisjoint(
                    map(id, value.__bases__)
                ):
                    turned.setdefault(value, value.__bases__)
                    value.__bases__ = tuple(own.get(id(each), each) for each in value.__bases__)
    return turned


CACHES = (
    arrange.build, binding.fused, bf16._range, gemm.build, kernels.prepared, kernels.registered,
    packing.packing, packing.unpacking, steps.octets,
)  # fmt: skip


def forget():
    """Nothing that was compiled before is used."""
    for each in CACHES:
        each.cache_clear()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled before is used, nothing compiled here is kept."""
    forget()
    yield lambda: monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    forget()


def on(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant.isa is not None:
        if mutant.isa not in [record.name for record in isa.runnable()]:
            pytest.skip(f"{mutant.bug}: a bug of {mutant.isa} code, which this machine cannot run")
        monkeypatch.setattr(dispatch, "device", lambda: f"cpu:{mutant.isa}")
    if BF16 in mutant.arguments:
        x = np.ones((1, 64), BFLOAT16)
        reason = refusal(BF16, x, random_qarray("int8_row", 1, 64))
        if reason is not None:
            pytest.skip(f"{mutant.bug}: {reason}")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.bug)
def test_a_planted_bug_is_found(mutant, monkeypatch, fresh):
    on(mutant, monkeypatch)
    mutant.check(*mutant.arguments)  # the unchanged kernel passes
    fresh()
    forget()
    turned = plant(mutant, monkeypatch)
    try:
        with pytest.raises(AssertionError, match=KILLED):
            mutant.check(*mutant.arguments)
    finally:
        for each, bases in turned.items():
            each.__bases__ = bases

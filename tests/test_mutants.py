"""Bugs planted in the kernels' own source, each killed by a named check that the tests run.

A mutant is a change of a few characters. Its module is executed once more with the change, and
whatever another module has imported from it is replaced. A text that is no longer there fails: the
mutant has to follow the code.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from lowbit import dispatch, kernels
from lowbit.kernels.cpu import gemm, isa
from lowbit.testing.conformance import (
    bounded_products,
    documented_order,
    exact_products,
    extreme_integers,
    finished_products,
    independent_rows,
    long_rows,
    long_sums,
    rounded_once,
    same_when_prepared,
)

# What checks say; an assertion of the generator itself would not count.
KILLED = r"not exact|outside of the bound|numbers differ|came out as|want \["
FMA, DOT = "matmul.cpu.fma", "matmul.cpu.dot"


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


OCTETS = """a = f.call("llvm.x86.avx2.pmadd.ub.sw", "<16 x i16>", a, b)
            b = constant("<16 x i16>", 1)
            parts.append(f.call("llvm.x86.avx2.pmadd.wd", "<8 x i32>", a, b))"""
SATURATING = (
    ('"pmaddwd": Dot(2, False)', '"pmaddwd": Dot(4, False)'),
    ('f, pairs = self.function, "<32 x i16>"', 'f, pairs = self.function, "<64 x i8>"'),
    ("for start in (0, 16):", "for start in (0, 32):"),
    ("list(range(start, start + 16))", "list(range(start, start + 32))"),
    ('parts.append(f.call("llvm.x86.avx2.pmadd.wd", "<8 x i32>", a, b))', OCTETS),
)

MUTANTS = (
    change(
        "nibble order swapped", "cpu.tile",
        "shift = step * word_bits(", "shift = (step ^ 1) * word_bits(",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "nibble order swapped in integer sums", "cpu.tile",
        "shift = step * word_bits(", "shift = (step ^ 1) * word_bits(",
        exact_products, DOT, "uint4_g64_asym", "int8_row",
    ),
    change(
        "last k dropped", "cpu.gemm",
        "-(-k * spec.element.bits // 8)", "-(-(k - 1) * spec.element.bits // 8)",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "wrong group's scale", "cpu.operands",
        "else block // segment", "else block // segment + 1",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "wrong group's scale of x", "cpu.tile",
        'block = f.op("udiv", segment, self.values["x_block"])',
        'block = f.op("udiv", segment, f.add(self.values["x_block"], 1))',
        exact_products, DOT, "int8_row", "int8_g32",
    ),
    change(
        "transposed scale tile", "layouts",
        "padded.reshape(panels, PANEL, count).transpose(0, 2, 1)",
        "padded.reshape(panels, count, PANEL)",
        same_when_prepared, FMA, "int4_g32",
    ),
    change(
        "last row of w replaced", "cpu.pack",
        'row = f.least(f.add(first, loop.index), f.op("sub", count, 1))',
        'row = f.op("urem", f.add(first, loop.index), f.op("sub", count, 1))',
        exact_products, FMA, "int4_4x32_asym",
    ),
    change(
        "zero point off by one", "cpu.program",
        "offset = stored_offset(self.spec, DOTS[self.module.isa.dot])[1]",
        "offset = stored_offset(self.spec, DOTS[self.module.isa.dot])[1] + 1",
        exact_products, DOT, "int4_g32_asym", "int8_row",
    ),
    change(
        "zero point not taken off", "cpu.tile",
        'operands[p] = f.op("fsub", operands[p], zero)', "operands[p] = operands[p]",
        exact_products, FMA, "uint4_g64_asym",
    ),
    change(
        "sign of -8 lost", "cpu.decode",
        "    assert isinstance(element, Element)\n    for choose",
        "    from lowbit.formats.declare import codebook\n"
        "    element = codebook('lost', [8.0 if v == -8 else v for v in element.values])\n"
        "    for choose",
        exact_products, FMA, "int4_g32",
    ),
    change(
        "accumulation with the digits of float16", "cpu.tile",
        "return f.fma(x, w, total)",
        'return f.bits(f.op("and", f.bits(f.fma(x, w, total), INT), -(2**13)), FLOAT)',
        bounded_products, FMA, "int4_g32",
    ),
    change(
        "bfloat16-rounded scales", "cpu.pack",
        "number = decode.emit(f, word, 0)",
        "number = decode.emit(f, word, 0)\n"
        '        number = f.bits(f.op("and", f.bits(number, INT), -65536), number.type)',
        bounded_products, FMA, "int4_g32",
    ),
    change(
        "stale padding row", "cpu.program",
        "with f.loop(0, f.mul(rows, GROUP)) as loop:",
        'with f.loop(0, f.mul(f.op("sub", rows, 1), GROUP)) as loop:',
        exact_products, FMA, "int4_g32",
    ),
    change(
        "stale padding columns", "cpu.operands",
        "wide = np.zeros((x.shape[0], width), FLOAT32)",
        "wide = np.full((x.shape[0], width), 7, FLOAT32)",
        exact_products, FMA, "uint4_g64_asym",
    ),
    change(
        "int32 overflow of K", "cpu.gemm",
        "return (2**31 - 1) //", "return 2**40 //",
        long_sums, DOT, "int8_row",
    ),
    Mutant(
        "vpmaddubsw saturates", "cpu.tile", SATURATING, extreme_integers, (DOT, "int8_row"), "avx2"
    ),
    change(
        "scales applied in another order", "cpu.tile",
        'total = f.fma(x_scale, f.op("fmul", scales[p], g), total)',
        'total = f.fma(scales[p], f.op("fmul", x_scale, g), total)',
        documented_order, DOT, "int4_g32",
    ),
    change(
        "two roundings where one is promised", "cpu.tile",
        "return f.fma(x, w, total)",
        'return f.fma(x, w, total) if self.rows > 1 else f.op("fadd", f.op("fmul", x, w), total)',
        independent_rows, FMA, "nf4",
    ),
    change(
        "sums carried over are lost", "cpu.tile",
        'fresh = f.compare("eq", at, begin)', 'fresh = f.compare("sge", at, begin)',
        long_rows, FMA, "int8_row",
    ),
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
    change(
        "words of two panels exchanged", "layouts",
        "np.ascontiguousarray(lanes.transpose(0, 2, 1))",
        "np.ascontiguousarray(lanes.transpose(0, 2, 1)[::-1])",
        same_when_prepared, FMA, "int4_g32",
    ),
    change(
        "block biases without x's scale", "cpu.fma",
        "sums *= scales[:, : sums.shape[1]]", "pass",
        exact_products, FMA, "int4_g32_bias", "int8_row",
    ),
    change(
        "tensor scale of one operand only", "cpu.fma",
        "operands.second_level(x, w)", "operands.second_level(w)",
        exact_products, FMA, "nvfp4", "nvfp4",
    ),
)  # fmt: skip


def source(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text()


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(f"lowbit.kernels.{mutant.module}")
    text = source(module)
    for old, new in mutant.changes:
        assert text.count(old) == 1, f"{mutant.bug}: {text.count(old)} times {old!r}"
        text = text.replace(old, new)
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


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled before is used, nothing compiled here is kept."""
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    caches = (gemm.build, kernels.prepared, kernels.registered)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def on(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant.isa is not None:
        if mutant.isa not in [record.name for record in isa.runnable()]:
            pytest.skip(f"{mutant.bug}: a bug of {mutant.isa} code, which this machine cannot run")
        monkeypatch.setattr(dispatch, "device", lambda: f"cpu:{mutant.isa}")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.bug)
def test_a_planted_bug_is_found(mutant, monkeypatch, fresh):
    on(mutant, monkeypatch)
    mutant.check(*mutant.arguments)  # the unchanged kernel passes
    for cached in (gemm.build, kernels.prepared, kernels.registered):
        cached.cache_clear()
    plant(mutant, monkeypatch)
    with pytest.raises(AssertionError, match=KILLED):
        mutant.check(*mutant.arguments)

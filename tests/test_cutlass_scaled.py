"""Scaled blocks on Blackwell: what is launched, read back from the arguments, computed in NumPy."""

from __future__ import annotations

import gc
import struct
import weakref
from dataclasses import dataclass, replace
from typing import Any

import host
import numpy as np
import pytest
from absence import needs_headers
from computed import DTYPES, aligned, interleaved, placed, quantized
from host import Watching
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import kernels
from lowbit.formats import reference
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import compile, interleave, launch
from lowbit.kernels.cutlass import blackwell, scaled
from lowbit.kernels.cutlass.blackwell import KINDS, Spec

Array = Any
DEVICES = {"cuda:100:148": "Sm100", "cuda:120:170": "Sm120"}
GROUPED = {kind.name for kind in scaled._KINDS if kind.group}
FORMATS = {
    "nvfp4": ("nvfp4",), "mxfp4": ("mxfp4",), "mxfp8": ("mxfp8", "mxfp8_e5m2"),
    "float8_rows": ("fp8_row", "fp8_tensor"),
}  # fmt: skip


class Keeping(Watching):
    """A machine whose stream has memory, as a GPU's has."""

    def __init__(self, name: str) -> None:
        super().__init__(launch.parse(name))
        self.words = np.zeros(1 << 16, np.int32)

    def scratch(self, count: int) -> Any:
        assert count <= self.words.size
        return self.words


@dataclass
class Launched:
    """One launch, computed from nothing but the argument's bytes."""

    spec: Spec
    argument: bytes

    def member(self, path: str) -> Any:
        at, code = blackwell.layout(self.spec).members[path]
        return struct.unpack_from("<" + code, self.argument, at)[0]

    def operand(self, name: str) -> Any:
        return self.member("epilogue.thread." + blackwell.finish(self.spec).operands[name])

    def values(self, name: str, fmt: lb.Format) -> Array:
        """The numbers of the first or second operand, scales of blocks included."""
        bits = KINDS[self.spec.x].bits
        address, k, rows, *rest = host.fields(self.member(f"mainloop.{name}.descriptor"))
        held = host.memory(address, (rows, k * bits // 8), (rest[3], 1), np.uint8)
        codes = held if bits == 8 else np.stack([held & 15, held >> 4], -1).reshape(rows, k)
        found = np.array(fmt.element.values)[codes]
        if not self.spec.group:
            return found
        address = host.fields(self.member(f"mainloop.{name}_scales.descriptor"))[0]
        columns = -(-k // self.spec.group)
        places = interleaved(np.arange(1, rows * columns + 1).reshape(rows, columns))
        ordered = host.memory(address, places.shape, (1,), np.uint8)
        scales = np.zeros(rows * columns, np.uint8)
        scales[places[places > 0] - 1] = ordered[places > 0]
        assert not isinstance(fmt.scale.element, str)
        numbers = np.array(fmt.scale.element.values)[scales].reshape(rows, columns)
        return found * numbers.repeat(self.spec.group, 1)[:, :k]

    def vector(self, name: str, count: int) -> Array:
        address = self.operand(name)
        if not address:
            return np.full(count, self.operand(f"{name}.default"), np.float32)
        return host.memory(address, (count,), (4 * self.operand(f"{name}.step"),), np.float32)

    def factor(self, name: str) -> float:
        address = self.operand(name)
        found = host.memory(address, (1,), (4,), np.float32) if address else [1.0]
        assert self.operand(f"{name}.default") == 1
        return float(found[0])

    def compute(self, x_fmt: lb.Format, w_fmt: lb.Format) -> None:
        """Write the result where the kernel would."""
        names = ("second", "first") if self.spec.turned else ("first", "second")
        x, w = (self.values(*each) for each in zip(names, (x_fmt, w_fmt), strict=True))
        result = self.operand("alpha") * (x @ w.T)
        if self.spec.group:
            result *= self.factor("x_factor") * self.factor("w_factor")
        else:
            result *= np.outer(self.vector("x_scale", len(x)), self.vector("w_scale", len(w)))
        result += self.vector("bias", len(w))
        if self.spec.activation:
            result = np.maximum(result, 0)
        if self.spec.residual:
            dtype = DTYPES[self.spec.residual]
            result += host.read(self.member("epilogue.c.descriptor"), dtype).astype(np.float64)
        out = host.read(self.member("epilogue.d.descriptor"), DTYPES[self.spec.out])
        out[...] = result.astype(out.dtype)


@needs_headers
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_launched_computes_the_product(data: st.DataObject) -> None:
    name, device = (
        data.draw(st.sampled_from(sorted(scaled.FAMILIES))),
        data.draw(st.sampled_from([*DEVICES])),
    )
    device = device if "120" not in device or name in GROUPED else "cuda:100:148"
    formats = [lb.format(data.draw(st.sampled_from(FORMATS[name]))) for _ in range(2)]
    m, n = data.draw(st.integers(1, 300)), 8 * data.draw(st.integers(1, 40))
    k = 32 * data.draw(st.integers(1, 20))
    added, biased = data.draw(st.booleans()), data.draw(st.booleans())
    activation = data.draw(st.sampled_from([None, "relu"]))
    x, w = (
        quantized(str(fmt.name), (rows, k), seed)
        for seed, (fmt, rows) in enumerate(zip(formats, (m, n), strict=True))
    )
    rng = np.random.default_rng(3)
    bias = placed(rng.standard_normal(n, np.float32)) if biased else None
    residual = placed(rng.standard_normal((m, n)).astype(np.float32)) if added else None
    p = Problem(
        m, n, k, x.format, w.format, "float32", biased, activation, "float32" if added else None,
        device=device,
    )  # fmt: skip
    kernel = kernels.choose(p, f"matmul.cutlass.{name}").kernel
    machine, out = Keeping(device), aligned((m, n), np.float32)
    with launch.pretending(machine):
        run = kernel.build(p)(w)
        run(x, Epilogue(-0.75, bias, activation, residual), out)
    *others, (source, grid, argument) = machine.launched
    for _, _, (scales, _, rows, columns, found) in others:
        assert scales.shape == (rows, columns)
        words = interleave.words(rows, columns)
        found[:words].view(np.uint8)[...] = interleaved(scales)
    spec = scaled.FAMILIES[name].spec_of(p)
    assert spec.schedule == DEVICES[device]
    assert source == scaled.source(spec)
    assert len(others) == (2 if spec.group else 0)
    assert all(blocks % size == 0 for blocks, size in zip(grid, spec.cluster, strict=False))
    Launched(spec, argument).compute(x.format, w.format)
    wanted = -0.75 * (reference.dequantize(x) @ reference.dequantize(w).T)
    wanted += 0 if bias is None else bias
    wanted = np.maximum(wanted, 0) if activation else wanted
    wanted += 0 if residual is None else residual
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5 * np.sqrt(k))
    del run  # scales of its own that the argument points to


def problem(name: str = "nvfp4", **changed: Any) -> Problem:
    fmt = lb.format(FORMATS[name][0])
    given: dict[str, Any] = {"m": 512, "n": 512, "k": 512, "x": fmt, "w": fmt, "out": "bfloat16"}
    return Problem(**{**given, "device": "cuda:100:148", **changed})


REFUSALS: dict[str, tuple[str, dict[str, Any]]] = {
    "capabilities 10.0, 12.0, this is 9.0": ("nvfp4", {"device": "cuda:90:132"}),
    "capability 10.0, this is 12.0": ("float8_rows", {"device": "cuda:120:170"}),
    "lowbit's own kernels": ("mxfp8", {"device": "cuda:100:4:plain"}),
    "both sides, x is bfloat16": ("mxfp8", {"x": "bfloat16"}),
    "elements as nvfp4": ("nvfp4", {"w": lb.format("mxfp8")}),
    "scale of float8_e8m0fnu for 32": ("mxfp4", {"x": lb.format("nvfp4")}),
    "scale of float8_e4m3fn for 16": ("nvfp4", {"w": lb.format("mxfp4")}),
    "one float32 scale": ("float8_rows", {"w": lb.format("fp8_g128")}),
    "rows of 528 columns of x": ("nvfp4", {"k": 528}),
    "numbers of the result": ("mxfp8", {"n": 516}),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_is_refused_is_said_why(words: str) -> None:
    name, changed = REFUSALS[words]
    kernel = {k.name: k for k in kernels.registered()}[f"matmul.cutlass.{name}"]
    assert kernel.accepts(problem(name)) is None
    assert words in str(kernel.accepts(problem(name, **changed)))


def test_chosen_by_name_only() -> None:
    for name in scaled.FAMILIES:
        assert "cutlass" not in kernels.choose(problem(name)).kernel.name


def test_few_rows_take_small_tiles() -> None:
    found = [scaled.FAMILIES["mxfp4"].spec_of(problem("mxfp4", m=m, n=8192)) for m in (1, 8192)]
    assert [spec.turned for spec in found] == [True, False]
    assert found[1].tile == (256, 192, 256)


def test_libraries_use_all_of_a_gpu() -> None:
    spec = scaled.FAMILIES["nvfp4"].spec_of(problem(device="cuda:120:170"))
    assert compile.architecture_of(scaled.source(spec), 120) == "sm_120a"
    assert compile.architecture_of(replace(scaled.source(spec), headers=None), 120) == "sm_120"


@needs_headers
def test_what_is_made_of_a_weight_stays() -> None:
    p, w = problem(), quantized("nvfp4", (512, 512), 1)
    machine, made = Keeping(p.device), []

    def empty(shape: Any, dtype: Any) -> Array:
        found = np.empty(shape, dtype)
        made.append(weakref.ref(found))
        return found

    machine.empty = empty  # type: ignore[method-assign]
    with launch.pretending(machine):
        run = kernels.choose(p, "matmul.cutlass.nvfp4").kernel.build(p)(w)
    machine.launched.clear()
    gc.collect()
    assert [each() is not None for each in made] == [True]
    del run

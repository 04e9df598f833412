"""Peers of the GPU sweep on the CPU: what they are given, and what they are checked by.

PyTorch computes where it can on a CPU; tinygemm and GemLite are stood in for by what their sources
say that they mean. What only a device can say: that they mean it, and the layouts that CUDA wants.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lowbit as lb

sys.path[:0] = [str(Path(__file__).parents[1] / "bench")]
contenders = importlib.import_module("peers.gpu")
pytorch = importlib.import_module("peers.gpu.pytorch")
gemlite = importlib.import_module("peers.gpu.gemlite")
checking = importlib.import_module("harness.checking")
work_of = importlib.import_module("harness.gpu_work")
Work, Operands = work_of.Work, work_of.Operands
ROWS = 20


def answer(name: str, work: Any) -> tuple[Any, Any]:
    """What a contender gives with its second copy, checked; and that contender."""
    assert contenders.found()[name].refusal(name, work) is None
    built = contenders.build(name, Operands(work, ROWS, np))
    built.copy()
    found = built.call(built.take(ROWS), 1)
    assert 0 <= built.check(found, ROWS) <= 1
    return found, built


def must_notice(built: Any, found: Any) -> None:
    """An answer with one wrong entry is refused."""
    wrong = found.clone() if isinstance(found, torch.Tensor) else found.copy()
    wrong[-1, -1] += 1 + abs(wrong[-1, -1])
    with pytest.raises(checking.Wrong, match="outside of the bound"):
        built.check(wrong, ROWS)


@pytest.fixture(autouse=True)
def _state() -> Any:
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["torch.dense", "cupy.dense"])
def test_dense_products(name: str, dtype: str) -> None:
    found, built = answer(name, Work(96, 64, dtype, dtype))
    assert built.weight_bytes == 96 * 64 * 2
    must_notice(built, found)


def test_whole_numbers() -> None:
    found, built = answer("torch.int_mm", Work(96, 64, "int8_row", "int8_row"))
    assert (built.least_rows, built.out_bytes) == (17, found.element_size())
    must_notice(built, found)
    found[0, 0] += 1  # exact: one is too many
    with pytest.raises(checking.Wrong):
        built.check(found, ROWS)


@pytest.mark.parametrize("weight", ["fp8_row", "fp8_tensor"])
def test_float8(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_mm(x: Any, w: Any, x_scale: Any, w_scale: Any, **options: Any) -> Any:
        assert w.stride() == (1, 64), "columns of w lie together"
        wanted = ((), ()) if weight == "fp8_tensor" else ((ROWS, 1), (1, 96))
        assert (tuple(x_scale.shape), tuple(w_scale.shape)) == wanted
        assert options == {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return ((x.float() * x_scale) @ (w.float() * w_scale)).to(torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    found, built = answer("torch.scaled_mm", Work(96, 64, weight, weight))
    must_notice(built, found)


def test_tinygemm(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(packed: Any, inner_tiles: int) -> Any:
        assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (96, 128))
        assert packed.is_contiguous()
        return packed

    def multiply(x: Any, packed: Any, group: int, pairs: Any) -> Any:
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(96, 256)
        scale, zero = (p.t().repeat_interleave(group, dim=1) for p in pairs.unbind(-1))
        weight = ((codes.float() - 8) * scale.float() + zero.float()).to(torch.bfloat16)
        return (x.float() @ weight.float().t()).to(torch.bfloat16)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    found, built = answer("torch.tinygemm", Work(96, 256, "int4_g64", "bfloat16"))
    assert built.weight_bytes == 96 * 128 + 96 * 4 * 2 * 2
    must_notice(built, found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gemlite(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    class DType(Enum):
        FP16 = torch.float16
        BF16 = torch.bfloat16

    class GemLiteLinear:
        def __init__(self, **given: Any) -> None:
            self.given = given

        def pack(self, codes: Any, scales: Any, zeros: Any, bias: Any) -> None:
            assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, (96, 128))
            assert (scales.dtype, zeros, bias) == (self.given["input_dtype"].value, 8, None)
            self.W_q, self.scales = codes, scales
            spread = scales.float().repeat_interleave(self.given["group_size"], dim=1)
            self.weight = ((codes.float() - zeros) * spread).to(scales.dtype)

        def __call__(self, x: Any) -> Any:
            assert x.dtype == self.given["input_dtype"].value
            return (x.float() @ self.weight.float().t()).to(x.dtype)

    core: Any = ModuleType("gemlite.core")
    core.DType, core.GemLiteLinear = DType, GemLiteLinear
    monkeypatch.setitem(sys.modules, "gemlite", ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.core", core)
    found, built = answer("gemlite", Work(96, 128, "int4_g64", dtype))
    must_notice(built, found)


def test_int4_codes_become_unsigned() -> None:
    w = lb.quantize(np.arange(-8, 8, dtype=np.float32)[None].repeat(3, 0), "int4_g32")
    codes, scales = pytorch.unsigned4(w)
    values = (codes.numpy().astype(np.float64)[:, :16] - 8) * scales.numpy()
    assert (values == w.dequantize(np.float64)).all()


REFUSALS = (
    ("torch.dense", Work(96, 64, "int4_g32", "bfloat16"), "dense weights only"),
    ("cupy.dense", Work(96, 64, "int4_g32", "bfloat16"), "dense weights only"),
    ("torch.int_mm", Work(96, 64, "int8_row", "bfloat16"), "int8_row times int8_row"),
    ("torch.scaled_mm", Work(96, 64, "fp8_row", "fp8_tensor"), "on both sides"),
    ("torch.tinygemm", Work(96, 128, "int4_g128", "float16"), "wants bfloat16 x"),
    ("torch.tinygemm", Work(96, 128, "int3_g128", "bfloat16"), "wants int4 in groups"),
    ("torch.tinygemm", Work(96, 192, "int4_g64", "bfloat16"), "k divisible by 128"),
    ("gemlite", Work(96, 128, "int4_row", "bfloat16"), "wants int4 in groups"),
    ("gemlite", Work(96, 100, "int4_g64", "bfloat16"), "k divisible by 32"),
    ("gemlite", Work(96, 128, "int4_g64", "float32"), "bfloat16 or float16 x"),
    ("lowbit.rmsnorm", Work(96, 128, "fp8_128x128", "bfloat16"), "between rows"),
    ("lowbit.silu_mul", Work(96, 128, "int1_g32_asym", "bfloat16"), "zero points"),
)


@pytest.mark.parametrize(("name", "work", "why"), REFUSALS, ids=lambda v: str(v))
def test_refusals_are_in_words(name: str, work: Any, why: str) -> None:
    assert why in str(contenders.found()[name].refusal(name, work))


def test_absence_is_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert "sees no CUDA device" in str(pytorch.missing())
    monkeypatch.setattr(pytorch, "find_spec", lambda name: None)
    assert "torch is not installed" in str(pytorch.missing())
    monkeypatch.setattr(gemlite, "find_spec", lambda name: None)
    assert "gemlite is not installed" in str(gemlite.missing())
    assert "there are" in str(contenders.refusal("jax", replace(REFUSALS[0][1])))

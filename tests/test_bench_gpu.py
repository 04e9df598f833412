"""The GPU sweep without a GPU: its cases, bars, clock, report, and a run on a module that pretends.

What only a device can say: whether CUDA's events, pinned memory and the peers' functions are what
the sweep takes them for.
"""

from __future__ import annotations

import importlib
import io
import json
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
measuring = importlib.import_module("harness.gpu_measuring")
records = importlib.import_module("harness.records")
report = importlib.import_module("harness.gpu_report")
roofline = importlib.import_module("harness.roofline")
roofs = importlib.import_module("harness.gpu_roofs")
sections = importlib.import_module("harness.gpu_sections")
sources = importlib.import_module("harness.gpu_sources")
summary = importlib.import_module("harness.report")
targets = importlib.import_module("harness.targets")
work_of = importlib.import_module("harness.gpu_work")

Entrant, Group, Row, Work = records.Entrant, records.Group, records.Row, work_of.Work
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


# A run on a module that pretends


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("event")

    def synchronize(self) -> None:
        self.log.append("wait")


class Lost(Exception):
    pass


class Fake:
    """NumPy under CuPy's name; writes down what it is asked for. Every batch takes 3 ms."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lost = False
        self.word = np.zeros(4, np.uint8)
        memory = self.word.view(np.int32)

        class Pinned(np.ndarray):
            ptr = 4096

        self.held: list[int] = []

        def kernel(code: str, name: str) -> Any:
            def launch(grid: Any, block: Any, arguments: Any) -> None:
                self.log.append(name)
                self.held.append(int(memory[0]))

            return launch

        def synchronize() -> None:
            if self.lost:
                raise Lost("cudaErrorIllegalAddress")

        self.RawKernel = kernel
        self.RawModule = lambda code: SimpleNamespace(get_function=lambda name: kernel("", name))
        facts = {
            "name": b"NVIDIA Pretender", "major": 9, "minor": 0, "multiProcessorCount": 4,
            "l2CacheSize": 1 << 20, "totalGlobalMem": 1 << 30,
        }  # fmt: skip
        self.cuda = SimpleNamespace(
            Event=lambda: Event(self.log),
            get_elapsed_time=lambda start, end: 3.0,
            alloc_pinned_memory=lambda size: self.word[:size].view(Pinned),
            runtime=SimpleNamespace(
                deviceSynchronize=synchronize,
                CUDARuntimeError=Lost,
                getDeviceProperties=lambda index: facts,
                driverGetVersion=lambda: 13000,
                runtimeGetVersion=lambda: 13000,
            ),
        )

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_all_blocks=lambda: self.log.append("free"))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def test_calls_are_enqueued_while_the_gpu_is_held() -> None:
    fake = Fake()
    clock = clocks.Clock(fake)
    seconds = clock.batch(lambda i: fake.log.append(f"call {i}"), 3)
    assert fake.log == ["hold", "event", "call 0", "call 1", "call 2", "event", "wait"]
    assert seconds == pytest.approx(1e-3)
    assert fake.held == [0]
    assert fake.word.view(np.int32)[0] == 1, "released"
    with pytest.raises(ZeroDivisionError):
        clock.batch(lambda i: 1 // 0, 1)
    assert fake.word.view(np.int32)[0] == 1, "a call that fails leaves nothing held"


def test_a_lost_device_is_told_apart() -> None:
    fake = Fake()
    clock = clocks.Clock(fake)
    assert clock.host(lambda i: None, 2) >= 0
    fake.lost = True
    with pytest.raises(clocks.Broken, match="cudaErrorIllegalAddress"):
        clock.synchronize()


def built(log: list[str], name: str, share: float = 0.5, **changes: Any) -> Any:
    def check(answer: Any, m: int) -> float:
        log.append(f"check {name} {m}")
        if share > 1:
            raise checking.Wrong("y[0, 0]")
        return share

    made = contenders.Built(
        weight_bytes=100,
        copy=lambda: log.append(f"copy {name}"),
        take=lambda m: m,
        call=lambda m, i: log.append(f"{name}{i}"),
        check=check,
    )
    return replace(made, **changes)


def running(fake: Fake, pace: Any, **made: Any) -> Any:
    entrants = [Entrant(name, SMALL) for name in made]
    group = Group("section", tuple(tuple((e, m) for e in entrants) for m in (1, 20)))
    return group, measuring.Running(
        group,
        pace,
        clocks.Clock(fake),
        fake,
        build=lambda name, operands: made[name],
        refusal=lambda name, work: "no wheel" if made[name] is None else None,
    )


PACE = measuring.Pace(seconds=0.002, rounds=2, rotate=250, most_copies=8)


def test_contenders_are_checked_then_alternate_and_rotate_their_copies() -> None:
    fake = Fake()
    group, found = running(fake, PACE, a=built(fake.log, "a"), b=built(fake.log, "b"), c=None)
    assert fake.log == ["copy a", "copy a", "copy b", "copy b"]  # 250 bytes of 100 each
    del fake.log[:]
    rows = found.turn(group.turns[0])
    calls = [word for word in fake.log if word not in ("hold", "event", "wait")]
    # Each copy once for the pilot, which says 1 ms a call: two calls fill a round of 2 ms.
    pilot = ["a0", "a1", "a2", "b0", "b1", "b2"]
    rounds = ["a0", "a1", "b0", "b1", "a2", "a0", "b2", "b0"]
    assert calls == ["a0", "check a 1", "b0", "check b 1", *pilot, *rounds]
    assert [r.note for r in rows] == ["", "", "absent: no wheel"]
    assert [len(r.times) for r in rows] == [2, 2, 0]
    assert (rows[0].share_of_bound, rows[0].rotated, rows[0].weight_bytes) == (0.5, 300, 100)


def test_what_is_wrong_or_fails_is_not_timed() -> None:
    fake = Fake()

    def fails(m: int, i: int) -> None:
        raise RuntimeError("no kernel image")

    group, found = running(
        fake, PACE, a=built(fake.log, "a", share=2.0), b=built(fake.log, "b", call=fails),
        c=built(fake.log, "c", least_rows=17), d=built(fake.log, "d"),
    )  # fmt: skip
    notes = [r.note for r in found.turn(group.turns[0])]
    assert notes == [
        "wrong: y[0, 0]",
        "failed: RuntimeError: no kernel image",
        "absent: wants at least 17 rows",
        "",
    ]
    assert [bool(r.times) for r in found.turn(group.turns[1])] == [False, False, True, True]


def test_a_contender_that_loses_the_device_is_named() -> None:
    fake = Fake()

    def fails(m: int, i: int) -> None:
        fake.lost = True
        raise Lost("illegal address")

    group, found = running(fake, PACE, a=built(fake.log, "a", call=fails))
    with pytest.raises(clocks.Broken, match=r"^a int4_g32 .* with M = 1: cudaErrorIllegalAddress"):
        found.turn(group.turns[0])


def test_no_turn_begins_after_the_deadline() -> None:
    fake = Fake()
    late = replace(PACE, deadline=0.0)
    group, found = running(fake, late, a=built(fake.log, "a"))
    (only,) = found.turn(group.turns[0])
    assert (only.note, only.times) == ("left out: no time left", [])


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 97), (300, 64), (5000, 1000)])
def test_spots_meet_every_part_of_an_answer(m: int, n: int) -> None:
    few_rows, few_columns = work_of.spots(m, n)
    assert set(few_rows.columns // 64) == set(range(-(-n // 64)))
    for part in (few_rows, few_columns):
        assert {0, m - 1} <= set(part.rows) <= set(range(m))
        assert {0, n - 1} <= set(part.columns) <= set(range(n))
    assert np.diff(few_columns.rows).max(initial=0) <= 2 * -(-m // 256)
    assert (work_of.spots(7, n)[0].columns == few_rows.columns).all()


@pytest.mark.parametrize("weight", ["int8_row", "fp8_g32"])
@pytest.mark.parametrize("step", ["quantize", "dequantize", "silu_mul", "rmsnorm"])
def test_conversions_are_right_in_the_emulator(emulator: Any, step: str, weight: str) -> None:
    operands = work_of.Operands(Work(5, 96, weight, "bfloat16"), 5, np)
    with launch.pretending(emulator):
        made = contenders.build(f"lowbit.{step}", operands)
        answer = made.call(made.take(5), 0)
        assert 0 <= made.check(answer, 5) <= 1
    scales = 1 if weight == "int8_row" else 3  # float32, of a row
    others = {"quantize": 1, "dequantize": 1, "silu_mul": 2, "rmsnorm": 3}[step]
    assert made.moved(5) == 5 * (others * 96 * 2 + 96 + scales * 4)
    damaged = answer if step == "dequantize" else (answer[0] if step == "rmsnorm" else answer).parts
    victim = damaged if step == "dequantize" else damaged.codes
    victim.view(np.uint8)[3, 7] ^= 0x40
    with launch.pretending(emulator), pytest.raises(checking.Wrong):
        made.check(answer, 5)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """lowbit on the CPU and a dense product of NumPy, under the names of the GPU's contenders."""
    fake = Fake()
    ours = Entrant("lowbit", SMALL)
    dense = Entrant("cupy.dense", Work(96, 64, "bfloat16", "bfloat16"))
    whole = Entrant("lowbit", Work(96, 64, "int8_row", "int8_row"))
    one = Group("weights", (((ours, 3), (dense, 3)),), (records.Faster("cupy.dense", 0.5),))
    two = Group("both", (((whole, 5),),), (records.Within(7e-6),))
    three = Group("dispatch", (((Entrant("lowbit.plan", SMALL), 1),),), (records.Within(1.0),))
    monkeypatch.setattr(
        gpu, "SECTIONS", {"one": lambda choice: [one, two], "two": lambda choice: [three]}
    )
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(device, "query", lambda field: "some")
    monkeypatch.setattr(sources, "compiled", lambda points, device: f"for {device.name}")
    monkeypatch.setattr(roofs, "BYTES", 1 << 10)
    monkeypatch.setattr(roofs, "SIDE", 64)
    monkeypatch.setattr(roofs, "DENSE", {"bf16": (dense,)})
    monkeypatch.setattr(contenders.found()["cupy.dense"], "missing", lambda: None)
    monkeypatch.setattr(contenders.found()["cupy.dense"], "version", lambda: "numpy")
    return fake


def run(fake: Fake, *arguments: str) -> dict[str, Any]:
    options = gpu.parser().parse_args(["--sections", "one,two", "--date", "a day", *arguments])
    gpu.Run(options, gpu.chosen(options), fake).all()
    path = gpu.RESULTS / "gpu-pretender.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_run_checks_times_judges_and_writes(
    pretended: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(pretended)
    assert record["date"] == "a day"
    assert record["machine"]["card"] == "NVIDIA Pretender"
    assert record["machine"]["cuda"] == {"driver": "13.0", "runtime": "13.0"}
    assert set(record["clocks"]) == {"before", "after"}
    assert (record["groups_done"], record["groups"]) == (3, 3)
    assert record["roofs"]["copy"] == pytest.approx(2 * 1024 / 3e-3)
    timed = [each for each in record["rows"] if each["section"] != "roofs"]
    assert [each["name"] for each in timed] == ["lowbit", "cupy.dense", "lowbit", "lowbit.plan"]
    for each in timed:
        assert each["note"] == ""
        assert 0 <= each["share_of_bound"] <= 1
        assert len(each["times"]) == 7
    assert [v["met"] for v in record["verdicts"]] == [True, False, True]
    assert record["verdicts"][1]["said"].startswith("missed")
    text = capsys.readouterr().out
    assert "for cuda:90:4\n" in text
    assert "missed" in text
    assert "torch.dense was not measured: torch" in text


def test_a_wrong_kernel_is_not_timed(pretended: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    true = lb.plan

    def wrong(x: Any, w: Any, *, out: Any, **options: Any) -> Any:
        plan = true(x, w, out=out, **options)

        def call(x: Any) -> Any:
            plan(x)
            out[-1, -1] += 1
            return out

        return call

    monkeypatch.setattr(lb, "plan", wrong)
    rows = [each for each in run(pretended)["rows"] if each["name"].startswith("lowbit")]
    assert {each["note"].partition(":")[0] for each in rows} == {"wrong"}
    assert all(each["times"] == [] for each in rows)


def test_a_run_goes_on_in_a_new_process_when_the_device_is_lost(
    pretended: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        commands.append(command)
        raise KeyboardInterrupt  # a new process would come back from nothing

    monkeypatch.setattr(gpu.os, "execv", execv)
    true = measuring.Running.turn

    def turn(self: Any, turn: Any) -> Any:
        if self.group.section == "both":
            raise clocks.Broken("lowbit: an illegal address")
        return true(self, turn)

    monkeypatch.setattr(measuring.Running, "turn", turn)
    with pytest.raises(KeyboardInterrupt):
        run(pretended)
    path = gpu.RESULTS / "gpu-pretender.json"
    assert json.loads(path.read_text())["groups_done"] == 2
    assert commands[0][-2:] == ["--resume", str(path)]
    monkeypatch.setattr(measuring.Running, "turn", true)
    record = run(pretended, "--resume", str(path))
    rows = {each["section"]: each for each in record["rows"]}
    assert rows["both"]["note"] == "failed: the device was lost to lowbit: an illegal address"
    assert rows["weights"]["times"]
    assert rows["dispatch"]["times"]
    assert record["groups_done"] == 3

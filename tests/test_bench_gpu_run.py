"""The GPU sweep's clock, its turns and a whole run, on a module that pretends to be CuPy.

What only a device can say: whether CUDA's events and pinned memory are what the clock takes them
for.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lowbit as lb
from lowbit.kernels.cuda import launch

sys.path[:0] = [str(Path(__file__).parents[1] / "bench")]
gpu = importlib.import_module("gpu")
contenders = importlib.import_module("peers.gpu")
checking = importlib.import_module("harness.checking")
clocks = importlib.import_module("harness.gpu_clock")
device = importlib.import_module("harness.gpu_device")
measuring = importlib.import_module("harness.gpu_measuring")
records = importlib.import_module("harness.records")
roofs = importlib.import_module("harness.gpu_roofs")
sources = importlib.import_module("harness.gpu_sources")
work_of = importlib.import_module("harness.gpu_work")

Entrant, Group, Work = records.Entrant, records.Group, work_of.Work
SMALL = Work(96, 64, "int4_g32", "bfloat16")


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


def test_a_first_run_collects_what_a_device_has_to_show() -> None:
    """Without the project's own settings, and with no more folders than the script names."""
    root = Path(__file__).parents[1]
    script = (root / "bench" / "gpu_first.sh").read_text()
    (found,) = (line for line in script.splitlines() if line.startswith("mapfile"))
    folders = "src:tests/emulator"
    assert f'PYTHONPATH="{":".join(f"$PWD/{each}" for each in folders.split(":"))}' in script
    command = (
        f'{found}; PYTHONPATH={folders} "{sys.executable}" -P -m pytest -q -m gpu --collect-only '
        '-c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider "${tests[@]}"'
    )
    run = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    collected = {line.partition("::")[0] for line in run.stdout.splitlines() if "::" in line}
    marked = ("cuda_primitives", "cuda_sm90", "cutlass_gpu", "gpu_arrays", "gpu_quantize")
    assert collected == {f"tests/test_{name}.py" for name in marked}

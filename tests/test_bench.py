"""The benchmark's own logic: nothing here is timed, and no peer has to be installed."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lowbit as lb
from lowbit.kernels.cpu import isa as isas
from lowbit.kernels.cpu import native

sys.path[:0] = [str(Path(__file__).parents[1] / "bench")]
cpu = importlib.import_module("cpu")
roofs = importlib.import_module("roofs")
peers = importlib.import_module("peers")
checking = importlib.import_module("harness.checking")
measuring = importlib.import_module("harness.measuring")
processes = importlib.import_module("harness.processes")
records = importlib.import_module("harness.records")
report = importlib.import_module("harness.report")
sections = importlib.import_module("harness.sections")
targets = importlib.import_module("harness.targets")
work_of = importlib.import_module("harness.work")
worker = importlib.import_module("harness.worker")

Work, Operands = work_of.Work, work_of.Operands
SMALL = Work(96, 64, "int4_g32")
ROOFS = targets.Roofs(2, read=1e9, copy=2e9, operations={"int8_dot": 1e12})


def row(name: str = "lowbit", m: int = 1, seconds: float = 1e-3, **changes: Any) -> Any:
    made = records.Row("section", name, SMALL, m, 2, times=[seconds], weight_bytes=850_000)
    return replace(made, **changes)


# The command line


def test_lists_are_read() -> None:
    assert cpu.shapes("4096x4096,97x32") == ((4096, 4096), (97, 32))
    assert cpu.numbers("1,16") == (1, 16)
    assert cpu.names("a,b") == ("a", "b")


@pytest.mark.parametrize("text", ["4096", "4096x", "0x32", "1x2x3", "-1x4"])
def test_shapes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="want NxK"):
        cpu.shapes(text)


def test_no_rows_are_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 up"):
        cpu.numbers("0,4")


def chosen(*arguments: str) -> Any:
    options = cpu.parser().parse_args(arguments)
    return cpu.chosen(options), options


def test_only_a_whole_run_replaces_the_committed_results() -> None:
    assert chosen()[1].json == cpu.RESULTS / "cpu.json"
    for part in (["--quick"], ["--rows", "1"], ["--sections", "growth"], ["--peers", "mlx"]):
        assert chosen(*part)[1].json is None


def test_peers_are_chosen_by_how_their_names_begin() -> None:
    groups, _ = chosen("--sections", "int4xint8", "--quick", "--peers", "ggml.q4_0")
    found = {e.name for group in groups for e in group.entrants}
    assert found == {"lowbit", "ggml.q4_0.plain", "ggml.q4_0.repack", "ggml.q4_0.amx"}
    groups, _ = chosen("--sections", "int4xint8", "--quick", "--peers", "none")
    assert {e.name for group in groups for e in group.entrants} == {"lowbit"}


@pytest.mark.parametrize("arguments", [["--sections", "int5"], ["--peers", "torchy"]])
def test_unknown_names_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="there are"):
        chosen(*arguments)


# What is measured


@pytest.mark.parametrize("name", sections.SECTIONS)
@pytest.mark.parametrize("quick", [False, True])
def test_sections_name_what_exists(name: str, quick: bool) -> None:
    for group in sections.SECTIONS[name](sections.Choice(quick=quick)):
        assert group.section == name
        assert group.targets
        present = {entrant.name for entrant in group.entrants}
        assert present <= set(peers.found())
        measured = {(e, m) for turn in group.turns for e, m in turn}
        for entrant in group.entrants:
            lb.format(entrant.work.weight)
            assert entrant.work.inner is None or lb.format(entrant.work.inner)
        for target in group.targets:
            if isinstance(target, records.Faster):
                assert target.peer in present
            if isinstance(target, records.Beside):
                assert (target.entrant, target.m) in measured
                assert (target.other, target.other_m) in measured


def test_every_peer_of_the_issue_is_measured_somewhere() -> None:
    everywhere = {
        entrant.name
        for section in sections.SECTIONS.values()
        for group in section(sections.Choice())
        for entrant in group.entrants
        if peers.found()[entrant.name].refusal(entrant.name, entrant.work) is None
    }
    assert everywhere >= set(peers.found()) - {"torch.float32"}


def test_a_group_says_how_many_rows_an_entrant_needs() -> None:
    small, large = records.Entrant("lowbit", SMALL), records.Entrant("lowbit", SMALL, threads=1)
    group = records.Group("section", (((small, 4), (large, 9)), ((small, 2),)))
    assert group.entrants == [small, large]
    assert (group.rows(small), group.rows(large)) == (4, 9)


# Targets


def verdict(target: Any, *rows: Any) -> Any:
    (found,) = targets.judge([target], rows, {2: ROOFS})
    return found


def test_faster_compares_medians_of_the_same_rows() -> None:
    peer = row("peer", times=[5e-3, 2.9e-3, 2e-3])
    assert verdict(records.Faster("peer", 2.9), row(), peer).met
    missed = verdict(records.Faster("peer", 3), row(), peer)
    assert (missed.ratio, missed.met) == (pytest.approx(2.9), False)
    assert not targets.judge([records.Faster("peer", 1)], [row(), row("peer", m=2)], {2: ROOFS})
    assert not targets.judge([records.Faster("peer", 1, first=2)], [row(), peer], {2: ROOFS})
    assert not targets.judge([records.Faster("peer", 1, last=0)], [row(), peer], {2: ROOFS})


def test_the_bandwidth_is_enough_where_a_peer_is_at_it_too() -> None:
    # 850 kB in 1 ms are 85 % of 1 GB/s.
    assert verdict(records.Faster("peer", 3, bandwidth=0.85), row(), row("peer")).enough
    assert not verdict(records.Faster("peer", 3, bandwidth=0.86), row(), row("peer")).met
    assert not verdict(records.Faster("peer", 3), row(), row("peer")).met


def test_shares_of_roofs() -> None:
    assert verdict(records.Reaches("read", 0.85), row()).ratio == pytest.approx(0.85)
    busy = row(m=10_000)
    share = 2 * 10_000 * 96 * 64 / 1e-3 / 1e12
    assert verdict(records.Reaches("int8_dot", 0.1), busy).ratio == pytest.approx(share)
    assert verdict(records.Reaches("copy", 0.5), row(moved=10**6)).ratio == pytest.approx(0.5)
    # A peak that this machine has not says nothing.
    assert not targets.judge([records.Reaches("amx_int8", 0.1)], [busy], {2: ROOFS})


@pytest.mark.parametrize(("per", "ratio"), [("call", 0.5), ("byte", 0.25), ("operation", 1.0)])
def test_rows_beside_each_other(per: str, ratio: float) -> None:
    other = Work(96, 128, "int4_g32")
    half = row(work=other, m=1, seconds=2e-3, weight_bytes=425_000)
    target = records.Beside(
        records.Entrant("lowbit", other), records.Entrant("lowbit", SMALL), per, 0.9, 1, 1
    )
    found = verdict(target, row(), half)
    assert found.row is half
    assert found.ratio == pytest.approx(ratio)


def test_noise_is_said() -> None:
    noisy = row("peer", times=[1e-3, 2e-3, 3e-3, 4e-3])
    assert noisy.noisy
    assert not row(times=[1e-3] * 5).noisy
    assert verdict(records.Faster("peer", 1), row(), noisy).noisy


def test_rows_and_verdicts_become_json() -> None:
    plain = json.loads(json.dumps(row(times=[3e-3, 1e-3, 2e-3, 9e-3]).record()))
    assert (plain["seconds"], plain["best"], plain["calls"]) == (2.5e-3, 1e-3, 4)
    assert "times" not in plain
    absent = json.loads(json.dumps(row(times=[], note="absent: no wheel").record()))
    assert "seconds" not in absent
    judged = verdict(records.Faster("peer", 1), row(), row("peer")).record()
    assert json.loads(json.dumps(judged))["met"] is True


def test_the_tables_hold_notes_and_figures() -> None:
    rows = [row(seconds=2e-3), row("peer", seconds=6e-3), row("gone", times=[], note="wrong: y")]
    verdicts = targets.judge([records.Faster("peer", 2)], rows, {2: ROOFS})
    console = report.Console(file=io.StringIO(), width=140)
    console.print(report.group_table(rows, verdicts, ROOFS))
    console.print(report.summary(verdicts))
    text = console.file.getvalue()
    for words in ("3.00x", "wrong: y", "1 of 1"):
        assert words in text


# Processes


class Fake:
    """A contender without a process; writes down in which order it was asked."""

    def __init__(self, task: Any, log: list[str], replies: dict[str, Any]) -> None:
        self.ready = replies.get("ready", {"weight_bytes": 10, "version": "1"})
        self.name, self.log, self.replies = task.name, log, replies
        if "dies" in replies:
            raise processes.Lost("killed by SIGILL")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        kind = "time" if "seconds" in request else "check"
        self.log.append(f"{kind} {self.name} {request['m']}")
        reply = self.replies.get(kind, {"times": [1.0], "share_of_bound": 0.5, "rotated": 20})
        if reply == "dies":
            raise processes.Lost("killed by SIGSEGV")
        return dict(reply)

    def close(self) -> None:
        self.log.append(f"close {self.name}")


def running(log: list[str], rounds: int = 2, **replies: Any) -> Any:
    entrants = [records.Entrant(name, SMALL) for name in ("a", "b")]
    turns = tuple(tuple((e, m) for e in entrants) for m in (1, 100))
    group = records.Group("section", turns)
    found = measuring.Running(
        group,
        measuring.Pace(rounds=rounds),
        2,
        lambda task: Fake(task, log, replies.get(task.name, {})),
        lambda name, work: replies.get(name, {}).get("refusal"),
    )
    return group, found


def test_contenders_are_checked_and_then_alternate() -> None:
    log: list[str] = []
    group, found = running(log)
    rows = found.turn(group.turns[0])
    assert log == ["check a 1", "check b 1", *["time a 1", "time b 1"] * 2]
    assert [r.times for r in rows] == [[1.0, 1.0]] * 2
    assert (rows[0].share_of_bound, rows[0].weight_bytes, rows[0].rotated) == (0.5, 10, 20)


def test_a_wrong_answer_is_not_timed() -> None:
    log: list[str] = []
    group, found = running(log, b={"check": {"note": "wrong: y[0, 0]"}})
    rows = found.turn(group.turns[0])
    assert "time b 1" not in log
    assert (rows[1].note, rows[1].times) == ("wrong: y[0, 0]", [])
    assert math.isnan(rows[1].seconds)


@pytest.mark.parametrize(
    ("replies", "note"),
    [
        ({"refusal": "no wheel"}, "absent: no wheel"),
        ({"ready": {"absent": "no kernel"}}, "absent: no kernel"),
        ({"dies": True}, "lost: killed by SIGILL"),
        ({"time": "dies"}, "lost: killed by SIGSEGV"),
    ],
)
def test_whoever_is_lost_stays_away(replies: dict[str, Any], note: str) -> None:
    log: list[str] = []
    group, found = running(log, b=replies)
    for turn in group.turns[:1] * 2:
        rows = found.turn(turn)
        assert (rows[1].note, rows[1].times) == (note, [])
        assert rows[0].times
    found.close()
    assert log[-1] == "close a"
    assert log.count("close b") <= 1


def test_what_would_take_too_long_is_left_out() -> None:
    log: list[str] = []
    group, found = running(log)
    found.turn(group.turns[0])  # a second for one row
    rows = found.turn(group.turns[1])
    assert rows[0].note == "left out: about 100.0 s a call"
    assert not any("100" in line for line in log)


def task(name: str, work: Any) -> Any:
    return worker.Task(name, work, rows=9, threads=1, rotate=1 << 16, most_copies=4)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A peer of NumPy that can be made wrong."""
    found = SimpleNamespace(missing=lambda: None, refusal=lambda *_: None, version=lambda: "9")

    def build(name: str, operands: Any, threads: int) -> Any:
        weights = [operands.weight.copy()]
        meaning = checking.Meaning(lambda rows: operands.weight[rows], roundings=operands.work.k)
        return peers.Built(
            weight_bytes=weights[0].nbytes,
            copy=lambda: weights.append(operands.weight.copy()),
            take=lambda x: x,
            call=lambda x, i: found.calls.append(i) or x @ weights[i].T * found.factor,
            read=lambda y: y,
            check=peers.checked_by(meaning, operands.work),
        )

    found.build, found.factor, found.calls = build, np.float32(1), []
    monkeypatch.setattr(peers, "found", lambda: {"numpy": found})
    return found


def served(name: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    out = io.StringIO()
    worker.serve(task(name, SMALL), [json.dumps(r) for r in requests], out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_worker_builds_checks_and_times(peer: SimpleNamespace) -> None:
    ready, checked, timed = served("numpy", {"m": 9}, {"m": 3, "seconds": 1e-4})
    assert ready == {"weight_bytes": 96 * 64 * 4, "version": "9"}
    assert 0 < checked["share_of_bound"] < 1
    assert len(timed["times"]) >= worker.FEWEST
    assert timed["rotated"] == 3 * 96 * 64 * 4  # 64 KiB of 24 KiB each
    # Nine rows: each copy is touched, the first is checked. Three rows: touched, then in turn.
    assert peer.calls[:4] == [0, 1, 2, 0]
    assert peer.calls[4:] == [i % 3 for i in range(3 + len(timed["times"]))]


def test_a_worker_says_what_is_wrong(peer: SimpleNamespace) -> None:
    peer.factor = np.float32(1.01)
    _, reply, again = served("numpy", {"m": 9}, {"m": 0})
    assert reply["note"].startswith("wrong: ")
    assert again["note"].startswith("failed: ")
    peer.refusal = lambda *_: "wants other shapes"
    assert served("numpy", {"m": 9}) == [{"absent": "wants other shapes"}]


def stopped(contender: Any) -> bool:
    """A signal takes a moment to arrive; a process that is left running never gets there."""
    state = Path(f"/proc/{contender._process.pid}/stat")
    for _ in range(1000):
        if state.read_text().rpartition(") ")[2][0] == "T":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads the state of a process from /proc")
def test_processes_sleep_while_others_are_measured() -> None:
    contender = processes.Contender(task("lowbit", SMALL))
    try:
        quantized = lb.quantize(Operands(SMALL, 1).weight, "int4_g32")
        assert contender.ready["weight_bytes"] == quantized.nbytes
        assert stopped(contender)
        assert 0 <= contender.ask({"m": 9})["share_of_bound"] <= 1
        assert stopped(contender)
        contender._process.kill()
        for _ in range(2):  # the second time its end of the pipe is surely gone
            with pytest.raises(processes.Lost, match="killed by SIGKILL"):
                contender.ask({"m": 9})
    finally:
        contender.close()


def test_tasks_travel_as_text() -> None:
    made = task("lowbit", replace(SMALL, inner="int8_g32"))
    assert worker.Task.read(json.dumps(asdict(made))) == made


# Roofs

INSTRUCTIONS = {
    "fma": ("vfmadd", "fmla", "addps"),
    "int8_dot": ("vpdpbusd", "sdot", "smmla"),
    "bf16_dot": ("vdpbf16ps",),
    "amx_int8": ("tdpbssd",),
    "amx_bf16": ("tdpbf16ps",),
}


@pytest.mark.parametrize("isa", [i for i in isas.RECORDS if i.triple], ids=lambda i: i.name)
def test_peaks_are_loops_of_one_instruction_in_registers(isa: Any) -> None:
    for name, peak in roofs.peaks(isa).items():
        text = native.assembly(roofs.text(peak), isa)
        loop = re.split(r"^\.LBB0_1:", text, flags=re.M)[1].splitlines()
        end = next(i for i, line in enumerate(loop) if re.match(r"\t(jb|b\.)", line))
        words = [line.split() for line in loop[1 : end + 1]]
        wanted = [w for w in words if any(part.startswith(INSTRUCTIONS[name]) for part in w[:2])]
        assert len(wanted) == peak.accumulators, name
        assert len(words) <= peak.accumulators + 3, name  # count, compare, branch; no moves

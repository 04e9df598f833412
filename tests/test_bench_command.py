"""`lowbit bench`: products are timed, rates are fitted and written, choices are looked at."""

import dataclasses
import json
import re
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
from typer.testing import CliRunner

import lowbit as lb
from lowbit import kernels, tuning
from lowbit.cli import app, benching
from lowbit.kernels import Problem, judge
from lowbit.kernels.cpu import machine
from lowbit.kernels.cpu.isa import RECORDS, host
from lowbit.kernels.cpu.machine import Rates, Tuning

NAMES = tuple(each.name for each in fields(Rates))


@pytest.fixture(autouse=True)
def _estimated(monkeypatch):
    """Nominal rates, whatever this machine's user has measured."""
    monkeypatch.setenv("LOWBIT_TUNING", "off")
    before = machine.use(())
    yield
    machine.use(before)


def tuned(rates=None, **changes):
    isa = changes.get("isa", host().name)
    here = Tuning(
        isa, machine.processor(), 2, machine.version(), "a day", rates or machine.nominal(isa)
    )
    return replace(here, **changes)


def written(path, *found):
    path.write_text(machine.text(list(found)))
    return path


TINY = [
    tuning.Case(1, 16, 32, "int4_row", "float32", tuning.FMA),
    tuning.Case(20, 48, 64, "int4_row", "int8_row", tuning.DOT, prepared=False),
    tuning.Case(3, 48, 64, "int4_row", "int8_row", tuning.BF16),  # whole numbers: it refuses
]


def call(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_measuring_takes_what_is_accepted_and_restores_the_threads():
    before, told = lb.get_num_threads(), []
    cases = [*TINY[:2], replace(TINY[0], threads=2), TINY[2]]
    found = tuning.measure(cases, seconds=0.0, rounds=1, report=lambda *at: told.append(at))
    assert lb.get_num_threads() == before
    assert [(s.kernel, s.problem.threads) for s in found] == [
        (tuning.FMA, 1),
        (tuning.DOT, 1),
        (tuning.FMA, 2),
    ]
    assert [s.problem.layout for s in found] == ["words16", "rows", "words16"]
    assert all(0 < s.seconds < 10 for s in found)
    assert told[-1] == (4, 4)


def test_products_that_take_long_are_left_out():
    case = replace(TINY[1], m=64)
    assert len(tuning.measure([case], seconds=0.0, rounds=1)) == 1
    machine.use((tuned(replace(machine.nominal(host().name), call=1.0)),))
    assert tuning.measure([case], seconds=0.0, rounds=1) == []


def test_weights_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(tuning, "_ROTATED", 10_000)
    weights = tuning.Weights("int8_row", 48, 64)
    assert len(weights.copies) == 10_000 // weights.copies[0].nbytes == 3
    timer = tuning.Timer(weights, 1, "float32", tuning.FMA)
    used = []
    timer._plans = [lambda x, n=n: used.append(n) for n in range(3)]  # type: ignore[misc]
    for _ in range(5):
        timer.spend(0.0)
    assert used == [0, 1, 2, 0, 1]
    monkeypatch.setattr(tuning, "_ROTATED", 1 << 30)
    assert len(tuning.Weights("int8_row", 48, 64).copies) == 64
    monkeypatch.setattr(tuning, "_ROTATED", 1)
    assert len(tuning.Weights("int8_row", 48, 64).copies) == 1


@pytest.mark.parametrize(("late", "spent"), [(True, 30), (False, 10)])
def test_a_choice_that_was_late_is_timed_for_longer(monkeypatch, late, spent):
    """The chosen kernel takes two seconds, another one one or three."""
    spends = []

    class Fake:
        def __init__(self, weights, m, x, kernel):
            self.kernel = kernel
            self.seconds = 2.0 if kernel == tuning.DOT else 1.0 if late else 3.0

        def spend(self, seconds):
            spends.append(self.kernel)

    monkeypatch.setattr(tuning, "Timer", Fake)
    (found,) = benching.outcomes(("int4_row",), ("int8_row",), (1,), ((48, 64),), 10)
    assert found is not None
    assert spends == [tuning.DOT, tuning.FMA] * spent
    assert found.regret == (1.0 if late else 0.0)


def test_the_grid_has_every_kernel_and_runs_within_a_minute():
    for threads in (1, 64):
        chosen = tuning.cases(threads)
        assert {case.kernel for case in chosen} == {
            k.name for k in kernels.registered() if k.device == "cpu"
        }
        assert len(set(chosen)) == len(chosen)
        assert {case.threads for case in chosen} == {1, threads}
        assert len(chosen) * 10 * 0.015 < 40


def test_tune_writes_what_explain_then_says(monkeypatch, tmp_path):
    path = tmp_path / "t.json"
    monkeypatch.setenv("LOWBIT_TUNING", str(path))
    monkeypatch.setattr(tuning, "cases", lambda threads: TINY)
    machine.use(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = call("bench", "--tune", "--quick")
    assert done.exit_code == 0, done.output
    assert f"written: {path}" in done.stdout
    assert re.search(r"half of the timed products are within \d+% of their price", done.stdout)
    (kept,) = machine.read(path)
    assert kept.key == (host().name, machine.processor(), lb.get_num_threads())
    told = json.loads(call("explain", 1, 64, 64, "--weight", "int4_g32", "--json").stdout)
    assert told["rates"] == "measured"
    assert {each["kernel"]: each["source"] for each in told["verdicts"]} == {
        v.kernel.name: None
        if v.refusal
        else "estimated"
        if v.kernel.device == "any"
        else "measured"
        for v in judge(
            Problem(1, 64, 64, "float32", lb.format("int4_g32"), device=f"cpu:{host().name}")
        )
    }
    other = next(each.name for each in RECORDS if each.name != host().name)
    elsewhere = call("explain", 1, 64, 64, "--weight", "int4_g32", "--device", f"cpu:{other}")
    assert "(costs are estimated)" in elsewhere.stdout
    again = json.loads(call("bench", "--tune", "--quick", "--json").stdout)
    assert again["path"] == str(path)
    assert set(again["rates"]) == set(NAMES)


def test_tuning_changes_nothing_by_itself(monkeypatch):
    monkeypatch.setattr(tuning, "cases", lambda threads: TINY)
    before = (tuned(measured="before"),)
    machine.use(before)
    found, off = tuning.tune(quick=True)
    assert machine.tunings() == before
    assert found.key == (host().name, machine.processor(), lb.get_num_threads())
    assert found.version == lb.__version__
    assert off > 0


def test_tune_needs_a_place_to_write_to(monkeypatch):
    monkeypatch.setattr(tuning, "cases", lambda threads: TINY)
    done = call("bench", "--tune")
    assert done.exit_code == 2
    assert "nowhere to write to: LOWBIT_TUNING=off" in done.stderr


def test_bench_measures_every_kernel_that_accepts():
    options = (
        "--quick --weights int4_g32,fp8_row --x float32,int8_row --rows 1,5 --shapes 48x64 --json"
    )
    done = call("bench", *options.split())
    assert done.exit_code == 0, done.output
    products = json.loads(done.stdout)["products"]
    assert len(products) == 8
    for each in products:
        x = each["x"] if each["x"] in tuning.DENSE else lb.format(each["x"])
        w = lb.quantize(np.ones((48, 64), np.float32), each["weight"]).prepare()
        ones = np.ones((each["m"], 64), np.float32)
        why = lb.explain(ones if isinstance(x, str) else lb.quantize(ones, x), w.T)
        usable = {v.kernel.name: v.seconds for v in why.verdicts if not v.refusal}
        del usable["reference"]
        assert (each["n"], each["k"], each["kernel"]) == (48, 64, why.kernel)
        assert each["prices"] == usable
        assert set(each["seconds"]) == set(usable)
        assert each["fastest"] == min(each["seconds"], key=each["seconds"].get)
        assert each["regret"] == each["seconds"][why.kernel] / min(each["seconds"].values()) - 1


def test_the_table_shows_where_another_kernel_was_faster():
    good = benching.Outcome(
        1, 48, 64, "float32", "int4_g32", "estimated", tuning.FMA,
        {tuning.FMA: 1e-3, tuning.BF16: 0.97e-3}, {tuning.FMA: 1.1e-3, tuning.BF16: 2e-3},
    )  # fmt: skip
    bad = dataclasses.replace(good, m=4, seconds={tuning.FMA: 1.5e-3, tuning.BF16: 1e-3})
    lines = benching.table([good, bad]).splitlines()
    assert lines[1].split() == [
        "float32",
        "int4_g32",
        "48",
        "x",
        "64",
        "1",
        "fma",
        "1",
        "ms",
        "1.1",
        "ms",
        "+10%",
    ]
    assert lines[2].split()[-3:] == ["-27%", "bf16", "50%"]
    assert lines[3] == (
        f"2 products on {lb.get_num_threads()} threads, prices are estimated; at 1 another kernel "
        "was more than 5% faster, by 50% at most"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "int99"], "int99"),
        (["--x", "int99"], "int99"),
        (["--rows", "1,none"], "--rows: want numbers from 1 up"),
        (["--rows", "0"], "--rows: want numbers from 1 up"),
        (["--shapes", "64"], "--shapes: want NxK"),
        (["--shapes", "0x64"], "--shapes: want NxK"),
    ],
)
def test_bench_refuses_by_name(arguments, said):
    done = call("bench", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("lowbit bench: ")
    assert said in done.stderr
    assert done.stdout == ""


def test_doctor_says_whether_costs_are_measured(monkeypatch, tmp_path):
    from lowbit.cli import diagnosis

    def look(path):
        monkeypatch.setenv("LOWBIT_TUNING", str(path))
        (finding,) = diagnosis._tuning()
        return finding

    assert look("off").value == "LOWBIT_TUNING=off: costs are estimated"
    path = written(tmp_path / "t.json", tuned())
    assert look(path).value == f"costs are measured, in {path}"
    path.write_text("{")
    assert look(path).remedy == "lowbit bench --tune"

"""Whose rates prices take: nominal ones, those of a file, those that a fit finds."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

import lowbit as lb
from lowbit import tuning
from lowbit.kernels import Problem, choose, judge
from lowbit.kernels.cpu import machine
from lowbit.kernels.cpu.isa import RECORDS, host
from lowbit.kernels.cpu.machine import Rates, Tuning

ROOT = Path(__file__).parent.parent
NAMES = tuple(each.name for each in fields(Rates))


@pytest.fixture(autouse=True)
def _estimated(monkeypatch):
    """Nominal rates, whatever this machine's user has measured."""
    monkeypatch.setenv("LOWBIT_TUNING", "off")
    before = machine.use(())
    yield
    machine.use(before)


def problem(**changes):
    stated = Problem(64, 4096, 4096, "float32", lb.format("int4_g128"), layout="words16")
    return replace(stated, device="cpu:avx512vnni", threads=16, **changes)


def tuned(rates=None, **changes):
    isa = changes.get("isa", host().name)
    here = Tuning(
        isa, machine.processor(), 2, machine.version(), "a day", rates or machine.nominal(isa)
    )
    return replace(here, **changes)


def price(stated, kernel):
    return next(v.seconds for v in judge(stated) if v.kernel.name == kernel)


# Whose rates


def test_measured_rates_are_for_their_instruction_set():
    fast = replace(machine.nominal("avx2"), fma=9e15)
    machine.use((tuned(fast, isa="avx2"),))
    assert machine.known("cpu:avx2", 2) == machine.Known(fast, measured=True)
    for other in RECORDS:
        if other.name != "avx2":
            found = machine.known(f"cpu:{other.name}", 2)
            assert found == machine.Known(machine.nominal(other.name), measured=False)


def test_the_nearest_number_of_threads_counts():
    some = [tuned(replace(machine.nominal("avx2"), call=n), isa="avx2", threads=n) for n in (2, 16)]
    machine.use(tuple(some))
    chosen = {n: machine.known("cpu:avx2", n).rates.call for n in (1, 2, 4, 8, 16, 64)}
    assert chosen == {1: 2, 2: 2, 4: 2, 8: 16, 16: 16, 64: 16}


def test_nominal_rates_of_every_record_could_be_read_back():
    for record in RECORDS:
        rates = machine.nominal(record.name)
        assert all(0 < rate < 1e18 for rate in asdict(rates).values())
        assert rates.call < 1e-4 < 1e6 < rates.scale


def test_explain_says_whose_rates(monkeypatch):
    x, w = np.ones((8, 64), np.float32), lb.quantize(np.ones((32, 64), np.float32), "int4_g32")
    lines = str(lb.explain(x, w.T)).splitlines()
    assert lines[2].startswith("floors (estimated machine)")
    assert lines[3].endswith("(costs are estimated)")
    assert not any("(measured" in line for line in lines)
    rates = machine.nominal(host().name)
    machine.use((tuned(replace(rates, read_one=1e9, read_all=1e15, fma=1e9)),))
    why = lb.explain(x, w.T, kernel="matmul.cpu.fma")
    each = why.problem.threads * 1e9
    assert why.floors == pytest.approx((why.problem.bytes / each, 8 * 32 * 64 / each))
    lines = str(why).splitlines()
    assert lines[2].startswith("floors (measured machine)")
    assert lines[3].endswith("(costs are measured)")
    for line in lines[5:]:
        source = "estimated" if "reference" in line else "measured"
        assert " no: " in line or line.endswith(f"({source})")


def test_floors_are_those_of_the_fastest_instructions():
    known = machine.nominal("amx")
    limits = machine.estimate("cpu:amx", 2)
    assert 0.95 * 2 * known.read_one < limits.bandwidth < 2 * known.read_one
    assert limits.float_operations == 2 * 2 * known.fma
    assert limits.bfloat_operations == 2 * 2 * known.bf16_tiles
    assert limits.integer_operations == 2 * 2 * known.dot_tiles
    machine.use((tuned(replace(known, together=0.5), isa="amx"),))
    assert machine.estimate("cpu:amx", 2).float_operations == limits.float_operations / 2
    assert machine.estimate("cpu:amx", 1).float_operations == limits.float_operations / 2
    vectors = machine.estimate("cpu:avx2", 192)
    assert vectors.bandwidth == pytest.approx(machine.nominal("avx2").read_all, rel=1e-3)
    assert vectors.bfloat_operations == vectors.float_operations
    assert vectors.integer_operations == 2 * 192 * machine.nominal("avx2").dot


# The file


def written(path, *found):
    path.write_text(machine.text(list(found)))
    return path


def load(monkeypatch, path):
    """What a new process would find, and what it would say."""
    monkeypatch.setenv("LOWBIT_TUNING", str(path))
    machine.use(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = machine.tunings()
        assert machine.tunings() is found  # read once, and said once
    return found, [str(each.message) for each in caught]


def test_a_file_is_read_back(monkeypatch, tmp_path):
    rates = Rates(*(float(n + 1) for n in range(len(NAMES))))
    mine, other = tuned(rates), tuned(processor="another")
    path = written(tmp_path / "t.json", other, mine)
    assert machine.read(path) == [other, mine]
    assert load(monkeypatch, path) == ((mine,), [])
    assert machine.known(f"cpu:{host().name}", 2).rates == rates


BROKEN = {
    "empty": "",
    "cut": machine.text([tuned()])[:-20],
    "binary": "\0\1\2",
    "deep": "[" * 100_000,
    "list": "[]",
    "schema": machine.text([tuned()]).replace('"lowbit tuning": 1', '"lowbit tuning": 2'),
    "machines": '{"lowbit tuning": 1, "machines": {}}',
    "entry": '{"lowbit tuning": 1, "machines": [1]}',
    "large": " " * (1 << 20) + machine.text([tuned()]),
    "missing": machine.text([tuned()]).replace('"fma":', '"ferma":'),
    "threads": machine.text([tuned()]).replace('"threads": 2', '"threads": 0'),
    "true": machine.text([tuned()]).replace('"threads": 2', '"threads": true'),
    "isa": machine.text([tuned()]).replace(f'"isa": "{host().name}"', '"isa": ["x"]'),
    **{
        f"rate {bad}": json.dumps(
            {
                "lowbit tuning": 1,
                "machines": [asdict(tuned()) | {"rates": asdict(tuned().rates) | {"fma": bad}}],
            }
        )
        for bad in (0, -1.0, float("nan"), float("inf"), True, "fast", None, 1e30)
    },
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_costs_a_warning_and_nothing_else(kind, monkeypatch, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(BROKEN[kind])
    found, said = load(monkeypatch, path)
    assert found == ()
    assert len(said) == 1
    assert said[0].startswith(f"tuning not used, costs are estimated: {path}: ")
    assert ("more than 1048576 bytes" in said[0]) == (kind == "large")
    assert choose(problem()).kernel.name == "matmul.cpu.fma"


def test_what_cannot_be_read_costs_a_warning(monkeypatch, tmp_path):
    found, said = load(monkeypatch, tmp_path)  # a folder
    assert (found, len(said)) == ((), 1)
    found, said = load(monkeypatch, tmp_path / "absent")
    assert (found, len(said)) == ((), 1)
    assert "lowbit bench --tune" in said[0]


def test_a_file_of_another_machine_is_not_used(monkeypatch, tmp_path):
    other = [tuned(processor="another"), tuned(version="0.0.0")]
    found, said = load(monkeypatch, written(tmp_path / "t.json", *other))
    assert (found, len(said)) == ((), 1)
    assert f"nothing of {machine.processor()} with lowbit {machine.version()}" in said[0]


def test_a_shared_folder_of_settings_says_nothing_of_other_machines(monkeypatch, tmp_path):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_config_dir", lambda *a, **k: str(tmp_path))
    path, _ = machine.place()
    assert path is None  # off, by the fixture
    assert load(monkeypatch, "") == ((), [])  # none there
    assert machine.place()[0] == tmp_path / "tuning.json"
    written(tmp_path / "tuning.json", tuned(processor="another"))
    assert load(monkeypatch, "") == ((), [])
    mine = tuned()
    written(tmp_path / "tuning.json", tuned(processor="another"), mine)
    assert load(monkeypatch, "") == ((mine,), [])
    assert load(monkeypatch, "off") == ((), [])


def test_without_a_home_there_is_no_file(monkeypatch):
    import platformdirs

    monkeypatch.delenv("LOWBIT_TUNING")
    monkeypatch.setattr(platformdirs, "user_config_dir", lambda *a, **k: "~/.config/lowbit")
    path, why = machine.place()
    assert path is None
    assert "LOWBIT_TUNING" in why


def test_writing_keeps_other_machines(tmp_path):
    path = tmp_path / "new" / "t.json"
    others = [tuned(processor="another", version="0.0.0"), tuned(threads=3), tuned(isa="generic")]
    for each in (*others, tuned(measured="yesterday")):
        tuning.write(each, path)
    newest = tuned(measured="today")
    tuning.write(newest, path)
    assert machine.read(path) == [*others, newest]
    assert [each.name for each in path.parent.iterdir()] == ["t.json"]


def test_writing_forgets_what_another_version_measured_here(tmp_path):
    path = tmp_path / "t.json"
    tuning.write(tuned(version="0.0.0", threads=7), path)
    tuning.write(tuned(), path)
    assert machine.read(path) == [tuned()]


def test_writing_replaces_a_broken_file(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("{")
    tuning.write(tuned(), path)
    assert machine.read(path) == [tuned()]


def test_a_failed_write_leaves_what_was_there(monkeypatch, tmp_path):
    path = written(tmp_path / "t.json", tuned())

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        tuning.write(tuned(measured="today"), path)
    assert machine.read(path) == [tuned()]
    assert [each.name for each in tmp_path.iterdir()] == ["t.json"]


def test_prices_load_nothing_heavy(tmp_path):
    path = written(tmp_path / "t.json", tuned())
    code = (
        "import sys, numpy, lowbit\n"
        "w = lowbit.quantize(numpy.ones((8, 64), numpy.float32), 'int4_g32')\n"
        "x = numpy.ones((1, 64), numpy.float32)\n"
        "before = set(sys.modules)\n"
        "print(lowbit.explain(x, w.T).rates)\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "LOWBIT_TUNING": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    said, loaded = done.stdout.splitlines()
    assert said == "measured"
    assert set(loaded.split()) <= {"lowbit", "numpy", "platformdirs"} | set(sys.stdlib_module_names)


# The fit


def samples(isa, rates, threads=2):
    """Products of the tuning grid with the times that such rates would give."""
    machine.use((tuned(rates, isa=isa, threads=threads),))
    found = []
    for case in tuning.cases(threads):
        x = case.x if case.x in tuning.DENSE else lb.format(case.x)
        layout = "words16" if case.prepared else "rows"
        stated = Problem(case.m, case.n, case.k, x, lb.format(case.weight), layout=layout)
        stated = replace(stated, device=f"cpu:{isa}", threads=case.threads)
        verdict = next(v for v in judge(stated) if v.kernel.name == case.kernel)
        if verdict.seconds is not None:
            found.append(tuning.Sample(stated, case.kernel, verdict.seconds))
    machine.use(())
    return found


# Rates that the grid shows: not those of instructions that the record lacks, and not those that
# take turns with memory.
SHOWN = {
    "amx": set(NAMES) - {"bf16", "dot", "read_all", "byte_narrow", "dot_tiles"},
    "avx512bf16": set(NAMES) - {"bf16_tiles", "dot_tiles", "read_all", "byte_narrow"},
    "avx2": {"call", "fma", "dot", "float_narrow", "float_integer", "float_table", "together"},
}


@pytest.mark.parametrize("isa", SHOWN)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fit_finds_planted_rates(isa, seed):
    rng = np.random.default_rng(seed)
    factors = dict(zip(NAMES, 2.0 ** rng.uniform(-1, 1, len(NAMES)), strict=True))
    factors["together"] = 0.8
    planted = Rates(**{n: r * factors[n] for n, r in asdict(machine.nominal(isa)).items()})
    timed = samples(isa, planted)
    found = tuning.fit(timed, isa)
    assert machine.tunings() == ()  # as it was before
    for name in SHOWN[isa]:
        assert getattr(found, name) == pytest.approx(getattr(planted, name), rel=0.1), name
    machine.use((tuned(found, isa=isa),))
    prices = np.array([price(s.problem, s.kernel) for s in timed])
    assert np.abs(np.log(prices / [s.seconds for s in timed])).max() < 0.02


def test_the_fit_outlives_disturbed_times():
    planted = replace(machine.nominal("amx"), fma=5e10, bf16_tiles=3e11, read_one=2e10)
    rng = np.random.default_rng(0)
    timed = [
        replace(s, seconds=s.seconds * (rng.uniform(1.5, 5) if rng.random() < 0.15 else 1))
        for s in samples("amx", planted)
    ]
    found = tuning.fit(timed, "amx")
    for name in ("fma", "bf16_tiles", "read_one"):
        assert getattr(found, name) == pytest.approx(getattr(planted, name), rel=0.15), name


def test_what_nothing_shows_stays_nominal():
    found = tuning.fit(samples("avx2", machine.nominal("avx2")), "avx2")
    assert found.bf16_tiles == pytest.approx(machine.nominal("avx2").bf16_tiles, rel=1e-3)
    with pytest.raises(ValueError, match="no product was measured"):
        tuning.fit([], "avx2")

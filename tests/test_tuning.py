"""Prices of products: what they follow from, whose rates they take, and how those are found."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import lowbit as lb
from lowbit import kernels, tuning
from lowbit.cli import app, benching
from lowbit.kernels import Problem, choose, judge
from lowbit.kernels.cpu import costs, machine
from lowbit.kernels.cpu.isa import RECORDS, host
from lowbit.kernels.cpu.machine import Rates, Tuning

ROOT = Path(__file__).parent.parent
NAMES = tuple(each.name for each in fields(Rates))
METHODS = {
    "fma": ("direct", "decoded"),
    "bf16": ("direct", "decoded", "tiles", "single"),
    "dot": ("direct", "decoded", "tiles", "single"),
}


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


# Amounts of work


@st.composite
def _priced(draw):
    inner = draw(st.sampled_from(list(METHODS)))
    method = draw(st.sampled_from(METHODS[inner]))
    weight = draw(st.sampled_from(["int4_g32", "int8_row", "fp8_128x128", "int3_g96", "nvfp4"]))
    stated = problem(
        m=draw(st.integers(1, 2000)),
        n=draw(st.integers(1, 9000)),
        k=draw(st.integers(1, 9000)),
        x=draw(st.sampled_from(["float32", "bfloat16", lb.format("int8_g128")])),
        w=lb.format(weight),
        activation=draw(st.sampled_from([None, "relu", "gelu"])),
        layout=draw(st.sampled_from(["rows", "words16"])),
    )
    stated = replace(stated, threads=draw(st.sampled_from([1, 2, 16, 192])))
    isa = "amx" if method in ("tiles", "single") else draw(st.sampled_from(RECORDS)).name
    return replace(stated, device=f"cpu:{isa}"), inner, method, draw(st.sampled_from([16, 128]))


@given(
    case=_priced(),
    axis=st.sampled_from(["m", "n", "k"]),
    more=st.one_of(st.integers(1, 20), st.integers(1, 10000)),
)
def test_more_never_costs_less(case, axis, more):
    stated, inner, method, segment = case
    larger = replace(stated, **{axis: getattr(stated, axis) + more})
    before = costs.seconds(stated, inner, method, segment)
    assert 0 < before <= costs.seconds(larger, inner, method, segment) * (1 + 1e-12)


def beside(*work):
    """Of which nothing is hidden but by the longest."""
    return sum(each**4 for each in work) ** 0.25


def test_a_price_is_the_work_over_the_rates():
    """By hand: 64 rows and 512 columns of int4_g128 on one thread."""
    stated = replace(problem(n=512), threads=1)
    rates = machine.nominal("avx512bf16")
    moving = 1 / (rates.read_one**-4 + rates.read_all**-4) ** -0.25
    results, numbers, scales = 64 * 512, 64 * 4096, 64 * 32 / rates.scale
    kinds = {
        "fma": (("float32",), rates.fma, rates.float_narrow, 1, 0),
        "bf16": (("bfloat16",), rates.bf16, rates.bfloat_narrow, 2, 2),
        "dot": ((lb.format("int8_row"),), rates.dot, rates.byte_narrow, 3, 1),
    }
    for kind, ((x,), products, codes, calls, size) in kinds.items():
        asked = replace(stated, x=x, device="cpu:avx512bf16")
        computing = 512 * (4096 / codes + numbers / products + scales)
        expected = beside(asked.bytes * moving, computing) + results / rates.finish
        expected += calls * rates.call + size * numbers / rates.arrange
        assert price(asked, f"matmul.cpu.{kind}") == pytest.approx(expected, rel=1e-9), kind


def test_tall_products_are_shared_by_rows_as_well():
    tall = problem(n=64, m=1 << 14)
    alone = price(replace(tall, threads=1), "matmul.cpu.fma")
    assert price(replace(tall, threads=16), "matmul.cpu.fma") < alone / 12


def test_one_thread_arranges_what_is_little():
    rates = replace(machine.nominal("avx512vnni"), arrange=1e3)
    machine.use(tuple(tuned(rates, isa="avx512vnni", threads=t) for t in (1, 16)))
    for m, shared in ((4, False), (16, False), (64, True)):
        stated = problem(x="bfloat16", m=m)
        one, many = (price(replace(stated, threads=t), "matmul.cpu.fma") for t in (1, 16))
        assert many == pytest.approx(one / 4 if shared else one, rel=1e-3)


def test_bytes_need_no_decoding_and_half_of_them_half_of_the_rearranging():
    free = dict.fromkeys(NAMES, 1e15) | {"call": 1e-12, "repack": 1e6, "byte_narrow": 1e5}
    machine.use((tuned(Rates(**free), isa="avx512vnni", threads=1),))
    stated = replace(problem(n=1024, k=4096, x=lb.format("int8_row")), threads=1)
    for weight, layout, seconds in (
        ("int8_row", "words16", 0.0),
        ("int8_row", "rows", 1024 * 4096 / 1e6),
        ("int4_row", "words16", 1024 * 4096 / 1e5),
        ("int4_row", "rows", 1024 * 4096 * (1 / 1e5 + 1 / 2e6)),
    ):
        asked = replace(stated, w=lb.format(weight), layout=layout)
        assert price(asked, "matmul.cpu.dot") == pytest.approx(seconds, rel=1e-3, abs=1e-3)


def test_codes_are_decoded_again_for_every_four_rows_in_registers():
    stated = replace(problem(x="bfloat16", w=lb.format("fp8_row")), threads=1)
    rates = machine.nominal("avx512vnni")
    slow = replace(rates, float_table=1e8, fma=1e15, read_one=1e15, read_all=1e15)
    machine.use((tuned(slow, isa="avx512vnni"),))
    codes = stated.n * stated.k / slow.float_table
    for method, passes in (("direct", 16), ("decoded", 1)):
        found = costs.seconds(stated, "fma", method, stated.k)
        assert found == pytest.approx(passes * codes, rel=0.01)


def test_scales_that_are_multiplied_in_while_decoding_cost_a_longer_look_up():
    stated = replace(problem(m=16, w=lb.format("mxfp4"), x="bfloat16"), device="cpu:amx", threads=1)
    wide = replace(stated, w=lb.format("fp8_row"))
    rates = replace(machine.nominal("amx"), read_one=1e15, read_all=1e15)
    machine.use((tuned(rates, isa="amx"),))
    folded = costs.seconds(stated, "bf16", "tiles", stated.k, folded=True)
    assert folded == pytest.approx(costs.seconds(wide, "bf16", "tiles", stated.k))
    assert folded > 1.1 * costs.seconds(stated, "bf16", "tiles", stated.k)


@pytest.mark.parametrize(
    "more",
    [
        {"activation": "gelu"},
        {"w": lb.format("int4_g128_bias_bf16")},
        {"x": lb.format("uint8_row_asym")},
    ],
)
def test_what_comes_on_top_is_paid_for(more):
    stated = replace(problem(n=64, k=64, x=lb.format("fp8_row")), threads=1)
    assert price(replace(stated, **more), "matmul.cpu.fma") > 1.02 * price(stated, "matmul.cpu.fma")


def test_tiles_of_sixteen_rows_cost_as_much_for_one():
    stated = replace(problem(x="bfloat16"), device="cpu:amx", threads=1)
    one, sixteen, more = (
        costs.seconds(replace(stated, m=m), "bf16", "tiles", 4096) for m in (1, 16, 17)
    )
    assert sixteen < 1.1 * one
    assert more > sixteen + 16 * 4096 * 4096 / machine.nominal("amx").bf16_tiles / 1.1


def test_rows_that_are_not_prepared_cost_more():
    for weight in ("int4_g128", "int8_row", "int3_g128"):
        stated = problem(w=lb.format(weight), m=1)
        packed, plain = (
            price(replace(stated, layout=layout), "matmul.cpu.fma")
            for layout in ("words16", "rows")
        )
        assert plain > 1.002 * packed


def test_threads_share_what_there_is_to_share():
    wide = problem(n=8192)
    assert price(replace(wide, threads=2), "matmul.cpu.fma") == pytest.approx(
        price(replace(wide, threads=1), "matmul.cpu.fma") / 2, rel=0.01
    )
    narrow = problem(n=64)
    assert price(replace(narrow, threads=16), "matmul.cpu.fma") > 0.9 * price(
        replace(narrow, threads=2), "matmul.cpu.fma"
    )


# The choice, by nominal rates


@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
@pytest.mark.parametrize("weight", ["int4_g128", "int8_row", "fp8_row", "nf4_g64"])
@pytest.mark.parametrize("m", [1, 64])
def test_float32_is_multiplied_as_float32(isa, weight, m):
    stated = replace(problem(w=lb.format(weight), m=m), device=f"cpu:{isa}")
    assert choose(stated).kernel.name == "matmul.cpu.fma"


@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
@pytest.mark.parametrize("weight", ["int4_g128", "int8_row", "uint4_g64_asym"])
@pytest.mark.parametrize("m", [1, 4, 64])
def test_integers_are_multiplied_as_integers(isa, weight, m):
    stated = problem(w=lb.format(weight), m=m, x=lb.format("int8_row"))
    assert choose(replace(stated, device=f"cpu:{isa}")).kernel.name == "matmul.cpu.dot"


@pytest.mark.parametrize("weight", ["int4_g128", "int8_row", "fp8_row", "nf4_g64", "mxfp4"])
@pytest.mark.parametrize("m", [4, 16, 64, 256])
@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
def test_bfloat16_is_multiplied_where_the_machine_can(isa, weight, m):
    stated = replace(problem(w=lb.format(weight), m=m, x="bfloat16"), device=f"cpu:{isa}")
    can = next(each.bf16 for each in RECORDS if each.name == isa)
    assert choose(stated).kernel.name == ("matmul.cpu.bf16" if can else "matmul.cpu.fma")


@pytest.mark.parametrize("weight", ["int4_g128", "nf4_g64", "fp8_row"])
def test_one_row_of_bfloat16_is_no_dearer_in_bfloat16_on_zen_4(weight):
    stated = replace(problem(w=lb.format(weight), m=1, x="bfloat16"), device="cpu:avx512bf16")
    assert choose(stated).kernel.name == "matmul.cpu.bf16"


def test_slow_products_of_bfloat16_are_left_alone():
    """The choice follows the rates, not the name of the instruction set."""
    stated = replace(problem(m=1, x="bfloat16"), device="cpu:avx512bf16", threads=2)
    slow = replace(machine.nominal("avx512bf16"), bf16=1e9)
    machine.use((tuned(slow, isa="avx512bf16"),))
    assert choose(stated).kernel.name == "matmul.cpu.fma"
    machine.use(())
    assert choose(stated).kernel.name == "matmul.cpu.bf16"


@pytest.mark.parametrize("isa", [each.name for each in RECORDS])
@pytest.mark.parametrize("x", ["float32", "bfloat16", lb.format("int8_row")])
def test_a_batch_invariant_choice_does_not_depend_on_m(isa, x):
    stated = replace(problem(x=x, batch_invariant=True), device=f"cpu:{isa}")
    assert len({choose(replace(stated, m=m)).kernel.name for m in (1, 2, 5, 64, 4096)}) == 1


@pytest.mark.parametrize("tunings", [(), (1,), (2, 64)])
@pytest.mark.parametrize("weight", ["int4_g128", "nf4_g64"])
def test_the_choice_does_not_depend_on_the_number_of_threads(weight, tunings):
    """Kernels have their own orders of sums, and bits do not depend on threads."""
    slow = replace(machine.nominal("avx512bf16"), bf16=1.5e10)
    machine.use(tuple(tuned(slow, isa="avx512bf16", threads=t) for t in tunings))
    stated = replace(problem(w=lb.format(weight), x="bfloat16"), device="cpu:avx512bf16")
    for m in range(1, 20):
        asked = [replace(stated, m=m, threads=threads) for threads in (1, 2, 8, 64)]
        assert len({choose(each).kernel.name for each in asked}) == 1
    assert len({price(each, "matmul.cpu.fma") for each in asked}) == len(asked)


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


# Measuring, and the commands

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

"""Choice in the open: judged for machines that are not here, counted by hand, said in words."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit import binding, kernels
from lowbit.kernels import Problem, choose, judge
from lowbit.kernels.cpu.isa import RECORDS
from lowbit.kernels.declare import format_bytes
from lowbit.testing import assert_within_bound, random_qarray

INT4, INT8 = lb.format("int4_g128"), lb.format("int8_row")
DEVICES = [f"cpu:{isa.name}" for isa in RECORDS] + ["cuda:80:108", "cuda:90:132"]


def problem(**changes):
    stated = Problem(m=8, n=4096, k=4096, x="float32", w=INT4, device="cpu:avx512vnni", threads=16)
    return dataclasses.replace(stated, **changes)


# Judging needs a problem and nothing else


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("x", ["float32", "bfloat16", "float64", lb.format("int8_row")])
@pytest.mark.parametrize("m", [0, 1, 4096])
def test_every_kernel_has_a_verdict_on_every_machine(device, x, m, monkeypatch):
    monkeypatch.setattr(kernels, "prepared", None)  # judging builds nothing
    stated = problem(device=device, x=x, m=m)
    verdicts = judge(stated)
    assert {v.kernel for v in verdicts} == set(kernels.registered())
    assert len(verdicts) == len(kernels.registered())
    for verdict in verdicts:
        if verdict.refusal is None:
            assert verdict.seconds is not None
            assert verdict.seconds > 0
        else:
            assert verdict.seconds is None
            assert re.match(r"[\w' ]{10,}", verdict.refusal), "a reason is a phrase"
    # The cheapest on four threads first, whatever the number of threads.
    compared = judge(dataclasses.replace(stated, threads=4))
    assert [v.kernel for v in compared] == [v.kernel for v in verdicts]
    usable = [v.seconds for v in compared if v.seconds is not None]
    assert usable == sorted(usable)
    assert [v.seconds is None for v in verdicts] == sorted(v.seconds is None for v in verdicts)
    assert judge(dataclasses.replace(stated)) == verdicts
    assert choose(stated) == verdicts[0]


def test_the_problem_is_a_value():
    assert problem() == problem()
    assert hash(problem()) == hash(problem())
    assert len({problem(), problem(), problem(m=9)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem().m = 1


def test_a_gpu_leaves_the_kernels_of_the_cpu_out():
    refusals = {v.kernel.name: v.refusal for v in judge(problem(device="cuda:90:132"))}
    assert refusals["matmul.cpu.fma"] == "runs on cpu, the operands are on cuda"
    assert refusals["reference"] is None


def test_layouts_that_a_kernel_does_not_read_are_named():
    refusals = {v.kernel.name: v.refusal for v in judge(problem(layout="spiral"))}
    assert set(refusals) == {k.name for k in kernels.registered()}
    here = [k.name for k in kernels.registered() if k.device != "cuda"]
    for refusal in (str(refusals[name]) for name in here):
        assert re.fullmatch(r"reads [\w ]+, w is held as spiral", refusal)
    with pytest.raises(ValueError, match=r"no kernel computes this product: .*held as spiral"):
        choose(problem(layout="spiral"))


def test_ordinary_problems_run_compiled_and_odd_ones_on_the_reference():
    assert choose(problem()).kernel.name == "matmul.cpu.fma"
    assert choose(problem(x=lb.format("int8_row"), m=64)).kernel.name == "matmul.cpu.dot"
    assert choose(problem(x="float64")).kernel.name == "reference"
    assert choose(problem(w_along=False)).kernel.name == "reference"


@pytest.mark.parametrize("name", [k.name for k in kernels.registered()])
@pytest.mark.parametrize(
    "changes", [{}, {"x": "float64"}, {"w_along": False}, {"device": "cuda:90:132"}, {"m": 0}]
)
def test_a_forced_kernel_runs_or_gives_the_reason_of_its_verdict(name, changes):
    stated = problem(**changes)
    verdict = next(v for v in judge(stated) if v.kernel.name == name)
    if verdict.refusal is None:
        assert choose(stated, name) == verdict
    else:
        with pytest.raises(
            ValueError, match=re.escape(f"kernel={name!r} refuses: {verdict.refusal}")
        ):
            choose(stated, name)


def test_an_unknown_kernel_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"kernel='magic' is not known; there are .*reference"):
        choose(problem(), "magic")


# Bytes and operations, by hand


@pytest.mark.parametrize(
    ("changes", "moved", "operations"),
    [
        # codes 4096 * 2048, scales 4096 * 32 * 4, x and result 8 * 4096 * 4 each
        ({}, 8388608 + 524288 + 131072 + 131072, 2 * 8 * 4096 * 4096),
        # x and result in two bytes
        ({"x": "bfloat16", "out": "float16"}, 8388608 + 524288 + 65536 + 65536, 268435456),
        ({"x": "float64", "out": "float64"}, 8388608 + 524288 + 2 * 262144, 268435456),
        # rows of 38 bytes hold 100 codes of 3 bits; 4 groups of 32, the last of 4 columns
        (
            {"m": 1, "n": 7, "k": 100, "w": lb.format("int3_g32")},
            7 * 38 + 7 * 4 * 4 + 100 * 4 + 7 * 4,
            1400,
        ),
        # zero points of a byte each beside the scales
        (
            {"m": 1, "n": 2, "k": 256, "w": lb.format("uint4_g128_asym")},
            2 * 128 + 4 * (4 + 1) + 256 * 4 + 2 * 4,
            1024,
        ),
        # bfloat16 scales, and addends like them
        (
            {"m": 1, "n": 2, "k": 256, "w": lb.format("int4_g128_bias_bf16")},
            2 * 128 + 4 * (2 + 2) + 256 * 4 + 2 * 4,
            1024,
        ),
        # E4M3 scales of 16 columns and one float32
        (
            {"m": 3, "n": 2, "k": 40, "w": lb.format("nvfp4")},
            2 * 20 + 2 * 3 + 4 + 3 * 40 * 4 + 3 * 2 * 4,
            480,
        ),
        # 2 x 3 tiles of 128 x 128
        (
            {"m": 1, "n": 130, "k": 300, "w": lb.format("fp8_128x128")},
            130 * 300 + 6 * 4 + 300 * 4 + 130 * 4,
            78000,
        ),
        # both quantized: x has a byte an entry and a float32 scale a row
        (
            {"m": 5, "n": 2, "k": 64, "x": lb.format("int8_row"), "w": lb.format("int8_row")},
            2 * 64 + 2 * 4 + 5 * 64 + 5 * 4 + 5 * 2 * 4,
            1280,
        ),
        # three matrices of a stack: of both operands and of the result
        (
            {"m": 5, "n": 2, "k": 64, "x": INT8, "w": INT8, "batches": 3},
            3 * (2 * 64 + 2 * 4 + 5 * 64 + 5 * 4 + 5 * 2 * 4),
            3 * 1280,
        ),
        ({"m": 0, "n": 0, "k": 0}, 0, 0),
    ],
)
def test_bytes_and_operations(changes, moved, operations):
    stated = problem(**changes)
    assert stated.bytes == moved
    assert stated.operations == operations


@pytest.mark.parametrize("name", ["int4_g128", "int3_g24", "nvfp4", "fp8_128x128", "int4_g32_asym"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (130, 300), (16, 0)])
def test_bytes_are_those_that_an_array_has(name, shape):
    assert format_bytes(lb.format(name), *shape) == lb.quantize(np.zeros(shape, "f4"), name).nbytes


def test_counts_go_beyond_64_bits():
    huge = problem(m=2**40, n=2**40, k=2**40)
    assert huge.operations == 2**121
    assert huge.bytes == 2**79 + 2**73 * 4 + 2 * 2**80 * 4


# explain states the problem that matmul would


@st.composite
def _calls(draw):
    fmt = draw(st.sampled_from(["int4_g32", "int8_row", "nvfp4", "fp8_2x32"]))
    lead = draw(st.sampled_from([(), (2,)]))
    w = random_qarray(fmt, 5, 5) if not lead else lb.quantize(np.ones((2, 5, 5), "f4"), fmt)
    w = draw(st.sampled_from([w, w.mT, w[0] if not lead else w]))
    w = w.prepare() if draw(st.booleans()) else w
    kind = draw(st.sampled_from(["float32", "float64", "bfloat16", "int8_row", "int4_g32"]))
    shape = draw(st.sampled_from([(5,), (5, 5), (2, 5, 5), (3, 2, 5, 5)]))
    x: Any = np.ones(shape, kind if kind in ("float32", "float64", "bfloat16") else "float32")
    if kind not in ("float32", "float64", "bfloat16"):
        x = lb.quantize(x, kind)
        x = x.mT if x.ndim > 1 and draw(st.booleans()) else x
    options: dict[str, object] = {}
    if draw(st.booleans()):
        options["out_dtype"] = draw(st.sampled_from(["float16", "float32", "float64"]))
    if draw(st.booleans()):
        options["activation"] = "relu"
    if draw(st.booleans()) and isinstance(x, np.ndarray):
        options["x_format"] = draw(st.sampled_from(["int8_row", "int8_tensor", "nvfp4"]))
    if draw(st.booleans()):
        options["batch_invariant"] = True
    if isinstance(x, lb.QArray) or "x_format" in options or draw(st.booleans()):
        return x, w, options
    return w, x, options


@given(case=_calls())
def test_explain_states_what_matmul_runs(case):
    x, w, options = case
    seen: list[Problem] = []
    real, quantizing = kernels.prepared, binding.fused
    with pytest.MonkeyPatch.context() as patch:

        def prepared(stated, name=None):
            seen.append(stated)
            return real(stated, name)

        def fused(stated, name, dtype):
            seen.append(stated)
            return quantizing(stated, name, dtype)

        patch.setattr(kernels, "prepared", prepared)
        patch.setattr(binding, "fused", fused)
        lb.matmul(x, w, **options)
    assert set(seen) == {lb.explain(x, w, **options).problem}


def test_explain_reads_shapes_and_not_values():
    w = random_qarray("int4_g32", 64, 64).T
    x = np.full((3, 64), np.nan, np.float32)
    assert lb.explain(x, w).problem == lb.explain(np.zeros((3, 64), np.float32), w).problem
    wide = np.broadcast_to(np.float32(0), (2**20, 2**10, 64))  # 256 GB that nobody holds
    assert lb.explain(wide, w).problem.m == 2**30


@pytest.mark.parametrize("name", [k.name for k in kernels.registered()])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matmul_gives_the_reason_that_explain_prints(name, turned, dtype):
    w = random_qarray("int4_g32", 64, 64)
    w = w if turned else w.T
    x = np.ones((2, 64), dtype)
    why = lb.explain(x, w)
    refusal = next(v.refusal for v in why.verdicts if v.kernel.name == name)
    if refusal is None:
        assert lb.explain(x, w, kernel=name).kernel == name
        lb.matmul(x, w, kernel=name)
        return
    assert f"   {name:<16} no: {refusal}" in str(why).splitlines()
    for call in (lb.explain, lb.matmul):
        with pytest.raises(ValueError, match=re.escape(f"kernel={name!r} refuses: {refusal}")):
            call(x, w, kernel=name)


def test_columns_that_x_cannot_undo_leave_the_reference():
    made = random_qarray("int4_g32", 64, 64)
    w = lb.from_parts(made.format, made.codes, made.scales, columns=np.arange(64)[::-1])
    x, q = np.ones((2, 64), np.float32), random_qarray("int8_row", 2, 64)
    assert lb.explain(x, w.T).kernel == "matmul.cpu.fma"
    assert "permuted first" in lb.explain(x, w.T).note
    for left, right in ((x, w), (w, x.T), (q, w.T)):
        why = lb.explain(left, right)
        assert why.kernel == "reference"
        assert "   matmul.cpu.fma   no: permuted or divided columns" in str(why)
        assert {v.refusal is None for v in why.verdicts[1:]} == {False}
        assert {v.kernel for v in why.verdicts} == set(kernels.registered())
        assert_within_bound(lb.matmul(left, right, kernel="reference"), left, right)
        for call in (lb.explain, lb.matmul):
            with pytest.raises(
                ValueError, match=r"'matmul\.cpu\.fma' refuses: permuted or divided"
            ):
                call(left, right, kernel="matmul.cpu.fma")
            with pytest.raises(ValueError, match=r"kernel='magic' is not known"):
                call(left, right, kernel="magic")


# In words


@pytest.fixture
def two_threads():
    before = lb.get_num_threads()
    lb.set_num_threads(2)
    yield
    lb.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_text_says_everything():
    x, w = np.ones((8, 256), np.float32), lb.quantize(np.ones((64, 256), np.float32), "int4_g128")
    text = str(lb.explain(x, w.T)).splitlines()
    # codes 64 * 128, scales 64 * 2 * 4, x 8 * 256 * 4, result 8 * 64 * 4
    assert text[0].startswith("(8, 256) float32 @ (64, 256) int4_g128.T -> float32 on cpu:")
    assert text[0].endswith(", 2 threads")
    assert text[1] == "18,944 bytes, 262,144 operations"
    assert re.fullmatch(
        r"floors \(estimated machine\): \S+ [mu]?s to move, \S+ [mu]?s to compute", text[2]
    )
    assert re.fullmatch(r"expected share of the floor: \d+ % \(costs are estimated\)", text[3])
    assert text[4].startswith("rounding: ")
    kinds = text[5:]
    assert sum(line.startswith("-> ") for line in kinds) == 1
    assert {line.split()[line.startswith("->")] for line in kinds} == {
        k.name for k in kernels.registered()
    }
    for line in kinds:
        assert re.search(r"(us|ms|s) \(estimated\)$|no: \w+", line)


def test_the_text_shows_which_way_the_weight_stands_and_that_the_slow_path_is_slow():
    x, w = np.ones((8, 64), np.float32), random_qarray("int4_g32", 64, 32)
    text = str(lb.explain(x, w))
    assert "(8, 64) float32 @ (64, 32) int4_g32 -> float32" in text
    assert "the scales of w lie across the contraction axis" in text
    assert text.splitlines()[-1] == "the reference kernel is slow: it widens every value to float64"
    turned = str(lb.explain(w, np.ones((32, 3), np.float32)))
    assert turned.splitlines()[-1] == "computed as the transpose of w.T @ x.T"
    stack = str(lb.explain(np.ones((2, 8, 32), "f4"), lb.stack([w, w]).mT))
    assert stack.splitlines()[-1] == "every matrix of the stack by itself"


def test_seconds_are_those_of_all_matrices():
    made = random_qarray("int8_row", 32, 64)
    turned = lb.from_parts(made.format, made.codes, made.scales, columns=np.arange(64)[::-1])
    for w in (made, turned):
        one, five = (
            {v.kernel.name: v.seconds for v in lb.explain(x, y.mT).verdicts if v.seconds}
            for x, y in ((made, w), (lb.stack([made] * 5), lb.stack([w] * 5)))
        )
        assert five == {name: 5 * seconds for name, seconds in one.items()}


@pytest.mark.parametrize("stacks", [False, True])
def test_kernels_are_asked_for_a_matrix_unless_they_take_stacks(stacks, monkeypatch):
    asked: dict[str, set[int]] = {}

    def answer(name, given):
        def say(p, *_):
            asked.setdefault(name, set()).add(p.batches)
            return given

        return say

    kernel = kernels.Kernel(
        "asked",
        "cpu",
        accepts=answer("accepts", None),
        cost=answer("cost", 1e-6),
        build=answer("build", None),
        roundings=answer("roundings", kernels.Roundings("float32", 1)),
        layouts=("rows",),
        describe=answer("describe", "a way"),
        stacks=stacks,
        fused=answer("fused", None),
    )
    monkeypatch.setattr(kernels, "registered", lambda: (kernel,))
    # What is built is remembered: no other test states this.
    stated = problem(m=7919, batches=7 + stacks, x=INT8)
    assert "a way" in str(lb.Explanation(stated, judge(stated), "asked"))
    kernels.prepared(stated, "asked")
    binding.fused(stated, "asked", "float32")
    for name in ("accepts", "cost", "build", "roundings", "describe", "fused"):
        assert asked[name] == {8 if stacks else 1}, name


def test_a_stack_of_no_matrices_is_explained_by_one():
    w = random_qarray("int8_row", 32, 64)
    empty = lb.stack([w])[:0]
    assert "(32, 64) int8_row @ (32, 64) int8_row.T" in str(lb.explain(empty, empty.mT))


def test_floors_are_bytes_and_operations_over_the_rates():
    from lowbit.kernels.cpu import machine

    x, w = np.ones((8, 64), np.float32), random_qarray("int8_row", 64, 64)
    for why in (lb.explain(x, w.T), lb.explain(x, w.T, x_format="int8_row")):
        p = why.problem
        rates = machine.estimate(p.device, p.threads)
        integer = not isinstance(p.x, str)
        speed = rates.integer_operations if integer else rates.float_operations
        assert why.floors == (p.bytes / rates.bandwidth, 2 * 8 * 64 * 64 / speed)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "tanh"}, ValueError, "activation: want one of relu"),
        ({"out_dtype": "int8"}, TypeError, "out_dtype: want one of"),
        ({"x_format": "int9"}, ValueError, "no format 'int9'"),
        ({"kernel": "magic"}, ValueError, "kernel='magic' is not known"),
    ],
)
def test_bad_options_are_refused_as_by_matmul(options, error, message):
    x, w = np.ones((8, 64), np.float32), random_qarray("int8_row", 64, 64).T
    for call in (lb.explain, lb.matmul):
        with pytest.raises(error, match=message):
            call(x, w, **options)


def test_operands_that_do_not_multiply_are_refused():
    w = random_qarray("int8_row", 64, 32)
    with pytest.raises(ValueError, match=r"\(8, 64\) and \(32, 64\) do not multiply"):
        lb.explain(np.ones((8, 64), np.float32), w.T)
    with pytest.raises(TypeError, match="neither operand is a QArray"):
        lb.explain(np.ones((8, 64)), np.ones((64, 8)))
    for call in (lb.explain, lb.matmul):
        with pytest.raises(TypeError, match="quantized already, as int8_row"):
            call(w, np.ones((32, 2), np.float32), x_format="int8_row")

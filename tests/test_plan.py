"""A plan is matmul with everything but the arithmetic done before: same bits, same refusals."""

import gc
import itertools
import re
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import kernels
from lowbit.formats.reference import Packed
from lowbit.kernels.reference import KERNELS as REFERENCE
from lowbit.testing import conformance, random_qarray, strategies

RNG = np.random.default_rng(0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(dtype)


# Same bits


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ("float32", "int4_g32_asym"),
        ("bfloat16", "int8_row"),
        ("float64", "int4_g32"),
        ("float32", "int3_g24"),
        ("int8_row", "int4_g32"),
        ("float8_e4m3fn_row", "float8_e4m3fn_row"),
    ],
)
@settings(max_examples=25)
@given(data=st.data())
def test_a_plan_gives_the_bits_of_matmul(x, w, data):
    case = data.draw(strategies.products(w, x, most=40, epilogue=True))
    held = case.w.prepare() if data.draw(st.booleans()) else case.w
    plan = lb.plan(case.x, held.T, **case.options)
    wanted = lb.matmul(case.x, held.T, **case.options)
    assert (plan.shape, plan.dtype) == (wanted.shape, wanted.dtype)
    for _ in range(2):
        conformance.same_bits(plan(case.x), wanted)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((3, 64), (17, 64)),
        ((64,), (17, 64)),
        ((2, 3, 64), (17, 64)),
        ((0, 64), (17, 64)),
        ((3, 64), (2, 17, 64)),
        ((64,), (2, 17, 64)),
        ((2, 1, 3, 64), (5, 17, 64)),
        ((3, 64), (64,)),
        ((64,), (64,)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"x_format": "int8_row"}, {"x_format": "int8_tensor"}])
@pytest.mark.parametrize("prepared", [False, True])
def test_every_shape(x, w, options, prepared):
    held = lb.quantize(normal(*w), "int8_row")
    if len(w) > 1:
        held = (held.prepare() if prepared else held).mT
    example, given = np.zeros(x, np.float32), normal(*x)
    plan = lb.plan(example, held, **options)
    wanted = lb.matmul(given, held, **options)
    conformance.same_bits(plan(given), wanted)
    assert plan.shape == np.shape(wanted)
    assert plan.kernel == plan.explain().kernel == lb.explain(given, held, **options).kernel
    assert plan.explain().problem == lb.explain(given, held, **options).problem


def test_quantized_x():
    w = random_qarray("int4_g32", 17, 64).T
    for x in (
        random_qarray("int8_row", 5, 64),
        random_qarray("int8_row", 64, 5).T,
        lb.stack([random_qarray("int8_row", 5, 64)] * 2),
        random_qarray("int8_row", 1, 64)[0],
    ):
        conformance.same_bits(lb.plan(x, w)(x), lb.matmul(x, w))


@pytest.mark.parametrize("x_format", [None, "int8_row"])
def test_columns_divided_and_permuted(x_format):
    made = lb.quantize(normal(17, 64), "int4_g32")
    w = lb.from_parts(
        made.format,
        made.codes,
        made.scales,
        columns=RNG.permutation(64),
        divisor=RNG.uniform(0.3, 3, 64),
    )
    for dtype in ("float32", "float16"):
        for x, right in ((normal(5, 64), w.T), (normal(5, 17), w)):
            x = x.astype(dtype)
            plan = lb.plan(x, right, x_format=x_format)
            conformance.same_bits(plan(x), lb.matmul(x, right, x_format=x_format))


def test_static_scales_are_those_of_the_plan():
    x, w, scale = normal(5, 64), random_qarray("int8_row", 17, 64), np.full((1, 1), 0.05)
    plan = lb.plan(x, w.T, x_format="int8_tensor", x_scale=scale)
    wanted = lb.matmul(x, w.T, x_format="int8_tensor", x_scale=0.05)
    scale[:] = 1
    conformance.same_bits(plan(x), wanted)


def test_memory_of_x_is_free():
    w = random_qarray("int4_g32", 24, 96).T
    x = normal(7, 96)
    plan = lb.plan(x, w, x_format="int8_row"), lb.plan(x, w)
    for kind in strategies.MEMORY:
        held = strategies.in_memory(x, kind)
        conformance.same_bits(plan[0](held), lb.matmul(x, w, x_format="int8_row"))
        conformance.same_bits(plan[1](held), lb.matmul(x, w))
    conformance.same_bits(plan[1](x.astype(">f4")), lb.matmul(x, w))


# Epilogue and out


def test_bias_and_residual_are_copied_when_the_plan_is_made():
    x, w = normal(3, 64), random_qarray("int4_g32", 17, 64).T
    options = {"bias": normal(17), "residual": normal(3, 17), "activation": "gelu", "alpha": 0.5}
    wanted = lb.matmul(x, w, **options)
    plan = lb.plan(x, w, **options)
    options["bias"][:] = 0
    options["residual"][:] = 0
    conformance.same_bits(plan(x), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", ">f4"])
def test_a_residual_of_the_call(dtype):
    x, w = normal(3, 64), random_qarray("int4_g32", 17, 64).T
    dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    first, second = (normal(3, 17) * 9).astype(dtype), (normal(17) * 9).astype(dtype)
    plan = lb.plan(x, w, residual=first, bias=np.ones(17))
    conformance.same_bits(plan(x), lb.matmul(x, w, residual=first, bias=np.ones(17)))
    wanted = lb.matmul(x, w, residual=second, bias=np.ones(17))
    conformance.same_bits(plan(x, residual=second), wanted)
    conformance.same_bits(plan(x), lb.matmul(x, w, residual=first, bias=np.ones(17)))


@pytest.mark.parametrize("kind", strategies.MEMORY)
def test_out_of_the_plan_and_of_the_call(kind):
    x, w = normal(3, 64), random_qarray("int4_g32", 17, 64).T
    out = strategies.in_memory(np.zeros((3, 17), np.float32), kind)
    if kind == "read-only":
        with pytest.raises(ValueError, match="out: the array is read-only"):
            lb.plan(x, w, out=out)
        with pytest.raises(ValueError, match="out: the array is read-only"):
            lb.plan(x, w)(x, out=out)
        return
    plan, wanted = lb.plan(x, w, out=out), lb.matmul(x, w)
    assert plan(x) is out
    assert (out == wanted).all()
    other = np.zeros_like(wanted)
    assert plan(-x, out=other) is other
    assert (other == lb.matmul(-x, w)).all()
    assert (out == wanted).all()
    out[...] = 0
    assert lb.plan(x, w)(x, out=out) is out
    assert (out == wanted).all()


def test_out_decides_the_dtype_of_the_plan():
    x, w = normal(3, 64), random_qarray("int4_g32", 17, 64).T
    out = np.zeros((3, 17), np.float16)
    assert lb.plan(x, w, out=out)(x).dtype == np.float16
    assert (out == lb.matmul(x, w, out_dtype="float16")).all()


def test_out_may_be_an_operand_or_overlap_one():
    w = random_qarray("int4_g32", 192, 192).T  # more than one tile: the first is written early
    x, rest = normal(32, 192), normal(33, 192)
    wanted = lb.matmul(x, w, residual=rest[:-1])
    plan = lb.plan(x, w, residual=rest[:-1])
    for call in (
        lambda given, held: plan(given, residual=held[:-1], out=held[1:]),
        lambda given, held: lb.matmul(given, w, residual=held[:-1], out=held[1:]),
        lambda given, held: plan(given, out=given),
        lambda given, held: lb.matmul(given, w, residual=held[:-1], out=given),
    ):
        assert (call(x.copy(), rest.copy()) == wanted).all()
    bias = np.arange(32 * 192, dtype=np.float32).reshape(32, 192)
    wanted = lb.matmul(x, w, bias=bias[3].copy())
    assert (lb.matmul(x, w, bias=bias[3], out=bias) == wanted).all()


def test_results_are_fresh_and_aligned():
    x, w = normal(1, 64), random_qarray("int4_g32", 17, 64).T
    plan = lb.plan(x, w)
    results = [plan(x) for _ in range(8)] + [lb.matmul(x, w) for _ in range(8)]
    assert all(r.ctypes.data % 64 == 0 for r in results)
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(results, 2))


# Frameworks


def test_torch():
    w = lb.quantize(torch.eye(4, 64), "int4_g32").T
    x, bias = torch.randn(3, 64), torch.ones(4)
    plan = lb.plan(x, w, bias=bias)
    result = plan(x)
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, lb.matmul(x, w, bias=bias))
    out = torch.zeros(3, 4)
    version = out._version
    assert plan(x, out=out) is out
    assert out._version > version
    assert torch.equal(out, result)
    assert isinstance(plan(x.numpy()), np.ndarray)
    kept = lb.plan(x, w, bias=bias, out=torch.zeros(3, 4))
    assert torch.equal(kept(x), result)


def test_jax():
    w = lb.quantize(np.eye(4, 64, dtype=np.float32), "int4_g32").T
    x = jnp.ones((3, 64))
    plan = lb.plan(x, w)
    assert isinstance(plan(x), jnp.ndarray)
    assert (plan(x) == x @ w).all()


# Refusals


def test_what_does_not_fit_is_named():
    w = random_qarray("int4_g32", 17, 64).T
    plan = lb.plan(np.zeros((3, 64), np.float32), w)
    with pytest.raises(
        ValueError, match=r"x is \(2, 64\) float32, the plan is for \(3, 64\) float32; make another"
    ):
        plan(normal(2, 64))
    with pytest.raises(TypeError, match=r"x is float16, the plan is for float32; cast x to float"):
        plan(normal(3, 64, dtype="float16"))
    with pytest.raises(ValueError, match=r"x is \(3, 64\) int8_row for float32, the plan is for"):
        plan(random_qarray("int8_row", 3, 64))
    with pytest.raises(TypeError, match="x: dtype"):
        plan(np.zeros((3, 64), complex))
    coded = lb.plan(random_qarray("int8_row", 3, 64), w)
    for other in (
        normal(3, 64),
        random_qarray("int8_g32", 3, 64),
        random_qarray("int8_row", 2, 64),
        random_qarray("int8_row", 64, 3).T,
        lb.quantize(normal(3, 64, dtype="float16"), "int8_row"),
    ):
        with pytest.raises(ValueError, match=r"the plan is for \(3, 64\) int8_row for float32;"):
            coded(other)


def test_out_and_residual_that_do_not_fit_are_named():
    x, w = normal(3, 64), random_qarray("int4_g32", 17, 64).T
    plan = lb.plan(x, w, residual=normal(3, 17))
    for make in (lambda out: lb.plan(x, w, out=out), lambda out: plan(x, out=out)):
        with pytest.raises(ValueError, match=r"out: want shape \(3, 17\), got \(17, 3\)"):
            make(np.zeros((17, 3), np.float32))
        with pytest.raises(TypeError, match="out: want an array to write into, got list"):
            make([0.0])
    with pytest.raises(TypeError, match="out: the plan gives float32, got float16; make the plan"):
        plan(x, out=np.zeros((3, 17), np.float16))
    with pytest.raises(TypeError, match="residual: the plan adds float32, got float16"):
        plan(x, residual=normal(3, 17, dtype="float16"))
    with pytest.raises(ValueError, match=r"residual: \(4, 17\) does not broadcast to the result"):
        plan(x, residual=normal(4, 17))
    with pytest.raises(ValueError, match=r"residual: the plan was made without one; .*float32"):
        lb.plan(x, w)(x, residual=normal(3, 17))


def test_options_are_refused_as_by_matmul():
    x, w = normal(3, 64), random_qarray("int4_g32", 17, 64).T
    for options in (
        {"activation": "tanh"},
        {"activation": ["relu"]},
        {"bias": np.ones(3)},
        {"alpha": np.nan},
        {"alpha": np.ones(2)},
        {"out_dtype": "int8"},
        {"x_format": "int9"},
        {"x_scale": 1.0},
        {"kernel": "magic"},
        {"kernel": ["reference"]},
        {"residual": np.ones((4, 17))},
        {"residual": np.ones((3, 17), complex)},
        {"out": np.zeros((3, 17), np.float32), "out_dtype": "float16"},
    ):
        with pytest.raises((TypeError, ValueError)) as wanted:
            lb.matmul(x, w, **options)
        with pytest.raises(type(wanted.value)) as got:
            lb.plan(x, w, **options)
        assert str(got.value) == str(wanted.value)
    with pytest.raises(ValueError, match="matmul: x has 63 columns, w has 64 rows"):
        lb.plan(normal(3, 63), w)


def test_the_weight_is_on_the_right():
    with pytest.raises(TypeError, match=r"got ndarray. Of w @ x plan the transpose, x.T @ w.T"):
        lb.plan(random_qarray("int4_g32", 17, 64), normal(64, 3))


def test_numbers_that_are_not_finite_cannot_be_quantized():
    x, w = normal(3, 64), random_qarray("int4_g32", 17, 64).T
    plan = lb.plan(x, w, x_format="int8_row")
    x[1, 5] = np.nan
    with pytest.raises(ValueError, match="NaN") as wanted:
        lb.quantize(x, "int8_row")
    with pytest.raises(ValueError, match=re.escape(str(wanted.value))):
        plan(x)


# What it holds


def test_the_weight_lives_as_long_as_the_plan():
    w = random_qarray("int4_g32", 17, 64)
    held = weakref.ref(w._parts.codes)
    plan = lb.plan(np.zeros((3, 64), np.float32), w.T)
    del w
    gc.collect()
    assert held() is not None
    assert plan.weight.shape == (64, 17)
    plan(normal(3, 64))
    del plan
    assert held() is None, "without a cycle that would wait for the collector"


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_no_weight_is_held_twice(prepared, stacked):
    w = lb.quantize(normal(*([2] if stacked else []), 512, 2048), "int8_row")
    w = w.prepare() if prepared else w
    x = np.zeros((1, 2048), np.float32)

    def plans():
        made = [lb.plan(x, w.mT), lb.plan(x, w.mT, x_format="int8_row")]
        for plan in made:
            plan(x)
        return made

    plans()  # compiles, and the texts stay
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    again = plans()
    assert again[0].weight._parts is w._parts
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < w.nbytes / 8


def in_pieces():
    """A weight in memories that kernels do not read, and whole."""
    whole = random_qarray("uint4_g32_asym", 256, 2048)
    codes, scales, zeros = whole.codes, whole.scales, whole.zeros
    assert zeros is not None
    for parts in (
        (codes[::-1].copy()[::-1], scales, zeros),
        (np.asfortranarray(codes), scales, zeros),
        (codes, np.asfortranarray(scales), zeros),
        (codes, scales, np.repeat(zeros, 2, axis=1)[:, ::2]),
    ):
        yield lb.from_parts(whole.format, parts[0], parts[1], zeros=parts[2]), whole


@pytest.mark.parametrize("number", range(4))
def test_a_weight_in_pieces_is_gathered_at_each_call(number):
    w, whole = list(in_pieces())[number]
    x = normal(3, 2048)
    wanted = lb.matmul(x, whole.T)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    plan = lb.plan(x, w.T)
    for _ in range(2):
        conformance.same_bits(plan(x), wanted)
        conformance.same_bits(lb.matmul(x, w.T), wanted)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < w.nbytes / 4
    conformance.same_bits(lb.plan(normal(3, 256), w)(normal(3, 256) * 0), np.zeros((3, 2048), "f4"))


def test_a_prepared_weight_the_other_way_round_is_restored_at_each_call(monkeypatch):
    """The problem says that it is held as rows, so rows it is that a kernel gets."""
    seen = []

    def bind(w):
        seen.append(w)
        return REFERENCE[0].build(problem)(w)

    w = random_qarray("int4_g32", 256, 2048)
    x = normal(3, 256)
    wanted = lb.matmul(x, w)
    problem = lb.explain(x, w.prepare()).problem
    monkeypatch.setattr(kernels, "prepared", lambda *_: bind)
    plan = lb.plan(x, w.prepare())
    for _ in range(2):
        conformance.same_bits(plan(x), wanted)
    assert problem.layout == "rows"
    assert [type(each) for each in seen] == [Packed, Packed]


def test_any_number_of_threads_may_call():
    w = random_qarray("int4_g32", 130, 200).T
    xs = [normal(40, 200) for _ in range(8)]
    plan, started = lb.plan(xs[0], w), threading.Barrier(8)
    wanted = [lb.matmul(x, w) for x in xs]

    def work(number):
        started.wait()
        return all((plan(xs[number]) == wanted[number]).all() for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_it_says_what_it_is():
    x, w = np.zeros((3, 64), np.float32), random_qarray("int4_g32", 17, 64)
    assert repr(lb.plan(x, w.T, kernel="reference")) == (
        "Plan((3, 64) float32 @ (64, 17) int4_g32 for float32, transposed -> (3, 17) float32, "
        "kernel='reference')"
    )
    assert str(lb.plan(x, w.T).explain()) == str(lb.explain(x, w.T))
    assert "reference" in str(lb.plan(x, w.T, kernel="reference").explain())

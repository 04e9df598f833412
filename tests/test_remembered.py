"""A weight remembers what was bound to it: each kind of product once, not for ever, in no cycle."""

import weakref

import numpy as np
import pytest

import lowbit as lb
from lowbit import binding
from lowbit.testing import conformance, random_qarray

RNG = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(dtype)


def counted(monkeypatch):
    """Every product that is made from now on."""
    made, real = [], binding.make

    def make(*operands):
        made.append(operands)
        return real(*operands)

    monkeypatch.setattr(binding, "make", make)
    return made


@pytest.mark.parametrize(
    ("x", "w"), [((3, 64), (64, 64)), ((3, 64), (4, 64, 64)), ((64,), (64, 64)), ((64, 3), None)]
)
@pytest.mark.parametrize("options", [{}, {"x_format": "int8_row"}, {"activation": "relu"}])
def test_what_was_multiplied_once_is_remembered(x, w, options, monkeypatch):
    made = counted(monkeypatch)
    if w is None:  # the weight on the left, which is never x
        held = random_qarray("int4_g32", 64, 64)
        pair, options = (held, normal(*x)), {"activation": options.get("activation")}
    else:
        held = lb.quantize(normal(*w), "int4_g32")
        pair = normal(*x), held.mT
    first = lb.matmul(*pair, **options)
    conformance.same_bits(lb.matmul(*pair, **options), first)
    assert len(made) == 1
    lb.matmul(*pair, **options, batch_invariant=True)
    lb.matmul(*pair, **options, out_dtype="float16")
    assert len(made) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"bias": np.arange(64.0)},
        {"activation": "relu"},
        {"residual": np.arange(64.0)},
        {"alpha": 2},
        {"x_format": "int8_row"},
        {"x_format": "int8_tensor", "x_scale": 0.1},
        {"out_dtype": "float16"},
        {"out": np.zeros((3, 64), np.float16)},
        {"kernel": "reference"},
        {"batch_invariant": True},
    ],
)
def test_a_plain_product_before_stands_for_no_other(options, monkeypatch):
    x, w = normal(3, 64), random_qarray("int4_g32", 64, 64)
    wanted = lb.matmul(x, w.copy().T, **options)
    plain = lb.matmul(x, w.T)
    made = counted(monkeypatch)
    for _ in range(2):
        got = lb.matmul(x, w.T, **options)
        conformance.same_bits(got, wanted)
        conformance.same_bits(lb.matmul(x, w.T), plain)
    assert len(made) == ("alpha" not in options), "alpha is a number of the call"


def test_either_side_of_a_square_is_remembered_by_itself():
    x, w = normal(64, 64), random_qarray("int4_g32", 64, 64)
    for first, second in ((x, w), (w, x), (x, w.T), (w.T, x)):
        wanted = [lb.dequantize(s, "float64") if s is not x else x for s in (first, second)]
        for _ in range(2):
            got = lb.matmul(first, second)
            assert np.abs(got - wanted[0] @ wanted[1]).max() < 1e-2


def test_another_number_of_threads_is_another_choice(monkeypatch):
    made, w = counted(monkeypatch), random_qarray("int4_g32", 64, 64).T
    x = normal(3, 64)
    for threads in (1, 2, 1, 2):
        lb.set_num_threads(threads)
        lb.matmul(x, w)
    lb.set_num_threads(None)
    assert len(made) == 2


def test_columns_that_x_undoes_are_remembered_too(monkeypatch):
    made = counted(monkeypatch)
    q = random_qarray("int4_g32", 64, 64)
    w = lb.from_parts(q.format, q.codes, q.scales, columns=RNG.permutation(64)).T
    x = normal(3, 64)
    for _ in range(3):
        lb.matmul(x, w)
    assert len(made) == 1


def test_a_weight_does_not_remember_without_end():
    w = random_qarray("int4_g32", 3, 32)
    for rows in range(200):
        lb.matmul(np.zeros((rows, 32), np.float32), w.T)
    assert 0 < len(w._content.plans) <= 64


@pytest.mark.parametrize("turn", [lambda w: w.T, lambda w: w])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_weight_that_was_multiplied_is_freed_at_once(turn, permuted):
    made = random_qarray("int4_g32", 64, 64)
    columns = RNG.permutation(64) if permuted else None
    w = lb.from_parts(made.format, made.codes.copy(), made.scales.copy(), columns=columns)
    held = weakref.ref(w._content)
    x = normal(3, 64)
    lb.matmul(x, turn(w))
    lb.matmul(x, turn(w), x_format="int8_row")
    lb.matmul(turn(w), x.T)
    lb.matmul(random_qarray("int8_row", 3, 64), turn(w))
    assert w._content.plans
    del w
    assert held() is None

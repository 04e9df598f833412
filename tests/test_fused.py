"""Kernels that quantize x themselves: asked, given steady rows, and never the last word."""

import re

import ml_dtypes
import numpy as np
import pytest

import lowbit as lb
from lowbit import binding, kernels
from lowbit.formats import reference
from lowbit.kernels.declare import NOT_FINITE, Kernel, Roundings
from lowbit.kernels.reference import KERNELS as REFERENCE
from lowbit.testing import assert_within_bound, conformance, random_qarray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(dtype)


class Inside:
    """A kernel that quantizes x inside, by the reference, and writes down what it was given."""

    def __init__(self, refuses=(), blind=False):
        self.given, self.asked, self.refuses, self.blind = [], [], refuses, blind
        self.kernel = Kernel(
            "inside",
            "cpu",
            accepts=lambda p: None if not isinstance(p.x, str) else "wants a quantized x",
            cost=lambda p: 1e-9,
            build=REFERENCE[0].build,
            roundings=lambda p: Roundings("float64", p.k + 12),
            layouts=("rows", "words16"),
            fused=self.fused,
        )

    def fused(self, problem, dtype):
        self.asked.append(dtype)
        if dtype in self.refuses:
            return None
        bind = REFERENCE[0].build(problem)

        def bound(w):
            run = bind(w)

            def inside(x, after, out):
                assert x.shape == (problem.m, problem.k)
                assert x.dtype.name == dtype
                assert x.flags.c_contiguous
                assert x.flags.aligned
                assert x.dtype.isnative
                self.given.append(x)
                if self.blind or not np.isfinite(x.astype(np.float64)).all():
                    out[...] = 99
                    return NOT_FINITE
                run(reference.quantize(problem.x, x), after, out)
                return None

            return inside

        return bound


@pytest.fixture
def inside(monkeypatch):
    def install(**options):
        made = Inside(**options)
        monkeypatch.setattr(kernels, "registered", lambda: (*REFERENCE, made.kernel))
        kernels.prepared.cache_clear()
        binding.fused.cache_clear()
        return made

    yield install
    kernels.prepared.cache_clear()
    binding.fused.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("x", "w", "x_format", "calls"),
    [
        ((3, 64), (17, 64), "int8_row", 1),
        ((64,), (17, 64), "int8_g32", 1),
        ((2, 3, 64), (17, 64), "int8_row", 1),  # every row has its own scales
        ((2, 3, 64), (17, 64), "int8_tensor", 2),  # every matrix has
        ((3, 64), (2, 17, 64), "int8_row", 2),
        ((2, 3, 64), (2, 17, 64), "nvfp4", 2),
    ],
)
def test_x_is_quantized_by_the_kernel(inside, dtype, x, w, x_format, calls):
    given = normal(*x).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    held = lb.quantize(normal(*w), "int4_g32").mT
    wanted = lb.matmul(given, held, x_format=x_format, kernel="reference")
    seen = inside()
    options = {"x_format": x_format, "bias": np.ones(17), "residual": normal(17)}
    for got in (
        lb.matmul(given, held, x_format=x_format),
        lb.plan(np.zeros_like(given), held, x_format=x_format)(given),
    ):
        conformance.same_bits(got, wanted)
    assert len(seen.given) == 2 * calls
    assert set(seen.asked) == {dtype}
    full = lb.matmul(given, held, **options)
    conformance.same_bits(full, lb.matmul(given, held, **options, kernel="reference"))
    assert_within_bound(full, given, held, **options)
    assert len(seen.given) == 3 * calls


@pytest.mark.parametrize("kind", ["strided", "reversed", "unaligned", "foreign"])
def test_what_a_kernel_gets_is_steady(inside, kind):
    x = normal(3, 64)
    memory = {
        "strided": np.repeat(x, 2, axis=1)[:, ::2],
        "reversed": x[::-1].copy()[::-1],
        "unaligned": np.frombuffer(b" " + x.tobytes(), np.float32, 192, 1).reshape(3, 64),
        "foreign": x.astype(">f4"),
    }
    w, seen = random_qarray("int4_g32", 17, 64).T, inside()
    conformance.same_bits(
        lb.matmul(memory[kind], w, x_format="int8_row"), lb.matmul(x, w, x_format="int8_row")
    )
    assert len(seen.given) == 2


def test_a_kernel_need_not_quantize_everything(inside):
    x, w, seen = normal(3, 64), random_qarray("int4_g32", 17, 64).T, inside(refuses=("float32",))
    lb.matmul(x, w, x_format="int8_row")
    assert (seen.asked, seen.given) == (["float32"], [])
    lb.matmul(x, w, x_format="int8_tensor", x_scale=0.1)
    lb.plan(x, w, x_format="int8_tensor", x_scale=0.1)(x)
    lb.matmul(lb.quantize(x, "int8_row"), w)
    assert seen.asked == ["float32"], "static scales and ready codes are no question"
    lb.matmul(x, w, x_format="int8_row", kernel="reference")
    assert seen.given == []


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("x", [(3, 64), (2, 3, 64), (64,)])
def test_the_reference_says_where_a_number_is_not_finite(inside, x, stacked):
    given, seen = normal(*x), inside()
    w = lb.quantize(normal(*([2] if stacked else []), 17, 64), "int4_g32").mT
    plan = lb.plan(given, w, x_format="int8_row")
    given[..., -2] = np.inf
    with pytest.raises(ValueError, match="infinit") as wanted:
        lb.quantize(given, "int8_row")
    for call in (lambda: lb.matmul(given, w, x_format="int8_row"), lambda: plan(given)):
        with pytest.raises(ValueError, match=re.escape(str(wanted.value))):
            call()
    assert len(seen.given) == 2


def test_a_kernel_that_is_wrong_about_that_costs_no_bits(inside):
    x, w = normal(2, 3, 64), random_qarray("int4_g32", 17, 64).T
    wanted = lb.matmul(x, w, x_format="int8_row", kernel="reference")
    seen = inside(blind=True)
    conformance.same_bits(lb.matmul(x, w, x_format="int8_row"), wanted)
    assert seen.given


@pytest.mark.parametrize("x_format", [None, "int8_row"])
@pytest.mark.parametrize(
    "view",
    [
        lambda r: np.asfortranarray(r),
        lambda r: r[:, ::-1],
        lambda r: np.repeat(r, 2, axis=1)[:, ::2],
        lambda r: r.astype(r.dtype.newbyteorder(">")),
        lambda r: np.broadcast_to(r[:, :1], r.shape),
        lambda r: np.broadcast_to(r[:1, :1], r.shape),
    ],
)
def test_a_residual_is_read_whatever_its_memory(x_format, view):
    rng = np.random.default_rng(0)
    w = lb.quantize(rng.standard_normal((70, 64), np.float32), "int4_g32")
    x, residual = (rng.standard_normal((9, n), np.float32) for n in (64, 70))
    given = view(residual)
    plain = lb.matmul(x, w.T, x_format=x_format, residual=np.ascontiguousarray(given, np.float32))
    for found in (
        lb.matmul(x, w.T, x_format=x_format, residual=given),
        lb.plan(x, w.T, x_format=x_format, residual=given)(x),
    ):
        np.testing.assert_array_equal(found, plain)

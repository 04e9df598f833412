"""quantize_silu_mul and quantize_rmsnorm on a GPU: CuPy's rules on NumPy's memory, emulated."""

import re
import sys
from contextlib import nullcontext
from typing import Any

import fake_cupy
import ml_dtypes
import numpy as np
import pytest
from emulator import Emulator
from fake_cupy import Device, Machine, uncopied

import lowbit as lb
from lowbit import device as places
from lowbit.formats import codes
from lowbit.kernels.cuda import fused, launch

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(0)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(places, "gpu_array", fake.ndarray)
    return fake


@pytest.fixture
def machine(cupy: Any, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(emulator)
    monkeypatch.setattr(launch, "machine_of", lambda array: machine)
    return machine


def drawn(shape: tuple[int, ...], dtype: Any = BFLOAT16, seed: int = 0) -> Any:
    return codes.rounded(np.random.default_rng(seed).standard_t(4, shape), np.dtype(dtype))


def exact(x: Any) -> Any:
    """Gates whose silu has no error: 0, and numbers whose exponential does not count."""
    return np.where(x < 0, 0, 200 + np.abs(x)).astype(x.dtype)


def there(cupy: Any, x: Any, number: int = 1) -> Any:
    with Device(number):
        return cupy.asarray(x)


def same(got: lb.QArray, expected: lb.QArray, device: str = "cuda:1") -> None:
    assert got.device == device
    back = got.to_device("cpu")
    assert (back.format, back.shape, back.dtype) == (
        expected.format,
        expected.shape,
        expected.dtype,
    )
    for name in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        a, b = getattr(back, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if b is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            equal = a.tobytes() == b.tobytes()
            assert equal, name


SHAPES = [(5, 264), (2, 3, 264), (264,), (0, 264), (4, 0), (3, 0, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_kernel_gives_the_bits_of_the_host(machine, cupy, shape):
    gate, up = exact(drawn(shape, seed=1)), drawn(shape, seed=2)
    staying = uncopied if gate.size else nullcontext
    with staying():
        got = lb.quantize_silu_mul(there(cupy, gate), there(cupy, up), "mxfp8")
    same(got, lb.quantize_silu_mul(gate, up, "mxfp8"))
    x, weight = drawn(shape, seed=3), drawn(shape[-1:], seed=4)
    held = [there(cupy, each) for each in (x, weight, up)]
    with staying():
        alone = lb.quantize_rmsnorm(held[0], held[1], "int8_row", eps=1e-3)
        w, updated = lb.quantize_rmsnorm(held[0], held[1], "int8_row", eps=1e-3, residual=held[2])
    assert machine.launches == (3 if x.size else 0)
    same(alone, lb.quantize_rmsnorm(x, weight, "int8_row", eps=1e-3))
    expected, h = lb.quantize_rmsnorm(x, weight, "int8_row", eps=1e-3, residual=up)
    same(w, expected)
    assert type(updated) is cupy.ndarray
    assert updated.device.id == 1
    assert (updated.shape, updated.dtype) == (h.shape, h.dtype)
    assert updated.get().tobytes() == h.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_of_any_dtype_and_any_memory(machine, cupy, dtype):
    x = drawn((4, 72))
    weight = drawn((144,), dtype, seed=5)
    held = there(cupy, x), there(cupy, weight)[::-2]
    same(lb.quantize_rmsnorm(*held, "int8_row"), lb.quantize_rmsnorm(x, weight[::-2], "int8_row"))
    assert machine.launches == 1


VIEWS = {
    "rows backwards": np.s_[::-1],
    "every other row": np.s_[:, ::2],
    "columns apart": np.s_[..., ::2],
    "columns backwards": np.s_[..., ::-1],
    "inner rows": np.s_[:, 1:3],
    "one matrix": np.s_[1:2, ::3],
    "one row of each": np.s_[:, 2:3],
    "a vector": np.s_[1, 2, ::2],
    "half of the columns": np.s_[..., 8:72],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_read_by_the_kernel_or_copied_there(machine, cupy, view):
    x, other = exact(drawn((3, 5, 144), seed=6)), drawn((3, 5, 144), seed=7)
    held = there(cupy, x)[view], there(cupy, other)[view]
    x, other = x[view], other[view]
    weight = drawn(x.shape[-1:], seed=8)
    with Device(1), uncopied():
        product = lb.quantize_silu_mul(*held, "mxfp8")
        w, updated = lb.quantize_rmsnorm(held[0], cupy.asarray(weight), "mxfp8", residual=held[1])
    assert machine.launches == 2
    same(product, lb.quantize_silu_mul(x, other, "mxfp8"))
    expected, h = lb.quantize_rmsnorm(x, weight, "mxfp8", residual=other)
    same(w, expected)
    assert updated.get().tobytes() == h.tobytes()


REFUSED = ["nvfp4", "fp8_2x32", "int8_tensor", "int4_g48"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_does_is_done_on_the_host(machine, cupy, name, dtype):
    x, other, weight = (drawn(s, dtype, i) for i, s in enumerate([(2, 3, 96), (2, 3, 96), (96,)]))
    held = [there(cupy, each) for each in (x, other, weight)]
    w, updated = lb.quantize_rmsnorm(held[0], held[2], name, residual=held[1])
    expected, h = lb.quantize_rmsnorm(x, weight, name, residual=other)
    same(w, expected)
    assert updated.device.id == 1
    assert updated.get().tobytes() == h.tobytes()
    assert not machine.launches
    if dtype == "float64" or name != "int4_g48":
        same(lb.quantize_silu_mul(held[0], held[1], name), lb.quantize_silu_mul(x, other, name))
        assert not machine.launches


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", ["gate", "up", "x", "weight", "residual"])
def test_what_is_not_finite_is_counted_and_placed(machine, cupy, argument, value):
    names = ("gate", "up", "x", "residual")
    operands = {name: drawn((3, 72), seed=i) for i, name in enumerate(names)}
    operands["weight"] = drawn((72,))
    first = (7,) if argument == "weight" else (1, 7)
    operands[argument][first] = value
    held = {name: there(cupy, x) for name, x in operands.items()}

    def call() -> None:
        if argument in ("gate", "up"):
            lb.quantize_silu_mul(held["gate"], held["up"], "int8_row")
        else:
            lb.quantize_rmsnorm(held["x"], held["weight"], "int8_row", residual=held["residual"])

    text = f"{argument}: 1 entries are NaN or infinite, first at {first}"
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
    assert machine.launches == 1


def test_what_is_not_finite_only_in_between(machine, cupy):
    x, one = drawn((3, 72), np.float32), np.ones(72, np.float32)
    large, nothing = x.copy(), x.copy()
    large[1], nothing[2] = 1e30, 0
    for bad, eps, text in (
        (
            large,
            1e-6,
            r"first at \(1, 0\): numbers up to 1e\+30 in that row have squares whose sum",
        ),
        (nothing, 0, r"first at \(2, 0\): the mean square of that row is 0, and eps is, too"),
    ):
        with pytest.raises(ValueError, match=text):
            lb.quantize_rmsnorm(there(cupy, bad), there(cupy, one), "int8_row", eps=eps)
    half = np.full((2, 72), 300, np.float16)
    with pytest.raises(
        ValueError, match=r"holds 144 NaN .* first at \(0, 0\): gate is 300 and up is"
    ):
        lb.quantize_silu_mul(there(cupy, half), there(cupy, half), "int8_row")
    assert machine.launches == 3


def test_what_the_format_refuses_is_refused_there_too(machine, cupy):
    x = drawn((3, 72))
    with pytest.raises(
        ValueError, match=r"silu\(gate\) \* up as x, uint4_row has no negative value"
    ):
        lb.quantize_silu_mul(there(cupy, x), there(cupy, -x), "uint4_row")


X = drawn((2, 64))
MISPLACED: dict[str, Any] = {
    "up: it is on cpu, gate is on cuda:1": lambda c: lb.quantize_silu_mul(there(c, X), X, "int8"),
    "up: it is on cuda:0, gate is on cuda:1": lambda c: lb.quantize_silu_mul(
        there(c, X), there(c, X, 0), "int8"
    ),
    "up: it is on cuda:1, gate is on cpu": lambda c: lb.quantize_silu_mul(X, there(c, X), "int8"),
    "weight: it is on cpu, x is on cuda:1": lambda c: lb.quantize_rmsnorm(
        there(c, X), X[0], "int8"
    ),
    "residual: it is on cuda:0, x is on cuda:1": lambda c: lb.quantize_rmsnorm(
        there(c, X), there(c, X[0]), "int8", residual=there(c, X, 0)
    ),
}


@pytest.mark.parametrize("text", MISPLACED)
def test_operands_of_two_places_are_refused_by_name(machine, cupy, text):
    with pytest.raises(BufferError, match=rf"{text}; both have to be on one device: \w+"):
        MISPLACED[text](cupy)
    assert not machine.launches


def test_rows_that_lie_evenly() -> None:
    x = np.zeros((4, 3, 1, 16), np.float32)
    for good in (
        x,
        x[:, :1],
        x[::2, :1],
        x[0],
        x[0, 0, 0][None],
        x[..., 4:],
        x[::-1, 2:3],
        x[:1, ::2],
    ):
        assert fused.in_rows(good)
        assert fused.rows_of(good, "x").shape == (good.size // good.shape[-1], good.shape[-1])
    for bad in (x[:, ::2], x[:, 1:], x[..., ::2], x[..., ::-1], x.swapaxes(0, 1)):
        assert not fused.in_rows(bad)

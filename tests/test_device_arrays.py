"""Arrays on a GPU, on machines without one: CuPy's rules on NumPy's memory, kernels emulated."""

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import fake_cupy
import jax
import numpy as np
import pytest
from emulator import Emulator
from fake_cupy import Device, Machine, uncopied

import lowbit as lb
from lowbit import device as places
from lowbit import einsums
from lowbit.kernels.cuda import launch

README = Path(__file__).parent.parent / "README.md"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 64)).astype(np.float32)
FORMATS = ["int4_g32", "fp8_g32", "uint4_g32_asym", "mxfp4", "nvfp4", "int4_4x32", "int4_g32_bias"]


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


def weight(name: str = "int4_g32", shape: tuple[int, ...] = (8, 64)) -> lb.QArray:
    numbers = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return lb.quantize(abs(numbers) if name.startswith("u") else numbers, name)


def same(there: Any, here: Any) -> None:
    """The same parts, and so the same array."""
    there = there.to_device("cpu") if isinstance(there, lb.QArray) else there
    assert (there.shape, there.format, there.dtype) == (here.shape, here.format, here.dtype)
    for name in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        a, b = getattr(there, name), getattr(here, name)
        assert (a is None) == (b is None)
        if b is not None:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_moved_there_and_back(cupy, name, device):
    w = weight(name)
    there = w.to_device(device)
    assert there.device == ("cuda:1" if device == "cuda:1" else "cuda:0")
    assert isinstance(there.codes, cupy.ndarray)
    assert there.to_device(device) is there
    assert there.nbytes == w.nbytes
    assert f"device='{there.device}'" in repr(there)
    same(there, w)
    other = there.to_device("cuda:0" if device == "cuda:1" else "cuda:1")
    assert other.device != there.device
    same(other, w)


def test_the_current_device_is_what_cuda_alone_means(cupy):
    with Device(1):
        assert weight().to_device("cuda").device == "cuda:1"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:2", "'cuda:2' does not exist, CUDA finds 2 GPUs"),
        ("cuda:", "want 'cpu', 'cuda' or 'cuda:0'"),
        ("tpu", "want 'cpu', 'cuda' or 'cuda:0'"),
    ],
)
def test_devices_that_are_not_there(cupy, device, message):
    with pytest.raises(ValueError, match=message):
        weight().to_device(device)


def test_without_a_driver_the_error_says_where_to_look(cupy):
    def fail() -> int:
        raise fake_cupy.CUDARuntimeError("cudaErrorInsufficientDriver")

    cupy.cuda.runtime.getDeviceCount = fail
    with pytest.raises(ValueError, match=r"no GPU .*InsufficientDriver.*lowbit doctor"):
        weight().to_device("cuda")


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BufferError, match=r'pip install "lowbit\[cuda13\]"'):
        weight().to_device("cuda")


def test_streams_of_a_move(cupy):
    w = weight()
    seen = []
    inner = cupy.asarray

    def asarray(a: Any) -> Any:
        seen.append(fake_cupy.state.stream)
        return inner(a)

    cupy.asarray = asarray
    there = w.to_device("cuda", stream=7)
    w.to_device("cuda", stream=cupy.cuda.Stream(9))
    assert set(seen) == {7, 9}
    same(there.to_device("cpu", stream=7), w)
    with pytest.raises(TypeError, match="want a stream of CuPy or torch, or its number"):
        w.to_device("cuda", stream="high")
    with pytest.raises(ValueError, match="'cpu' has no streams"):
        w.to_device("cpu", stream=7)


OPERATIONS = {
    "a row": lambda w: w[1, 3],
    "rows": lambda w: w[:, 1:7:2],
    "reversed": lambda w: w[::-1],
    "columns": lambda w: w[..., 32:],
    "fancy": lambda w: w[[1, 0], [5, 2]],
    "mask": lambda w: w[np.array([True, False])],
    "reshape": lambda w: w.reshape(-1, 64),
    "transpose": lambda w: w.transpose(0, 2, 1),
    "swapaxes": lambda w: w.mT.mT,
    "copy": lambda w: w.copy(),
    "prepare": lambda w: w.prepare().copy(),
    "negate": lambda w: -w,
    "twice": lambda w: w * 2.0,
    "each row": lambda w: w * np.full((2, 8, 1), 0.5, np.float32),
    "concatenate": lambda w: lb.concatenate([w, w], -2),
    "side by side": lambda w: lb.concatenate([w[..., :32], w[..., 32:]], -1),
    "stack": lambda w: lb.stack([w, w]),
    "split": lambda w: np.split(w, 2)[1],
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_what_an_array_does_on_the_host_it_does_there(cupy, number, operation):
    w = weight("int4_g32", (2, 8, 64))
    there = operation(w.to_device(f"cuda:{number}"))
    assert there.device == f"cuda:{number}"
    same(there, operation(w))


@pytest.mark.parametrize("name", FORMATS)
def test_scales_of_every_kind_join_and_change_sign(cupy, name):
    w = weight(name)
    there = w.to_device("cuda")
    same(lb.concatenate([there, there]), lb.concatenate([w, w]))
    same(lb.stack([there, there])[1], w)
    if not name.startswith("u"):
        same(-there, -w)
    assert lb.array_equal(there, w)


def test_an_index_of_the_device(cupy):
    w = weight()
    same(w.to_device("cuda")[cupy.asarray(np.array([3, 1]))], w[[3, 1]])


def test_arrays_of_two_devices_do_not_join(cupy):
    w = weight()
    with pytest.raises(BufferError, match="array 1: it is on cpu, array 0 is on cuda:1"):
        lb.concatenate([w.to_device("cuda:1"), w])


@pytest.mark.parametrize("name", FORMATS)
def test_pickled_it_arrives_where_it_was(cupy, name):
    w = weight(name)
    data = pickle.dumps(w.to_device("cuda:1"))
    back = pickle.loads(data)
    assert back.device == "cuda:1"
    same(back, w)


def test_pickled_it_stays_on_the_host_where_the_gpu_is_missing(cupy):
    w = weight()
    data = pickle.dumps(w.to_device("cuda:1"))
    fake_cupy.state.count = 1
    with pytest.warns(UserWarning, match=r"pickled on cuda:1 stays on the host here: .*1 GPUs"):
        back = pickle.loads(data)
    assert back.device == "cpu"
    same(back, w)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("number", [0, 1])
def test_assembled_from_parts_without_a_copy(cupy, name, number):
    w = weight(name)
    there: Any = w.to_device(f"cuda:{number}")
    parts = {n: getattr(there, n) for n in ("zeros", "biases", "tensor_scale")}
    made: Any = lb.from_parts(w.format, there.codes, there.scales, shape=w.shape, **parts)
    assert made.device == f"cuda:{number}"
    assert made.codes.data.ptr == there.codes.data.ptr
    same(made, w)


def test_parts_of_two_places_are_refused(cupy):
    w = weight()
    there = w.to_device("cuda:1")
    with pytest.raises(
        BufferError, match=r"scales: it is on cpu, codes is on cuda:1.*cupy\.asarra"
    ):
        lb.from_parts(w.format, there.codes, w.scales)
    with pytest.raises(BufferError, match=r"scales: it is on cuda:1, codes is on cpu.*\.get\(\)"):
        lb.from_parts(w.format, w.codes, there.scales)


def test_scales_that_are_not_finite_are_found_there(cupy):
    there: Any = weight().to_device("cuda:1")
    scales = there.scales.get()
    scales[2, 1] = np.inf
    with Device(1):
        bad = cupy.asarray(scales)
    with pytest.raises(
        ValueError, match=r"scales: 1 entries are NaN or infinite, first at \(2, 1\)"
    ):
        lb.from_parts(there.format, there.codes, bad)


MISPLACED = {
    "x on the host": lambda c, w: lb.linear(X, w),
    "x on another GPU": lambda c, w: lb.linear(other(c, X), w),
    "w on the host": lambda c, w: lb.linear(c.asarray(X), w.to_device("cpu")),
    "x quantized on the host": lambda c, w: lb.linear(lb.quantize(X, "int8_row"), w),
    "bias": lambda c, w: lb.linear(c.asarray(X), w, bias=np.ones(8)),
    "residual": lambda c, w: lb.linear(c.asarray(X), w, residual=np.ones((5, 8))),
    "out": lambda c, w: lb.linear(c.asarray(X), w, out=np.empty((5, 8), np.float32)),
    "plan": lambda c, w: lb.plan(X, w.T),
    "plan's bias": lambda c, w: lb.plan(c.asarray(X), w.T, bias=np.ones(8)),
}


def other(cupy: Any, x: Any) -> Any:
    with Device(1):
        return cupy.asarray(x)


@pytest.mark.parametrize("call", MISPLACED.values(), ids=MISPLACED)
def test_operands_of_two_places_are_refused_by_name(machine, cupy, call):
    w = weight().to_device("cuda")
    lb.linear(cupy.asarray(X), w)  # a remembered product must not be found
    with pytest.raises(
        BufferError, match=r"\A\w+: it is on (cpu|cuda:\d), w is on (cpu|cuda:0); bo"
    ):
        call(cupy, w)


def test_quantized_where_the_numbers_are(machine, cupy):
    there = lb.quantize(cupy.asarray(X), "int4_g32")
    assert there.device == "cuda:0"
    assert machine.launches
    same(there, lb.quantize(X, "int4_g32"))


@pytest.mark.parametrize(
    "options",
    [{"rounding": "stochastic", "seed": 3}, {"method": "mse"}, {"overflow": "raise"}],
    ids=str,
)
def test_what_kernels_leave_to_the_reference_has_its_bits(cupy, options):
    there = lb.quantize(other(cupy, X), "int4_g32", **options)
    assert there.device == "cuda:1"
    same(there, lb.quantize(X, "int4_g32", **options))


def test_numbers_that_are_not_finite_are_placed(machine, cupy):
    x = X.copy()
    x[3, 5] = np.nan
    with pytest.raises(ValueError, match=r"1 NaN or infinite values, first at \(3, 5\)"):
        lb.quantize(cupy.asarray(x), "int4_g32")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [0, 1])
def test_values(machine, cupy, dtype, number):
    w = weight()
    values: Any = w.to_device(f"cuda:{number}").T.dequantize(dtype)
    assert values.device.id == number
    np.testing.assert_array_equal(values.get(), w.T.dequantize(dtype))


def test_values_with_a_divisor_and_permuted_columns(machine, cupy):
    w, order = weight(), RNG.permutation(64)
    divisor = RNG.uniform(1, 2, 64).astype(np.float32)
    w = lb.from_parts(w.format, w.codes, w.scales, columns=order, divisor=divisor)
    there: Any = w.to_device("cuda:1")
    np.testing.assert_array_equal(there.dequantize().get(), w.dequantize())
    x = X.astype(np.float64)
    got = lb.linear(other(cupy, x), there, kernel="reference").get()
    np.testing.assert_array_equal(got, lb.linear(x, w, kernel="reference"))


@pytest.mark.parametrize("number", [0, 1])
def test_products_stay_there_and_do_not_wait(machine, cupy, number):
    w = weight()
    there = w.to_device(f"cuda:{number}")
    with Device(number):
        x, bias = cupy.asarray(X), cupy.asarray(np.ones(8, np.float32))
        out = cupy.empty((5, 8), np.float32)
    expected = lb.linear(X, w, bias=np.ones(8, np.float32))
    plan = lb.plan(x, there.T, bias=bias, out=out)
    before = machine.launches
    with uncopied():
        got = [lb.linear(x, there, bias=bias), lb.linear(x, there, bias=bias), plan(x)]
        lb.linear(x, there, bias=bias, out=out)
    assert machine.launches > before
    assert got[2] is out
    for each in got:
        assert each.device.id == number
        np.testing.assert_allclose(each.get(), expected, rtol=1e-5, atol=1e-5)
    why = lb.explain(x, there.T)
    assert why.problem.device == machine.device.name
    assert why.kernel.startswith("matmul.cuda")


def test_x_whose_rows_have_gaps(machine, cupy):
    w = weight().to_device("cuda")
    x = cupy.asarray(np.repeat(X, 2, 1))
    np.testing.assert_array_equal(
        lb.linear(x[:, ::2], w).get(), lb.linear(cupy.asarray(X), w).get()
    )


def test_out_that_is_an_operand(machine, cupy):
    w = weight(shape=(64, 64)).to_device("cuda")
    x = cupy.asarray(X)
    expected = lb.linear(x, w).get()
    plan, again = lb.plan(x, w.T), cupy.asarray(X)
    lb.linear(x, w, out=x)
    np.testing.assert_array_equal(x.get(), expected)
    plan(again, out=again)
    np.testing.assert_array_equal(again.get(), expected)
    bound = lb.plan(again, w.T, out=again)
    expected = lb.linear(again, w).get()
    np.testing.assert_array_equal(bound(again).get(), expected)


def test_a_plan_is_for_one_device(machine, cupy):
    w = weight().to_device("cuda:1")
    out = other(cupy, np.empty((5, 8), np.float32))
    for plan in lb.plan(other(cupy, X), w.T), lb.plan(other(cupy, X), w.T, out=out):
        with pytest.raises(BufferError, match="x: it is on cuda:0, w is on cuda:1"):
            plan(cupy.asarray(X))
        with pytest.raises(BufferError, match="x: it is on cpu, w is on cuda:1"):
            plan(X)
        with pytest.raises(BufferError, match="out: it is on cuda:0, w is on cuda:1"):
            plan(other(cupy, X), out=cupy.empty((5, 8), np.float32))


def test_the_reference_always_works_and_says_how(machine, cupy):
    w = weight()
    there = w.to_device("cuda:1")
    x, bias = X.astype(np.float64), np.ones(8)
    with Device(1):
        held = cupy.asarray(x), cupy.asarray(bias)
    got = lb.linear(held[0], there, bias=held[1], activation="gelu")
    assert got.device.id == 1
    np.testing.assert_array_equal(got.get(), lb.linear(x, w, bias=bias, activation="gelu"))
    assert "runs on the host: operands are copied there" in str(lb.explain(held[0], there.T))


def test_the_weight_on_the_left(machine, cupy):
    w = weight()
    there = w.to_device("cuda")
    x = np.ascontiguousarray(X.T)
    bias = np.linspace(0, 1, 5).astype(np.float32)
    expected = lb.matmul(w, x, bias=bias, activation="gelu")
    got = lb.matmul(there, cupy.asarray(x), bias=cupy.asarray(bias), activation="gelu")
    np.testing.assert_allclose(got.get(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((there @ cupy.asarray(x)).get(), w @ x, rtol=1e-5, atol=1e-5)


def test_experts(machine, cupy):
    w = weight(shape=(3, 8, 64))
    expected = lb.grouped_matmul(X, w, [2, 2, 5])
    there = w.to_device("cuda:1")
    ends = other(cupy, np.array([2, 2, 5]))
    got = lb.grouped_matmul(other(cupy, X), there, ends)
    assert got.device.id == 1
    np.testing.assert_allclose(got.get(), expected, rtol=1e-5, atol=1e-5)


def test_x_is_quantized_on_the_way(machine, cupy):
    w = weight()
    x, there = cupy.asarray(X), w.to_device("cuda")
    plan = lb.plan(x, there.T, x_format="int8_row")
    with uncopied():
        got = [lb.linear(x, there, x_format="int8_row"), plan(x)]
    for each in got:
        np.testing.assert_array_equal(each.get(), lb.linear(X, w, x_format="int8_row"))


@pytest.mark.parametrize("name", ["int8_row", "int8_g32", "nvfp4"])
def test_what_is_not_finite_makes_the_result_nan_since_nothing_waits(machine, cupy, name):
    there = weight().to_device("cuda")
    x = X.copy()
    x[3, 5] = np.inf
    x = cupy.asarray(x)
    with uncopied():
        got = lb.linear(x, there, x_format=name)
    assert np.isnan(got.get()).all()


def test_mx_formats_have_no_such_factor_and_wait(machine, cupy):
    there = weight().to_device("cuda")
    x = X.copy()
    x[3, 5] = np.inf
    with pytest.raises(ValueError, match=r"1 NaN or infinite values, first at \(3, 5\)"):
        lb.linear(cupy.asarray(x), there, x_format="mxfp8")


def test_static_scales_of_x(machine, cupy):
    w, scale = weight(), np.full((5, 1), 0.02)
    got = lb.linear(cupy.asarray(X), w.to_device("cuda"), x_format="int8_row", x_scale=scale)
    np.testing.assert_array_equal(got.get(), lb.linear(X, w, x_format="int8_row", x_scale=scale))


def test_einsum(machine, cupy):
    w = weight()
    x = cupy.asarray(X)
    there = w.to_device("cuda")
    got = einsums.einsum("mk,nk->nm", x, there)
    np.testing.assert_array_equal(got.get(), lb.linear(x, there).get().T)


def test_inside_jit_it_multiplies_by_copies(machine, cupy):
    there = weight().to_device("cuda")
    got = jax.jit(lambda x: x @ there.T)(jax.numpy.asarray(X))
    np.testing.assert_array_equal(np.asarray(got), lb.linear(cupy.asarray(X), there).get())


def test_the_readmes_lines_for_a_gpu_run(machine, cupy):
    _, code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    names: dict[str, Any] = {"lb": lb, "weight": RNG.normal(size=(512, 512))}
    exec(compile(code.replace("4096", "512"), "README.md", "exec"), names)
    assert isinstance(names["y"], cupy.ndarray)
    values = names["w"].to_device("cpu").dequantize(np.float64)
    # Ones times values, which are rounded to bfloat16 at most, and the sum to float16.
    bound = (2.0**-8 * 1.01 + 2.0**-10) * abs(values).sum(1)
    assert (abs(names["y"].get() - values.sum(1)) <= bound).all()


def test_every_name_of_the_stand_in_is_one_of_cupys():
    real = pytest.importorskip("cupy", reason="wants CuPy, whose names are compared")
    assert all(hasattr(real, name) for name in fake_cupy._NAMES)
    names = {*fake_cupy._METHODS, *fake_cupy._PROPERTIES, "get", "device", "data", "flags"}
    assert all(hasattr(real.ndarray, name) for name in names)
    assert all(hasattr(real.ndarray, f"__{name}__") for name in fake_cupy._OPERATORS)

"""Tensors of a GPU in and out: CuPy's own arrays on the host's memory, kernels emulated.

CuPy makes, views and slices arrays without a driver as long as it does not have to allocate, copy
or compute, so here it allocates on the host, and nothing else of a product is CuPy's work.
"""

import ctypes
import gc
import sys
import types
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from emulator import Emulator

import lowbit as lb
from lowbit import cuda_interop, device, dispatch, interop
from lowbit.dlpack import Exported, Relabelled
from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda import quantize as cuda_quantize

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 64)).astype(np.float32)


def on_host(array: Any) -> Any:
    """A NumPy array of the memory that a CuPy array says is a GPU's."""
    if not hasattr(array, "data") or isinstance(array, np.generic):
        return array
    span = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
    size = span + array.itemsize if array.size else 0
    memory: Any = (ctypes.c_char * size).from_address(array.data.ptr)
    return np.ndarray(array.shape, array.dtype, memory, strides=array.strides)


class Machine:
    """The emulator on CuPy's arrays."""

    def __init__(self, emulator: Emulator, cupy: Any) -> None:
        self.emulator, self.cupy = emulator, cupy
        self.streams: list[int] = []

    @property
    def device(self) -> launch.Device:
        return self.emulator.device

    def function(self, source: launch.Source) -> Any:
        function = self.emulator.function(source)

        def call(grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
            self.streams.append(self.cupy.cuda.get_current_stream().ptr)
            function(grid, block, tuple(on_host(a) for a in args), shared_mem=shared_mem)

        return call

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.cupy.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = self.empty(shape, dtype)
        on_host(array)[...] = 0
        return array

    def counters(self, count: int) -> Any:
        return self.zeros((count,), np.int32)

    def scratch(self, count: int) -> Any:
        return self.empty((count,), np.int32)

    def number(self, kind: type[np.generic], value: float) -> Any:
        return kind(value)

    def settle(self) -> None:
        pass

    def address(self, array: Any) -> int:
        address: int = array.data.ptr
        return address


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    cupy = pytest.importorskip("cupy", reason="wants CuPy's arrays")
    current = [0]

    class Stream:
        def __init__(self, number: int) -> None:
            self.ptr = number

        @staticmethod
        def from_external(other: Any) -> Any:
            return Stream(other.__cuda_stream__()[1])

        def __enter__(self) -> None:
            current.append(self.ptr)

        def __exit__(self, *_: Any) -> None:
            current.pop()

    def allocate(size: int) -> Any:
        memory = np.empty(max(size, 1), np.uint8)
        owner = cupy.cuda.UnownedMemory(memory.ctypes.data, size, memory, 0)
        return cupy.cuda.MemoryPointer(owner, 0)

    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    monkeypatch.setattr(cupy.cuda, "Stream", Stream)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: Stream(current[-1]))
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(allocate)
    monkeypatch.setattr(device, "gpu_array", cupy.ndarray)
    yield cupy
    cupy.cuda.set_allocator(before)


@pytest.fixture
def machine(cupy: Any, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(emulator, cupy)
    monkeypatch.setattr(
        launch, "machine_of", lambda a: emulator if isinstance(a, np.ndarray) else machine
    )
    return machine


def sent(cupy: Any, array: Any) -> Any:
    there = cupy.empty(array.shape, array.dtype)
    on_host(there)[...] = array
    return there


def weight(cupy: Any, name: str = "int4_g32") -> tuple[lb.QArray, lb.QArray]:
    """On the host, and the same one there."""
    w = lb.quantize(RNG.normal(size=(8, 64)).astype(np.float32), name)
    return w, w._with(device.changed(w._rows(), lambda part: sent(cupy, part)))


class Cuda(torch.Tensor):  # type: ignore[misc]
    """A tensor on the host that says that it is on a GPU."""

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: torch.device("cuda:0"))


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of torch's current stream, and torch.empty that takes a GPU."""
    empty = torch.empty

    def on_gpu(shape: Any, *, dtype: Any, device: str) -> Any:
        assert device == "cuda:0"
        return empty(shape, dtype=dtype).as_subclass(Cuda)

    monkeypatch.setattr(torch, "empty", on_gpu)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda number: types.SimpleNamespace(cuda_stream=70 + number)
    )
    return 70


TENSORS = {
    "rows": lambda x: x,
    "transposed": lambda x: x.T,
    "steps": lambda x: x[1::2, 3:40:3],
    "expanded": lambda x: x[:, :1].expand(-1, 7),
    "empty": lambda x: x[:0],
    "a number": lambda x: x[0, 0],
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_a_tensor_is_viewed_where_it_is(cupy, change, dtype):
    tensor = change(torch.from_numpy(X).to(getattr(torch, dtype)))
    view: Any
    view, origin = interop.read(tensor.as_subclass(Cuda), "x")
    assert type(view) is cupy.ndarray
    assert (view.device.id, view.dtype, view.shape) == (0, np.dtype(dtype), tuple(tensor.shape))
    assert view.strides == tuple(s * tensor.element_size() for s in tensor.stride())
    assert view.data.ptr == tensor.data_ptr()
    assert origin == interop.Origin("torch", "cuda:0")
    values = tensor.to(torch.float32).numpy()
    np.testing.assert_array_equal(on_host(view).astype(np.float32), values)


def test_a_view_keeps_its_tensor_alive(cupy):
    tensor = torch.ones(3).as_subclass(Cuda)
    gone = weakref.ref(tensor.untyped_storage())
    view, _ = interop.read(tensor, "x")
    del tensor
    gc.collect()
    assert on_host(view).tolist() == [1.0, 1.0, 1.0]
    del view
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tensor_is_multiplied_on_its_stream(machine, cupy, stream, dtype, monkeypatch):
    w, there = weight(cupy)
    x = torch.from_numpy(X).to(getattr(torch, dtype))
    out_dtype = x.dtype
    got = lb.linear(x.as_subclass(Cuda), there, out_dtype=out_dtype)
    assert type(got) is Cuda
    assert got.dtype == x.dtype
    assert set(machine.streams) == {stream}
    plain = got.as_subclass(torch.Tensor)
    monkeypatch.setattr(dispatch, "device", lambda: machine.device.name)  # of NumPy's arrays
    assert torch.equal(plain, lb.linear(x, w, out_dtype=out_dtype))
    plan = lb.plan(x.as_subclass(Cuda), there.T, out_dtype=out_dtype)
    assert torch.equal(plan(x.as_subclass(Cuda)).as_subclass(torch.Tensor), plain)
    out = torch.zeros(5, 8, dtype=x.dtype).as_subclass(Cuda)
    assert lb.linear(x.as_subclass(Cuda), there, out=out) is out
    assert torch.equal(out.as_subclass(torch.Tensor), plain)
    assert set(machine.streams) == {stream}


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,)])
def test_layers_end_quantized_on_the_stream_of_a_tensor(
    machine, cupy, stream, name, shape, monkeypatch
):
    """By a kernel, or by way of the host; the residual is memory of torch's."""
    # Copies to and from the host are the driver's work.
    streams = []

    def get(self: Any, array: Any) -> Any:
        streams.append(cupy.cuda.get_current_stream().ptr)
        return on_host(array).copy()

    def put(self: Any, array: Any) -> Any:
        streams.append(cupy.cuda.get_current_stream().ptr)
        return sent(cupy, array)

    def write(self: Any, _: Any, value: Any) -> None:
        streams.append(cupy.cuda.get_current_stream().ptr)
        on_host(self)[...] = on_host(value)

    monkeypatch.setattr(device.Gpu, "get", get)
    monkeypatch.setattr(device.Gpu, "put", put)
    monkeypatch.setattr(cupy.ndarray, "__setitem__", write)
    monkeypatch.setattr(cuda_quantize.Pending, "settled", lambda self: self.parts)
    x, residual = torch.from_numpy(RNG.normal(size=(2, *shape))).to(torch.bfloat16)
    weight = x.reshape(-1, 64)[0].clone()
    there = [each.as_subclass(Cuda) for each in (x, weight, residual)]
    w, updated = lb.quantize_rmsnorm(there[0], there[1], name, residual=there[2])
    expected, h = lb.quantize_rmsnorm(x, weight, name, residual=residual)
    assert type(updated) is Cuda
    assert updated.dtype == torch.bfloat16
    assert torch.equal(updated.as_subclass(torch.Tensor), h)
    assert type(w.codes) is cupy.ndarray
    assert (on_host(w.codes.view(np.uint8)) == expected.codes.view(np.uint8)).all()
    assert set(machine.streams + streams) == {stream}
    assert len(machine.streams) == (name == "mxfp8")


def test_streams_that_are_one_are_left_alone(machine, cupy, stream, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda number: types.SimpleNamespace(cuda_stream=0)
    )
    monkeypatch.setattr(cupy.cuda.Stream, "__enter__", lambda self: pytest.fail("no need"))
    lb.linear(torch.from_numpy(X).as_subclass(Cuda), weight(cupy)[1], out_dtype="float32")
    assert set(machine.streams) == {0}


@pytest.mark.parametrize("name", ["int4_g32", "fp8_g32", "nvfp4", "int8_row"])
def test_cupys_own_arrays_multiply(machine, cupy, name):
    w, there = weight(cupy, name)
    x = sent(cupy, X)
    got = x @ there.T
    assert type(got) is cupy.ndarray
    np.testing.assert_allclose(on_host(got), X @ w.dequantize().T, rtol=1e-4, atol=1e-4)
    plan = lb.plan(x, there.T)
    assert plan.kernel.startswith("matmul.cuda")
    assert (on_host(plan(x)) == on_host(got)).all()
    assert set(machine.streams) == {0}


def test_lazily_negated_tensors_and_those_with_gradients_are_refused_there_too(cupy):
    negated = torch.from_numpy(X).to(torch.complex64).conj().imag.as_subclass(Cuda)
    with pytest.raises(ValueError, match=r"resolve_neg\(\)"):
        interop.read(negated, "x")
    with pytest.raises(ValueError, match=r"requires grad.*\.detach\(\)"):
        interop.read(torch.ones(3, requires_grad=True).as_subclass(Cuda), "x")


def test_without_cupy_a_tensor_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BufferError, match=r'x: .*cuda:0.*pip install "lowbit\[cuda13\]"'):
        lb.quantize(torch.ones(2, 32).as_subclass(Cuda), "int4_g32")


class Producer:
    """A GPU array of some library."""

    def __init__(self, array: Any) -> None:
        self.array, self.asked = array, {}  # type: ignore[var-annotated]

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked = asked
        return Exported(self.array).__dlpack__(max_version=asked.get("max_version"))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_capsules_are_asked_for_the_stream_and_relabelled(cupy, monkeypatch, dtype):
    producer = Producer(X.astype(dtype))
    # CuPy's own import asks the driver; what it would be given is looked at by NumPy.
    seen = []

    def from_dlpack(given: Relabelled) -> Any:
        assert given.__dlpack_device__() == (2, 0)
        capsule = given.__dlpack__(stream=5, max_version=(1, 0))

        class Once:
            __dlpack_device__ = staticmethod(lambda: (1, 0))
            __dlpack__ = staticmethod(lambda **_: capsule)

        seen.append(np.from_dlpack(Once()))
        return sent(cupy, seen[0])

    monkeypatch.setattr(cupy, "from_dlpack", from_dlpack)
    view, origin = interop.read(producer, "x")
    assert origin == interop.CUPY
    assert producer.asked["stream"] == 5
    assert view.dtype == dtype
    assert seen[0].dtype == (dtype if dtype is np.float32 else f"u{np.dtype(dtype).itemsize}")
    np.testing.assert_array_equal(on_host(view).astype(np.float32), X.astype(dtype).astype("f4"))


def test_exported_memory_of_a_gpu_names_its_device(cupy, monkeypatch):
    class There:
        dtype, strides = np.dtype(ml_dtypes.bfloat16), (2,)

        def view(self, dtype: Any) -> Any:
            assert dtype is np.uint16
            return Producer(np.ones(3, np.uint16))

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

    exported = Exported(There())  # type: ignore[arg-type]
    assert exported.__dlpack_device__() == (2, 1)
    with pytest.raises(
        BufferError, match=r"the memory is on cuda:1, not on DLPack device \(1, 0\)"
    ):
        exported.__dlpack__(dl_device=(1, 0))
    capsule = exported.__dlpack__(stream=3, max_version=(1, 0), dl_device=(2, 1))

    class Once:
        __dlpack_device__ = staticmethod(lambda: (1, 0))
        __dlpack__ = staticmethod(lambda **_: capsule)

    assert torch.from_dlpack(Once()).dtype == torch.bfloat16


def test_on_gpu_asks_only_what_can_answer():
    assert cuda_interop.on_gpu(Producer(X))
    assert not cuda_interop.on_gpu(X)
    assert not cuda_interop.on_gpu([1.0])

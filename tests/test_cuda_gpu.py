"""How kernels reach a GPU through CuPy, with a CuPy of this file that has no GPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lowbit.kernels.cuda import compile, gpu, launch, tensor_maps
from lowbit.kernels.cuda.launch import Device, Source

SMALL = Source("text", "small<int>", 128, 1024)
LARGE = Source("text", "large<int>", 128, 64 * 1024)
OPERATIONS = {"CUBLAS_OP_N": 0, "CUBLAS_OP_T": 1}
COMPUTE = {"CUBLAS_COMPUTE_32F": 68, "CUBLAS_COMPUTE_32F_PEDANTIC": 69}


class Array(np.ndarray):
    """Memory of the host that looks like CuPy's."""

    @property
    def data(self) -> Any:
        def memset_async(value: int, size: int) -> None:
            ctypes.memset(self.ctypes.data, value, size)

        return SimpleNamespace(ptr=self.ctypes.data, memset_async=memset_async)


def array(given: Any) -> Array:
    return np.asarray(given).view(Array)


class ByValue:
    """What CuPy makes of an argument that it passes by value."""

    def __init__(self, array: Any) -> None:
        assert isinstance(array, np.ndarray), "of a scalar it would take the address of a copy"
        self.array = array


class Cupy:
    """What gpu.py uses of CuPy, and a record of it."""

    def __init__(self) -> None:
        self.current = 0
        self.stream = SimpleNamespace(ptr=0)
        self.launches: list[tuple[Any, ...]] = []
        self.attributes: list[tuple[int, int, int]] = []
        self.loaded: list[tuple[bytes, int]] = []
        self.products: list[tuple[int, int]] = []
        outer = self

        class On:
            cublas_handle = 7

            def __init__(self, number: int) -> None:
                self.number = number

            def __enter__(self) -> On:
                self.before, outer.current = outer.current, self.number
                return self

            def __exit__(self, *_: Any) -> None:
                outer.current = self.before

        class Module:
            def load(self, code: bytes) -> None:
                outer.loaded.append((code, outer.current))

            def get_function(self, name: str) -> Any:
                return Function(name)

        class Function:
            def __init__(self, name: str) -> None:
                self.name, self.ptr = name, len(name)

            def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
                where = outer.current, outer.stream.ptr
                outer.launches.append((self.name, grid, block, args, shared_mem, where))

        self.cuda = SimpleNamespace(
            Device=On,
            function=SimpleNamespace(Module=Module, CNumpyArray=ByValue),
            driver=SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                funcSetAttribute=lambda *given: self.attributes.append(given),
            ),
            get_current_stream=lambda: self.stream,
            runtime=SimpleNamespace(
                getDeviceProperties=lambda number: {
                    "major": 9 if number == 0 else 12,
                    "minor": 0,
                    "multiProcessorCount": 132 + number,
                },
                driverGetVersion=lambda: 13000,
                getDevice=lambda: self.current,
                CUDA_R_32F=0,
                CUDA_R_16BF=14,
            ),
        )

    def empty(self, shape: Any, dtype: Any) -> Array:
        found = np.empty(shape, dtype)
        found.view(np.uint8).fill(0xFF)
        return array(found)


def gemm_ex(cupy: Cupy) -> Any:
    """cublasGemmEx as its reference has it, column-major, on the host's memory."""

    def matrix(address: int, kind: int, rows: int, columns: int, pitch: int) -> Any:
        assert pitch >= rows
        dtype = np.dtype({0: np.float32, 14: ml_dtypes.bfloat16}[kind])
        size = ((columns - 1) * pitch + rows) * dtype.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(address), dtype)
        strides = dtype.itemsize, pitch * dtype.itemsize
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), strides)

    def run(
        handle, op_a, op_b, m, n, k, alpha, a, a_kind, a_pitch, b, b_kind, b_pitch, beta, c, c_kind,
        c_pitch, computed, algorithm,
    ):  # fmt: skip
        assert (handle, algorithm) == (7, -1)
        left = matrix(a, a_kind, *((k, m) if op_a else (m, k)), a_pitch).astype(np.float64)
        right = matrix(b, b_kind, *((n, k) if op_b else (k, n)), b_pitch).astype(np.float64)
        one, zero = (ctypes.c_float.from_address(each).value for each in (alpha, beta))
        assert (one, zero) == (1, 0)
        out = matrix(c, c_kind, m, n, c_pitch)
        out[...] = (left.T if op_a else left) @ (right.T if op_b else right)
        cupy.products.append((a_kind, computed))

    return run


@pytest.fixture
def cupy(monkeypatch):
    found = Cupy()
    cublas = SimpleNamespace(gemmEx=gemm_ex(found), CUBLAS_GEMM_DEFAULT=-1, **OPERATIONS, **COMPUTE)
    libraries = SimpleNamespace(cublas=cublas)
    for name, module in (
        ("cupy", found),
        ("cupy_backends", SimpleNamespace(cuda=SimpleNamespace(libs=libraries))),
        ("cupy_backends.cuda", SimpleNamespace(libs=libraries)),
        ("cupy_backends.cuda.libs", libraries),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        compile,
        "cubin",
        lambda source, capability, *, driver: compile.Cubin(
            f"{source.name} {capability} {driver}".encode(), f"lowered {source.name}"
        ),
    )
    for remembered in (gpu.machine, gpu.number):
        remembered.cache_clear()
    yield found
    for remembered in (gpu.machine, gpu.number):
        remembered.cache_clear()


def test_a_device_is_looked_at_once(cupy):
    assert gpu.machine(0).device == Device(90, 132)
    assert gpu.machine(1).device == Device(120, 133)
    assert gpu.machine(0) is gpu.machine(0)
    there = SimpleNamespace(device=SimpleNamespace(id=1))
    assert launch.machine_of(there) is gpu.machine(1)


def test_a_kernel_is_loaded_once_and_launched_where_it_lies(cupy):
    machine = gpu.machine(1)
    function = machine.function(SMALL)
    assert machine.function(Source("text", "small<int>", 128, 1024)) is function
    assert cupy.loaded == [(b"small<int> 120 13000", 1)]
    assert cupy.current == 0
    x = array(np.zeros(4, np.float32))
    cupy.stream = SimpleNamespace(ptr=42)
    function((2, 3), (128,), (x, np.int32(5)), shared_mem=512)
    cupy.current = 1
    function((1,), (128,), ())
    assert [each[5] for each in cupy.launches] == [(1, 42), (1, 42)]
    name, grid, block, args, shared, _ = cupy.launches[0]
    assert (name, grid, block, shared) == ("lowered small<int>", (2, 3), (128,), 512)
    assert args[0] is x
    assert args[1] == 5
    assert cupy.launches[1][4] == 0
    assert gpu.machine(0).function(SMALL) is not function
    assert cupy.loaded[1] == (b"small<int> 90 13000", 0)


def test_numbers_are_made_once_in_the_size_of_their_parameter(cupy):
    number = gpu.machine(0).number
    assert number(np.int32, 5) is number(np.int32, 5)
    for kind in (np.int32, np.int64, np.float64):
        held = number(kind, 1).array
        assert (held.dtype, held.size, held.tobytes()) == (kind, 1, kind(1).tobytes())


def test_more_shared_memory_is_asked_for(cupy):
    machine = gpu.machine(0)
    machine.function(SMALL)
    assert cupy.attributes == []
    machine.function(LARGE)
    assert cupy.attributes == [(len("lowered large<int>"), 8, 64 * 1024)]


def test_memory_lies_on_the_machines_own_device(cupy, monkeypatch):
    seen: list[int] = []
    empty: Any = cupy.empty

    def noted(*given: Any) -> Any:
        seen.append(cupy.current)
        return empty(*given)

    monkeypatch.setattr(cupy, "empty", noted)
    machine = gpu.machine(1)
    assert (machine.empty((2, 3), np.uint8) == 0xFF).all()
    assert (machine.zeros((2, 3), np.float32) == 0).all()
    assert machine.zeros((0, 3), np.float32).shape == (0, 3)
    assert seen == [1, 1, 1]
    assert machine.address(found := machine.empty((1,), np.uint8)) == found.ctypes.data


def test_counters_belong_to_a_stream(cupy):
    machine = gpu.machine(0)
    first = machine.counters(10)
    assert first.dtype == np.int32
    assert first.size >= 10
    assert not first.any()
    assert machine.counters(5) is first
    cupy.stream = SimpleNamespace(ptr=42)
    second = machine.counters(10)
    assert second is not first
    grown = machine.counters(second.size + 1)
    assert grown.size > second.size
    assert not grown.any()
    assert machine.counters(10) is grown
    # Graphs may have captured the small one, and a new stream may get the handle of a dead one.
    kept = machine._shared["counters", 42, 0]
    assert kept.stream is cupy.stream
    assert kept.outgrown == (second,)
    words = machine.scratch(10)
    assert words is not grown
    assert machine.scratch(10) is words


def test_the_stream_of_each_thread_has_counters_of_its_own(cupy):
    cupy.stream = SimpleNamespace(ptr=2)  # cudaStreamPerThread
    machine, seen = gpu.machine(0), []
    thread = threading.Thread(target=lambda: seen.append(machine.counters(1)))
    thread.start()
    thread.join()
    assert machine.counters(1) is not seen[0]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("x_view", ["rows", "transposed", "wide"])
@pytest.mark.parametrize("w_view", ["rows", "transposed", "wide"])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 5, 7), (1, 5, 7), (3, 1, 7), (3, 5, 1), (1, 1, 1)])
def test_products_of_any_views(cupy, dtype, x_view, w_view, m, n, k):
    rng = np.random.default_rng(0)

    def made(rows: int, columns: int, view: str) -> Any:
        values = rng.integers(-4, 4, (rows, columns)).astype(dtype)
        if view == "transposed":
            return array(np.ascontiguousarray(values.T)).T
        if view == "wide":
            wide = np.full((rows, columns + 9), np.nan, dtype)
            wide[:, :columns] = values
            return array(wide)[:, :columns]
        return array(values)

    x, w = made(m, k, x_view), made(n, k, w_view)
    got = gpu.machine(0).matmul(x, w)
    assert got.dtype == np.float32
    assert np.array_equal(got, x.astype(np.float64) @ w.astype(np.float64).T)
    pedantic = COMPUTE["CUBLAS_COMPUTE_32F_PEDANTIC"]
    computed = COMPUTE["CUBLAS_COMPUTE_32F"]
    assert cupy.products == [(0, pedantic) if dtype is np.float32 else (14, computed)]


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_products_of_nothing(cupy, m, n, k):
    x, w = array(np.ones((m, k), np.float32)), array(np.ones((n, k), np.float32))
    got = gpu.machine(0).matmul(x, w)
    assert got.shape == (m, n)
    assert not got.any()
    assert cupy.products == []


def test_products_of_scattered_numbers_are_refused(cupy):
    x, w = array(np.ones((4, 8), np.float32)), array(np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="want x with rows or columns without gaps"):
        gpu.machine(0).matmul(x[:, ::2], w)
    with pytest.raises(ValueError, match="want w with rows or columns without gaps"):
        gpu.machine(0).matmul(w, x[:, ::2])


@pytest.fixture
def driver(monkeypatch):
    """cuTensorMapEncodeTiled: its arguments, and a status to give back."""
    calls: list[Any] = []

    def encode(place, *given):
        assert place % 64 == 0
        ctypes.memmove(place, bytes(range(128)), 128)
        calls.append([list(each) if hasattr(each, "_length_") else each for each in given])
        return 1 if given[1] != 2 or given[4][0] == 4096 else 0

    monkeypatch.setattr(tensor_maps, "_encode_tiled", lambda: encode)
    gpu._encoded.cache_clear()
    yield calls
    gpu._encoded.cache_clear()


def aligned(shape: tuple[int, int], dtype: Any) -> Any:
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    raw = np.zeros(size + 16, np.uint8)
    first = -raw.ctypes.data % 16
    return array(raw[first : first + size].view(dtype).reshape(shape))


def test_a_tensor_map_is_passed_by_value(cupy, driver):
    x = aligned((100, 72), np.float16)
    found = gpu.machine(0).tensor_map(x, (64, 32), swizzle=128)
    address = x.ctypes.data
    assert driver == [[1, 2, address, [72, 100], [144, 0], [32, 64], [1, 1], 0, 3, 2, 0]]
    # CuPy passes the bytes of a NumPy array of size 1, whatever its dtype.
    held = found.array
    assert (held.size, held.nbytes, held.tobytes()) == (1, 128, bytes(range(128)))
    codes = aligned((8, 64), np.uint8)
    gpu.machine(0).tensor_map(codes, (8, 64), swizzle=0)
    gpu.machine(0).tensor_map(codes, (8, 64), swizzle=0)
    assert driver[1:] == [[0, 2, codes.ctypes.data, [64, 8], [64, 0], [64, 8], [1, 1], 0, 0, 2, 0]]


@pytest.mark.parametrize(
    ("shape", "dtype", "box", "swizzle", "words"),
    [
        ((8, 64), np.float32, (8, 64), 0, "1- or 2-byte numbers, got shape"),
        ((0, 64), np.uint8, (8, 64), 0, r"got shape \(0, 64\)"),
        ((8, 64), np.uint8, (8, 64), 64, "swizzle of 0 or 128 bytes, got 64"),
        ((8, 64), np.uint8, (0, 64), 0, r"1..256 rows and columns.*got \(0, 64\)"),
        ((8, 64), np.uint8, (8, 24), 0, "multiple of 16 bytes"),
        ((8, 72), np.float16, (8, 128), 128, "128 bytes, got 128 columns"),
        ((8, 71), np.float16, (8, 64), 0, r"got strides \(142, 2\)"),
    ],
)
def test_a_tensor_map_that_the_driver_would_refuse(cupy, driver, shape, dtype, box, swizzle, words):
    with pytest.raises(ValueError, match=f"tensor_map: want .*{words}"):
        gpu.machine(0).tensor_map(aligned(shape, dtype), box, swizzle=swizzle)
    assert driver == []


def test_a_tensor_map_of_an_odd_address_is_refused(cupy, driver):
    with pytest.raises(ValueError, match="multiple of 16 bytes, got address 0x"):
        gpu.machine(0).tensor_map(aligned((8, 64), np.uint8)[:, 1:], (8, 32), swizzle=0)


def test_what_the_driver_refuses_all_the_same_is_an_error(cupy, driver):
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: CUDA error 1"):
        gpu.machine(0).tensor_map(aligned((8, 4096), np.uint8), (8, 64), swizzle=0)


def test_settling_waits_for_the_current_stream_and_refuses_a_capture(cupy):
    waited = []
    cupy.stream = SimpleNamespace(
        ptr=7, is_capturing=lambda: False, synchronize=lambda: waited.append(7)
    )
    gpu.machine(0).settle()
    assert waited == [7]
    cupy.stream.is_capturing = lambda: True
    with pytest.raises(RuntimeError, match="call it once before the capture"):
        gpu.machine(0).settle()
    assert waited == [7]

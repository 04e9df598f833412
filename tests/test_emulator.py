"""The emulator launches as CuPy does, and refuses what a GPU would refuse or hide."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import emulator_build
import ml_dtypes
import numpy as np
import pytest
from emulator import Emulator, EmulatorError

from lowbit.kernels.cuda import launch
from lowbit.kernels.cuda.launch import Device, Machine, Source

SCALE = """
#include "primitives.cuh"
template <class T>
__global__ void scale(const T* x, T* y, float by, int n, int x_step, int y_step) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i * y_step] = T(by * float(x[i * x_step]));
}
"""


def source(text: str, threads: int = 32, name: str = "kernel", shared: int = 0) -> Source:
    return Source(f'#include "primitives.cuh"\n{text}\n', name, threads, shared)


def scale(emulator: Emulator, x, y, n=None, steps=(1, 1), dtype="float") -> None:
    f = emulator.function(Source(SCALE, f"scale<{dtype}>", 64))
    count = x.size if n is None else n
    args = x, y, np.float32(3), np.int32(count), *map(np.int32, steps)
    f((-(-count // 64),), (64,), args)


def test_it_is_a_machine_that_kernels_find(emulator: Emulator):
    machine: Machine = emulator
    assert machine.device.name == "cuda:90:4:plain"
    with launch.pretending(machine):
        assert launch.machine_of(np.zeros(1)) is machine
    with pytest.raises(TypeError, match="want a CuPy array"):
        launch.machine_of(np.zeros(1))


@pytest.mark.parametrize("seed", range(4))
def test_a_kernel_runs(emulator: Emulator, seed):
    emulator.seed = seed
    x, y = np.arange(100, dtype=np.float32), emulator.empty((100,), np.float32)
    assert np.isnan(y).all()
    scale(emulator, x, y)
    assert np.array_equal(y, 3 * x)
    assert emulator.launches == ["scale<float>"]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(emulator_build, "headers", lambda: None)
    assert "CUDA's headers: install nvidia-cuda-runtime" in str(emulator_build.missing())
    monkeypatch.setattr(emulator_build, "COMPILER", "no-such-compiler")
    assert "no-such-compiler, which is not installed" in str(emulator_build.missing())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "this is darwin" in str(emulator_build.missing())
    with pytest.raises(EmulatorError, match="this is darwin"):
        Emulator().function(source("__global__ void kernel() {}"))


def test_new_memory(emulator: Emulator):
    zeros, empty = emulator.zeros((3, 5), np.int8), emulator.empty((0, 2), ml_dtypes.bfloat16)
    assert zeros.shape == (3, 5)
    assert not zeros.any()
    assert empty.shape == (0, 2)
    assert emulator.address(zeros) == zeros.ctypes.data
    assert emulator.address(zeros) % 256 == 0


@pytest.mark.parametrize("seed", [0, 3])
def test_views_keep_their_strides_and_what_is_between(emulator: Emulator, seed):
    emulator.seed = seed
    x, y = np.arange(60, dtype=np.float32), np.full(80, 7, np.float32)
    scale(emulator, x[::-3], y[::4], steps=(-3, 4))
    assert np.array_equal(y[::4], 3 * x[::-3])
    assert (y[np.arange(80) % 4 > 0] == 7).all()
    with pytest.raises(EmulatorError, match="wrote beside an array's elements: byte 4 of 308 of"):
        scale(emulator, x[:2], y[::4])


@pytest.mark.parametrize("seed", [0, 3])
def test_a_kernel_sees_an_address_as_odd_as_the_array_s(emulator: Emulator, seed):
    emulator.seed = seed
    text = "__global__ void kernel(const char* x, long long* out) { *out = (long long)x; }"
    f = emulator.function(source(text))
    memory, out = np.zeros(64, np.int8), np.zeros(1, np.int64)
    for first in range(17):
        f((1,), (1,), (memory[first:40], out))
        assert out[0] % 16 == memory[first:].ctypes.data % 16
        assert out[0] != memory[first:].ctypes.data


def test_arguments_that_share_memory_share_it_in_the_kernel(emulator: Emulator):
    text = "__global__ void kernel(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }"
    f = emulator.function(source(text))
    memory = np.zeros(33, np.int32)
    f((1,), (32,), (memory[:32], memory[:32]))
    assert np.array_equal(memory, [1] * 32 + [0])
    f((1,), (1,), (memory[31:], memory[31:]))
    assert memory[31] == 2
    whole = "__global__ void kernel(int* x, int* y) { x[5] = 9; y[0] += x[5]; x[6] = y[0]; }"
    emulator.function(source(whole))((1,), (1,), (memory, memory[5:]))
    assert memory[5] == memory[6] == 18


def test_disjoint_parts_of_one_array_are_guarded_apart(emulator: Emulator):
    memory = np.zeros(64, np.float32)
    scale(emulator, memory[:32], memory[32:])
    with pytest.raises(EmulatorError, match="access out of bounds"):
        scale(emulator, memory[:32], memory[32:], n=64)


def test_input_is_read_only_and_output_must_not_be(emulator: Emulator):
    text = "__global__ void kernel(const int* x) { const_cast<int*>(x)[0] = 1; }"
    x = np.zeros(4, np.int32)
    with pytest.raises(EmulatorError, match=r"byte 0 of 16 of argument 0, int32 .* is const"):
        emulator.function(source(text))((1,), (1,), (x,))
    assert not x.any()
    x.flags.writeable = False
    scale(emulator, x.view(np.float32), np.zeros(4, np.float32))
    with pytest.raises(EmulatorError, match="argument 1 is a read-only array"):
        scale(emulator, np.zeros(4, np.float32), x.view(np.float32))


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float16, "__half"), (ml_dtypes.bfloat16, "__nv_bfloat16")]
)
def test_numbers_of_sixteen_bits(emulator: Emulator, dtype, name):
    x, y = np.arange(9).astype(dtype), emulator.empty((9,), dtype)
    scale(emulator, x, y, dtype=name)
    assert np.array_equal(y, 3 * np.arange(9))


def test_structs_and_null_pointers(emulator: Emulator):
    text = """
    struct alignas(16) Pair { float a; int b; double c; };
    __global__ void kernel(double* out, Pair p, const float* none) {
        *out = none ? 0 : p.a + p.b + p.c;
    }
    """
    f = emulator.function(source(text))
    out = np.zeros(1)
    pair = np.array((1.5, 2, 3), np.dtype([("a", "f4"), ("b", "i4"), ("c", "f8")]))
    for given in (pair, pair[()], pair.tobytes()):
        out[:] = 0
        f((1,), (1,), (out, given, np.uintp(0)))
        assert out[0] == 6.5
    with pytest.raises(EmulatorError, match="argument 1 has 15 bytes, the parameter 16"):
        f((1,), (1,), (out, pair.tobytes()[1:], np.uintp(0)))
    with pytest.raises(EmulatorError, match=r"argument 2 is an address, want the array"):
        f((1,), (1,), (out, pair, np.uintp(4096)))


def test_arguments_that_do_not_fit(emulator: Emulator):
    f = emulator.function(source("__global__ void kernel(float* x, int n) {}"))
    x = np.zeros(4, np.float32)
    for args, said in (
        ((x,), "takes 2 arguments, not 1"),
        ((x, np.int64(1)), "argument 1 has 8 bytes, the parameter 4"),
        ((x, 1), "argument 1 is of type int; want an array, a NumPy scalar"),
        ((x, x), "argument 1 is an array, the parameter a value"),
        ((None, np.int32(1)), "argument 0 is of type NoneType"),
    ):
        with pytest.raises(EmulatorError, match=said):
            f((1,), (1,), args)


def test_launches_that_a_gpu_refuses(emulator: Emulator):
    text = "__global__ void kernel(float* x) {}"
    f, x = emulator.function(source(text, 64, shared=200_000)), np.zeros(1, np.float32)
    f((1, 2, 3), (4, 4, 4), (x,), shared_mem=200_000)
    for grid, block, said in (
        ((0,), (1,), r"grid is \(0,\)"),
        ((1, 65536), (1,), r"grid is \(1, 65536\)"),
        ((1,), (1, 1, 65), r"block is \(1, 1, 65\)"),
        ((1,), (65,), "65 threads, compiled for 64"),
    ):
        with pytest.raises(EmulatorError, match=said):
            f(grid, block, (x,))
    with pytest.raises(EmulatorError, match="200001 bytes of shared memory, compiled for 200000"):
        f((1,), (1,), (x,), shared_mem=200_001)
    emulator.device = Device(89, 128, plain=True)
    with pytest.raises(EmulatorError, match="a block of cuda:89:128:plain has at most 101376"):
        f((1,), (1,), (x,), shared_mem=200_000)


def test_empty_arrays(emulator: Emulator):
    f = emulator.function(source("__global__ void kernel(const int* x, int* y) { *y = *x; }"))
    with pytest.raises(EmulatorError, match=r"access out of bounds .* of argument 0"):
        f((1,), (1,), (np.zeros(0, np.int32), np.zeros(1, np.int32)))


def test_order_is_that_of_the_seed(emulator: Emulator):
    text = """
    __global__ void kernel(int* n, int* order) {
        order[atomicAdd(n, 1)] = blockIdx.x * 64 + threadIdx.x;
    }
    """
    f = emulator.function(source(text, 64))
    orders = []
    for seed in (1, 1, 2):
        emulator.seed = seed
        order = emulator.empty((256,), np.int32)
        f((4,), (64,), (emulator.zeros((1,), np.int32), order))
        assert np.array_equal(np.sort(order), np.arange(256))
        orders.append(order.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_some_blocks_only(emulator: Emulator):
    text = """
    __global__ void kernel(int* out) { out[blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z] = 1; }
    """
    f, out = emulator.function(source(text)), np.zeros(300, np.int32)
    emulator.blocks = [0, 7, 234]
    f((10, 10, 3), (1,), (out,))
    assert np.flatnonzero(out).tolist() == emulator.blocks


def test_addresses_beyond_32_bits(emulator: Emulator):
    """Memory of 4 GiB, of which two pages are there."""
    text = """
    __global__ void kernel(const lb::u8* x, lb::u8* y, long long n) {
        const INDEX i = INDEX(blockIdx.x) * 64 + threadIdx.x;
        if (i < n) y[i] = x[i];
    }
    """
    size = 2**32 + 64
    x, y = emulator.sparse((size,), np.uint8), emulator.sparse((size,), np.uint8)
    x[-64:] = np.arange(64)
    right = emulator.function(source(text.replace("INDEX", "size_t"), 64))
    wrong = emulator.function(source(text.replace("INDEX", "unsigned"), 64))
    emulator.blocks = [size // 64 - 1]
    wrong((size // 64,), (64,), (x, y, np.int64(size)))
    assert not y[-64:].any()
    right((size // 64,), (64,), (x, y, np.int64(size)))
    assert np.array_equal(y[-64:], np.arange(64))
    emulator.blocks = [size // 64]
    with pytest.raises(EmulatorError, match="access out of bounds"):
        right((size // 64 + 1,), (64,), (x, y, np.int64(size + 64)))


def test_stacks_of_other_processors(emulator: Emulator):
    """The switch that is not written in assembly."""
    emulator.sanitize = "ucontext"
    x = np.arange(100, dtype=np.float32)
    text = """
    __global__ void kernel(const float* x, float* y) {
        y[threadIdx.x] = lb::block_max<128>(threadIdx.x < 100 ? x[threadIdx.x % 100] : 0.f);
        __syncthreads();
    }
    """
    y = emulator.empty((128,), np.float32)
    f = emulator.function(source(text, 128))
    f((2,), (128,), (x, y))
    assert (y == 99).all()
    with pytest.raises(EmulatorError, match="access out of bounds"):
        f((1,), (128,), (x, y[:100]))


def test_launches_from_threads(emulator: Emulator):
    results = [emulator.empty((1000,), np.float32) for _ in range(4)]

    def work(number: int) -> None:
        for _ in range(20):
            scale(emulator, np.full(1000, number, np.float32), results[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(results):
        assert (result == 3 * number).all()


def test_processes_may_compile_the_same_at_once(emulator: Emulator, tmp_path):
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent / "emulator")]!r}
import numpy as np
from emulator import Emulator
from lowbit.kernels.cuda.launch import Source
out = np.zeros(1, np.int32)
text = '#include "primitives.cuh"\\n__global__ void kernel(int* x) {{ *x = 7; }}'
Emulator().function(Source(text, "kernel", 1))((1,), (1,), (out,))
print(out[0])
"""
    environment = {"LOWBIT_EMULATOR_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, env=environment
        )
        for _ in range(2)
    ]
    assert [r.communicate()[0] for r in running] == [b"7\n"] * 2
    assert not list(tmp_path.glob("tmp*"))

"""What goes wrong in CUDA kernels does not go unnoticed in the emulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulator import CompileError, Emulator, EmulatorError
from planted import Planted, flattened, mutate

from lowbit.kernels.cuda.launch import Source

KERNELS = Path(__file__).parent / "emulator/kernels"
GEMM = flattened((KERNELS / "gemm.cu").read_text())
ROWS = flattened((KERNELS / "rows.cu").read_text())


def gemm(emulator: Emulator, text: str, m: int, n: int, k: int, stages: int = 3) -> None:
    rng = np.random.default_rng(m)
    a, b = (rng.integers(-4, 5, (rows, k)).astype(np.float16) for rows in (m, n))
    c = emulator.empty((m, n), np.float32)
    shared = stages * 2 * 32 * 128
    f = emulator.function(Source(text, f"gemm<{stages}>", 128, shared))
    grid = -(-m // 32), -(-n // 32)
    f(grid, (128,), (a, b, c, np.int32(m), np.int32(n), np.int32(k)), shared_mem=shared)
    assert np.array_equal(c, a.astype(np.float64) @ b.astype(np.float64).T)


def rows(emulator: Emulator, text: str, count: int, columns: int) -> None:
    x = np.random.default_rng(0).integers(-99, 100, (count, columns)).astype(np.float32)
    x[np.arange(count), np.arange(count) * 37 % columns] = -1000  # in each warp in turn
    largest, sums = emulator.empty((count,), np.float32), emulator.empty((count,), np.float32)
    arrived, total = emulator.zeros((1,), np.int32), emulator.empty((1,), np.float32)
    f = emulator.function(Source(text, "rows", 128))
    f((count,), (128,), (x, largest, sums, arrived, total, np.int32(columns)))
    assert np.array_equal(largest, np.abs(x).max(1))
    assert np.array_equal(sums, x.sum(1))
    assert total == x.sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 8), (33, 31, 72), (64, 32, 512)])
def test_a_pipelined_gemm(emulator: Emulator, m, n, k, seed):
    emulator.seed = seed
    gemm(emulator, GEMM, m, n, k)


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_rows(emulator: Emulator, seed):
    emulator.seed = seed
    rows(emulator, ROWS, 5, 300)


MAIN = """        lb::cp_async_wait<Stages - 2>();
        __syncthreads();
        const int next = tile + Stages - 1, stage = tile % Stages;
        if (next < tiles) load(next % Stages, next);
        lb::cp_async_commit();
"""
WAIT, BARRIER, NEXT, LOAD, COMMIT = MAIN.splitlines(keepends=True)
LANES = "br = wn + lane % 8 + lane / 16 * 8, bc = step * 2 + lane / 8 % 2"
IN_GEMM = (
    Planted("no barrier in the main loop", MAIN, WAIT + NEXT + LOAD + COMMIT),
    Planted("barrier after the refill", MAIN, WAIT + NEXT + LOAD + BARRIER + COMMIT),
    Planted("barrier before the wait", MAIN, BARRIER + WAIT + NEXT + LOAD + COMMIT),
    Planted("commits only what it loads", MAIN, MAIN.replace("next);\n        ", "next), ")),
    Planted("waits for one group too few", WAIT, WAIT.replace("2", "1")),
    Planted("refill of the stage in use", "load(next % Stages,", "load(tile % Stages,"),
    Planted("a stage beyond the memory", "load(next % Stages,", "load(next % (Stages + 1),"),
    Planted("no swizzle on reading", "[ar][ac ^ (ar % 8)]", "[ar][ac]"),
    Planted("rows not bounded", "first + r < rows && k + c * 8 < K", "k + c * 8 < K"),
    Planted("columns not bounded", "first + r < rows && k + c * 8 < K", "first + r < rows"),
    Planted("c not bounded in m", "if (m < M && n < N)", "if (n < N)"),
    Planted("c not bounded in n", "if (m < M && n < N)", "if (m < M)"),
    Planted("lanes mixed up", LANES, "br = wn + lane % 16, bc = step * 2 + lane / 16"),
    Planted("registers mixed up", "{b[2 * j], b[2 * j + 1]}", "{b[j], b[j + 2]}"),
    Planted("one piece is never loaded", "c = i % 8;\n", "c = i % 8;\n if (i == 77) continue;\n"),
    Planted("more shared memory than launched", "uint4 a[Stages]", "uint4 more, a[Stages]"),
    Planted("pieces read askew", "k + c * 8 : 0);", "k + c * 8 + 1 : 0);"),
    Planted("half of a warp leaves", "step < 4;", "step < (lane < 16 ? 4 : 3);"),
)
SIZE, SUM = "size = fmaxf(size, fabsf(row[i])),", "sum += row[i]"
ADD = "b < int(gridDim.x); ++b) all += static_cast<volatile float*>(sums)[b]"
LAST = "    __syncthreads();\n    v = partial[0];"
STORE = "partial[warp()] = v;\n"
IN_ROWS = (
    Planted("no barrier in block_max", STORE + "    __syncthreads();", STORE),
    Planted("no barrier before the sum", "    __syncthreads();\n    if (threadIdx.x == 0) {", "{"),
    Planted("the last warp forgotten", "w < Threads / 32; ++w", "w < Threads / 32 - 1; ++w"),
    Planted("barrier in a branch", LAST, "if (threadIdx.x < 64)" + LAST),
    Planted("shuffle in a loop that lanes leave", SIZE, "size = lb::warp_max(row[i]),"),
    Planted("partial sums one too few", "static_shared<float[4], 1>", "static_shared<float[3], 1>"),
    Planted("one column too many", "i < columns; i += 128", "i <= columns; i += 128"),
    Planted("a column behind a row's end", SUM, "sum += row[i + 1]"),
    Planted("writes its input", SUM, SUM + ", const_cast<float&>(row[i]) = 0"),
    Planted("adds a block twice", ADD, ADD.replace("<", "<=", 1).replace("[b]", "[b % gridDim.x]")),
    Planted("the first block sums up", "ticket != int(gridDim.x) - 1", "ticket != 0"),
    Planted("a number of 64 bits", "int columns) {", "long long columns) {"),
)


@pytest.mark.parametrize("bug", IN_GEMM, ids=str)
def test_bugs_planted_in_a_gemm(emulator: Emulator, bug: Planted):
    def run(text: str, seed: int) -> None:
        emulator.seed = seed
        gemm(emulator, text, 33, 31, 520)

    bug.must_be_caught(GEMM, run)


@pytest.mark.parametrize("bug", IN_ROWS, ids=str)
def test_bugs_planted_in_a_reduction(emulator: Emulator, bug: Planted):
    def run(text: str, seed: int) -> None:
        emulator.seed = seed
        rows(emulator, text, 5, 300)

    bug.must_be_caught(ROWS, run)


def test_a_bug_that_shows_nowhere_is_told(emulator: Emulator):
    with pytest.raises(AssertionError, match="nobody noticed: none"):
        Planted("none", "float all = 0;", "float all = 0.f;").must_be_caught(
            ROWS, lambda text, seed: rows(emulator, text, 2, 10)
        )


def test_a_bug_that_does_not_compile_is_none(emulator: Emulator):
    with pytest.raises(CompileError, match="was not declared"):
        Planted("typo", "*total = all;", "*total = al;").must_be_caught(
            ROWS, lambda text, seed: rows(emulator, text, 2, 10)
        )


def test_what_is_mutated_occurs_once():
    assert mutate("a b", "a", "c") == "c b"
    with pytest.raises(ValueError, match="occurs 2 times: 'a'"):
        mutate("a a", "a", "c")
    with pytest.raises(ValueError, match="occurs 0 times: 'd'"):
        mutate("a a", "d", "c")


# What a block of 64 threads does, and what is said of it.
WRONG = (
    ("if (threadIdx.x % 2) __syncwarp(); else __any_sync(~0u, 1);", "divergent warp"),
    ("if (threadIdx.x % 2) __shfl_sync(~0u, 1, 0);", "deadlock .* at __shfl_sync"),
    ("__syncwarp(1);", "the mask leaves out the calling lane"),
    ("if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);", "reads lane 20, which the mask leaves"),
    ("if (threadIdx.x < 32) __syncthreads();", "ends while others wait|deadlock .* their end"),
    ("if (threadIdx.x) __syncthreads(); else\n__syncthreads();", "others are at the one of line"),
    ("while (lb::load_acquire(flag) != 7) {}", "waits for what none of its threads will do"),
    ("lb::store8(out + 1, make_uint2(1, 2));", "store: .* is not 8-byte aligned"),
    ("lb::load_once<uint4>(out + 1);", "load_once: .* is not 16-byte aligned"),
    ("out[0] = 5 / (n - 16);", "division by zero"),
    ("out[n] = 1;", "access out of bounds .* byte 64 of 64 of argument 0"),
    ("out[-1] = 1;", "wrote beside an array's elements.* byte -4 of 64 of argument 0"),
    ("out[1 << 16] = 1;", "access out of bounds .* of argument 0"),
    ("lb::dynamic_shared<int[9]>()[0] = 1;", "wants 36 bytes of dynamic shared memory, .* gives 0"),
    ("lb::static_shared<int[12289]>()[0] = 1;", "a block has at most 49152"),
    ("lb::cp_async<4>(shared, out, 4);", "copies it never committed"),
    ("lb::cp_async<4>(shared, out, 4); lb::cp_async_commit();", "copies it never waited for"),
    ("lb::cp_async<4>(shared, out, 5);", "5 valid bytes of 4"),
    ("lb::cp_async<4>(out, out, 4);", "is not in shared memory"),
    ("__trap();", "__trap"),
    ("*reinterpret_cast<long long*>(out + 1) = 1;", r"misaligned access \(.*line 5\)"),
    ("int x[4] = {}; out[0] = x[n / 4];", "index outside of an array"),
    ("lb::static_shared<int[3]>()[n / 5] = 1;", "index outside of an array"),
    ("out[0] = n << (n * 2);", "shift too far"),
    ("out[0] = (n << 26) + (n << 26);", "sum beyond its type"),
    ("out[0] = n * (1 << 28);", "product beyond its type"),
)


@pytest.mark.parametrize(("body", "said"), WRONG)
def test_what_no_kernel_may_do(emulator: Emulator, body, said):
    text = f"""#include "primitives.cuh"
    __global__ void wrong(int* out, int n) {{
        [[maybe_unused]] auto* flag = reinterpret_cast<unsigned*>(out);
        [[maybe_unused]] auto* shared = &lb::static_shared<int[64]>()[threadIdx.x];
        {body}
    }}
    """
    f = emulator.function(Source(text, "wrong", 64))
    out = np.zeros(16, np.int32)
    with pytest.raises(EmulatorError, match=said):
        f((1,), (64,), (out, np.int32(16)))
    assert not out.any()


def test_a_launch_after_one_that_failed(emulator: Emulator):
    text = """#include "primitives.cuh"
    __global__ void copies(int* out) {
        auto& x = lb::static_shared<int[64]>();
        lb::cp_async<4>(&x[threadIdx.x], out, 4);
        lb::cp_async_commit();
        if (out[0] && threadIdx.x == 9) __trap();
        lb::cp_async_wait<0>();
        __syncthreads();
        if (threadIdx.x == 0) out[1] = x[5] + 1;
    }
    """
    f = emulator.function(Source(text, "copies", 64))
    for first in (1, 0, 1, 0):
        out = np.array([first, 9], np.int32)
        if first:
            with pytest.raises(
                EmulatorError, match=r"copies: __trap .* thread 9 of block \(0,0,0\)"
            ):
                f((1,), (64,), (out,))
            assert out[1] == 9
        else:
            f((1,), (64,), (out,))
            assert out[1] == 1

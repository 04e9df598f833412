"""Bugs planted in the product kernel: each is caught by a check that the tests run anyway."""

# ruff: noqa: E501  (lines of the kernel, as they stand there)

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from emulator import Emulator, EmulatorError
from emulator_build import CompileError
from planted import flattened, mutate

import lowbit as lb
from lowbit import dispatch
from lowbit.kernels.cuda import hopper, launch, product
from lowbit.kernels.cuda.launch import Device
from lowbit.testing import conformance, exact_operands


@dataclass(frozen=True)
class Bug:
    name: str
    old: str
    new: str
    m: int = 9
    n: int = 70
    k: int = 700
    w: str = "int4_g64_asym"
    x: str = "float16"
    processors: int = 1
    kernel: str = "matmul.cuda.mma"
    """With 64, blocks share the columns."""

    def __str__(self) -> str:
        return self.name


HOPPER: dict[str, Any] = {
    "kernel": "matmul.cuda.wgmma",
    "m": 70,
    "n": 70,
    "k": 1088,
    "w": "int4_g64",
}
HOPPER_ZEROS = {**HOPPER, "w": "uint4_g64_asym"}
INTEGERS: dict[str, Any] = {"kernel": "matmul.cuda.integer", "w": "int4_g64_asym", "x": "int8_row"}
SHARED: dict[str, Any] = {"processors": 64, "k": 1500}
BUGS = (
    Bug("no barrier in the main loop", "        __syncthreads();\n        if (stage", "        if (stage"),
    Bug("one group of copies too few is waited for", "cp_async_wait<C::stages - 2>", "cp_async_wait<C::stages - 1>"),
    Bug("the barrier comes before the wait", "        cp_async_wait<C::stages - 2>();\n        __syncthreads();", "        __syncthreads();\n        cp_async_wait<C::stages - 2>();"),
    Bug("a stage is refilled while it is read", "load(stage + C::stages - 1);", "load(stage + C::stages);"),
    Bug("a commit is missing at the end", "if (stage + C::stages - 1 < end) load(stage + C::stages - 1);\n        cp_async_commit();", "if (stage + C::stages - 1 < end) { load(stage + C::stages - 1); cp_async_commit(); }"),
    Bug("rows of w beyond the last are read", "first + row < rows ? valid : 0);\n            }\n        } else", "valid);\n            }\n        } else"),
    Bug("columns beyond the last are read", "bytes - stage * RowBytes - at);\n            const u8* from", "Piece);\n            const u8* from", k=712),
    Bug("rows of x beyond the last are written", "min(Columns, M - m0)", "Columns"),
    Bug("columns of the result beyond the last are written", "if (n0 + n < N) use(m, n);", "use(m, n);"),
    Bug("a lane takes its neighbour's row of x", "from.x[x0 + xt * 8 + g]", "from.x[x0 + xt * 8 + (g ^ 1)]"),
    Bug("halves of w's tile are exchanged", "wt * 16 + half * 8 + g][octet", "wt * 16 + (1 - half) * 8 + g][octet"),
    Bug("fragments of w are in the wrong order", "{first[2 * s], second[2 * s], first[2 * s + 1], second[2 * s + 1]}", "{first[2 * s], first[2 * s + 1], second[2 * s], second[2 * s + 1]}"),
    Bug("x keeps its order where w's is spread", "if constexpr (!Adjacent) {\n        const", "if constexpr (false) {\n        const"),
    Bug("octets of x and w differ", "(octet + i) * X::octet", "(octet + (1 - i)) * X::octet"),
    Bug("the scale of the segment before", "scale[wt][half] = next_scale[wt][half], zero", "zero"),
    Bug("the zero point of the segment before", "next_scale[wt][half], zero[wt][half] = next_zero[wt][half];", "next_scale[wt][half];"),
    Bug("a segment ends a block late", "if (column == ends && column < K)", "if (column == ends + block && column < K)"),
    Bug("scales of the wrong block", "column < columns ? column / width : 0", "column < columns ? (column + 32) / width : 0", w="int4_g32"),
    Bug("scales of the wrong row", "(long long)(row / rows) * pitch", "(long long)row * pitch", w="int4_16x64"),
    Bug("a sum is not started anew", "sum[wt][xt][i] = 0;", ";"),
    Bug("zero points are added", "Op::pack(-zero, -zero)", "Op::pack(zero, zero)"),
    Bug("no mask on a field", "codes >> shift & twice(mask << place)", "codes >> shift", w="int3_g64"),
    Bug("the offset of signed codes is forgotten", "(1u << (Op::mantissa - place)) + offset", "(1u << (Op::mantissa - place))", w="int4_g64"),
    Bug("the eighth bit weighs +128", "| 0xc300c300u", "| 0x43004300u", w="int8_row", x="bfloat16"),
    Bug("NaN codes are numbers", "return number | found;", "return number;", w="fp8_row", x="bfloat16"),
    Bug("half of a codebook is never looked up", "0x3210u | (codes & 0x8888u) >> 1", "0x3210u", w="fp4_g64"),
    Bug("float32 loses its last bits", "for (int term = 0; term < terms; ++term) {  // what", "for (int term = 0; term < terms - 1; ++term) {  out[terms - 1][j] = 0; // what", x="float32"),
    Bug("bytes are not sign-extended", "if constexpr (Signed && Bits < 8) {", "if constexpr (false) {", w="int4_row", x="int8_row", kernel="matmul.cuda.integer"),
    Bug("sums of x are not taken off", "if constexpr (C::x_sums) whole -=", "if constexpr (false) whole -=", **INTEGERS),
    Bug("sums of x are not started anew", "for (int i = 0; i < 4; ++i) ones[xt][i] = 0;", "for (int i = 0; i < 0; ++i) ones[xt][i] = 0;", **INTEGERS),
    Bug("x meets the scale of another row", "xt * 8 + t * 2 + j, M - 1);", "xt * 8 + t * 2, M - 1);", **INTEGERS),
    Bug("shares overlap", "end = min(stages, begin + each)", "end = min(stages, begin + each + 1)", **SHARED),
    Bug("the last share is forgotten", "z < int(gridDim.z); ++z) total", "z < int(gridDim.z) - 1; ++z) total", **SHARED),
    Bug("the counter is not set back", "if (warp == 0 && lane() == 0) atomicExch(&counter, 0);", "", **SHARED),
    Bug("the bias of another column", "__fmaf_rn(times, v, bias[n])", "__fmaf_rn(times, v, bias[m])"),
    Bug("the residual has the result's pitch", "residual[m * residual_pitch + n]", "residual[m * out_pitch + n]"),
    Bug("shared memory is a stage short", "        Stage stage[C::stages];", "        Stage stage[C::stages + 1];"),
    Bug("the result overwrites a stage that is read", "    __syncthreads();  // nobody reads a stage any more\n", "", m=130, k=320),
    Bug("the result is read before it is there", "        sync();\n        if constexpr (C::shared) {\n", "        if constexpr (C::shared) {\n"),
    Bug("wgmma reads a stage that has not come", "mbarrier_wait(&shared.full[i % C::stages], i / C::stages & 1);", "", **HOPPER),
    Bug("a stage is filled while wgmma reads it", "mbarrier_wait(&shared.empty[i % C::stages], i / C::stages & 1 ^ 1);", "", **HOPPER),
    Bug("the phase of a barrier never turns", "mbarrier_wait(&shared.full[i % C::stages], i / C::stages & 1);", "mbarrier_wait(&shared.full[i % C::stages], 0);", **HOPPER),
    Bug("sums are read before wgmma has written them", "        wgmma_wait<0>(sum);\n", "", **HOPPER),
    Bug("operands of wgmma without a fence", "        wgmma_fence();\n#pragma", "#pragma", **HOPPER),
    Bug("a stage is given back too early", "        wgmma_wait<0>(sum);\n        mbarrier_arrive(&shared.empty[i % C::stages]);", "        mbarrier_arrive(&shared.empty[i % C::stages]);\n        wgmma_wait<0>(sum);", **HOPPER),
    Bug("a step reads the columns of the step before", "x + 2 * s);", "x + 2 * (s ? s - 1 : 0));", **HOPPER),
    Bug("one warpgroup does not say that it has read", "mbarrier_init(&shared.empty[s], 256);", "mbarrier_init(&shared.empty[s], 257);", **HOPPER),
    Bug("fewer bytes are expected than come", "sizeof(to.x) + sizeof(to.w)", "sizeof(to.x)", **HOPPER),
    Bug("w's box is that of another stage", "&w_map, (first + i) * 8 * bits, n0", "&w_map, (first + i + 1) * 8 * bits, n0", **HOPPER),
    Bug("halves of a fragment are exchanged", "a[o / 2][o % 2 * 2 + h] = pair;", "a[o / 2][o % 2 + 2 * h] = pair;", **HOPPER),
    Bug("a lane takes its neighbour's codes", "neighbours_at<bits>(words, o, t)", "neighbours_at<bits>(words, o, t ^ 1)", **HOPPER),
    Bug("a segment meets the scale of the next one", "if (closes) flush(own);", "if (closes) flush(scale);", **HOPPER),
    Bug("a segment is added up twice", "sum[i], acc[i]), sum[i] = 0.f;", "sum[i], acc[i]);", **HOPPER),
    Bug("rows 8 below have the scale of the rows above", "by[i / 2 % 2], sum", "by[0], sum", **HOPPER),
    Bug("zero points of the stage before", "scale[h] = next_scale[h], zero[h] = next_zero[h];", "scale[h] = next_scale[h];", **HOPPER_ZEROS),
    Bug("a stage of the ring is missing", "        Stage stage[C::stages];", "        Stage stage[C::stages + 1];", **HOPPER),
    Bug("results of the wrong rows of x", "shared.result.sum[8 * j + 2 * t + i % 2]", "shared.result.sum[8 * j + 2 * t + i / 2]", **HOPPER),
    Bug("results are read before they are there", "        sync();\n        if constexpr (C::shared) {\n", "        if constexpr (C::shared) {\n", **HOPPER),
    Bug("results overwrite a stage that is read", "    sync();  // nobody reads a stage any more\n", "", **HOPPER),
)  # fmt: skip


@pytest.fixture
def gpu(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setattr(dispatch, "device", lambda: emulator.device.name)
    with launch.pretending(emulator):
        yield emulator


def identity_product(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x times the identity, and x."""
    x = conformance.dense_or_quantized("float32", 9, 70, seed)
    w = lb.from_parts("int8_row", np.eye(70, dtype=np.int8), np.ones((70, 1), np.float32))
    return lb.matmul(x, w.T, kernel="matmul.cuda.mma"), x


def check(bug: Bug, seed: int) -> None:
    """Exact products with all that may follow, and a NaN code where there are any."""
    residual = np.random.default_rng(seed).integers(-9, 9, (bug.m, bug.n + 5)).astype(np.float32)
    case = exact_operands(bug.m, bug.n, bug.k, bug.w, bug.x, bias=True, seed=seed)
    case.expected[...] += residual[:, : bug.n]
    options = {**case.options, "residual": residual[:, : bug.n], "out_dtype": "float32"}
    kernel = bug.kernel
    w = case.w
    if bug.x == "float32":
        conformance.same_bits(*identity_product(seed))
        return
    if bug.w.startswith("fp8"):
        codes = w.codes.copy().view(np.uint8)
        codes[0, 0] = 0x7F
        w = lb.from_parts(bug.w, codes.view(w.codes.dtype), w.scales)
        case.expected[:, 0] = np.nan
        result = lb.matmul(case.x, w.T, kernel=kernel, **options)
        assert np.isnan(result[:, 0]).all()
        return
    for _ in range(2 if bug.processors > 1 else 1):
        case.check(lb.matmul(case.x, w.T, kernel=kernel, **options))


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bugs_are_caught(gpu, bug, monkeypatch):
    gpu.device = Device(90, bug.processors, plain=True)
    check(bug, 0)

    module, name = (hopper, "source") if "wgmma" in bug.kernel else (product, "_source")
    whole = getattr(module, name)

    def broken(spec):
        made = whole(spec)
        return replace(made, text=mutate(flattened(made.text), bug.old, bug.new))

    monkeypatch.setattr(module, name, broken)
    assert any(noticed(gpu, bug, seed) for seed in range(4))


def noticed(gpu: Emulator, bug: Bug, seed: int) -> bool:
    gpu.seed = seed
    try:
        check(bug, seed)
    except CompileError:
        raise
    except (AssertionError, EmulatorError):
        return True
    return False

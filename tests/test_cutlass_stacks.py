"""Stacks of matrices in one launch on CUTLASS: each matrix as if it had been launched alone."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fake_cupy
import numpy as np
import pytest
from absence import needs_headers
from computed import DTYPES, aligned, placed
from host import Watching
from launched import Launched, OfAmpere, OfBlocks, OfDense, OfMixed

import lowbit as lb
from lowbit import binding as bound
from lowbit import device as places
from lowbit import kernels
from lowbit.formats.reference import Packed, take
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import launch
from lowbit.kernels.cutlass import blockwise, launcher, mma, upcast, w8a8
from lowbit.kernels.cutlass.tiles import Tile

Array = Any
HOPPER, ADA = "cuda:90:132", "cuda:89:128"
READINGS: dict[Any, type[Launched]] = {
    w8a8: OfDense, upcast: OfMixed, blockwise: OfBlocks, mma: OfAmpere
}  # fmt: skip
FAMILIES = {
    name: (family, READINGS[module])
    for module in READINGS
    for name, family in module.FAMILIES.items()
}
CASES = [
    ("int8", "int8_row", "int8_row"),
    ("int8", "int8_tensor", "int8_tensor"),
    ("int8", "uint8_row_asym", "int8_row"),
    ("int8", "int8_tensor_asym", "int8_row"),
    ("float8", "fp8_row", "fp8_tensor"),
    ("float8_fast", "fp8_row", "fp8_row"),
    ("float8_blocks", "fp8_g128", "fp8_128x128"),
    ("upcast16", "bfloat16", "int4_g128"),
    ("upcast16", "bfloat16", "uint4_g64_asym"),
    ("upcast16", "float16", "int4_tensor"),
    ("upcast16", "float16", "uint4_g64_zint8"),
    ("upcast16", "bfloat16", "fp8_128x128"),
    ("upcast_int8", "int8_row", "uint4_row_asym"),
    ("upcast_float8", "fp8_tensor", "int4_g256_e4m3_ts"),
    ("upcast_float8_scaled", "fp8_row", "int4_g128_e4m3_ts"),
    ("mma_int8", "int8_tensor", "int8_row"),
    ("mma_int8", "int8_row", "int8_tensor"),
    ("mma_int4", "int8_row", "int4_row"),
    ("mma_float8", "fp8_row", "fp8_tensor"),
]
B, M, N, K = 3, 40, 136, 512


def stacked(fmt: str, rows: int, k: int = K) -> Packed:
    """Random parts."""
    made = lb.stack([lb.testing.random_qarray(fmt, rows, k, seed=seed) for seed in range(B)])
    parts = made._parts
    assert isinstance(parts, Packed)
    return replace(parts, codes=placed(parts.codes), scales=placed(parts.scales))


def operands(name: str, x_fmt: str, w_fmt: str, m: int = M, k: int = K) -> tuple[Problem, Any, Any]:
    """A stack's problem, x and w."""
    w, device = stacked(w_fmt, N, k), ADA if name.startswith("mma") else HOPPER
    if x_fmt in DTYPES:
        rng = np.random.default_rng(1)
        x: Any = placed(rng.standard_normal((B, m, k)).astype(DTYPES[x_fmt]))
        kind: Any = x_fmt
    else:
        x = stacked(x_fmt, m, k)
        kind = x.format
    return Problem(m, N, k, kind, w.format, "bfloat16", device=device, batches=B), x, w


def binding(
    p: Problem, name: str
) -> tuple[Callable[[Problem], Any], Callable[[bytes, int], Launched]]:
    """How to bind by the kernel of a stack, and how to read its arguments."""
    family, reading = FAMILIES[name]
    spec = family.spec_of(p)
    return lambda q: family.bind(q, spec), lambda given, i: reading(spec, given, i)


def launched(bind: Any, machine: Keeping, x: Any, w: Any, after: Epilogue, out: Array) -> bytes:
    """The argument; sums of rows are computed."""
    machine.launched.clear()
    with launch.pretending(machine):
        bind(w)(x, after, out)
    *others, (source, _, argument) = machine.launched
    assert source.headers == "cutlass"
    for _, _, (codes, _, _, _, sums) in others:
        sums[...] = codes.sum(-1)
    machine.kept.append(list(machine.launched))
    return bytes(argument)


class Keeping(Watching):
    """A machine that remembers the memory that it gave."""

    def __init__(self, device: launch.Device) -> None:
        super().__init__(device)
        self.kept: list[Any] = []
        self.given: list[weakref.ref[Any]] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Remember it."""
        found = aligned(shape, dtype)
        self.given.append(weakref.ref(found.base))
        return found


def computing(reading: Launched, x: str, w: str) -> None:
    """Write a matrix of the result."""
    if isinstance(reading, OfMixed):
        reading.compute()
    else:
        assert isinstance(reading, OfDense | OfBlocks | OfAmpere)
        reading.compute(x, w)


def compare(family: str, x_fmt: str, w_fmt: str, p: Problem, x: Any, w: Packed) -> None:
    """A launch of the stack with launches of its matrices."""
    p = replace(p, bias=True, residual="bfloat16")
    rng = np.random.default_rng(3)
    assert kernels.choose(p, f"matmul.cutlass.{family}").refusal is None
    bias = placed(rng.standard_normal(N, np.float32))
    residual = placed(rng.standard_normal((B, p.m, N)).astype(DTYPES["bfloat16"]))
    bind, reading = binding(p, family)
    machine, runs = Keeping(launch.parse(p.device)), []

    def keeping(q: Problem) -> Any:
        def to(w: Packed) -> Any:
            runs.append(bind(q)(w))
            return runs[-1]

        return to

    out, alone = (aligned((B, p.m, N), DTYPES["bfloat16"]) for _ in range(2))
    together = launched(keeping(p), machine, x, w, Epilogue(-0.75, bias, None, residual), out)
    single = replace(p, batches=1)
    for i in range(B):
        computing(reading(together, i), x_fmt, w_fmt)
        one = x[i] if x_fmt in DTYPES else take(x, i, slice(0, p.m))
        after = Epilogue(-0.75, bias, None, residual[i])
        weight = take(w, i, slice(0, N))
        argument = launched(keeping(single), machine, one, weight, after, alone[i])
        computing(reading(argument, 0), x_fmt, w_fmt)
    np.testing.assert_array_equal(out, alone)
    assert len(np.unique(out.astype(np.float32))) > 100


@needs_headers
@pytest.mark.parametrize(("family", "x_fmt", "w_fmt"), CASES)
@pytest.mark.parametrize("m", [M, 1])
def test_every_matrix_is_what_a_launch_of_its_own_computes(
    family: str, x_fmt: str, w_fmt: str, m: int
) -> None:
    compare(family, x_fmt, w_fmt, *operands(family, x_fmt, w_fmt, m))


@needs_headers
def test_scales_of_blocks_that_end_beyond_the_last_row() -> None:
    # One for all columns: 136 rows, each with the scale of its 128.
    case = "upcast16", "bfloat16", "fp8_128x128"
    compare(*case, *operands(*case, k=128))


@needs_headers
@pytest.mark.parametrize("family", ["upcast_float8", "upcast_float8_scaled"])
@pytest.mark.parametrize("step", [2, -1])
def test_scales_of_matrices_that_do_not_follow_each_other(family: str, step: int) -> None:
    case = family, "fp8_row", "int4_g128_e4m3_ts"
    p, x, w = operands(*case)
    held = np.zeros(abs(step) * B, np.float32)[::step]
    held[...] = w.tensor_scale
    compare(*case, p, x, replace(w, tensor_scale=held))


@needs_headers
@pytest.mark.parametrize(("family", "x_fmt", "w_fmt"), CASES)
def test_what_is_made_of_a_weight_stays(family: str, x_fmt: str, w_fmt: str) -> None:
    p, x, w = operands(family, x_fmt, w_fmt)
    machine, out = Keeping(launch.parse(p.device)), aligned((B, M, N), DTYPES["bfloat16"])
    with launch.pretending(machine):
        run = binding(p, family)[0](p)(w)
        made = list(machine.given)
        run(x, Epilogue(), out)
    machine.launched.clear()
    gc.collect()
    assert all(each() is not None for each in made)


def launched_with(odd: str, given: Callable[[Array], Array]) -> tuple[Watching, dict[str, Array]]:
    """What an int8 stack launches where one of its operands lies as `given` lays it."""
    p, x, w = operands("int8", "int8_row", "int8_row")
    p = replace(p, residual="bfloat16")
    held = {
        "x": x.codes, "w": w.codes, "residual": aligned((B, M, N), DTYPES["bfloat16"]),
        "out": aligned((B, M, N), DTYPES["bfloat16"]),
    }  # fmt: skip
    held[odd] = given(held[odd])
    machine = Watching(launch.parse(HOPPER))
    with launch.pretending(machine):
        run = kernels.choose(p, "matmul.cutlass.int8").kernel.build(p)
        left, right = replace(x, codes=held["x"]), replace(w, codes=held["w"])
        run(right)(left, Epilogue(residual=held["residual"]), held["out"])
    return machine, held


def off_by_one(array: Array) -> Array:
    """Rows that begin at no multiple of 16 bytes."""
    *lead, columns = array.shape
    return aligned((*lead, columns + 1), array.dtype)[..., 1:]


def matrices_anywhere(array: Array) -> Array:
    """Only rows of the first matrix begin at multiples of 16 bytes."""
    stack, rows, columns = array.shape
    apart = aligned((stack, rows * columns + 4), array.dtype)[:, : rows * columns]
    return apart.reshape(array.shape)


def repeated(array: Array) -> Array:
    """One matrix for all."""
    return np.broadcast_to(array[:1], array.shape)


@needs_headers
@pytest.mark.parametrize(
    ("odd", "given"),
    [
        ("residual", repeated),
        *((odd, off_by_one) for odd in ("x", "w", "out")),
        *((odd, matrices_anywhere) for odd in ("x", "w", "residual", "out")),
    ],
)
def test_memory_that_is_not_aligned_is_computed_matrix_by_matrix(
    odd: str, given: Callable[[Array], Array]
) -> None:
    machine, held = launched_with(odd, given)
    # Every matrix at its place: the arguments are arrays.
    assert [source.headers for source, *_ in machine.launched] == [None] * B
    found = [
        {a.ctypes.data for a in args if isinstance(a, np.ndarray)} for *_, args in machine.launched
    ]
    for name, array in held.items():
        assert all(array[i].ctypes.data in found[i] for i in range(B)), name


def test_another_kernel_gets_everything_of_a_matrix() -> None:
    p, x, w = operands("int8", "int8_row", "int8_row")
    residual, out = np.zeros((2, B, M, N), np.float32)
    after = Epilogue(0.5, np.ones(N, np.float32), "relu", residual)
    asked, seen = [], []

    def build(q: Problem) -> Any:
        asked.append(q)
        return lambda one: lambda *given: seen.append((one, *given))

    launcher.matrix_by_matrix(build, p)(w)(x, after, out)
    assert asked == [replace(p, batches=1)]
    assert len(seen) == B
    for i, (right, left, step, target) in enumerate(seen):
        for got, stack, rows in ((right, w, N), (left, x, M)):
            wanted = take(stack, i, slice(0, rows))
            np.testing.assert_array_equal(got.codes, wanted.codes)
            np.testing.assert_array_equal(got.scales, wanted.scales)
        assert (step.alpha, step.bias, step.activation) == (0.5, after.bias, "relu")
        assert step.residual.ctypes.data == residual[i].ctypes.data
        assert target.ctypes.data == out[i].ctypes.data


@needs_headers
def test_tiles_of_all_matrices_are_counted() -> None:
    row = lb.format("int8_row")
    p = Problem(64, 256, 512, row, row, "bfloat16", device=HOPPER)
    tile = Tile((64, 128, 128), (1, 1), "Pingpong", False, 1.0)
    for batches, waves in ((1, 1), (66, 1), (67, 2), (660, 10)):
        stack = replace(p, batches=batches)
        assert tile.blocks(stack) == 2 * batches
        assert tile.waves(stack) == waves


@needs_headers
def test_stacks_have_enough_tiles_not_to_share_them() -> None:
    row = lb.format("int8_row")
    p = Problem(16, 256, 16384, row, row, "bfloat16", device=HOPPER)
    spec_of = w8a8.FAMILIES["int8"].spec_of
    assert spec_of(p).shared
    assert not spec_of(replace(p, batches=8)).shared


def test_one_launch_is_cheaper_than_many() -> None:
    row = lb.format("int8_row")
    p = Problem(64, 256, 512, row, row, "bfloat16", device=HOPPER, batches=64)
    chosen = kernels.choose(p)
    assert chosen.kernel.name == "matmul.cutlass.int8"
    assert chosen.seconds is not None
    alone = chosen.kernel.cost(replace(p, batches=1))
    assert chosen.seconds < 16 * alone
    found = {verdict.kernel.name: verdict for verdict in kernels.judge(p)}
    single = {v.kernel.name: v for v in kernels.judge(replace(p, batches=1))}
    for name, verdict in found.items():
        if not verdict.kernel.stacks and verdict.seconds is not None:
            assert verdict.seconds == 64 * (single[name].seconds or 0)
            assert verdict.kernel.asked(p).batches == 1


def test_bits_that_do_not_depend_on_rows_do_not_depend_on_matrices() -> None:
    fmt = lb.format("fp8_row")
    p = Problem(16, 256, 4096, fmt, fmt, "bfloat16", device=HOPPER, batch_invariant=True)
    some = [replace(p, m=m, batches=b) for m, b in ((1, 1), (16, 64), (4096, 3))]
    assert len({kernels.choose(each).kernel.name for each in some}) == 1
    assert len({w8a8.FAMILIES["float8"].spec_of(each) for each in some}) == 1


def test_a_grid_has_room_for_so_many_matrices() -> None:
    row = lb.format("int8_row")
    p = Problem(1, 256, 512, row, row, "bfloat16", device=ADA, batches=65536)
    (kernel,) = (k for k in mma.KERNELS if k.name.endswith("mma_int8"))
    assert kernel.accepts(replace(p, batches=65535)) is None
    assert "room for 65535 matrices" in str(kernel.accepts(p))


@needs_headers
def test_scales_of_all_matrices_are_counted() -> None:
    x, w = lb.format("fp8_g128"), lb.format("fp8_128x128")
    p = Problem(1 << 14, 256, 1 << 14, x, w, "bfloat16", device=HOPPER, batches=1 << 10)
    (kernel,) = blockwise.KERNELS
    assert kernel.accepts(replace(p, batches=1023)) is None
    assert "scales up to" in str(kernel.accepts(p))


def test_a_weight_that_is_gathered_stays_while_it_is_read() -> None:
    w, read = stacked("int8_row", N), []

    def bind(parts: Any) -> Any:
        held = weakref.ref(parts.codes)  # as a launch knows no more than an address

        def run(x: Any, after: Epilogue, out: Array) -> None:
            gc.collect()
            read.append(held() is not None)

        return run

    row = lb.format("int8_row")
    p = Problem(M, N, K, row, row, device=HOPPER, batches=B)
    bound._bound(bind, replace(w, codes=w.codes[::-1]), p)(None, Epilogue(), np.zeros(0))
    assert read == [True]


class Computing(Keeping):
    """A machine whose launches on CUTLASS compute, those of W8A8."""

    spec: Any = None

    def function(self, source: Any) -> Any:
        """Compute when launched."""
        watch = super().function(source)

        def run(grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
            watch(grid, block, args, shared_mem=shared_mem)
            assert source == w8a8.source(self.spec)
            for i in range(OfDense(self.spec, args[0]).member("shape.l")):
                OfDense(self.spec, args[0], i).compute("int8_row", "int8_row")

        return run


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(places, "gpu_array", found.ndarray)
    found.computing = Computing(launch.parse(HOPPER))
    machine = fake_cupy.Machine(found.computing)
    monkeypatch.setattr(launch, "machine_of", lambda array: machine)
    return found


@needs_headers
def test_matmul_of_stacks_takes_one_launch(cupy: Any) -> None:
    rng, lead = np.random.default_rng(0), (2, 3)
    x = lb.quantize(rng.standard_normal((*lead, 24, 64), np.float32), "int8_row")
    w = lb.quantize(rng.standard_normal((*lead, 48, 64), np.float32), "int8_row")
    rest = rng.standard_normal((*lead, 24, 48), np.float32)
    bias = rng.standard_normal(48, np.float32)
    wanted = lb.matmul(x, w.mT, bias=bias, residual=rest)
    row = x.format
    p = Problem(
        24, 48, 64, row, row, "float32", bias=True, residual="float32", device=HOPPER, batches=6
    )
    cupy.computing.spec = w8a8.FAMILIES["int8"].spec_of(p)
    left, right = x.to_device("cuda"), w.to_device("cuda")
    options = {"bias": cupy.asarray(bias), "residual": cupy.asarray(rest)}
    with fake_cupy.uncopied():
        got = lb.matmul(left, right.mT, **options)
    assert len(cupy.computing.launched) == 1
    np.testing.assert_array_equal(got.get(), wanted)
    text = str(lb.explain(left, right.mT))
    assert "(6, 24, 64) int8_row @ (6, 48, 64) int8_row.mT" in text
    assert text.splitlines()[-1] == "all matrices of the stack in one launch"


@needs_headers
def test_a_stack_of_no_matrices_has_nothing_to_launch(cupy: Any) -> None:
    x, w = (lb.quantize(np.zeros((0, n, 64), np.float32), "int8_row") for n in (24, 48))
    got = lb.matmul(x.to_device("cuda"), w.to_device("cuda").mT)
    assert got.shape == (0, 24, 48)
    assert not cupy.computing.launched


@needs_headers
@pytest.mark.parametrize("which", ["x of one matrix", "w that is not in order"])
def test_other_stacks_go_matrix_by_matrix(cupy: Any, which: str) -> None:
    rng = np.random.default_rng(0)
    x = lb.quantize(rng.standard_normal((2, 3, 24, 64), np.float32), "int8_row")
    w = lb.quantize(rng.standard_normal((2, 3, 48, 64), np.float32), "int8_row")
    if which == "x of one matrix":
        x = x[0, 0]
    else:
        x, w = x.transpose(1, 0, 2, 3), w.transpose(1, 0, 2, 3)
    wanted = lb.matmul(x, w.mT)
    p = Problem(24, 48, 64, x.format, w.format, "float32", device=HOPPER)
    cupy.computing.spec = w8a8.FAMILIES["int8"].spec_of(p)
    left, right = x.to_device("cuda"), w.to_device("cuda")
    if which != "x of one matrix":
        right = right.transpose(1, 0, 2, 3).copy().transpose(1, 0, 2, 3)
    got = lb.matmul(left, right.mT, kernel="matmul.cutlass.int8")
    assert len(cupy.computing.launched) == 6
    np.testing.assert_array_equal(got.get(), wanted)

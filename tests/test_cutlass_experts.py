"""Experts in one launch: what is launched, computed from its bytes; lb.grouped_matmul above it."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, replace
from typing import Any

import fake_cupy
import host
import numpy as np
import pytest
from absence import needs_headers
from computed import DTYPES, finished, placed, quantized, sums
from computed import aligned as aligned_zeros

import lowbit as lb
from lowbit import cuda_interop, interop, products
from lowbit import device as places
from lowbit import grouped as grouped_module
from lowbit.formats import reference
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import launch
from lowbit.kernels.cutlass import dense, grouped
from lowbit.kernels.cutlass import experts as experts_of
from lowbit.kernels.cutlass.grouped import Spec

HOPPER = "cuda:90:132"


class Machine(host.Watching):
    """Runs lowbit's own kernels, and computes what CUTLASS's are given."""

    spec: Spec
    format: str

    def __init__(self, device: launch.Device, emulator: Any) -> None:
        super().__init__(device)
        self.emulator = emulator
        self.memory = placed(np.zeros(1 << 20, np.int32))

    def function(self, source: launch.Source) -> Any:
        if source.headers is None:
            return self.emulator.function(source)
        watched = super().function(source)

        def run(*given: Any, **options: Any) -> None:
            watched(*given, **options)
            Launched(self.spec, self.launched[-1][2]).compute(self.format)

        return run

    def scratch(self, count: int) -> Any:
        assert count <= self.memory.size
        return self.memory


@dataclass
class Launched:
    """One launch, computed group by group from nothing but the argument's bytes."""

    spec: Spec
    argument: bytes

    def member(self, path: str) -> Any:
        at, code = grouped.layout(self.spec).members[path]
        return struct.unpack_from("<" + code, self.argument, at)[0]

    def numbers(self, path: str, count: int) -> Any:
        return host.memory(self.member(path), (count,), (8,), np.int64)

    def operand(self, name: str) -> Any:
        return self.member(f"epilogue.thread.{dense.finish(self.spec).operands[name]}")

    def vector(self, address: int, name: str, count: int) -> Any:
        if not address:
            return np.full(count, self.operand(f"{name}.default"), np.float32)
        return host.memory(address, (count,), (4 * self.operand(f"{name}.step"),), np.float32)

    def compute(self, fmt: str) -> None:
        """Write the result where the kernel would."""
        groups, spec = self.member("shape.groups"), self.spec
        shapes = host.memory(self.member("scheduler.shape.shapes"), (groups, 3), (12, 4), np.int32)
        firsts, seconds = (self.numbers(f"mainloop.{s}", groups) for s in ("firsts", "seconds"))
        pitches = [self.numbers(f"mainloop.{s}_pitches", groups) for s in ("first", "second")]
        outs, out_pitch = (self.numbers(f"epilogue.{s}", groups) for s in ("ds", "d_pitches"))
        x_scales = self.numbers(f"epilogue.thread.{dense.finish(spec).operands['x_scale']}", groups)
        for e, (rows, columns, k) in enumerate(shapes):
            if rows == 0 or columns == 0:
                continue
            sides = (
                host.memory(int(firsts[e]), (rows, k), (int(pitches[0][e]), 1), np.uint8),
                host.memory(int(seconds[e]), (columns, k), (int(pitches[1][e]), 1), np.uint8),
            )
            x, w = sides[::-1] if spec.turned else sides
            scale, bias = (
                self.operand(name) + 4 * e * self.operand(f"{name}.batch")
                if self.operand(name)
                else 0
                for name in ("w_scale", "bias")
            )
            result = finished(
                sums(fmt, fmt, x, w), self.vector(int(x_scales[e]), "x_scale", len(x)),
                self.vector(scale, "w_scale", len(w)), self.operand("alpha"),
                self.vector(bias, "bias", len(w)), spec.activation, None,
            )  # fmt: skip
            dtype = np.dtype(DTYPES[spec.out])
            pitch = int(out_pitch[e]) * dtype.itemsize
            out = host.memory(int(outs[e]), (len(x), len(w)), (pitch, dtype.itemsize), dtype)
            out[...] = result.astype(dtype)


@needs_headers
@pytest.mark.parametrize("mean", [3, 20, 50, 150, 220])
@pytest.mark.parametrize("fmt", ["int8_row", "fp8_row", "fp8_tensor"])
def test_what_is_launched_computes_every_group(emulator: Any, fmt: str, mean: int) -> None:
    rng, experts, n, k = np.random.default_rng(mean), 5, 72, 160
    counts = rng.multinomial(experts * mean, [0.4, 0.0, 0.3, 0.2, 0.1])
    ends = np.cumsum(counts)
    x, w = quantized(fmt, (int(ends[-1]), k), 1), stacked(fmt, (experts, n, k))
    bias = placed(rng.standard_normal((experts, n), np.float32)) if mean % 2 else None
    p = Problem(
        int(ends[-1]), n, k, x.format, w.format, "bfloat16", bias is not None, device=HOPPER
    )  # fmt: skip
    assert experts_of.refuse(p, experts) is None
    machine, out = Machine(launch.parse(HOPPER), emulator), aligned_zeros((p.m, n), DTYPES[p.out])
    machine.spec, machine.format = experts_of.spec_of(p, experts), fmt
    with launch.pretending(machine):
        run = experts_of.bind(p, machine.spec, experts)(w)
        assert run(x, ends, 0, Epilogue(0.5, bias), out)
    ((source, blocks, _),) = machine.launched
    assert source == experts_of.source(machine.spec)
    assert blocks == (132, 1, 1)
    scale = np.broadcast_to(x.scales[:, 0], p.m)
    for e, start in enumerate(ends - counts):
        rows = slice(start, ends[e])
        wanted = finished(
            sums(fmt, fmt, x.codes.view(np.uint8)[rows], w.codes.view(np.uint8)[e]), scale[rows],
            np.broadcast_to(w.scales[e, :, 0], n), 0.5, 0 if bias is None else bias[e], None, None,
        )  # fmt: skip
        np.testing.assert_array_equal(out[rows], wanted.astype(out.dtype))


@needs_headers
@pytest.mark.parametrize("odd", ["x", "w", "out", "none"])
def test_memory_that_tma_does_not_read_is_left_to_others(emulator: Any, odd: str) -> None:
    experts, rows, n, k = 2, 6, 72, 160
    x, w = quantized("int8_row", (rows, k), 1), stacked("int8_row", (experts, n, k))
    p = Problem(rows, n, k, x.format, w.format, "bfloat16", device=HOPPER)
    held = {"x": x.codes, "w": w.codes, "out": aligned_zeros((rows, n), DTYPES["bfloat16"])}
    if odd in held:
        given = held[odd]
        apart = aligned_zeros((given.size + 1,), given.dtype)[1:].reshape(given.shape)
        apart[...] = given
        held[odd] = apart
    machine = Machine(launch.parse(HOPPER), emulator)
    machine.spec, machine.format = experts_of.spec_of(p, experts), "int8_row"
    with launch.pretending(machine):
        run = experts_of.bind(p, machine.spec, experts)(replace(w, codes=held["w"]))
        left = replace(x, codes=held["x"])
        assert run(left, np.array([2, 6]), 0, Epilogue(), held["out"]) == (odd == "none")
    assert len(machine.launched) == (odd == "none")


def stacked(fmt: str, shape: tuple[int, int, int]) -> Any:
    """A stack of weights."""
    values = np.random.default_rng(2).standard_normal(shape, np.float32)
    parts = reference.quantize(lb.format(fmt), values)
    return replace(parts, codes=placed(parts.codes), scales=placed(parts.scales))


def test_what_is_refused_is_said_why() -> None:
    fmt = lb.format("int8_row")
    p = Problem(64, 64, 64, fmt, fmt, "bfloat16", device=HOPPER)
    for changed, words in (
        ({"device": "cuda:80:108"}, "capability 9.0"),
        ({"residual": "bfloat16"}, "no residual"),
        ({"x": lb.format("int8_row_asym")}, "no zero points"),
        ({"w": lb.format("int8_g32")}, "scales must not change"),
    ):
        refusal = experts_of.refuse(replace(p, **changed), 8)
        assert refusal is not None
        assert words in refusal


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CuPy's stand-in, whose fresh memory is not zero by chance."""
    cupy = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(places, "gpu_array", cupy.ndarray)
    cupy.empty = lambda shape, dtype: cupy.full(shape, 7, dtype)
    return cupy


@pytest.fixture
def hopper(cupy: Any, emulator: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Machine]:
    """CuPy's stand-in and what its launches are computed by."""
    inner = Machine(launch.parse(HOPPER), emulator)
    machine = fake_cupy.Machine(inner)
    monkeypatch.setattr(launch, "machine_of", lambda array: machine)
    return cupy, inner


@needs_headers
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("x_format", [None, "int8_row"])
def test_one_launch_serves_all_groups(
    hopper: tuple[Any, Machine], x_format: str | None, there: bool
) -> None:
    """lb.grouped_matmul, offsets on the GPU or not: nothing comes back to the host."""
    cupy, inner = hopper
    rng, experts, n, k = np.random.default_rng(5), 4, 72, 160
    ends = np.array([7, 7, 30, 41])
    x = rng.standard_normal((41, k), np.float32)
    w = lb.quantize(rng.standard_normal((experts, n, k), np.float32), "int8_row")
    bias = rng.standard_normal((experts, n), np.float32)
    left: Any = x if x_format else lb.quantize(x, "int8_row")
    given: dict[str, Any] = {"x_format": x_format, "out_dtype": "float32", "alpha": 0.5}
    expected = lb.grouped_matmul(left, w, ends, bias=bias, **given)
    left = cupy.asarray(left) if x_format else left.to_device("cuda")
    stack, added = w.to_device("cuda"), cupy.asarray(bias)
    offsets = cupy.asarray(np.concatenate([[0], ends])) if there else ends
    p = Problem(41, n, k, w.format, w.format, "float32", bias=True, device=HOPPER)
    inner.spec, inner.format = experts_of.spec_of(p, experts), "int8_row"
    with fake_cupy.uncopied():
        got = [lb.grouped_matmul(left, stack, offsets, bias=added, **given) for _ in range(2)]
    assert len(inner.launched) == 2
    for each in got:
        np.testing.assert_array_equal(each.get(), expected)


@needs_headers
def test_every_number_of_rows_is_bound_once(hopper: tuple[Any, Machine]) -> None:
    cupy, inner = hopper
    rng, experts, n, k = np.random.default_rng(5), 2, 72, 160
    w = lb.quantize(rng.standard_normal((experts, n, k), np.float32), "int8_row")
    stack = w.to_device("cuda")
    p = Problem(1, n, k, w.format, w.format, "float32", device=HOPPER)
    inner.spec, inner.format = experts_of.spec_of(p, experts), "int8_row"
    for rows in range(2, 12):
        x = rng.standard_normal((rows, k), np.float32)
        options: dict[str, Any] = {"x_format": "int8_row", "out_dtype": "float32"}
        wanted = lb.grouped_matmul(x, w, [1, rows], **options)
        got = lb.grouped_matmul(cupy.asarray(x), stack, [1, rows], **options)
        np.testing.assert_array_equal(got.get(), wanted)
        room = np.stack([np.resize(x, (rows, k))] * experts)
        got = lb.grouped_matmul(cupy.asarray(room), stack, counts=[1, rows], **options)
        np.testing.assert_array_equal(got.get()[0, 0], wanted[0])
    assert len(stack._content.plans) == 2  # the experts themselves, and one launch


def test_other_groups_take_a_launch_each(
    cupy: Any, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = fake_cupy.Machine(emulator)  # a plain device
    monkeypatch.setattr(launch, "machine_of", lambda array: machine)
    x = np.random.default_rng(5).standard_normal((6, 64), np.float32)
    w = lb.quantize(np.random.default_rng(6).standard_normal((2, 8, 64), np.float32), "int8_row")
    there = w.to_device("cuda")
    wanted = lb.grouped_matmul(x, w, [2, 6], x_format="int8_row")
    ends = cupy.asarray(np.array([2, 6]))
    got = lb.grouped_matmul(cupy.asarray(x), there, ends, x_format="int8_row")
    np.testing.assert_array_equal(got.get(), wanted)
    x, counts = x.reshape(2, 3, 64), cupy.asarray(np.array([1, 2]))
    wanted = lb.grouped_matmul(x, w, counts=[1, 2], x_format="int8_row")
    got = lb.grouped_matmul(cupy.asarray(x), there, counts=counts, x_format="int8_row")
    np.testing.assert_array_equal(got.get(), wanted)


@needs_headers
def test_rooms_of_as_many_rows_are_computed_as_far_as_they_are_full(emulator: Any) -> None:
    experts, most, n, k = 3, 40, 72, 160
    counts = np.array([40, 0, 7], np.int32)
    x, w = quantized("fp8_row", (experts * most, k), 1), stacked("fp8_row", (experts, n, k))
    p = Problem(experts * most, n, k, x.format, w.format, "float32", device=HOPPER)
    machine, out = Machine(launch.parse(HOPPER), emulator), aligned_zeros((p.m, n), np.float32)
    machine.spec, machine.format = experts_of.spec_of(p, experts), "fp8_row"
    with launch.pretending(machine):
        run = experts_of.bind(p, machine.spec, experts)(w)
        assert run(x, counts, most, Epilogue(), out)
    for e, count in enumerate(counts):
        full, rest = slice(most * e, most * e + count), slice(most * e + count, most * e + most)
        wanted = finished(
            sums("fp8_row", "fp8_row", x.codes.view(np.uint8)[full], w.codes.view(np.uint8)[e]),
            x.scales[full, 0], w.scales[e, :, 0], 1.0, 0, None, None,
        )  # fmt: skip
        np.testing.assert_array_equal(out[full], wanted)
        assert not out[rest].any()


@needs_headers
@pytest.mark.parametrize("sliced", ["x", "x backwards", "w", "neither"])
def test_what_has_gaps_takes_a_launch_each(
    hopper: tuple[Any, Machine], monkeypatch: pytest.MonkeyPatch, sliced: str
) -> None:
    """Scales of slices lie apart: one launch would read others."""
    _, inner = hopper
    each: list[str] = []
    monkeypatch.setattr(grouped_module, "_each", lambda *given: each.append("a launch each"))
    rng, experts, n, k = np.random.default_rng(5), 2, 72, 160
    step = {"x": 2, "x backwards": -1}.get(sliced, 1)
    rows = 24 if sliced == "x" else 12
    x = lb.quantize(rng.standard_normal((rows, k), np.float32), "int8_row").to_device("cuda")
    stacks = experts * (2 if sliced == "w" else 1)
    w = lb.quantize(rng.standard_normal((stacks, n, k), np.float32), "int8_row").to_device("cuda")
    p = Problem(12, n, k, w.format, w.format, "float32", device=HOPPER)
    inner.spec, inner.format = experts_of.spec_of(p, experts), "int8_row"
    stack = w[::2] if sliced == "w" else w
    lb.grouped_matmul(x[::step], stack, np.array([5, 12]), out_dtype="float32")
    assert (each == []) == (sliced == "neither")
    assert bool(inner.launched) == (sliced == "neither")


class Rooms:
    """Operands of experts with a room each, on the host and on the GPU."""

    counts = np.array([7, 0, 12, 3])

    def __init__(self, cupy: Any, inner: Machine, x_format: str | None, room: int = 12) -> None:
        rng, n, k = np.random.default_rng(5), 72, 160
        experts = len(self.counts)
        values = rng.standard_normal((experts, room, k), np.float32)
        if x_format is not None:
            for e, count in enumerate(self.counts):
                values[e, count:] = np.nan
        self.w = lb.quantize(rng.standard_normal((experts, n, k), np.float32), "int8_row")
        codes = lb.quantize(values, "int8_row") if x_format is None else None
        self.x: Any = values if codes is None else codes
        self.bias = rng.standard_normal((experts, n), np.float32)
        self.shape = experts, room, n
        self.given: dict[str, Any] = {"x_format": x_format, "alpha": 0.5}
        x = cupy.asarray(values) if codes is None else codes.to_device("cuda")
        self.there = x, self.w.to_device("cuda")
        self.given_there = {**self.given, "bias": cupy.asarray(self.bias)}
        fmt = self.w.format
        p = Problem(experts * room, n, k, fmt, fmt, "float32", bias=True, device=HOPPER)
        inner.spec, inner.format = experts_of.spec_of(p, experts), "int8_row"

    def wanted(self, **options: Any) -> Any:
        """By one product after the other."""
        options = {"bias": self.bias, "counts": self.counts, **self.given, **options}
        return lb.grouped_matmul(self.x, self.w, **options)


@needs_headers
@pytest.mark.parametrize("counted", ["int32", "int64", "here"])
@pytest.mark.parametrize("x_format", [None, "int8_row"])
def test_one_launch_serves_all_rooms(
    hopper: tuple[Any, Machine], x_format: str | None, counted: str
) -> None:
    """Counts on the GPU or not: nothing comes back to the host."""
    cupy, inner = hopper
    each = Rooms(cupy, inner, x_format)
    here = counted == "here"
    counts = each.counts if here else cupy.asarray(each.counts.astype(counted))
    kept = cupy.full(each.shape, 3, np.float32)
    gaps = cupy.full((*each.shape[:2], 2 * each.shape[2]), 3, np.float32)[..., ::2]
    with fake_cupy.uncopied():
        got = lb.grouped_matmul(*each.there, counts=counts, **each.given_there)
        for out in (kept, gaps):
            found = lb.grouped_matmul(*each.there, counts=counts, out=out, **each.given_there)
            assert found is out
    assert len(inner.launched) == 3
    beyond = np.arange(each.shape[1])[:, None] >= each.counts[:, None, None]
    np.testing.assert_array_equal(got.get(), each.wanted())
    assert not (got.get() * beyond).any()
    for out in (kept, gaps):
        np.testing.assert_array_equal(out.get(), np.where(beyond, 3, each.wanted()))


@needs_headers
@pytest.mark.parametrize("x_format", [None, "int8_row"])
def test_counts_that_nobody_saw_are_taken_within_the_room(
    hopper: tuple[Any, Machine], x_format: str | None
) -> None:
    cupy, inner = hopper
    each = Rooms(cupy, inner, x_format)
    counts = cupy.asarray(np.array([7, -5, 10**12, 3]))
    got = lb.grouped_matmul(*each.there, counts=counts, **each.given_there)
    np.testing.assert_array_equal(got.get(), each.wanted())
    assert len(inner.launched) == 1


@needs_headers
def test_sorted_rows_and_rooms_of_as_many_are_bound_apart(hopper: tuple[Any, Machine]) -> None:
    cupy, inner = hopper
    each = Rooms(cupy, inner, None)
    x, w = each.there
    ends = np.array([7, 7, 30, 48])
    rows = each.x.reshape(48, -1)
    wanted = lb.grouped_matmul(rows, each.w, ends, bias=each.bias, **each.given)
    for _ in range(2):
        got = lb.grouped_matmul(x.reshape(48, -1), w, ends, **each.given_there)
        np.testing.assert_array_equal(got.get(), wanted)
        got = lb.grouped_matmul(x, w, counts=each.counts, **each.given_there)
        np.testing.assert_array_equal(got.get(), each.wanted())
    assert len(inner.launched) == 4


@needs_headers
@pytest.mark.parametrize(
    "how", ["a residual", "counts of int16", "scales of matrices", "no experts"]
)
def test_other_rooms_take_a_launch_each(
    hopper: tuple[Any, Machine], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    cupy, inner = hopper
    calls: list[Any] = []
    monkeypatch.setattr(grouped_module, "_each", lambda x, w, where, *_: calls.append(where))
    each = Rooms(cupy, inner, None)
    x, w = each.there
    counts = cupy.asarray(each.counts.astype("int16" if "int16" in how else "int64"))
    given = each.given_there
    if how == "a residual":
        given = {**given, "residual": cupy.asarray(np.ones(each.shape, np.float32))}
    elif how == "scales of matrices":
        x = lb.quantize(each.x.dequantize(), "int8_tensor").to_device("cuda")
    elif how == "no experts":
        x, w, counts, given = x[:0], w[:0], counts[:0], each.given
    got = lb.grouped_matmul(x, w, counts=counts, **given)
    assert calls == [[(e, slice(0, n)) for e, n in enumerate(each.counts[: len(counts)])]]
    assert not inner.launched
    assert got.shape == (len(counts), *each.shape[1:])
    assert not got.get().any()


@needs_headers
def test_what_can_be_seen_to_be_wrong_is_said(hopper: tuple[Any, Machine]) -> None:
    """Shapes and devices; nothing is launched."""
    cupy, inner = hopper
    each = Rooms(cupy, inner, None)
    counts = cupy.asarray(np.array([0, 7, 0, 12, 3]))
    with pytest.raises(ValueError, match=r"counts: want the number .* got shape \(5,\)"):
        lb.grouped_matmul(*each.there, counts=counts, **each.given_there)
    with pytest.raises(ValueError, match="counts: group 0 has 13 filled rows, want 0 to 12"):
        lb.grouped_matmul(*each.there, counts=[13, 0, 0, 0], **each.given_there)
    given = {**each.given_there, "bias": each.bias}
    with pytest.raises(BufferError, match="bias: it is on cpu"):
        lb.grouped_matmul(*each.there, counts=each.counts, **given)
    with cupy.cuda.Device(1):
        counts = cupy.asarray(each.counts)
    with pytest.raises(BufferError, match="counts: it is on cuda:1"):
        lb.grouped_matmul(*each.there, counts=counts, **each.given_there)
    assert not inner.launched


@needs_headers
def test_rooms_of_torch_begin_as_zeros(
    hopper: tuple[Any, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's memory, too, holds anything."""
    cupy, inner = hopper
    each, made = Rooms(cupy, inner, "int8_row"), []

    def result(shape: Any, dtype: Any, name: str) -> Any:
        made.append(cupy.full(shape, 7, dtype))
        return ("a tensor on", name), made[-1]

    monkeypatch.setattr(cuda_interop, "torch_result", result)
    monkeypatch.setattr(cuda_interop, "torch_stream", lambda name: places.named(name).current())
    read = products.operands_of

    def of_torch(x: Any, w: Any) -> Any:
        return *read(x, w)[:2], interop.Origin("torch", "cuda:0")

    monkeypatch.setattr(products, "operands_of", of_torch)
    counts = cupy.asarray(each.counts)
    got = lb.grouped_matmul(*each.there, counts=counts, **each.given_there)
    assert got == ("a tensor on", "cuda:0")
    monkeypatch.undo()
    np.testing.assert_array_equal(made[0].get(), each.wanted())

"""Groups of rows, each with a weight of its own, are a loop of matmul: same bits, one epilogue."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import binding, interop, quantizing
from lowbit.testing import assert_within_bound, conformance, random_qarray, strategies

RNG = np.random.default_rng(0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(dtype)


def stack(name, experts, n, k):
    """Weights as random as those of random_qarray, side by side."""
    if not experts:
        return lb.quantize(np.zeros((0, n, k), np.float32), name)
    return lb.stack([random_qarray(name, n, k, seed=seed) for seed in range(experts)])


def loop(x, w, ends, bias=None, residual=None, **options):
    """What grouped_matmul stands for, and within the bound of every single product."""
    parts = []
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        own = dict(options)
        if bias is not None:
            own["bias"] = bias[expert]
        if residual is not None:
            own["residual"] = np.broadcast_to(residual, (ends[-1], w.shape[1]))[start:end]
        parts.append(lb.matmul(x[start:end], w[expert].T, **own))
        if end > start:
            assert_within_bound(parts[-1], x[start:end], w[expert].T, **own)
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ("float32", "int4_g32_asym"),
        ("bfloat16", "int8_row"),
        ("float16", "nf4"),
        ("float64", "int4_g32"),
        ("float32", "int3_g24"),
        ("int8_row", "int4_g32"),
    ],
)
@settings(max_examples=30)
@given(data=st.data())
def test_any_sizes_and_epilogue(x, w, data):
    sizes = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 40]), min_size=1, max_size=5))
    n, k = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 130))
    experts, ends = stack(w, len(sizes), n, k), np.cumsum(sizes).tolist()
    held = experts.prepare() if data.draw(st.booleans()) else experts
    rows = ends[-1]
    left = conformance.dense_or_quantized(x, rows, k)
    options = {
        "bias": data.draw(st.sampled_from([None, normal(len(sizes), n)])),
        "residual": data.draw(st.sampled_from([None, normal(n), normal(rows, n)])),
        "activation": data.draw(st.sampled_from([None, "relu", "silu"])),
        "alpha": data.draw(st.sampled_from([1.0, -0.5])),
        "out_dtype": data.draw(st.sampled_from([None, "float16"])),
    }
    got = lb.grouped_matmul(left, held, ends, **options)
    assert got.shape == (rows, n)
    conformance.same_bits(got, loop(left, experts, ends, **options))


@pytest.mark.parametrize("x_format", ["int8_row", "int8_g32", "int8_tensor", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("w", ["int8_row", "nvfp4"])
def test_x_is_quantized_as_the_loop_does(x_format, w):
    x, ends = normal(9, 64), [4, 4, 9]
    experts = lb.quantize(normal(3, 17, 64), w)
    got = lb.grouped_matmul(x, experts, ends, x_format=x_format, bias=np.ones((3, 17)))
    wanted = loop(x, experts, ends, x_format=x_format, bias=np.ones((3, 17)))
    conformance.same_bits(got, wanted)


def test_rows_with_scales_of_their_own_are_quantized_in_one_call(monkeypatch):
    calls = []
    inner = lb.quantize

    def quantize(x, fmt, **options):
        calls.append(x.shape)
        return inner(x, fmt, **options)

    monkeypatch.setattr(quantizing, "quantize", quantize)
    x, experts = normal(9, 64), stack("float8_e4m3fn_row", 3, 17, 64)
    for _ in range(2):
        lb.grouped_matmul(x, experts, [4, 4, 9], x_format="float8_e4m3fn_row")
    assert calls == [(9, 64)] * 2


@pytest.mark.parametrize("x_format", [None, "int8_row", "int8_tensor"])
def test_columns_divided_and_permuted(x_format):
    made = stack("int4_g32", 3, 17, 64)
    experts = lb.from_parts(
        made.format,
        made.codes,
        made.scales,
        columns=RNG.permutation(64),
        divisor=RNG.uniform(0.3, 3, 64),
    )
    x, ends = normal(9, 64, dtype="float16"), [4, 4, 9]
    got = lb.grouped_matmul(x, experts, ends, x_format=x_format)
    conformance.same_bits(got, loop(x, experts, ends, x_format=x_format))


def test_stacks_that_are_views_or_stand_the_other_way():
    experts = stack("int8_row", 4, 64, 64)
    x, ends = normal(9, 64), [4, 4, 9]
    for held in (experts[1:], experts[[0, 2, 3]], experts[::-1][:3], experts[1:, ::-2]):
        conformance.same_bits(lb.grouped_matmul(x, held, ends), loop(x, held, ends))
        turned = held[:, :64].mT
        given = normal(9, turned.shape[2])
        for each in (turned, turned.prepare()):
            got = lb.grouped_matmul(given, each, ends, x_format=None)
            conformance.same_bits(got, loop(given, turned, ends))


@pytest.mark.parametrize("kind", strategies.MEMORY)
def test_memory_of_every_operand(kind):
    experts, ends = stack("int4_g32", 3, 17, 64), [4, 4, 9]
    plain = normal(9, 64), normal(3, 17), normal(9, 17)
    x, bias, residual = (strategies.in_memory(each, kind) for each in plain)
    got = lb.grouped_matmul(x, experts, ends, bias=bias, residual=residual)
    conformance.same_bits(got, loop(plain[0], experts, ends, bias=plain[1], residual=plain[2]))


@pytest.mark.parametrize("kind", strategies.MEMORY)
def test_out(kind):
    x, experts, ends = normal(9, 64), stack("int4_g32", 3, 17, 64), [4, 4, 9]
    out = strategies.in_memory(np.full((9, 17), 3, np.float16), kind)
    if kind == "read-only":
        with pytest.raises(ValueError, match="out: the array is read-only"):
            lb.grouped_matmul(x, experts, ends, out=out)
        return
    assert lb.grouped_matmul(x, experts, ends, out=out) is out
    assert (out == lb.grouped_matmul(x, experts, ends, out_dtype="float16")).all()


def test_out_may_be_an_operand():
    x, experts, ends = normal(9, 32), stack("int4_g32", 3, 32, 32), [4, 4, 9]
    wanted = lb.grouped_matmul(x, experts, ends, residual=x)
    assert (lb.grouped_matmul(x, experts, ends, residual=x, out=x) == wanted).all()


# Offsets


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint64"])
def test_offsets_of_any_integers(dtype):
    x, experts = normal(9, 64), stack("int4_g32", 3, 17, 64)
    wanted = loop(x, experts, [4, 4, 9])
    for offsets in ([4, 4, 9], [0, 4, 4, 9]):
        conformance.same_bits(lb.grouped_matmul(x, experts, offsets), wanted)
        conformance.same_bits(lb.grouped_matmul(x, experts, np.array(offsets, dtype)), wanted)
    tensor = lb.grouped_matmul(torch.from_numpy(x), experts, torch.tensor([4, 4, 9]))
    assert isinstance(tensor, torch.Tensor)
    conformance.same_bits(tensor.numpy(), wanted)


def test_groups_at_either_end_may_be_empty():
    x, experts = normal(9, 64), stack("int4_g32", 4, 17, 64)
    for ends in ([0, 9, 9, 9], [0, 0, 0, 9], [9, 9, 9, 9], [0, 3, 3, 9]):
        conformance.same_bits(lb.grouped_matmul(x, experts, ends), loop(x, experts, ends))


def test_nothing_at_all():
    assert lb.grouped_matmul(normal(0, 64), stack("int8_row", 3, 17, 64), [0, 0, 0]).shape == (
        0,
        17,
    )
    assert lb.grouped_matmul(normal(0, 64), stack("int8_row", 0, 17, 64), []).shape == (0, 17)
    assert lb.grouped_matmul(normal(5, 64), stack("int8_row", 2, 0, 64), [2, 5]).shape == (5, 0)
    nothing = lb.grouped_matmul(normal(5, 0), stack("int8_row", 2, 3, 0), [2, 5], bias=np.eye(2, 3))
    assert (nothing == [[1, 0, 0]] * 2 + [[0, 1, 0]] * 3).all()


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([4, 9], ValueError, r"offsets: want the end of each of 3 groups.*got shape \(2,\)"),
        ([1, 4, 4, 9], ValueError, r"got shape \(4,\)"),
        ([[4, 4, 9]], ValueError, r"got shape \(1, 3\)"),
        (9, ValueError, r"got shape \(\)"),
        ([4, 3, 9], ValueError, "offsets: group 1 ends at 3, before its start at 4"),
        ([-1, 3, 9], ValueError, "offsets: group 0 ends at -1, before its start at 0"),
        ([4, 4, 8], ValueError, "offsets: the last group ends at 8, x has 9 rows"),
        ([4, 4, 10], ValueError, "offsets: the last group ends at 10, x has 9 rows"),
        ([4.0, 4, 9], TypeError, "offsets: want integers, got float64"),
        ([True, True, True], TypeError, "offsets: dtype bool"),
    ],
)
def test_offsets_that_are_none(offsets, error, message):
    with pytest.raises(error, match=message):
        lb.grouped_matmul(normal(9, 64), stack("int4_g32", 3, 17, 64), offsets)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"w": random_qarray("int4_g32", 17, 64)}, TypeError, r"got a QArray \(17, 64\)"),
        ({"w": np.ones((3, 17, 64))}, TypeError, r"w: want a QArray of shape .*, got ndarray"),
        ({"x": np.ones((9, 63), "f4")}, ValueError, r"x has shape \(9, 63\), want \(rows, 64\)"),
        ({"x": np.ones((1, 9, 64), "f4")}, ValueError, r"x has shape \(1, 9, 64\)"),
        ({"x": np.ones((9, 64), int)}, TypeError, "x: plain integers"),
        ({"bias": np.ones(17)}, ValueError, r"bias: want shape \(3, 17\), got \(17,\)"),
        ({"residual": np.ones((3, 17))}, ValueError, r"residual: \(3, 17\) does not broadcast"),
        ({"out": np.ones((17, 9), "f4")}, ValueError, r"out: want shape \(9, 17\), got \(17, 9\)"),
        ({"activation": "tanh"}, ValueError, "activation: want one of relu"),
        ({"alpha": np.inf}, ValueError, "alpha: want a finite number"),
        ({"kernel": "magic"}, ValueError, "kernel='magic' is not known"),
        ({"x_format": "int9"}, ValueError, "no format 'int9'"),
    ],
)
def test_bad_operands_and_options(changes, error, message):
    given = {"x": normal(9, 64), "w": stack("int4_g32", 3, 17, 64), "offsets": [4, 4, 9]}
    with pytest.raises(error, match=message):
        lb.grouped_matmul(**{**given, **changes})


@pytest.mark.parametrize("x_format", ["int8_row", "int8_tensor", "mxfp8"])
def test_numbers_that_are_not_finite_are_found_in_the_whole(x_format):
    x = normal(9, 64)
    x[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"first at \(7, 3\)"):
        lb.grouped_matmul(x, stack("int8_row", 3, 17, 64), [4, 4, 9], x_format=x_format)


# Counts


def filled(x, counts):
    """The same rows with NaN in those that hold nothing: whoever reads these is found out."""
    x = x.copy()
    for group, count in enumerate(counts):
        x[group, count:] = np.nan
    return x


def rooms(x, w, counts, bias=None, residual=None, beyond=0, **options):
    """What counts stand for: the loop over what is filled of each room."""
    experts, room, n = x.shape[0], x.shape[1], w.shape[1]
    parts = []
    for expert, count in enumerate(counts):
        own = dict(options)
        if bias is not None:
            own["bias"] = bias[expert]
        if residual is not None:
            own["residual"] = np.broadcast_to(residual, (experts, room, n))[expert, :count]
        parts.append(lb.matmul(x[expert, :count], w[expert].T, **own))
    result = np.full((experts, room, n), beyond, parts[0].dtype)
    for expert, count in enumerate(counts):
        result[expert, :count] = parts[expert]
    return result


@pytest.fixture
def used_memory(monkeypatch):
    """Fresh memory that is not zero by chance."""
    fresh = interop.empty

    def empty(shape, dtype):
        array = fresh(shape, dtype)
        array[...] = 7
        return array

    monkeypatch.setattr(interop, "empty", empty)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ("float32", "int4_g32_asym"),
        ("bfloat16", "int8_row"),
        ("float64", "int4_g32"),
        ("float32", "int3_g24"),
        ("int8_row", "int4_g32"),
    ],
)
@settings(max_examples=30)
@given(data=st.data())
def test_rooms_of_any_sizes_and_epilogue(x, w, data):
    room = data.draw(st.sampled_from([0, 1, 5, 17, 40]))
    counts = data.draw(st.lists(st.integers(0, room), min_size=1, max_size=5))
    experts, n, k = len(counts), data.draw(st.integers(0, 70)), data.draw(st.integers(1, 130))
    weights = stack(w, experts, n, k)
    held = weights.prepare() if data.draw(st.booleans()) else weights
    left = conformance.dense_or_quantized(x, experts * room, k).reshape(experts, room, k)
    left = left if isinstance(left, lb.QArray) else filled(left, counts)
    shapes = [(n,), (room, n), (experts, room, n)]
    options = {
        "bias": data.draw(st.sampled_from([None, normal(experts, n)])),
        "residual": data.draw(st.sampled_from([None, *(normal(*shape) for shape in shapes)])),
        "activation": data.draw(st.sampled_from([None, "relu", "silu"])),
        "alpha": data.draw(st.sampled_from([1.0, -0.5])),
        "out_dtype": data.draw(st.sampled_from([None, "float16"])),
    }
    got = lb.grouped_matmul(left, held, counts=counts, **options)
    assert got.shape == (experts, room, n)
    conformance.same_bits(got, rooms(left, weights, counts, **options))


@pytest.mark.parametrize("name", ["int8_row", "int8_tensor", "int8_32x32", "mxfp8", "nvfp4"])
def test_rooms_of_a_quantized_x(name, used_memory):
    """Also where scales are not those of single rows."""
    x, experts, counts = (
        lb.quantize(normal(3, 40, 64), name),
        stack("int8_row", 3, 17, 64),
        [40, 0, 9],
    )
    bias = normal(3, 17)
    got = lb.grouped_matmul(x, experts, counts=counts, bias=bias)
    conformance.same_bits(got, rooms(x, experts, counts, bias=bias))
    assert not got[1].any()
    assert not got[2, 9:].any()


@pytest.mark.parametrize(
    "x_format", ["int8_row", "int8_g32", "int8_tensor", "float8_e4m3fn_row", "mxfp8", "nvfp4"]
)
@pytest.mark.parametrize("w", ["int8_row", "nvfp4"])
def test_x_is_quantized_as_far_as_rooms_are_filled(x_format, w, used_memory):
    counts = [4, 0, 5]
    x, experts = filled(normal(3, 6, 64), counts), lb.quantize(normal(3, 17, 64), w)
    got = lb.grouped_matmul(x, experts, counts=counts, x_format=x_format, alpha=2)
    conformance.same_bits(got, rooms(x, experts, counts, x_format=x_format, alpha=2))


@pytest.mark.parametrize("x_format", ["int8_row", "int8_tensor", "float8_e4m3fn_row", "mxfp8"])
def test_numbers_that_are_not_finite_are_found_among_those_that_count(x_format):
    x = filled(normal(3, 6, 64, dtype=BFLOAT16), [4, 0, 5])
    x[2, 3, 7] = np.inf
    with pytest.raises(ValueError, match=r"holds 1 NaN or infinite.*first at \(2, 3, 7\)"):
        lb.grouped_matmul(x, stack("int8_row", 3, 17, 64), counts=[4, 0, 5], x_format=x_format)


@pytest.mark.parametrize("kind", strategies.MEMORY)
def test_rows_of_out_beyond_counts_stay(kind, used_memory):
    counts = [4, 0, 6]
    plain, experts = filled(normal(3, 6, 64), counts), stack("int4_g32", 3, 17, 64)
    x = strategies.in_memory(plain, kind)
    out = np.full((3, 6, 17), 3, np.float16)
    out = out if kind == "read-only" else strategies.in_memory(out, kind)
    assert lb.grouped_matmul(x, experts, counts=counts, out=out) is out
    wanted = rooms(plain, experts, counts, beyond=3, out_dtype="float16")
    np.testing.assert_array_equal(out, wanted)
    conformance.same_bits(
        lb.grouped_matmul(x, experts, counts=counts, out_dtype="float16"),
        rooms(plain, experts, counts, out_dtype="float16"),
    )


def test_out_of_rooms_may_be_an_operand(used_memory):
    x, experts, counts = normal(3, 5, 32), stack("int4_g32", 3, 32, 32), [4, 0, 5]
    wanted = np.where(
        np.arange(5)[:, None] < np.array(counts)[:, None, None],
        rooms(x, experts, counts, residual=x),
        x,
    )
    assert (lb.grouped_matmul(x, experts, counts=counts, residual=x, out=x) == wanted).all()


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint64"])
def test_counts_of_any_integers(dtype):
    x, experts, counts = normal(3, 5, 64), stack("int4_g32", 3, 17, 64), [4, 0, 5]
    wanted = rooms(x, experts, counts)
    got = lb.grouped_matmul(x, experts, counts=np.array(counts, dtype))
    conformance.same_bits(got, wanted)
    tensor = lb.grouped_matmul(torch.from_numpy(x), experts, counts=torch.tensor(counts))
    assert isinstance(tensor, torch.Tensor)
    conformance.same_bits(tensor.numpy(), wanted)


def test_rooms_of_nothing(used_memory):
    experts = stack("int8_row", 2, 17, 64)
    assert lb.grouped_matmul(normal(2, 0, 64), experts, counts=[0, 0]).shape == (2, 0, 17)
    nothing = lb.grouped_matmul(normal(2, 3, 64), experts, counts=[0, 0], bias=normal(2, 17))
    assert nothing.shape == (2, 3, 17)
    assert not nothing.any()
    none = lb.grouped_matmul(normal(0, 3, 64), stack("int8_row", 0, 17, 64), counts=[])
    assert none.shape == (0, 3, 17)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([4, 0], ValueError, r"counts: want the number of .* 3 groups; got shape \(2,\)"),
        ([0, 4, 0, 5], ValueError, r"counts: want .*; got shape \(4,\)"),
        ([[4, 0, 5]], ValueError, r"counts: want .*; got shape \(1, 3\)"),
        ([4, -1, 5], ValueError, "counts: group 1 has -1 filled rows, want 0 to 5"),
        ([4, 0, 6], ValueError, "counts: group 2 has 6 filled rows, want 0 to 5"),
        ([4.0, 0, 5], TypeError, "counts: want integers, got float64"),
        ([True, True, True], TypeError, "counts: dtype bool"),
    ],
)
def test_counts_that_are_none(counts, error, message):
    with pytest.raises(error, match=message):
        lb.grouped_matmul(normal(3, 5, 64), stack("int4_g32", 3, 17, 64), counts=counts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": [5, 10, 15]}, "want either offsets, .*, or counts, .*; got both"),
        ({"counts": None}, "want either offsets, .*, or counts, .*; got neither"),
        ({"x": np.ones((15, 64), "f4")}, r"x has shape \(15, 64\), want \(3, rows, 64\) with"),
        ({"x": np.ones((2, 5, 64), "f4")}, r"x has shape \(2, 5, 64\), want \(3, rows, 64\)"),
        ({"x": np.ones((3, 5, 63), "f4")}, r"x has shape \(3, 5, 63\)"),
        ({"bias": np.ones(17)}, r"bias: want shape \(3, 17\), got \(17,\)"),
        ({"residual": np.ones((15, 17))}, r"residual: .* the result, \(3, 5, 17\)"),
        ({"out": np.ones((15, 17), "f4")}, r"out: want shape \(3, 5, 17\), got \(15, 17\)"),
    ],
)
def test_bad_operands_of_rooms(changes, message):
    plain = {"x": normal(3, 5, 64), "w": stack("int4_g32", 3, 17, 64), "counts": [4, 0, 5]}
    with pytest.raises(ValueError, match=message):
        lb.grouped_matmul(**{**plain, **changes})


# What is remembered


def test_the_next_call_binds_nothing(monkeypatch):
    made, real = [], binding.make

    def make(*given):
        made.append(given)
        return real(*given)

    monkeypatch.setattr(binding, "make", make)
    experts = stack("int4_g32", 5, 17, 64)
    for ends in ([1, 3, 3, 4, 6], [2, 3, 3, 5, 6], [1, 2, 2, 4, 5]):  # 1 or 2 rows each, or none
        for _ in range(2):
            lb.grouped_matmul(normal(ends[-1], 64), experts, ends)
    assert len(made) == 8


@pytest.mark.parametrize("x_format", [None, "float8_e4m3fn_row"])
def test_experts_do_not_remember_without_end(x_format):
    experts = stack("float8_e4m3fn_row", 300, 3, 32)
    for rows in range(1, 12):
        ends = np.arange(1, 301) * rows
        lb.grouped_matmul(normal(300 * rows, 32), experts, ends, x_format=x_format)
    [each] = experts._content.plans.values()
    assert {len(expert._content.plans) for expert in each} <= {*range(1, 9)}
    assert all(expert._parts.codes.base is not None for expert in each), "views, not copies"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    x, experts, ends = normal(150, 200), stack("int4_g32", 3, 300, 200), [1, 141, 150]
    wanted = lb.grouped_matmul(x, experts, ends)
    lb.set_num_threads(threads)
    try:
        conformance.same_bits(lb.grouped_matmul(x, experts, ends), wanted)
    finally:
        lb.set_num_threads(None)

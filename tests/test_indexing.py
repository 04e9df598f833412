"""`w[index]` is `w.dequantize()[index]`, quantized still, or an IndexError that says why not."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import lowbit as lb

FORMATS = (
    "int1_g8", "int2_row", "int3_g8", "int4_g8", "int5_g16_asym", "int6_row", "int7_tensor",
    "int8_g8", "uint4_g8_asym", "uint3_g8_zf32", "int3_g3", "int4_g3", "int4_3x8", "int4_allx8",
    "int4_2xall", "int4_g16_bias", "fp8_tensor", "fp8_2x8", "nf4_g4", "float6_e3m2fn_g8", "mxfp4",
    "nvfp4", "float4_e2m1fn_2x16_e4m3_ts", "int4_g8_bias_ts",
)  # fmt: skip


def array(name, shape, *, transposed=False, prepared=False, seed=0):
    """A QArray of this logical shape, whose matrices differ in size by powers of ten."""
    fmt = lb.format(name)
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    values = np.random.default_rng(seed).normal(size=stored)
    lead = math.prod(stored[:-2])
    values *= 10.0 ** np.arange(lead).reshape(*stored[:-2], 1, 1) if len(stored) > 2 else 1
    if fmt.zero is None and not fmt.bias and fmt.element.max <= 0:
        values = -np.abs(values)
    w = lb.quantize(values.astype(np.float32), fmt)
    w = w.mT if transposed else w
    return w.prepare() if prepared else w


def alignment(w):
    """Columns from one legal cut to the next: whole blocks, whole bytes."""
    width = w.format.scale.block[1]
    whole_bytes = next(n for n in range(1, 9) if n * w.format.element.bits % 8 == 0)
    return whole_bytes if width is None else math.lcm(width, whole_bytes)


def refusal(w, entries):
    """What must be refused, found out from NumPy: a word of the message, or None.

    `entries` holds one entry an axis, masks of two axes counting as one and nothing.
    """
    axis = w.ndim - 1 - (w._transposed and w.ndim > 1)
    length, step = w.shape[axis], alignment(w)
    cut = entries[axis]
    if not isinstance(cut, slice) or cut.indices(length)[2] != 1:
        return f"multiples of {step}" if not _is_whole(cut, length) else None
    start, stop, _ = cut.indices(length)
    if start % step or (stop > start and stop % step and stop != length):
        if not _is_whole(cut, length):
            return f"multiples of {step}"
    found = picked(_marks(w.shape, axis), entries, axis)
    if found.size == 0:
        return MAYBE
    varies = [a - found.ndim for a in range(found.ndim) if np.ptp(found, axis=a).any()]
    if varies not in ([-1], [-2]):
        return "contraction axis"
    if w.tensor_scale is not None and w.ndim > 2:
        scales = picked(np.ones(w.shape) * w.tensor_scale[..., None, None], entries, axis)
        if scales.size and np.ptp(scales, axis=tuple(range(-min(2, scales.ndim), 0))).any():
            return "tensor scale"
    return None


MAYBE = "nothing is selected, so nothing shows where the contraction axis goes"


def _marks(shape, axis):
    """Two entries along the contraction axis, 0 and 1, whatever its length."""
    marks = np.zeros((*shape[:axis], 2, *shape[axis + 1 :]))
    marks.swapaxes(0, axis)[1] = 1
    return marks


def picked(values, entries, axis):
    """Everything of the contraction axis, and of the others what the index says."""
    index = [slice(None) if i == axis else e for i, e in enumerate(entries)]
    return values[tuple(e for e in index if e is not None)]


def _is_whole(cut, length):
    return isinstance(cut, slice) and cut.indices(length) == (0, length, 1)


def check(w, index, entries):
    """Compare with NumPy, refusals included."""
    values = w.dequantize()
    try:
        expected = values[index]
    except IndexError:
        with pytest.raises(IndexError):
            w[index]
        return
    reason = refusal(w, entries)
    if reason is not None and reason != MAYBE:
        with pytest.raises(IndexError, match=reason):
            w[index]
        return
    refused = ""
    try:
        got = w[index]
    except IndexError as error:
        refused = str(error)
    if refused:
        assert reason == MAYBE, refused
        assert "contraction axis" in refused
        return
    assert isinstance(got, lb.QArray)
    assert got.shape == expected.shape
    assert got.ndim == expected.ndim
    assert got.dtype == w.dtype
    assert got.format.element == w.format.element
    assert np.array_equal(got.dequantize(), expected)
    # The parts are consistent: what they are checked for when they come from outside.
    again = lb.from_parts(
        got.format, got.codes, got.scales, zeros=got.zeros, biases=got.biases,
        tensor_scale=got.tensor_scale, shape=got.mT.shape if got._transposed else got.shape,
    )  # fmt: skip
    assert np.array_equal((again.mT if got._transposed else again).dequantize(), expected)


@st.composite
def _slices(draw, length, step=1):
    edge = st.none() | st.integers(-length - 2, length + 2)
    steps = st.sampled_from([None, 1, 2, 3, -1, -2, -7])
    if draw(st.booleans()):  # on the grid of legal cuts
        start, stop = (draw(st.integers(0, length // step + 1)) * step for _ in range(2))
        return slice(start, stop)
    return slice(draw(edge), draw(edge), draw(steps))


@st.composite
def _entries(draw, w, axis, picks):
    length = w.shape[axis]
    kinds = ["all", "all", "slice", "int", "array", "mask", "masks"]
    if axis == w.ndim - 1 - (w._transposed and w.ndim > 1):
        kinds = ["all"] * 6 + ["slice"] * 4 + ["int", "array", "mask"]
    kind = draw(st.sampled_from(kinds))
    if kind == "int":
        near = st.integers(-length, length - 1) if length else st.just(0)
        number = draw(near if draw(st.integers(0, 9)) else st.just(length))
        return [draw(st.sampled_from([int, np.int8, np.array]))(number)]
    if kind == "slice":
        return [draw(_slices(length, alignment(w)))]
    random = np.random.default_rng(draw(st.integers(0, 99)))
    if kind == "array" and length:
        dtype = draw(st.sampled_from([np.int64, np.uint8, np.int32]))
        low = -length if dtype is not np.uint8 else 0
        numbers = random.integers(low, length, picks).astype(dtype)
        return [numbers.tolist() if draw(st.booleans()) and numbers.size else numbers]
    if kind == "masks" and axis + 1 < w.ndim - 1 - w._transposed:
        return [random.random(w.shape[axis : axis + 2]) < 0.5, None]
    if kind in ("mask", "masks"):
        odd = draw(st.integers(0, 19)) == 0  # a mask that does not fit
        flags = random.random(length + odd) < 0.5
        return [flags.tolist() if length + odd and draw(st.booleans()) else flags]
    return [slice(None)]


@st.composite
def _cases(draw, name):
    lead = draw(st.lists(st.integers(1, 3) | st.integers(0, 3), max_size=2))
    rows, columns = draw(st.integers(1, 9) | st.just(0)), draw(st.integers(0, 70))
    vector = draw(st.integers(0, 9)) == 0
    transposed = draw(st.booleans()) and not vector
    shape = (columns,) if vector else (*lead, *((columns, rows) if transposed else (rows, columns)))
    w = array(
        name,
        shape,
        transposed=transposed,
        prepared=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )
    picks = draw(st.sampled_from([(3,), (1,), (0,), (2, 1), (1, 2), (2, 3)]))
    entries: list[object] = []
    while len(entries) < w.ndim:
        entries += draw(_entries(w, len(entries), picks))
    return w, entries


def _written(draw, entries):
    """The same index as somebody would write it: with ..., without trailing colons."""
    index = [e for e in entries if e is not None]

    def whole(entry):
        return isinstance(entry, slice) and entry == slice(None)

    way = draw(st.integers(0, 2))
    if way == 1:
        while index and whole(index[-1]):
            index.pop()
    elif way == 2:
        runs = [i for i, e in enumerate(index) if whole(e)]
        if runs:
            first = draw(st.sampled_from(runs))
            last = first
            while last < len(index) and whole(index[last]):
                last += 1
            index[first:last] = [...]
        else:
            index.append(...)
    if len(index) == 1 and not isinstance(index[0], (list, tuple)):
        return index[0]
    return tuple(index)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_an_index_gives_what_numpy_gives(name, data):
    w, entries = data.draw(_cases(name))
    check(w, _written(data.draw, entries), entries)


# Views


def parts(w):
    """Every part that the array has."""
    found = (w.codes, w.scales, w.zeros, w.biases, w.tensor_scale)
    return [p for p in found if p is not None]


@pytest.mark.parametrize("name", FORMATS)
def test_group_aligned_columns_are_views(name):
    step = alignment(array(name, (2, 8)))
    w = array(name, (6, 3 * step + 1))
    for cut in (slice(0, step), slice(step, 3 * step), slice(step, None), slice(-1 - step, None)):
        got = w[:, cut]
        assert np.array_equal(got.dequantize(), w.dequantize()[:, cut])
        for whole, part in zip(parts(w), parts(got), strict=True):
            assert np.shares_memory(whole, part)
        assert got.nbytes < w.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_columns_off_the_grid_are_refused_with_the_step_that_would_do(name):
    step = alignment(array(name, (2, 8)))
    w = array(name, (6, 3 * step + 1))
    for cut in (slice(1, None), slice(0, 2 * step - 1 or -2), slice(step, 3 * step + 1, 2), 0):
        if isinstance(cut, slice) and step == 1 and cut.step is None:
            continue
        with pytest.raises(IndexError, match=rf"multiples of {step}\b.*dequantize"):
            w[:, cut]
        with pytest.raises(IndexError, match=rf"multiples of {step}\b.*dequantize"):
            w.T[cut]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_by_slices_and_integers_are_views(name):
    w = array(name, (2, 9, 48))
    height = w.format.scale.block[0]
    for index in ((1,), (slice(None), slice(0, 6)), (0, slice(None, None, 2)), (1, 3)):
        got = w[index]
        assert np.array_equal(got.dequantize(), w.dequantize()[index])
        assert np.shares_memory(w.codes, got.codes)
        if height == 1:
            assert np.shares_memory(w.scales, got.scales)
    assert not np.shares_memory(w.codes, w[:, [0, 1]].codes)


def test_blocks_of_rows_are_kept_where_a_cut_begins_with_one():
    w = array("int4_3x8", (9, 16))
    assert w[3:8].format == w.format
    assert w[3:8].scales.shape == (2, 2)
    assert w[4:8].format == lb.format("int4_g8")
    assert w[::3].format == lb.format("int4_g8")
    whole = array("fp8_tensor", (9, 16))
    assert whole[2:7].format == whole.format
    assert whole[2:2].scales.shape == (0, 1)
    assert whole[2:2].dequantize().shape == (0, 16)


def test_transposes_are_indexed_in_their_own_axes():
    w = array("int4_g8", (16, 6), transposed=True)
    assert w[:, 2].shape == (16,)
    assert w[8:, 1:3].shape == (8, 2)
    stack = array("int4_g8", (2, 3, 16, 6), transposed=True)
    assert stack[..., 4].shape == (2, 3, 16)
    assert not stack[..., 4]._transposed
    assert stack[:, [0, 2, 1], :, [1, 1, 5]].shape == (3, 2, 16)


# Prepared arrays


@pytest.mark.parametrize("name", ["int4_g8", "int8_row", "nf4_g4", "nvfp4", "fp8_2x8"])
def test_a_whole_slice_keeps_the_prepared_layout_and_any_other_drops_it(name):
    w = array(name, (20, 48), prepared=True)
    assert w.layout == "words16"
    assert w[:].layout == w[..., 0:48].layout == w.T[:, :20].layout == "words16"
    assert w[:4].layout == w[:, :16].layout == w[[1]].layout == "rows"


# Permuted and divided columns


@pytest.mark.parametrize("prepared", [False, True])
def test_rows_of_permuted_columns_are_free_and_columns_are_not(prepared):
    columns = np.random.default_rng(0).permutation(16)
    plain = array("int4_g8", (5, 16))
    w = lb.from_parts(
        plain.format, plain.codes, plain.scales, columns=columns, divisor=np.arange(1.0, 17)
    )
    w = w.prepare() if prepared else w
    values = w.dequantize()
    stored = plain.dequantize(np.float64)
    for j, logical in enumerate(columns):
        expected = (stored[:, j] / (logical + 1.0)).astype(np.float32)
        assert np.array_equal(values[:, logical], expected)
    for index in (2, slice(1, 4), [0, 3], (slice(None), slice(None)), ([4, 0], ...)):
        assert np.array_equal(w[index].dequantize(), values[index])
    with pytest.raises(IndexError, match="permutation are not contiguous"):
        w[:, 8:]


def test_columns_take_their_divisors_along():
    plain = array("int4_g8", (5, 16))
    w = lb.from_parts(plain.format, plain.codes, plain.scales, divisor=np.arange(1.0, 17))
    assert np.array_equal(w[:, 8:].dequantize(), w.dequantize()[:, 8:])
    assert np.array_equal(w.T[8:, 2].dequantize(), w.dequantize()[2, 8:])
    divisor = w[:, 8:].divisor
    assert divisor is not None
    assert divisor.tolist() == [*range(9, 17)]


# Refused


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no new axes"),
        ((slice(None), None), "no new axes"),
        (True, "single bool"),
        (np.True_, "single bool"),
        (np.array(True), "bool"),
        (1.0, "integer, a slice"),
        ("rows", "integer, a slice"),
        (np.array([1.0]), "float64"),
        (np.array([]), "float64"),
        ((..., 0, ...), "only one Ellipsis"),
        ((0, slice(None), 0), "too many indices"),
        ((slice(None), slice(None), slice(None)), "too many indices"),
        (6, "out of bounds for an axis of 6"),
        (-7, "out of bounds for an axis of 6"),
        ([0, 6], "out of bounds"),
        ([True, False], "did not match|does not fit"),
    ],
)
def test_a_bad_index_is_refused_in_words(index, message):
    w = array("int4_g8", (6, 16))
    with pytest.raises(IndexError, match=message):
        w[index]


def test_an_index_of_another_framework_is_an_array():
    torch = pytest.importorskip("torch", reason="torch is an optional peer")
    w = array("int4_g8", (6, 16))
    assert np.array_equal(w[torch.tensor([4, 1])].dequantize(), w.dequantize()[[4, 1]])
    assert np.array_equal(
        w[torch.tensor([True] * 3 + [False] * 3)].dequantize(), w.dequantize()[:3]
    )
    assert np.array_equal(w[torch.tensor(2)].dequantize(), w.dequantize()[2])


def test_a_qarray_is_no_index():
    w = array("int4_g8", (6, 16))
    with pytest.raises(TypeError, match="dequantize"):
        w[w]


def test_rows_with_tensor_scales_of_their_own_do_not_form_a_matrix():
    w = array("nvfp4", (2, 4, 32))
    with pytest.raises(IndexError, match=r"different tensor scales.*i:i\+1"):
        w[:, 1]
    with pytest.raises(IndexError, match="different tensor scales"):
        w[[0, 1], [1, 2]]
    assert w[:, 1:2].shape == (2, 1, 32)
    assert w[[1, 1], [0, 2]].shape == (2, 32)
    assert w[[], []].shape == (0, 32)

"""Reshape, transpose, join, split: what NumPy does with the values, or a refusal."""

import itertools
import math
import pickle
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import lowbit as lb

FORMATS = (
    "int2_row", "int3_g8", "int4_g8", "int5_g16_asym", "int7_tensor", "int8_row", "uint4_g8_asym",
    "int4_3x8", "int4_allx8", "int4_g8_bias", "fp8_2x8", "nf4_g4", "mxfp4", "nvfp4",
    "int4_g16_zf32", "int4_g8_bf16",
)  # fmt: skip


def array(name, shape, *, transposed=False, seed=0):
    """A QArray of this logical shape; no two matrices have the same scales."""
    fmt = lb.format(name)
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    values = np.random.default_rng(seed).normal(size=stored).astype(np.float32)
    w = lb.quantize(values, fmt)
    return w.mT if transposed else w


def same(got, expected):
    """Equal values in the same shape, quantized, of consistent parts."""
    assert isinstance(got, lb.QArray)
    assert got.shape == expected.shape
    assert np.array_equal(got.dequantize(), expected)
    again = lb.from_parts(
        got.format, got.codes, got.scales, zeros=got.zeros, biases=got.biases,
        tensor_scale=got.tensor_scale, shape=got.mT.shape if got._transposed else got.shape,
        columns=got.columns, divisor=got.divisor,
    )  # fmt: skip
    assert np.array_equal((again.mT if got._transposed else again).dequantize(), expected)


# Reshape


def factors(number):
    """Every way to write a number as a product of at most three, order counting."""
    found: set[tuple[int, ...]] = {(number,)}
    for a in range(1, number + 1):
        if number % a == 0:
            found.add((a, number // a))
            found |= {
                (a, b, number // a // b) for b in range(1, number + 1) if number // a % b == 0
            }
    return sorted(found)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(12, 24), (2, 6, 24), (3, 2, 2, 24), (1, 12, 24)])
def test_rows_are_regrouped_over_the_same_columns(name, shape):
    w = array(name, shape)
    values = w.dequantize()
    for lead in factors(12):
        wanted = (*lead, 24)
        regrouped = wanted[-2:] != shape[-2:]
        if w.tensor_scale is not None and w.tensor_scale.size > 1 and regrouped:
            with pytest.raises(ValueError, match="tensor scale"):
                w.reshape(wanted)
            continue
        same(w.reshape(wanted), values.reshape(wanted))
        same(np.reshape(w, wanted), values.reshape(wanted))
        hole = (*wanted[:-1], -1)
        same(w.reshape(*hole), values.reshape(wanted))


def test_reshape_keeps_views_and_blocks_where_it_can():
    w = array("fp8_2x8", (2, 6, 24))
    assert w.reshape(2, 1, 6, 24).format == w.format
    assert np.shares_memory(w.reshape(2, 1, 6, 24).codes, w.codes)
    assert w.reshape(12, 24).format == lb.format("float8_e4m3fn_g8")
    rows = array("int4_g8", (2, 6, 24))
    assert np.shares_memory(rows.reshape(12, 24).scales, rows.scales)
    assert w.reshape(2, 6, 24) is w


def test_vectors_and_matrices_of_one_row_turn_into_each_other():
    w = array("int4_g8", (1, 24))
    assert w.reshape(24).ndim == 1
    same(w.reshape(24), w.dequantize().reshape(24))
    same(w.reshape(-1).reshape(1, 1, 24), w.dequantize().reshape(1, 1, 24))


def test_empty_arrays_reshape():
    for name in ("int4_g8", "fp8_2x8", "nvfp4"):
        for shape, wanted in (
            ((2, 0, 32), (3, 0, 32)), ((0, 4, 32), (0, 32)), ((0, 4, 32), (3, 0, 32)),
            ((0, 4, 32), (0, 2, 2, 32)), ((3, 4, 0), (12, 0)),
        ):  # fmt: skip
            w = array(name, shape)
            if w.tensor_scale is None or w.tensor_scale.size <= 1 or shape[-2:] == wanted[-2:]:
                same(w.reshape(wanted), w.dequantize().reshape(wanted))


def test_an_empty_array_does_not_say_what_minus_one_is():
    with pytest.raises(ValueError, match="0 values do not fill"):
        array("int4_g8", (3, 0)).reshape(-1, 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((24, 12), "break rows of 24 codes"),
        ((6, 48), "break rows of 24 codes"),
        ((288,), "break rows of 24 codes"),
        ((13, 24), "288 values do not fill"),
        ((-1, 25), "288 values do not fill"),
        ((-1, 0), "do not fill"),
        ((-1, -1, 24), "one -1"),
        ((-2, 24), "no other negative"),
        ((), "do not fill"),
    ],
)
def test_reshapes_that_cannot_be_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        array("int4_g8", (12, 24)).reshape(shape)


def test_a_transpose_is_reshaped_before_it_is_transposed():
    w = array("int4_g8", (24, 12), transposed=True)
    assert w.reshape(24, 12) is w
    with pytest.raises(ValueError, match=r"reshape \.mT"):
        w.reshape(2, 12, 12)


def test_reshape_in_another_order_is_refused():
    w = array("int4_g8", (12, 24))
    same(np.reshape(w, (2, 6, 24), order="C"), w.dequantize().reshape(2, 6, 24))
    with pytest.raises(TypeError, match="order='C'"):
        np.reshape(w, (2, 6, 24), order="F")


# Transpose


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_leading_axes_and_the_last_two_change_places_among_themselves(name, lead, transposed):
    w = array(name, (*lead, 4, 16) if not transposed else (*lead, 16, 4), transposed=transposed)
    values, ndim = w.dequantize(), w.ndim
    for axes in itertools.permutations(range(ndim)):
        if set(axes[-2:]) == {ndim - 2, ndim - 1}:
            same(w.transpose(axes), values.transpose(axes))
            same(w.transpose(*(a - ndim for a in axes)), values.transpose(axes))
            same(np.transpose(w, axes), values.transpose(axes))
            assert np.shares_memory(w.codes, w.transpose(axes).codes)
        else:
            with pytest.raises(ValueError, match="contraction axis"):
                w.transpose(axes)
    same(w.mT, values.swapaxes(-1, -2))
    same(np.matrix_transpose(w), values.swapaxes(-1, -2))
    same(np.swapaxes(w, -1, ndim - 2), values.swapaxes(-1, -2))
    same(w.swapaxes(0, 0), values)
    if ndim == 2:
        same(w.T, values.T)
        same(w.transpose(), values.T)
        same(np.transpose(w), values.T)
    else:
        with pytest.raises(ValueError, match="mT swaps the last two"):
            _ = w.T


def test_vectors_are_their_own_transpose():
    v = array("int4_g8", (24,))
    assert v.T is v
    same(v.transpose(), v.dequantize())
    same(v.transpose(0), v.dequantize())
    with pytest.raises(ValueError, match="one axis, two are needed"):
        _ = v.mT


@pytest.mark.parametrize("axes", [(0,), (0, 0), (0, 2), (0, 1, 2)])
def test_transposes_that_are_no_permutation_are_refused(axes):
    with pytest.raises(ValueError, match="do not permute 2 axes"):
        array("int4_g8", (4, 24)).transpose(axes)


def test_swapaxes_names_the_axis_that_is_not_there():
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        array("int4_g8", (4, 24)).swapaxes(0, 2)


# Join


@st.composite
def _joins(draw):
    name = draw(st.sampled_from(FORMATS))
    lead = draw(st.lists(st.integers(1, 2), max_size=2))
    transposed = draw(st.booleans())
    rows = draw(st.integers(1, 5))
    shape = [*lead, 24, rows] if transposed else [*lead, rows, 24]
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    if axis % len(shape) == len(shape) - (2 if transposed else 1):
        step = draw(st.sampled_from([8, 16, 24, 4, 5]))
        lengths = [length * step for length in lengths]
    pieces = []
    for seed, length in enumerate(lengths):
        shape[axis] = length
        pieces.append(array(name, tuple(shape), transposed=transposed, seed=seed))
    return pieces, axis


def refusal(pieces, axis):
    """A word of the message with which the join has to be refused, or None."""
    first, ndim = pieces[0], pieces[0].ndim
    fmt = first.format
    stored = axis % ndim - ndim
    if first._transposed and stored >= -2:
        stored = -3 - stored
    if stored >= -2 and first.tensor_scale is not None:
        if any(not np.array_equal(first.tensor_scale, p.tensor_scale) for p in pieces):
            return "tensor scales"
    if stored == -1 and len(pieces) > 1:
        width = fmt.scale.block[1]
        if width is None:
            return "one scale for whole rows"
        whole_bytes = next(n for n in range(1, 9) if n * fmt.element.bits % 8 == 0)
        step = math.lcm(width, whole_bytes)
        if any(p.shape[axis] % step for p in pieces[:-1]):
            return f"multiple of {step} columns"
    return None


@settings(max_examples=3 * settings().max_examples)
@given(case=_joins())
def test_joining_is_joining_the_values(case):
    pieces, axis = case
    expected = np.concatenate([p.dequantize() for p in pieces], axis)
    reason = refusal(pieces, axis)
    if reason:
        with pytest.raises(ValueError, match=reason):
            lb.concatenate(pieces, axis)
        return
    same(lb.concatenate(pieces, axis), expected)
    same(np.concatenate(pieces, axis), expected)
    same(np.concatenate(tuple(pieces), axis=axis), expected)


def test_blocks_of_rows_survive_a_join_on_their_edges():
    first, second = array("int4_3x8", (6, 24)), array("int4_3x8", (4, 24), seed=1)
    assert lb.concatenate([first, second]).format == first.format
    assert lb.concatenate([second, first]).format == lb.format("int4_g8")
    same(lb.concatenate([second, first, second]), np.concatenate(
        [p.dequantize() for p in (second, first, second)]
    ))  # fmt: skip
    mixed = [first, array("int4_g8", (2, 24), seed=2)]
    same(lb.concatenate(mixed), np.concatenate([p.dequantize() for p in mixed]))


def test_vectors_join_along_their_columns():
    v, u = array("int4_g8", (16,)), array("int4_g8", (5,), seed=1)
    same(lb.concatenate([v, u]), np.concatenate([v.dequantize(), u.dequantize()]))
    with pytest.raises(ValueError, match="multiple of 8 columns"):
        lb.concatenate([u, v])
    same(np.vstack([v, v]), np.vstack([v.dequantize()] * 2))
    same(np.stack([v, v]), np.stack([v.dequantize()] * 2))
    with pytest.raises(ValueError, match="axis 0"):
        lb.stack([v, v], axis=1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_grow_a_leading_axis(name, transposed):
    shape = (2, 24, 3) if transposed else (2, 3, 24)
    pieces = [array(name, shape, transposed=transposed, seed=s) for s in range(3)]
    values = [p.dequantize() for p in pieces]
    for axis in (0, 1, -3, -4):
        same(lb.stack(pieces, axis), np.stack(values, axis))
        same(np.stack(pieces, axis=axis), np.stack(values, axis))
    for axis in (2, 3, -1, -2):
        with pytest.raises(ValueError, match="inside the matrices"):
            lb.stack(pieces, axis)
    for axis in (4, -5):
        with pytest.raises(ValueError, match="out of range for 4 axes"):
            lb.stack(pieces, axis)
    same(np.vstack(pieces), np.vstack(values))


@pytest.mark.parametrize(
    ("pieces", "error", "message"),
    [
        ([], ValueError, "at least one array"),
        ([((4, 24), "int4_g8"), ((4, 24), "int5_g8")], ValueError, "formats and dtypes"),
        ([((4, 24), "int4_g8"), ((4, 24), "int4_g16")], ValueError, "int4_g16 and int4_g8"),
        ([((4, 24), "int4_g8"), ((4, 24), "int4_g8_asym")], ValueError, "formats have to agree"),
        ([((4, 24), "int4_g8"), ((4, 32), "int4_g8")], ValueError, "another axis"),
        ([((4, 24), "int4_g8"), ((1, 4, 24), "int4_g8")], ValueError, "numbers of axes"),
    ],
)
def test_joins_that_would_change_a_value_are_refused(pieces, error, message):
    with pytest.raises(error, match=message):
        lb.concatenate([array(name, shape) for shape, name in pieces])


def test_joining_with_anything_but_qarrays_is_refused():
    w = array("int4_g8", (4, 24))
    dense = np.zeros((4, 24), np.float32)
    for pieces in ([w, dense], [dense, w], (w, [[0.0] * 24])):
        with pytest.raises(TypeError, match=r"has to be a QArray.*\.dequantize\(\)"):
            np.concatenate(pieces)
        with pytest.raises(TypeError, match=r"has to be a QArray.*\.dequantize\(\)"):
            np.stack(pieces)
        with pytest.raises(TypeError, match=r"has to be a QArray.*\.dequantize\(\)"):
            np.vstack(pieces)
    with pytest.raises(TypeError, match="sequence of QArrays"):
        lb.concatenate(w)
    half = lb.quantize(np.zeros((4, 24), np.float16), "int4_g8")
    with pytest.raises(ValueError, match="float32 and int4_g8 of float16"):
        lb.concatenate([w, half])
    with pytest.raises(ValueError, match="transposed and some are not"):
        lb.concatenate([array("int4_g8", (24, 24)), array("int4_g8", (24, 24)).T])
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        lb.concatenate([w, w], 2)
    with pytest.raises(TypeError, match="axis=None"):
        np.concatenate([w, w], axis=None)
    with pytest.raises(TypeError, match="does not take these arguments"):
        np.concatenate([w, w], dtype=np.float64)
    with pytest.raises(ValueError, match="shapes differ"):
        lb.stack([w, w[:2]])


# Permuted and divided columns


def rearranged(columns=None, divisor=None, *, seed=0):
    w = array("int4_g8", (4, 16), seed=seed)
    return lb.from_parts(w.format, w.codes, w.scales, columns=columns, divisor=divisor)


def test_permutations_and_divisors_follow_every_move():
    order = np.random.default_rng(1).permutation(16)
    w = rearranged(order, np.arange(1.0, 17))
    u = rearranged(order, np.arange(1.0, 17), seed=2)
    values, others = w.dequantize(), u.dequantize()
    same(w.reshape(2, 2, 16), values.reshape(2, 2, 16))
    same(w.T, values.T)
    same(w.reshape(2, 2, 16).transpose(0, 2, 1), values.reshape(2, 2, 16).transpose(0, 2, 1))
    same(lb.concatenate([w, u]), np.concatenate([values, others]))
    same(lb.stack([w, u]), np.stack([values, others]))
    same(np.split(w, 2)[1], values[2:])
    same(w.copy(), values)
    same(pickle.loads(pickle.dumps(w)), values)
    assert np.array_equal(w.prepare().dequantize(), values)
    with pytest.raises(ValueError, match="permutations cannot be joined"):
        lb.concatenate([w, u], 1)
    with pytest.raises(ValueError, match="divisors have to agree"):
        lb.concatenate([w, rearranged(order)])
    with pytest.raises(ValueError, match="divisors have to agree"):
        lb.stack([w, rearranged(order[::-1], np.arange(1.0, 17))])


def test_divisors_are_cut_and_joined_with_their_columns():
    w = rearranged(None, np.arange(1.0, 17))
    halves: Any = np.split(w, 2, axis=1)
    left, right = halves
    same(lb.concatenate([left, right], 1), w.dequantize())
    same(
        lb.concatenate([right.T, left.T]),
        np.concatenate([right.dequantize().T, left.dequantize().T]),
    )
    with pytest.raises(ValueError, match="some have none"):
        lb.concatenate([left, rearranged()[:, :8]], 1)


def test_the_columns_and_the_divisor_are_read_only():
    w = rearranged(np.arange(16)[::-1], np.arange(1.0, 17))
    for part in (w.columns, w.divisor, w.codes, w.scales):
        assert part is not None
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 0


# Split


@pytest.mark.parametrize("name", ["int4_g8", "int4_3x8", "nvfp4", "int3_g8"])
def test_pieces_are_views_and_join_to_the_whole(name):
    w = array(name, (2, 6, 64))
    values = w.dequantize()
    for axis, sections in (
        (0, 2),
        (1, 3),
        (1, [1, 4]),
        (1, [4, 2]),
        (2, 2),
        (-1, [16, 32]),
        (1, [-2]),
    ):
        expected = np.split(values, sections, axis)
        pieces: Any = np.split(w, sections, axis=axis)
        assert len(pieces) == len(expected)
        for piece, part in zip(pieces, expected, strict=True):
            same(piece, part)
            assert not piece.codes.size or np.shares_memory(piece.codes, w.codes)
        if sections != [4, 2] and not (name == "nvfp4" and axis == 1):
            same(lb.concatenate(pieces, axis), values)
    for piece, part in zip(np.array_split(w, 4, 1), np.array_split(values, 4, 1), strict=True):
        same(piece, part)
    for piece, part in zip(np.array_split(w, 4), np.array_split(values, 4), strict=True):
        same(piece, part)


def test_splits_that_cannot_be_are_refused():
    w = array("int4_g8", (6, 64))
    with pytest.raises(ValueError, match="6 entries do not make 4 equal pieces"):
        np.split(w, 4)
    with pytest.raises(ValueError, match="do not make 0"):
        np.array_split(w, 0)
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        np.split(w, 2, axis=2)
    with pytest.raises(IndexError, match="multiples of 8"):
        np.split(w, [5], axis=1)

"""Products reach us from both sides and go back where they came from; nothing else densifies."""

import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb

BFLOAT16 = np.dtype("bfloat16")


def weight(shape: Any, *, name="int4_g8", transposed=False, seed=0, dtype=np.float32) -> Any:
    """Integers below 8 under scales that are powers of two: every product is exact."""
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    values = np.random.default_rng(seed).integers(-7, 8, stored).astype(dtype)
    values[..., ::8] = 7
    w = lb.quantize(values * dtype(0.5), name)
    return w.mT if transposed else w


def dense(shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


# NumPy

PRODUCTS: dict[str, Any] = {
    "@": operator.matmul,
    "matmul": np.matmul,
    "dot": np.dot,
    "lowbit": lb.matmul,
}


@pytest.mark.parametrize("how", PRODUCTS)
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 24), (24, 5)),
        ((24,), (24, 5)),
        ((3, 24), (24,)),
        ((24,), (24,)),
        ((2, 3, 24), (24, 5)),
        ((2, 3, 24), (24,)),
    ],
)
def test_either_operand_may_be_quantized(how, left, right):
    product = PRODUCTS[how]
    x = dense(left)
    w = weight(right, transposed=len(right) > 1)
    expected = x @ w.dequantize()
    got = product(x, w)
    assert type(got) is np.ndarray
    assert got.dtype == np.float32
    assert np.array_equal(got, expected)
    turned = product(weight(left), dense(right))
    assert np.array_equal(turned, weight(left).dequantize() @ dense(right))
    both = product(weight(left), w)
    assert np.array_equal(both, weight(left).dequantize() @ w.dequantize())


@pytest.mark.parametrize("x", [np.float16, np.float32, np.float64, BFLOAT16])
@pytest.mark.parametrize("w", [np.float16, np.float32, np.float64, BFLOAT16])
def test_the_result_has_the_promoted_dtype(x, w):
    held = lb.quantize(dense((4, 24)).astype(w), "int4_g8")
    got = dense((3, 24)).astype(x) @ held.T
    names = {np.dtype(x).name, np.dtype(w).name}
    wanted = "float32" if names == {"float16", "bfloat16"} else np.promote_types(x, w).name
    assert got.dtype.name == wanted
    assert (held @ dense((24, 3)).astype(x)).dtype.name == wanted


def test_stacks_multiply_as_in_matmul():
    x, w = dense((2, 3, 24)), weight((2, 24, 5), transposed=True)
    assert np.array_equal(x @ w, x @ w.dequantize())
    assert np.array_equal(np.matmul(x[0], w), x[0] @ w.dequantize())
    assert np.array_equal(np.linalg.matmul(x, w), x @ w.dequantize())
    for product in (lambda: np.dot(x, w), lambda: np.dot(x[0], w)):
        with pytest.raises(TypeError, match="every matrix with every other; use matmul"):
            product()
    assert np.array_equal(np.dot(x[0, 0], w), np.dot(x[0, 0], w.dequantize()))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("divisor", [None, 2.0 ** np.arange(-4, 4).repeat(3)])
@pytest.mark.parametrize("permuted", [False, True])
def test_permuted_and_divided_columns_multiply_as_their_values_do(prepared, divisor, permuted):
    plain = weight((5, 24))
    columns = np.random.default_rng(2).permutation(24) if permuted else None
    w = lb.from_parts(plain.format, plain.codes, plain.scales, columns=columns, divisor=divisor)
    w = w.prepare() if prepared else w
    values, x, y = w.dequantize(), dense((3, 24)), dense((3, 5))
    assert (columns is None and divisor is None) == np.array_equal(values, plain.dequantize())
    assert np.array_equal(x @ w.T, x @ values.T)
    assert np.array_equal(x[0] @ w.T, x[0] @ values.T)
    assert np.array_equal(y @ w, y @ values)
    assert np.array_equal(w @ x.T, values @ x.T)
    assert np.array_equal(w @ x[0], values @ x[0])
    assert np.array_equal(w.T @ y.T, values.T @ y.T)
    assert np.array_equal(w @ w.T, values @ values.T)
    assert np.array_equal(w @ plain.T, values @ plain.dequantize().T)
    assert np.array_equal(plain @ w.T, plain.dequantize() @ values.T)
    assert np.array_equal(x @ w[2], x @ values[2])
    stack = lb.stack([w, w[::-1]])
    assert np.array_equal(x @ stack.mT, x @ np.stack([values, values[::-1]]).swapaxes(1, 2))
    assert np.array_equal(np.einsum("mk,nk->nm", x, w), values @ x.T)


def test_out_is_written_and_returned():
    x, w, out = dense((3, 24)), weight((24, 5), transposed=True), np.empty((3, 5), np.float32)
    for product in (np.matmul, np.dot):
        out[...] = np.nan
        assert product(x, w, out=out) is out
        assert np.array_equal(out, x @ w.dequantize())


@pytest.mark.parametrize(
    ("x", "w"),
    [((3, 24), (5, 24)), ((24,), (5, 24)), ((3, 24), (24,)), ((24,), (24,)), ((2, 3, 24), (5, 24))],
)
def test_inner_sums_over_both_last_axes(x, w):
    held = weight(w)
    assert np.array_equal(np.inner(dense(x), held), np.inner(dense(x), held.dequantize()))
    if len(x) < 3:
        turned = np.inner(weight(x), dense(w))
        assert np.array_equal(turned, np.inner(weight(x).dequantize(), dense(w)))


def test_inner_with_a_stack_is_refused():
    with pytest.raises(TypeError, match="every row with every other; use matmul"):
        np.inner(dense((3, 24)), weight((2, 5, 24)))


def test_lists_multiply_too():
    w = weight((5, 24))
    assert np.array_equal(dense((3, 24)).tolist() @ w.T, dense((3, 24), float) @ w.T)
    assert np.array_equal(w @ dense((24, 3)).tolist(), w.dequantize() @ dense((24, 3), float))


# einsum


@st.composite
def _equations(draw):
    letters = draw(st.permutations("abcdknmop"))
    batch = letters[: draw(st.integers(0, 2))]
    k, n, *rest = letters[len(batch) :]
    kept = rest[: draw(st.integers(0, 2))]
    vector = draw(st.booleans()) and not batch
    right = [*batch, k] if vector else [*batch, *draw(st.permutations([k, n]))]
    left = draw(st.permutations([*batch, *kept, k]))
    result = draw(st.permutations([*batch, *kept, *([] if vector else [n])]))
    swapped, spaced = draw(st.booleans()), draw(st.booleans())
    inputs = [right, left] if swapped else [left, right]
    text = f"{','.join(map(''.join, inputs))}->{''.join(result)}"
    if sorted(result) == list(result) and draw(st.booleans()) and not batch:
        text = text.partition("->")[0]
    lengths = dict(zip(letters, [2, 3, 4, 1, 2, 3, 4, 5, 2], strict=True))
    lengths[k] = draw(st.sampled_from([8, 16, 24]))
    shapes = [[lengths[c] for c in side] for side in (left, right)]
    turned = not vector and right[-1] != k
    return text.replace(",", " , ") if spaced else text, *shapes, swapped, turned


@settings(max_examples=2 * settings().max_examples)
@given(case=_equations())
def test_einsum_is_numpys(case):
    text, left, right, swapped, turned = case
    x, w = dense(left), weight(tuple(right), transposed=turned)
    operands = (w, x) if swapped else (x, w)
    values = [o.dequantize() if isinstance(o, lb.QArray) else o for o in operands]
    expected = np.einsum(text, *values)
    assert np.array_equal(np.einsum(text, *operands), expected)
    assert np.array_equal(np.einsum(text, *operands, optimize=True), expected)
    out = np.empty(expected.shape, np.float32)
    assert np.einsum(text, *operands, out=out) is out
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("text", "x", "w", "error", "message"),
    [
        ("mk,nk->m", (3, 24), (5, 24), TypeError, "exactly one shared label is summed"),
        ("mk,nk->mnk", (3, 24), (5, 24), TypeError, "exactly one shared label is summed"),
        ("mnk,nk->m", (3, 5, 24), (5, 24), TypeError, "exactly one shared label is summed"),
        ("nk,nk->n", (5, 24), (5, 24), TypeError, "batch labels, then its two matrix axes"),
        ("bmk,nbk->bmn", (2, 3, 24), (5, 2, 24), TypeError, "batch labels, then its two matrix"),
        ("mn,bnk->mbk", (3, 5), (2, 5, 24), TypeError, "batch labels, then its two matrix axes"),
        ("...k,nk->...n", (3, 24), (5, 24), TypeError, "no ellipsis"),
        ("kk,nk->n", (24, 24), (5, 24), TypeError, "no diagonals"),
        ("mk->km", (3, 24), (5, 24), TypeError, "two inputs"),
        ("mk,nk->mz", (3, 24), (5, 24), ValueError, "a label that no operand has"),
        ("bmk,nk->bmn", (3, 24), (5, 24), ValueError, r"does not fit shapes \(3, 24\)"),
    ],
)
def test_einsums_that_are_no_matrix_product_are_refused(text, x, w, error, message):
    with pytest.raises(error, match=message):
        np.einsum(text, dense(x), weight(w))


def test_einsum_takes_two_operands_in_text():
    x, w = dense((3, 24)), weight((5, 24))
    with pytest.raises(TypeError, match="text and two operands"):
        np.einsum("mk,nk,n->mn", x, w, np.ones(5))
    with pytest.raises(TypeError, match="text and two operands"):
        np.einsum(x, [0, 1], w, [2, 1])
    assert np.array_equal(np.einsum("mk,nk->mn", x.tolist(), w), x @ w.T)


# PyTorch


def _torch():
    return pytest.importorskip("torch", reason="torch is an optional peer")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_gets_torch_back(dtype):
    torch = _torch()
    held = lb.quantize(weight((5, 24)).dequantize().astype(dtype), "int4_g8")
    x, bias = dense((3, 24)), dense(5)
    tensor = torch.from_numpy(x).to(getattr(torch, dtype))
    expected = torch.from_numpy(x @ held.dequantize(np.float32).T)
    linear = torch.nn.functional.linear
    for got in (
        tensor @ held.T, torch.matmul(tensor, held.T), torch.mm(tensor, held.T),
        torch.matmul(input=tensor, other=held.T), torch.mm(input=tensor, mat2=held.T),
        tensor.matmul(held.T), tensor.mm(held.T), linear(tensor, held),
        linear(input=tensor, weight=held), torch.einsum("mk,nk->mn", tensor, held),
        (held @ tensor.T).T, torch.matmul(held, tensor.T).T, tensor.T.__rmatmul__(held).T,
        lb.linear(tensor, held),
    ):  # fmt: skip
        assert type(got) is torch.Tensor
        assert got.dtype == tensor.dtype
        assert torch.equal(got.to(torch.float32), expected)
    with_bias = torch.from_numpy(bias).to(tensor.dtype)
    for got in (linear(tensor, held, with_bias), linear(tensor, held, bias=with_bias)):
        assert torch.equal(got.to(torch.float32), expected + torch.from_numpy(bias))


def test_torch_shapes_follow_torch():
    torch = _torch()
    x, w = dense((2, 3, 24)), weight((5, 24))
    tensor = torch.from_numpy(x)
    assert np.array_equal((tensor @ w.T).numpy(), x @ w.dequantize().T)
    assert np.array_equal(torch.mv(w, tensor[0, 0]).numpy(), w.dequantize() @ x[0, 0])
    assert np.array_equal(torch.dot(w[0], tensor[0, 0]).numpy(), w.dequantize()[0] @ x[0, 0])
    stack = weight((2, 5, 24))
    got = torch.bmm(tensor, stack.mT)
    assert np.array_equal(got.numpy(), x @ stack.dequantize().swapaxes(1, 2))
    got = torch.einsum("bmk,bnk->mbn", tensor, stack)
    assert np.array_equal(got.numpy(), np.einsum("bmk,bnk->mbn", x, stack.dequantize()))
    out = torch.empty(2, 3, 5)
    assert torch.matmul(tensor, w.T, out=out) is out
    assert np.array_equal(out.numpy(), x @ w.dequantize().T)
    with pytest.raises(TypeError, match=r"torch\.mm of a QArray takes out= only, got out_dtype="):
        torch.mm(tensor[0], w.T, out_dtype=torch.float32)


def test_torch_functions_that_need_values_are_refused_by_name():
    torch = _torch()
    tensor, w = torch.ones(5, 24), weight((5, 24))
    for function in (
        lambda: torch.add(tensor, w), lambda: torch.sum(w), lambda: torch.cat([tensor, w]),
        lambda: torch.nn.functional.gelu(w), lambda: torch.equal(tensor, w),
        lambda: torch.addmm(torch.ones(5), tensor, w.T), lambda: tensor.copy_(w),
        lambda: torch.inner(tensor, w),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"torch\.\w+ would need the values.*\.dequantize\(\)"):
            function()
    for convert in (torch.as_tensor, torch.tensor, torch.asarray, torch.from_dlpack):
        with pytest.raises(TypeError, match=r"\.dequantize\(\)"):
            convert(w)
    for operation in (
        lambda: tensor + w,
        lambda: w + tensor,
        lambda: tensor - w,
        lambda: tensor / w,
    ):
        with pytest.raises(TypeError, match=r"\.dequantize\(\)"):
            operation()
    with pytest.raises(TypeError, match=r"lowbit\.array_equal"):
        _ = tensor == w


def test_a_tensor_scales_rows_like_an_array():
    torch = _torch()
    w, factor = weight((5, 24)), torch.tensor([1.0, 2, 4, -1, 0.5])[:, None]
    expected = w.dequantize() * factor.numpy()
    assert np.array_equal((factor * w).dequantize(), expected)
    assert np.array_equal((w * factor.bfloat16()).dequantize(), expected)


# JAX


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_gets_jax_back(dtype):
    jax = pytest.importorskip("jax", reason="jax is an optional peer")
    held = lb.quantize(weight((5, 24)).dequantize().astype(dtype), "int4_g8")
    x = dense((3, 24))
    array = jax.numpy.asarray(x.astype(dtype))
    for got in (
        array @ held.T,
        (held @ array.T).T,
        lb.linear(array, held),
        lb.matmul(array, held.T),
    ):
        assert isinstance(got, jax.Array)
        assert got.dtype == array.dtype
        assert np.array_equal(np.asarray(got, np.float32), x @ held.dequantize(np.float32).T)


def test_jax_does_not_turn_a_qarray_into_an_array():
    jax = pytest.importorskip("jax", reason="jax is an optional peer")
    w, array = weight((5, 24)), jax.numpy.ones((5, 24))
    for convert in (jax.numpy.asarray, jax.numpy.array, lambda a: jax.numpy.array([a])):
        with pytest.raises(TypeError, match=r"\.dequantize\(\)"):
            convert(w)
    for operation in (lambda: array + w, lambda: w - array, lambda: array / w):
        with pytest.raises(TypeError, match=r"\.dequantize\(\)"):
            operation()
    with pytest.raises(TypeError, match=r"lowbit\.array_equal"):
        _ = array == w
    for function in (jax.numpy.sum, jax.numpy.exp):  # in JAX's own words: it asks nobody
        with pytest.raises(TypeError):
            function(w)


# Refusals


@pytest.mark.parametrize(
    "densify",
    [
        np.asarray, np.array, lambda w: np.array([w, w]), lambda w: np.array(w, copy=None),
        np.ascontiguousarray, lambda w: np.asarray(w, np.float32), np.from_dlpack,
        list, tuple, iter, reversed, sorted, sum, max, float, int, complex, abs, round,
        lambda w: range(w), lambda w: [1.0][w], lambda w: 1.0 in w,
        lambda w: w + 1, lambda w: 1 + w, lambda w: w - w, lambda w: 1 - w,
        lambda w: w + np.ones(8), lambda w: np.ones(8) + w, lambda w: w**2, lambda w: 2**w,
        lambda w: w // 2, lambda w: 5 // w,
        lambda w: w % 2, lambda w: 5 % w, lambda w: divmod(w, 2), lambda w: divmod(2, w),
        lambda w: 1 / w, lambda w: np.ones(8) / w, lambda w: w < 1, lambda w: w <= 1,
        lambda w: w >= w, lambda w: 1 > w, lambda w: 2 <= w, lambda w: np.ones(8) < w,
        lambda w: np.add(w, 1), lambda w: np.sum(w), lambda w: np.mean(w, axis=0),
        lambda w: np.add.reduce(w), lambda w: np.multiply.outer(w, [2.0]),
        lambda w: np.maximum(w, 0), lambda w: np.exp(w), lambda w: np.isnan(w),
        lambda w: np.where(w, 1, 0),
        lambda w: np.linalg.norm(w), lambda w: np.allclose(w, w), lambda w: np.max(w),
        lambda w: np.negative(w, out=np.empty(8)), lambda w: np.multiply(w, 2, dtype=np.float64),
        lambda w: np.add(np.ones(8), 1, out=w), lambda w: np.testing.assert_array_equal(w, w),
        lambda w: np.ones((4, 24)).dot(w.T), lambda w: np.put(np.ones(8), [0], w),
        lambda w: np.ones((4, 24)).__setitem__(slice(None), w),
    ],
)  # fmt: skip
def test_nothing_turns_into_numbers_by_itself(densify):
    with pytest.raises(TypeError, match=r"\.dequantize\(\)"):
        densify(weight((4, 24)))


def test_truth_and_equality_point_to_array_equal():
    w = weight((4, 24))
    for compare in (
        bool, lambda w: not w, lambda w: w and 1, lambda w: w == w, lambda w: w != w,
        lambda w: w == 1, lambda w: np.ones(8) == w, lambda w: w == np.ones(8),
        lambda w: np.equal(w, w), lambda w: np.not_equal(w, 1), lambda w: w in [1],
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"lowbit\.array_equal"):
            compare(w)
    assert w in [w]


def test_a_qarray_is_no_key():
    with pytest.raises(TypeError, match="unhashable"):
        hash(weight((4, 24)))


def test_a_qarray_is_not_made_by_its_class_and_does_not_change():
    w = weight((4, 24))
    with pytest.raises(TypeError, match=r"lowbit\.quantize or lowbit\.from_parts"):
        lb.QArray(np.ones((4, 24)))
    with pytest.raises(AttributeError):
        w.shape = (2, 48)
    with pytest.raises(AttributeError):
        w.name = "weight"
    with pytest.raises(TypeError, match="assignment"):
        w[0] = 0


def test_in_place_products_say_what_to_write():
    x = np.ones((24, 24), np.float32)
    with pytest.raises(TypeError, match="write x = x @ w"):
        x @= weight((24, 24)).T
    with pytest.raises(TypeError, match="takes out= only, got dtype="):
        np.matmul(x, weight((24, 24)).T, dtype=np.float64)


def test_arguments_that_numpy_would_take_are_named():
    w = weight((4, 24))
    for call in (
        lambda: np.array_equal(w, w, equal_nan=True), lambda: np.copy(w, order="F"),
        lambda: np.stack([w, w], dtype=np.float64), lambda: np.einsum("mk,nk->mn", w, w, order="F"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"numpy\.\w+ of a QArray does not take these"):
            call()


def test_shape_questions_are_answered():
    w = weight((2, 4, 24))
    assert (np.shape(w), np.ndim(w), np.size(w), np.size(w, 1)) == ((2, 4, 24), 3, 192, 4)
    assert len(w) == 2
    assert w.device == "cpu"
    assert w.to_device("cpu") is w
    with pytest.raises(ValueError, match="want 'cpu', 'cuda' or 'cuda:0', got 'tpu'"):
        w.to_device("tpu")
    with pytest.raises(ValueError, match="no streams"):
        w.to_device("cpu", stream=1)

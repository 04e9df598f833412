"""Products inside torch.compile and jax.jit: one registered operation, the same bits as eager."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import library

import lowbit as lb

RNG = np.random.default_rng(0)
W = lb.quantize(RNG.normal(size=(8, 64)).astype(np.float32), "int4_g32")
OTHER = lb.quantize(RNG.normal(size=(8, 64)).astype(np.float32), "int8_row")
SQUARE = lb.quantize(RNG.normal(size=(8, 8)).astype(np.float32), "int8_row")
X = torch.from_numpy(RNG.normal(size=(2, 64)).astype(np.float32))
XS = torch.from_numpy(RNG.normal(size=(8, 8)).astype(np.float32))
BIAS = torch.arange(8.0)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: torch.relu(x @ W.T) + 1, X),
        (lambda x: torch.matmul(x, W.T), X),
        (lambda x: torch.nn.functional.linear(x, W, BIAS), X),
        (lambda x: lb.linear(x, W, bias=BIAS, activation="gelu", alpha=0.5), X),
        (lambda x: lb.linear(x, W, residual=torch.ones(2, 8)), X),
        (lambda x: lb.linear(x, W, x_format="int8_row", out_dtype="bfloat16"), X),
        (lambda x: lb.linear(x, W, out_dtype=torch.float16), X),
        (lambda x: lb.linear(x, W), X.bfloat16()),
        (lambda x: W @ x.T, X),
        (lambda x: W @ x, X[0]),
        (lambda x: x @ W.T, X[0]),
        (lambda x: x @ W.T, X.reshape(2, 1, 64)),
        (lambda x: torch.matmul(x, SQUARE.T), XS),
        (lambda x: torch.matmul(SQUARE, x), XS),
        (lambda x: lb.matmul(SQUARE, x), XS),
    ],
)
def test_torch_compile_equals_eager_in_one_graph(function, x):
    got, expected = compiled(function)(x), function(x)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_torch_compile_with_inductor():
    def function(x):
        return torch.relu(x @ W.T) * 2

    assert torch.equal(compiled(function, "inductor")(X), function(X))


def test_another_weight_compiles_anew_instead_of_reusing_the_first():
    function = compiled(lambda x, w: x @ w.T)
    for w in (W, OTHER, W, lb.quantize(np.eye(8, 64, dtype=np.float32), "fp8"), OTHER):
        assert torch.equal(function(X, w), X @ w.T)


def test_a_module_holds_a_weight():
    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, w):
            super().__init__()
            self.w = w

        def forward(self, x):
            return x @ self.w.T

    layer = Layer(W)
    assert torch.equal(compiled(layer)(X), layer(X))
    layer.w = OTHER
    assert torch.equal(compiled(layer)(X), X @ OTHER.T)


def test_torch_compile_refuses_the_order_that_it_does_not_record():
    with pytest.raises(Exception, match="does not tell x @ w from w @ x"):
        compiled(lambda x: x @ SQUARE)(XS)


def test_the_registered_operation_passes_torchs_own_checks():
    w = W.T
    compiled(lambda x: x @ w)(X)  # registers it
    arguments = (X, w._content.key, True, False, False, BIAS, None, 1.0, "relu", None, None, False)
    library.opcheck(
        torch.ops.lowbit.matmul.default,
        (*arguments, None),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_a_compiled_function_does_not_outlive_its_weight_silently():
    import lowbit.torch_ops as ops

    w = lb.quantize(np.eye(8, dtype=np.float32), "int8_row")
    key, gone = w._content.key, weakref.ref(w._content)
    del w
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="keep it alive"):
        ops._weight(key, False, False)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: jax.nn.relu(a @ W.T) + 1,
        lambda a: W @ a.T,
        lambda a: lb.linear(a, W, bias=jnp.arange(8.0), activation="silu"),
        lambda a: lb.linear(a, W, residual=a[:, :8]),
        lambda a: lb.linear(a, W, x_format="int8_row", out_dtype="bfloat16"),
        lambda a: a.astype(jnp.bfloat16) @ W.T,
    ],
)
def test_jax_jit_equals_eager(function):
    x = jnp.asarray(X.numpy())
    got, expected = jax.jit(function)(x), function(x)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_jax_sees_one_primitive():
    text = str(jax.make_jaxpr(lambda a: a @ W.T)(jnp.asarray(X.numpy())))
    assert text.count("lowbit_matmul") == 1


def test_jax_vmap_is_a_loop_over_the_axis():
    x = jnp.asarray(RNG.normal(size=(3, 2, 64)).astype(np.float32))
    bias = jnp.asarray(RNG.normal(size=(3, 8)).astype(np.float32))

    def function(a, b):
        return lb.linear(a, W, bias=b)

    expected = np.stack([np.asarray(function(a, b)) for a, b in zip(x, bias, strict=True)])
    np.testing.assert_array_equal(jax.vmap(function)(x, bias), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(function))(x, bias), expected)
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(function, in_axes=(1, None)))(x.swapaxes(0, 1), bias[0]),
        np.stack([np.asarray(function(a, bias[0])) for a in x]),
    )


def test_jax_knows_the_shape_without_running():
    shape = jax.eval_shape(lambda a: a @ W.T, jax.ShapeDtypeStruct((5, 64), jnp.float32))
    assert shape.shape == (5, 8)
    assert shape.dtype == jnp.float32


@pytest.mark.parametrize("trace", [compiled, jax.jit])
def test_traced_products_refuse_what_a_graph_cannot_hold(trace):
    x = X if trace is compiled else jnp.asarray(X.numpy())
    with pytest.raises(Exception, match="x_scale= and out= are not taken"):
        trace(lambda a: lb.linear(a, W, x_format="int8_row", x_scale=1.0))(x)
    with pytest.raises(Exception, match="do not multiply"):
        trace(lambda a: lb.matmul(a, W))(x)

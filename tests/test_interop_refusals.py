"""What would be silently wrong is refused: by argument, by what came, with what would do."""

import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lowbit.interop import Origin, from_numpy, to_numpy

TORCH = Origin("torch")
JAX = Origin("jax", str(jax.devices("cpu")[0]))


class Wrapper(torch.Tensor):  # type: ignore[misc]
    """What DTensor and quantized subclasses are: a tensor without memory of its own."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("lowbit must not compute with it")


class Quantized:
    """A QArray's border: a shape, a format, and no silent way to NumPy."""

    shape = (3,)
    format = "int4_g128"
    __iter__ = None

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self

    def __array__(self, dtype=None, copy=None):
        raise TypeError("call .dequantize() for values")


def fake():
    with FakeTensorMode():
        return torch.empty(3)


def negated():
    return torch.ones(3, dtype=torch.complex64).conj().imag


def unlisted(name):
    """What torch has and its stubs do not."""
    return getattr(torch, name)


def deleted():
    x = jnp.ones(3)
    x.delete()
    return x


REFUSALS = {
    "bool": (lambda: np.ones(3, bool), TypeError, r"dtype bool .*\.astype\(np\.uint8\)"),
    "bool list": (lambda: [True, False], TypeError, "dtype bool "),
    "complex": (lambda: np.ones(3, complex), TypeError, "dtype complex128 .*imaginary"),
    "complex number": (lambda: 1j, TypeError, "dtype complex128 "),
    "datetime": (lambda: np.zeros(3, "M8[s]"), TypeError, r"datetime64\[s\] .*np\.int64"),
    "timedelta": (lambda: np.zeros(3, "m8[s]"), TypeError, r"timedelta64\[s\] .*np\.int64"),
    "longdouble": (lambda: np.ones(3, np.longdouble), TypeError, r"\.astype\(np\.float64\)"),
    "object": (lambda: np.array([1, None]), TypeError, "dtype object .*np.asarray"),
    "none": (lambda: None, TypeError, "dtype object "),
    "dictionary": (dict, TypeError, "dtype object "),
    "string": (lambda: "int4", TypeError, "dtype <U4 .*convert it to numbers"),
    "bytes": (lambda: b"int4", TypeError, r"dtype \|S4 "),
    "structured": (lambda: np.zeros(3, "f4,i4"), TypeError, "dtype .*does not hold real"),
    "ragged": (lambda: [[1], [2, 3]], ValueError, "list does not become .*inhomogeneous"),
    "masked": (lambda: np.ma.ones(3), TypeError, r"masked array .*weight\.filled\(0\)"),
    "matrix": (lambda: np.ones((3, 3)).view(np.matrix), TypeError, r"np\.asarray\(weight\)"),
    "quantized": (Quantized, TypeError, r"Quantized does not become .*call \.dequantize\(\)"),
    "quantized list": (lambda: [Quantized()], TypeError, r"call \.dequantize\(\)"),
    "proxy": (
        lambda: torch.fx.Proxy(torch.fx.Graph().placeholder("x")),
        ValueError,
        "Proxy does not become",
    ),
    "torch bool": (lambda: torch.ones(3) > 0, TypeError, r"torch\.bool .*to\(torch\.uint8\)"),
    "torch complex": (lambda: torch.ones(3) * 1j, TypeError, r"torch\.complex64 .*imaginary"),
    "torch int4": (
        lambda: torch.empty(3, dtype=unlisted("int4")),
        TypeError,
        r"torch\.int4 .*whole bytes .*weight\.view\(torch\.uint8\)",
    ),
    "torch uint2": (lambda: torch.empty(3, dtype=unlisted("uint2")), TypeError, r"torch\.uint2 "),
    "torch quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        TypeError,
        r"qint8 .*weight\.dequantize\(\)",
    ),
    "torch negated": (negated, ValueError, r"minus sign; pass weight\.resolve_neg\(\)"),
    "torch grad": (
        lambda: torch.ones(3, requires_grad=True),
        ValueError,
        r"weight\.detach\(\), or work under torch\.no_grad\(\) or torch\.inference_mode\(\)",
    ),
    "torch meta": (lambda: torch.ones(3, device="meta"), BufferError, "meta device .*no memory"),
    "torch sparse": (lambda: torch.eye(3).to_sparse(), TypeError, r"sparse_coo .*\.to_dense\(\)"),
    "torch mkldnn": (lambda: torch.ones(3, 3).to_mkldnn(), TypeError, r"_mkldnn .*\.to_dense\(\)"),
    "torch fake": (fake, TypeError, "FakeTensor .*no memory; .*registered custom op"),
    "torch wrapper": (Wrapper, TypeError, "Wrapper keeps its values .*plain torch.Tensor"),
    "torch zero": (
        lambda: unlisted("_efficientzerotensor")((3,)),
        TypeError,
        "no memory of its own",
    ),
    "jax complex": (lambda: jnp.ones(3, complex), TypeError, "dtype complex64 "),
    "jax bool": (lambda: jnp.ones(3, bool), TypeError, "dtype bool "),
    "jax key": (lambda: jax.random.key(0), TypeError, "does not become .*key_data"),
    "jax deleted": (deleted, ValueError, "deleted or donated"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_be_silently_wrong_is_refused(name):
    make, error, text = REFUSALS[name]
    x = make()
    with pytest.raises(error, match=re.compile(rf"\Aweight: .*{text}", re.DOTALL)):
        to_numpy(x, "weight")


def test_the_lazy_minus_sign_is_really_missing_from_memory():
    tensor = torch.view_as_real(torch.tensor([1 + 2j])).select(-1, 1)
    lazy = torch.tensor([1 + 2j]).conj().imag
    assert np.from_dlpack(lazy) == -lazy.resolve_neg().numpy()
    assert to_numpy(lazy.resolve_neg(), "x")[0].tolist() == [-2.0]
    assert to_numpy(tensor, "x")[0].tolist() == [2.0]


def test_nested_tensors_are_refused():
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match=r"\Ax: a nested tensor .*to_padded_tensor"):
        to_numpy(nested, "x")
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"\Ax: NestedTensor .*to_padded_tensor"):
        to_numpy(jagged, "x")


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_tensors_under_torch_func_have_no_memory(transform):
    def function(x):
        to_numpy(x, "x")
        return x.sum()

    with pytest.raises(TypeError, match=r"\Ax: .*torch\.func has no memory"):
        transform(function)(torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "trace",
    [
        lambda function: torch.jit.trace(function, torch.ones(3)),
        lambda function: make_fx(function)(torch.ones(3)),
    ],
    ids=["jit", "make_fx"],
)
def test_traces_do_not_swallow_results_as_constants(trace):
    with pytest.raises(TypeError, match=r"\Ax: .*constant of torch's trace.*custom op"):
        trace(lambda x: from_numpy(to_numpy(x, "x")[0] * 2, TORCH))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_tangents_are_not_dropped():
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        dual = forward.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(ValueError, match=r"\Ax: .*tangent.*unpack_dual\(x\)\.primal"):
            to_numpy(dual, "x")
        primal = forward.unpack_dual(dual).primal
        assert to_numpy(primal, "x")[0].tolist() == [1.0] * 3


def test_tensors_on_a_gpu_without_cupy_are_refused_with_what_to_install(monkeypatch):
    # It takes no GPU to have a tensor without memory that says it is on one.
    monkeypatch.setitem(sys.modules, "cupy", None)

    class Elsewhere(Wrapper):
        pass

    tensor = torch.Tensor._make_wrapper_subclass(Elsewhere, (3,), device=torch.device("cuda:0"))
    Elsewhere.__torch_dispatch__ = torch.Tensor.__torch_dispatch__  # type: ignore[method-assign]
    with pytest.raises(BufferError, match=r'\Ax: .* on cuda:0, .*pip install "lowbit\[cuda13\]"'):
        to_numpy(tensor, "x")


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_jax_tracers_have_no_memory(transform):
    def function(x):
        to_numpy(x, "x")
        return x.sum()

    with pytest.raises(TypeError, match=r"\Ax: a JAX tracer .*no memory; .*registered custom op"):
        transform(function)(jnp.ones(3) if transform is not jax.vmap else jnp.ones((2, 3)))


@pytest.mark.parametrize("name", ["float8_e4m3", "float6_e2m3fn", "float4_e2m1fn", "int4"])
def test_torch_is_not_given_a_dtype_it_lacks(name):
    x = np.zeros(3, getattr(ml_dtypes, name))
    with pytest.raises(TypeError, match=f"torch .* has no dtype for {name}"):
        from_numpy(x, TORCH)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64])
def test_jax_does_not_narrow_a_result_in_silence(dtype):
    with pytest.raises(ValueError, match=f"{np.dtype(dtype)} result.*jax_enable_x64.*out_dtype="):
        from_numpy(np.ones(3, dtype), JAX)

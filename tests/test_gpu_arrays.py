"""Arrays on a real GPU: bits of the host, callers' streams and graphs, other libraries' memory."""

import pickle
from typing import Any

import numpy as np
import pytest
from launchers import no_gpu

import lowbit as lb

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 256)).astype(np.float32)
W = RNG.normal(size=(48, 256)).astype(np.float32)
FORMATS = ["int4_g32", "fp8_row", "uint4_g64_asym", "mxfp4", "nvfp4", "nf4_g64", "int3_g32"]


@pytest.fixture
def cupy() -> Any:
    reason = no_gpu()
    if reason is not None:
        pytest.skip(reason)
    import cupy

    return cupy


def same(there: lb.QArray, here: lb.QArray) -> None:
    back = there.to_device("cpu")
    for name in ("codes", "scales", "zeros", "biases", "tensor_scale"):
        a, b = getattr(back, name), getattr(here, name)
        assert (a is None) == (b is None)
        if b is not None:
            assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def close(got: Any, x: Any, w: lb.QArray) -> None:
    """What every kernel of a GPU promises: values of w rounded to bfloat16, sums of float32."""
    wide, values = np.asarray(x, np.float64), w.dequantize(np.float64)
    # 2**-8 for a value of w, and at most 3 K roundings of 2**-23 in the sum.
    bound = 2.0**-8 * 1.01 + 3 * wide.shape[1] * 2.0**-23
    assert (abs(got - wide @ values.T) <= bound * (abs(wide) @ abs(values).T)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_the_host(cupy, name):
    numbers = abs(W) if name.startswith("u") else W
    here = lb.quantize(numbers, name)
    there = lb.quantize(cupy.asarray(numbers), name)
    assert there.device == f"cuda:{cupy.cuda.runtime.getDevice()}"
    same(there, here)
    same(here.to_device("cuda"), here)
    same(pickle.loads(pickle.dumps(there)), here)
    values: Any = there.dequantize()
    np.testing.assert_array_equal(values.get(), here.dequantize())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_products(cupy, name, dtype):
    here = lb.quantize(W, name) if not name.startswith("u") else lb.quantize(abs(W), name)
    x = X.astype(dtype)
    there = cupy.asarray(x)
    got = there @ here.to_device("cuda").T
    assert type(got) is cupy.ndarray
    kernel = lb.explain(there, here.to_device("cuda").T).kernel
    assert kernel.startswith("matmul.cuda")
    close(got.get(), x, here)


def test_slices_and_joins(cupy):
    here = lb.quantize(W, "int4_g32")
    there = here.to_device("cuda")
    same(there[3:40:2], here[3:40:2])
    same(there[[5, 1]], here[[5, 1]])
    same(there[:, 64:128], here[:, 64:128])
    same(lb.concatenate([there, there]), lb.concatenate([here, here]))
    same(lb.stack([there, there])[1], here)
    same(there * 0.5, here * 0.5)
    same(-there, -here)


def test_a_plan_is_captured_in_a_graph(cupy):
    w = lb.quantize(cupy.asarray(W), "int4_g32")
    x, out = cupy.asarray(X.astype(np.float16)), cupy.empty((5, 48), np.float32)
    plan = lb.plan(x, w.T, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        plan(x)  # compiles, and takes what workspace it wants
        stream.begin_capture()
        plan(x)
        graph = stream.end_capture()
        stream.synchronize()
        expected = out.get()
        out[...] = 0
        graph.launch(stream=stream)
        stream.synchronize()
    np.testing.assert_array_equal(out.get(), expected)


def test_torch_on_a_stream_of_its_own(cupy):
    torch = pytest.importorskip("torch", reason="wants PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("wants a PyTorch that is built for CUDA")
    w = lb.quantize(torch.from_numpy(W).cuda(), "int4_g32")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.from_numpy(X).cuda().to(torch.bfloat16)
        got = x @ w.T
    stream.synchronize()
    assert got.device == x.device
    assert got.dtype == torch.float32
    close(got.cpu().numpy(), x.cpu().double().numpy(), w.to_device("cpu"))


def test_jax_arrays_stay_on_their_gpu(cupy):
    jax = pytest.importorskip("jax", reason="wants JAX")
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"wants a JAX that is built for CUDA: {error}")
    w = lb.quantize(jax.device_put(W, gpu), "int8_row")
    x = jax.device_put(X, gpu)
    got = x @ w.T
    assert got.devices() == {gpu}
    close(np.asarray(got), X, w.to_device("cpu"))


@pytest.mark.parametrize("name", ["int8_row", "mxfp8", "nvfp4", "fp8_2x32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_layers_that_end_in_a_quantization(cupy, name, dtype):
    x, other = (RNG.normal(size=(3, 5, 520)).astype(dtype) for _ in range(2))
    gate = np.where(x < 0, 0, 200 + abs(x)).astype(dtype)  # whose silu is exact
    for view in (np.s_[:], np.s_[0, 1], np.s_[:, ::2, ::-1], np.s_[..., 8:264]):
        held = [cupy.asarray(each)[view] for each in (gate, x, other)]
        same(lb.quantize_silu_mul(held[0], held[2], name),
             lb.quantize_silu_mul(gate[view], other[view], name))  # fmt: skip
        weight = x[view].reshape(-1, held[1].shape[-1])[0]
        there, h = lb.quantize_rmsnorm(held[1], cupy.asarray(weight), name, residual=held[2])
        here, expected = lb.quantize_rmsnorm(x[view], weight, name, residual=other[view])
        same(there, here)
        assert h.get().tobytes() == expected.tobytes()
    x[2, 1, 7] = np.inf
    with pytest.raises(ValueError, match=r"up: 1 entries .* first at \(2, 1, 7\)"):
        lb.quantize_silu_mul(cupy.asarray(gate), cupy.asarray(x), name)


def test_layers_of_torch_on_a_stream_of_its_own(cupy):
    torch = pytest.importorskip("torch", reason="wants PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("wants a PyTorch that is built for CUDA")
    x = torch.from_numpy(X).cuda().to(torch.bfloat16)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        w, h = lb.quantize_rmsnorm(x * 2, x[0], "int8_row", residual=x)
    stream.synchronize()
    here, expected = lb.quantize_rmsnorm(x.cpu() * 2, x[0].cpu(), "int8_row", residual=x.cpu())
    same(w, here)
    assert h.device == x.device
    assert torch.equal(h.cpu(), expected)

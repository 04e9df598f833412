"""Arrays of other frameworks in and out, without importing any of them.

Whoever passes a torch tensor has imported torch, so a framework is looked up in `sys.modules`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from lowbit import cuda_interop
from lowbit import device as places
from lowbit.dlpack import from_dlpack, unpack_float4

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an operand came from, so that the result can go back there."""

    framework: str
    device: str = "cpu"


NUMPY = Origin("numpy")
CUPY = Origin("cupy", "cuda")
_TORCH = Origin("torch")

_NUMBERS = {np.dtype(code).type for code in "bBhHiIlLqQefd"} | {
    getattr(ml_dtypes, name)
    for name in dir(ml_dtypes)
    if name.startswith(("bfloat", "float", "int", "uint"))
}
# The integer dtypes that carry, to and from torch, what NumPy's own DLPack refuses. torch before
# 2.9 refuses float8 as well, and a relabelled capsule costs 1 us more than two views.
_CARRIERS = {
    "bfloat16": "int16",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
}
# torch dtype -> the carrier to view it as and the dtype of the values, or neither. Filled at the
# first tensor; not a functools.cache, at which torch.compile warns.
_TORCH_DTYPES: dict[Any, tuple[Any, Any]] = {}
_REMEDIES = {
    "b": "convert it with .astype(np.uint8)",
    "c": "multiply its real and imaginary parts separately",
    "f": "convert it with .astype(np.float64)",
    "M": "convert it with .astype(np.int64)",
    "m": "convert it with .astype(np.int64)",
    "O": "make an array of numbers of one shape, as np.asarray(x, dtype=np.float32) would",
}


def read(x: Any, argument: str, *, kept: bool = False) -> tuple[NDArray[Any], Origin]:
    """View `x` as an array of real numbers and say where the result belongs.

    An array of NumPy, or of CuPy where the memory is a GPU's. Memory is shared wherever these can
    address it. A kind of array that is not NumPy's, CuPy's, torch's or JAX's is read through
    DLPack or `__array__`. `kept` says that the view outlives the call.
    """
    kind = type(x)
    if kind is np.ndarray or kind is places.gpu_array:
        if x.dtype.type in _NUMBERS:
            return x, NUMPY if kind is np.ndarray else CUPY
        _refuse_dtype(x.dtype, argument)
    torch: Any = sys.modules.get("torch")
    if isinstance(x, getattr(torch, "Tensor", ())):
        tensor: Any = x
        array = _from_torch(tensor, argument, torch, kept)
        return array, _torch_origin(str(tensor.device)) if tensor.is_cuda else _TORCH
    jax: Any = sys.modules.get("jax")
    origin = NUMPY
    if isinstance(x, getattr(jax, "Array", ())):
        array, origin = _from_jax(x, argument, jax)
    elif places.is_gpu_array(x):
        array, origin = x, CUPY
    elif cuda_interop.on_gpu(x):
        array, origin = (
            _convert(lambda x: cuda_interop.from_capsule(x, argument), x, argument),
            CUPY,
        )
    else:
        array = _from_any(x, argument)
    if array.dtype.type not in _NUMBERS:
        _refuse_dtype(array.dtype, argument)
    return array, origin


def to_numpy(x: Any, argument: str, *, kept: bool = False) -> tuple[NDArray[Any], Origin]:
    """View `x` as `read` does, on the host: what is on a GPU is copied, which waits for it."""
    array, origin = read(x, argument, kept=kept)
    return array if isinstance(array, np.ndarray) else places.of(array).get(array), origin


def from_numpy(array: NDArray[Any], origin: Origin) -> Any:
    """Hand an array back in the framework and on the device of `origin`, sharing its memory.

    torch knows neither read-only nor unaligned memory, foreign byte order nor negative strides,
    so it gets a copy of such an array. JAX arrays are committed to their device; JAX itself copies
    what is not C-contiguous or does not begin on a multiple of 64 bytes. An array on a GPU stays
    there.
    """
    if origin.framework in ("numpy", "cupy"):
        return array
    if origin.framework == "torch":
        return _to_torch(array)
    if not isinstance(array, np.ndarray):
        return cuda_interop.to_jax(array)
    return _to_jax(array, origin.device)


def stream(origin: Origin, place: places.Place) -> AbstractContextManager[Any]:
    """Where to launch what belongs to an operand: on torch's current stream, if it is torch's."""
    if origin.framework == "torch" and origin.device != "cpu":
        return cuda_interop.torch_stream(origin.device)
    return place.current()


def written(x: Any) -> None:
    """Tell torch that a tensor's memory has changed, so that autograd notices stale values."""
    if type(x) is np.ndarray:
        return
    torch: Any = sys.modules.get("torch")
    if isinstance(x, getattr(torch, "Tensor", ())):
        torch.autograd.graph.increment_version(x)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return uninitialised C-contiguous memory that begins on a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    memory = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    # A third of the price of memory.ctypes.data.
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory.data))
    return np.ndarray(shape, dtype, memory, -address % ALIGNMENT)


def _refuse_dtype(dtype: np.dtype[Any], argument: str) -> NoReturn:
    remedy = _REMEDIES.get(dtype.kind, "convert it to numbers first")
    if dtype.type.__module__ == "ml_dtypes":
        remedy = _REMEDIES["c"]
    raise TypeError(
        f"{argument}: dtype {dtype} does not hold real numbers of at most 64 bits; {remedy}"
    )


def _from_any(x: Any, argument: str) -> NDArray[Any]:
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{argument}: a masked array has no values where it is masked; "
                f"pass {argument}.filled(0)"
            )
        if isinstance(x, np.matrix):
            raise TypeError(
                f"{argument}: np.matrix multiplies and slices by rules of its own; "
                f"pass np.asarray({argument})"
            )
        return np.asarray(x)
    # Asked of the type: instances of torch.fx.Proxy and of mocks have every attribute.
    if hasattr(type(x), "__dlpack__"):
        return _convert(from_dlpack, x, argument)
    return _convert(np.asarray, x, argument)


def _convert(how: Callable[[Any], NDArray[Any]], x: Any, argument: str) -> NDArray[Any]:
    try:
        return how(x)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        kinds = (BufferError, ValueError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), TypeError)
        name = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        raise kind(f"{argument}: {name} does not become a NumPy array: {error}") from error


def _list_torch_dtypes(torch: Any) -> None:
    native = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
    dtypes: dict[Any, tuple[Any, Any]] = {getattr(torch, name): (None, None) for name in native}
    for name, carrier in _CARRIERS.items():
        if hasattr(torch, name):
            dtypes[getattr(torch, name)] = getattr(torch, carrier), getattr(ml_dtypes, name)
    if hasattr(torch, "float4_e2m1fn_x2"):
        dtypes[torch.float4_e2m1fn_x2] = torch.uint8, ml_dtypes.float4_e2m1fn
    _TORCH_DTYPES.update(dtypes)  # in one step: another thread may be reading


def _from_torch(x: Any, argument: str, torch: Any, kept: bool) -> NDArray[Any]:
    """View a tensor whose memory holds its values; refuse every other kind."""
    if torch.compiler.is_compiling():
        # dynamo would trace this very function; having seen it raise, it runs it on real tensors.
        _refuse_tracing("torch.compile traces with tensors that have no memory", argument)
    kind = type(x)
    if kind is not torch.Tensor and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        _refuse_torch_subclass(kind.__name__, argument)
    if not _TORCH_DTYPES:
        _list_torch_dtypes(torch)
    known = _TORCH_DTYPES.get(x.dtype)
    if known is None:
        _refuse_torch_dtype(x, argument, torch)
    if x.is_nested or x.layout is not torch.strided:
        _refuse_torch_layout(x, argument)
    if not (x.is_cpu or (x.is_cuda and not torch.version.hip)):
        _refuse_torch_device(x, argument)
    if x.is_cuda:
        places.gpu(x.device.index, f"{argument}: the tensor is on {x.device}")
    if not _has_memory(x):
        _refuse_tracing("a tensor transformed by torch.func has no memory of its own", argument)
    if _is_tracing(torch):
        _refuse_tracing("the result would become a constant of torch's trace", argument)
    if x.is_neg():
        raise ValueError(
            f"{argument}: torch negates this tensor lazily and its memory lacks the minus sign; "
            f"pass {argument}.resolve_neg()"
        )
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{argument}: the tensor carries a forward-mode tangent, which lowbit would drop; pass "
            f"torch.autograd.forward_ad.unpack_dual({argument}).primal"
        )
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError(
                f"{argument}: the tensor requires grad, and lowbit records none; pass "
                f"{argument}.detach(), or work under torch.no_grad() or torch.inference_mode()"
            )
        x = x.detach()
    carrier, dtype = known
    if carrier is not None:
        x = x.view(carrier)
    if x.is_cuda:
        wide = np.dtype(str(x.dtype).removeprefix("torch.") if dtype is None else dtype)
        return cuda_interop.torch_view(x, wide)
    # x.numpy() forbids for good to resize the caller's storage. FSDP has to do that to operands,
    # but under the parts of an array it would free memory that the array still reads.
    array: NDArray[Any] = x.numpy() if kept else np.from_dlpack(x)
    if not array.flags.writeable:  # NumPy 2.0 or torch before 2.9: capsules without flags
        array = x.numpy()
    if dtype is None:
        return array
    return unpack_float4(array) if dtype is ml_dtypes.float4_e2m1fn else array.view(dtype)


def _has_memory(x: Any) -> bool:
    try:
        return bool(x.data_ptr() or not x.numel())
    except RuntimeError:  # batched and differentiated by torch.func
        return False


def _is_tracing(torch: Any) -> bool:
    """Tell whether torch.jit.trace or make_fx records the operations on real tensors."""
    proxies: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    mode = None if proxies is None else proxies.get_proxy_mode()
    return mode is not None or bool(torch.jit.is_tracing())


def _refuse_tracing(reason: str, argument: str) -> NoReturn:
    raise TypeError(
        f"{argument}: {reason}; call lowbit outside of the traced function, or inside of it "
        "through the registered custom op"
    )


def _refuse_torch_subclass(name: str, argument: str) -> NoReturn:
    if name in ("FakeTensor", "FunctionalTensor"):
        _refuse_tracing(
            f"a {name} stands for values while torch traces and has no memory", argument
        )
    raise TypeError(
        f"{argument}: {name} keeps its values by rules of its own, not in one strided memory; "
        "pass a plain torch.Tensor of them (DTensor has .full_tensor(), a padded jagged tensor "
        ".to_padded_tensor(0.0))"
    )


def _refuse_torch_dtype(x: Any, argument: str, torch: Any) -> NoReturn:
    if x.is_quantized:
        remedy = f"pass {argument}.dequantize() for the values or .int_repr() for the integers"
    elif x.is_complex():
        remedy = _REMEDIES["c"]
    elif x.dtype == torch.bool:
        remedy = f"convert it with {argument}.to(torch.uint8)"
    else:
        remedy = (
            "torch exports it as whole bytes of unknown content; "
            f"pass {argument}.view(torch.uint8) or view(torch.int8) if they hold one value each"
        )
    raise TypeError(f"{argument}: a tensor of {x.dtype} does not hold real numbers; {remedy}")


def _refuse_torch_layout(x: Any, argument: str) -> NoReturn:
    if x.is_nested:
        raise TypeError(
            f"{argument}: a nested tensor has rows of many lengths; pass "
            f"{argument}.to_padded_tensor(0.0)"
        )
    raise TypeError(f"{argument}: a tensor of layout {x.layout} is not dense; pass .to_dense()")


def _refuse_torch_device(x: Any, argument: str) -> NoReturn:
    if x.is_meta:
        raise BufferError(
            f"{argument}: a tensor on torch's meta device has a shape and no memory; load its "
            "values onto the CPU first"
        )
    raise BufferError(
        f"{argument}: the torch tensor is on {x.device}, where lowbit's CPU kernels cannot read "
        f"it; pass {argument}.cpu()"
    )


def _to_torch(array: NDArray[Any]) -> Any:
    torch: Any = sys.modules["torch"]
    dtype = array.dtype
    # Also of contiguous arrays: NumPy calls np.ones((1, 4))[::-1] contiguous.
    strided = all(stride >= 0 and stride % dtype.itemsize == 0 for stride in array.strides)
    if not (strided and array.flags.behaved and dtype.isnative):
        array = _copy(array)
    if dtype.type.__module__ != "ml_dtypes":
        # Of NumPy's two 64-bit unsigned types torch takes one; both are called "<u8".
        return torch.from_numpy(array.view(array.dtype.str) if dtype.kind == "u" else array)
    if dtype.name not in _CARRIERS or not hasattr(torch, dtype.name):
        raise TypeError(f"torch {torch.__version__} has no dtype for {dtype.name} results")
    return torch.from_numpy(array.view(_CARRIERS[dtype.name])).view(getattr(torch, dtype.name))


def _from_jax(x: Any, argument: str, jax: Any) -> tuple[NDArray[Any], Origin]:
    if isinstance(x, jax.core.Tracer):
        _refuse_tracing(
            "a JAX tracer stands for values under jit, grad or vmap and has no memory", argument
        )
    try:
        devices = x.devices()
    except RuntimeError as error:
        raise ValueError(f"{argument}: the JAX array was deleted or donated") from error
    device = next(iter(devices))
    if len(devices) == 1 and device.platform == "gpu" and cuda_interop.on_gpu(x):
        array = _convert(lambda x: cuda_interop.from_capsule(x, argument), x, argument)
        return array, _jax_origin(str(device))
    if len(devices) > 1 or device.platform != "cpu":
        raise BufferError(
            f"{argument}: the JAX array is on {', '.join(sorted(map(str, devices)))}, lowbit's CPU "
            f"kernels read one host memory; pass jax.device_put({argument}, jax.devices('cpu')[0])"
        )
    # Waits for the values, and shares the memory (packed 4-bit and smaller integers aside).
    return _convert(np.asarray, x, argument), _jax_origin(str(device))


@functools.cache
def _torch_origin(device: str) -> Origin:
    return Origin("torch", device)


@functools.cache
def _jax_origin(device: str) -> Origin:
    return Origin("jax", device)


def _to_jax(array: NDArray[Any], device: str) -> Any:
    jax: Any = sys.modules["jax"]
    if not array.dtype.isnative:
        array = _copy(array)
    target = next(d for d in jax.local_devices(backend="cpu") if str(d) == device)
    result = jax.device_put(array, target)
    if result.dtype != array.dtype:
        raise ValueError(
            f"JAX holds a {array.dtype} result as {result.dtype} unless jax_enable_x64 is set; set "
            f"it, or ask for out_dtype={result.dtype.name!r}"
        )
    return result


def _copy(array: NDArray[Any]) -> NDArray[Any]:
    copy = empty(array.shape, array.dtype.newbyteorder("="))
    copy[...] = array
    return copy

"""Arrays of other frameworks in and out, without importing any of them.

Whoever passes a torch tensor has imported torch, so a framework is looked up in `sys.modules`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from lowbit.dlpack import from_dlpack, unpack_float4

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an operand came from, so that the result can go back there."""

    framework: str
    device: str = "cpu"


NUMPY = Origin("numpy")
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
_REMEDIES = {
    "b": "convert it with .astype(np.uint8)",
    "c": "multiply its real and imaginary parts separately",
    "f": "convert it with .astype(np.float64)",
    "M": "convert it with .astype(np.int64)",
    "m": "convert it with .astype(np.int64)",
    "O": "make an array of numbers of one shape, as np.asarray(x, dtype=np.float32) would",
}


def to_numpy(x: Any, argument: str) -> tuple[NDArray[Any], Origin]:
    """View `x` as a NumPy array of real numbers and say where the result belongs.

    Memory is shared wherever NumPy can address it. A kind of array that is not NumPy's, torch's
    or JAX's is read through DLPack or `__array__`, and its results are NumPy arrays.
    """
    if type(x) is np.ndarray:
        if x.dtype.type in _NUMBERS:
            return x, NUMPY
        _refuse_dtype(x.dtype, argument)
    torch: Any = sys.modules.get("torch")
    if isinstance(x, getattr(torch, "Tensor", ())):
        return _from_torch(x, argument, torch), _TORCH
    jax: Any = sys.modules.get("jax")
    if isinstance(x, getattr(jax, "Array", ())):
        array, origin = _from_jax(x, argument, jax)
    else:
        array, origin = _from_any(x, argument), NUMPY
    if array.dtype.type not in _NUMBERS:
        _refuse_dtype(array.dtype, argument)
    return array, origin


def from_numpy(array: NDArray[Any], origin: Origin) -> Any:
    """Hand an array back in the framework and on the device of `origin`, sharing its memory.

    torch knows neither read-only memory, foreign byte order nor negative strides: such an array
    is copied for it. JAX arrays are committed to the device, and alias memory aligned to 64 bytes.
    """
    if origin.framework == "numpy":
        return array
    if origin.framework == "torch":
        return _to_torch(array)
    return _to_jax(array, origin.device)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return uninitialised C-contiguous memory that begins on a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    memory = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    # A third of the price of memory.ctypes.data.
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return np.ndarray(shape, dtype, memory, -address % ALIGNMENT)


def _refuse_dtype(dtype: np.dtype[Any], argument: str) -> NoReturn:
    remedy = _REMEDIES.get(dtype.kind, "convert it to numbers first")
    if dtype.type.__module__ == "ml_dtypes":
        remedy = _REMEDIES["c"]
    raise TypeError(f"{argument}: dtype {dtype} does not hold real numbers of at most 64 bits; {remedy}")


def _from_any(x: Any, argument: str) -> NDArray[Any]:
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{argument}: a masked array has no values behind its mask; pass {argument}.filled(0)"
            )
        if isinstance(x, np.matrix):
            raise TypeError(
                f"{argument}: np.matrix multiplies and slices by rules of its own; "
                f"pass np.asarray({argument})"
            )
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    try:
        # Asked of the type: the instances of torch.fx.Proxy and of mocks have every attribute.
        if not isinstance(x, np.ndarray | np.generic) and hasattr(type(x), "__dlpack__"):
            return from_dlpack(x)
        return np.asarray(x)
    except BufferError as error:
        raise BufferError(f"{argument}: {kind}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{argument}: {kind} did not turn into an array: {error}") from error
    except (TypeError, RuntimeError, AttributeError) as error:
        raise TypeError(f"{argument}: {kind} did not turn into an array: {error}") from error


@functools.cache
def _torch_dtypes() -> dict[Any, tuple[Any, Any]]:
    """Map a torch dtype to the carrier it is viewed as, and to the NumPy dtype of the values."""
    torch: Any = sys.modules["torch"]
    native = ("float16", "float32", "float64", "int8", "int16", "int32", "int64")
    native += ("uint8", "uint16", "uint32", "uint64")
    dtypes: dict[Any, tuple[Any, Any]] = {getattr(torch, name): (None, None) for name in native}
    for name, carrier in _CARRIERS.items():
        if hasattr(torch, name):
            dtypes[getattr(torch, name)] = (getattr(torch, carrier), getattr(ml_dtypes, name))
    if hasattr(torch, "float4_e2m1fn_x2"):
        dtypes[torch.float4_e2m1fn_x2] = (torch.uint8, ml_dtypes.float4_e2m1fn)
    return dtypes


def _from_torch(x: Any, argument: str, torch: Any) -> NDArray[Any]:
    _check_torch(x, argument, torch)
    carrier, dtype = _torch_dtypes().get(x.dtype) or _refuse_torch_dtype(x, argument)
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError(
                f"{argument}: the tensor requires grad, which lowbit does not compute; pass "
                f"{argument}.detach(), or work under torch.no_grad() or torch.inference_mode()"
            )
        x = x.detach()
    if carrier is not None:
        x = x.view(carrier)
    # Not x.numpy(): it forbids for good to resize the caller's storage, which FSDP has to do.
    array: NDArray[Any] = np.from_dlpack(x)
    if dtype is None:
        return array
    return unpack_float4(array) if dtype is ml_dtypes.float4_e2m1fn else array.view(dtype)


def _check_torch(x: Any, argument: str, torch: Any) -> None:
    """Refuse tensors whose memory, where they have any, does not hold their values."""
    kind = type(x)
    if kind is not torch.Tensor and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        _refuse_torch_subclass(kind.__name__, argument)
    if x.layout is not torch.strided or x.is_nested:
        name = "a nested tensor" if x.is_nested else f"a {x.layout} tensor"
        raise TypeError(f"{argument}: {name} has no strided memory; make it dense with .to_dense()")
    if not x.is_cpu:
        raise BufferError(
            f"{argument}: the torch tensor is on device {x.device}, lowbit reads host memory here; "
            f"pass {argument}.cpu()" + " with data in it" * x.is_meta
        )
    if _address(x) == 0 and x.numel():
        _refuse_memoryless(f"the torch tensor under a transform of torch.func", argument)
    if _is_torch_tracing(torch):
        raise TypeError(
            f"{argument}: torch is tracing, and the result would become a constant of the trace; "
            "trace lowbit's registered custom op instead, or use torch.compile"
        )
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{argument}: the tensor carries a forward-mode tangent, which would be lost; pass "
            f"torch.autograd.forward_ad.unpack_dual({argument}).primal"
        )
    if x.is_neg() or x.is_conj():
        raise ValueError(
            f"{argument}: torch negates or conjugates this tensor lazily, and its memory has the "
            f"values before; pass {argument}.resolve_neg().resolve_conj()"
        )

"""Memory of a GPU that torch, JAX or another library owns, as CuPy arrays and back.

Nothing here waits for the device. Kernels run on the stream that is torch's current one, and JAX
orders its own streams by DLPack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit import device as places
from lowbit import dlpack

_CUDA = 2  # DLPack's number


def torch_view(x: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """View a CUDA tensor, whatever its strides, as a CuPy array that keeps it alive.

    By its address: a capsule would have torch and CuPy order their streams, which are one here.
    """
    number, cupy = x.device.index, sys.modules["cupy"]
    size, strides = dtype.itemsize, x.stride()
    span = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1 if x.numel() else 0
    memory = cupy.cuda.UnownedMemory(x.data_ptr(), span * size, x, number)
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    view: NDArray[Any] = cupy.ndarray(
        tuple(x.shape), dtype, pointer, strides=tuple(s * size for s in strides)
    )
    return view


def from_capsule(x: Any, argument: str) -> NDArray[Any]:
    """View any object with `__dlpack__` on a GPU; the producer makes CuPy's stream wait for it."""
    number = int(x.__dlpack_device__()[1])
    name = f"{type(x).__module__}.{type(x).__qualname__}"
    place = places.gpu(number, f"{argument}: {name} is on cuda:{number}")
    producer = dlpack.Relabelled(x)
    with place.current():
        array: NDArray[Any] = place.xp.from_dlpack(producer)
    dtype = producer.dtype
    return array if dtype is None else array.view(dtype)


def on_gpu(x: Any) -> bool:
    """Whether an object that is not torch's has its memory on a GPU of NVIDIA."""
    if not hasattr(type(x), "__dlpack_device__"):
        return False
    return int(x.__dlpack_device__()[0]) == _CUDA


def torch_result(
    shape: tuple[int, ...], dtype: np.dtype[Any], name: str
) -> tuple[Any, NDArray[Any]]:
    """A new tensor of torch's own allocator, and a view for kernels to write to.

    torch's memory may be captured in torch's graphs, and is reused in the order of its streams.
    """
    torch: Any = sys.modules["torch"]
    tensor = torch.empty(shape, dtype=getattr(torch, dtype.name), device=name)
    return tensor, torch_view(tensor, dtype)


def to_jax(array: NDArray[Any]) -> Any:
    """An array of JAX on the same GPU that shares the memory."""
    return sys.modules["jax"].dlpack.from_dlpack(dlpack.Exported(array))


@contextmanager
def torch_stream(name: str) -> Iterator[None]:
    """Launch on torch's current stream of this device."""
    place = places.named(name)
    assert isinstance(place, places.Gpu)
    theirs = sys.modules["torch"].cuda.current_stream(place.number).cuda_stream
    with place.current():
        if place.xp.cuda.get_current_stream().ptr == theirs:
            yield
        else:
            with places.wrapped_stream(place.xp.cuda, theirs):
                yield

"""Kernels on a real GPU, through CuPy: what `launch.Machine` promises, in order of the streams."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit.kernels.cuda import compile, tensor_maps
from lowbit.kernels.cuda.launch import Device, Function, Source
from lowbit.kernels.cuda.tensor_maps import TensorMap

_PLAIN_SHARED = 48 * 1024  # bytes that a block may have without asking
_PER_THREAD = 2  # the stream handle that means another stream in every thread
_MOST = 2**31 - 1  # of a size that cuBLAS counts


@cache
def machine(device_id: int) -> Gpu:
    """Return the GPU of this number."""
    return Gpu(device_id)


def _by_value(array: npt.NDArray[Any]) -> Any:
    """An array of one element as a launch passes it, made beforehand: that takes 0.8 us."""
    import cupy

    return cupy.cuda.function.CNumpyArray(array)


@lru_cache(maxsize=4096)
def number(kind: type[np.generic], value: float) -> Any:
    """Return what `launch.Machine.number` promises."""
    return _by_value(np.array(value, kind))


class _Shared(NamedTuple):
    stream: Any
    """Kept, so that no other stream gets its handle while this one's kernels still use it."""
    array: Any
    outgrown: tuple[Any, ...]
    """Kept, because a captured graph may hold their addresses."""


class Gpu:
    """A `launch.Machine` on CuPy arrays. Nothing here waits for the GPU."""

    def __init__(self, device_id: int) -> None:
        import cupy

        found = cupy.cuda.runtime.getDeviceProperties(device_id)
        capability = 10 * found["major"] + found["minor"]
        self.device = Device(capability, found["multiProcessorCount"])
        self._cupy = cupy
        self._id = device_id
        self._driver = cupy.cuda.runtime.driverGetVersion()
        self.number: Callable[..., Any] = number
        self._functions: dict[Source, Function] = {}
        self._shared: dict[tuple[str, int, int], _Shared] = {}
        self._lock = threading.Lock()

    def function(self, source: Source) -> Function:
        """Return the compiled kernel, loaded on this GPU."""
        found = self._functions.get(source)
        if found is None:
            with self._lock:
                found = self._functions.get(source)
                if found is None:
                    found = self._functions[source] = self._load(source)
        return found

    def _load(self, source: Source) -> Function:
        code, name = compile.cubin(source, self.device.capability, driver=self._driver)
        cuda = self._cupy.cuda
        with cuda.Device(self._id):
            module = cuda.function.Module()
            module.load(code)
            function = module.get_function(name)
            if source.shared > _PLAIN_SHARED:
                attribute = cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                cuda.driver.funcSetAttribute(function.ptr, attribute, source.shared)
        return _Loaded(self._cupy, self._id, function)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Return new memory of this GPU."""
        with self._cupy.cuda.Device(self._id):
            return self._cupy.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Return new memory of this GPU, zeroed in the order of the current stream."""
        with self._cupy.cuda.Device(self._id):
            array = self._cupy.empty(shape, dtype)
            if array.nbytes:
                array.data.memset_async(0, array.nbytes)
            return array

    def counters(self, count: int) -> Any:
        """Return int32 zeros that every kernel of the current stream shares."""
        return self._of_stream("counters", count)

    def scratch(self, count: int) -> Any:
        """Return words of any contents that every kernel of the current stream shares."""
        return self._of_stream("scratch", count)

    def _of_stream(self, kind: str, count: int) -> Any:
        with self._cupy.cuda.Device(self._id):
            stream = self._cupy.cuda.get_current_stream()
            key = kind, stream.ptr, threading.get_ident() if stream.ptr == _PER_THREAD else 0
            known = self._shared.get(key)
            if known is None or known.array.size < count:
                with self._lock:
                    known = self._shared[key] = self._more(stream, key, count)
            return known.array

    def _more(self, stream: Any, key: tuple[str, int, int], count: int) -> _Shared:
        known = self._shared.get(key)
        outgrown: tuple[Any, ...] = ()
        if known is not None:
            if known.array.size >= count:
                return known
            outgrown = (*known.outgrown, known.array)
        # Powers of two: what was outgrown is never more than what is there.
        array = self.zeros((1 << max(count - 1, 255).bit_length(),), np.int32)
        return _Shared(stream, array, outgrown)

    def matmul(self, x: Any, w: Any) -> Any:
        """Return x @ w.T in float32 by cuBLAS, products and sums no narrower."""
        (m, k), n = x.shape, w.shape[0]
        if max(m, n, k) > _MOST:
            raise ValueError(f"matmul: cuBLAS counts to {_MOST}, got {m} x {k} and {n} x {k}")
        if not (m and n and k):
            return self.zeros((m, n), np.float32)
        blas, runtime = cublas(), self._cupy.cuda.runtime
        if x.dtype == np.float32:
            # Pedantic: no TF32, whatever the process has switched on.
            number, computed = runtime.CUDA_R_32F, blas.CUBLAS_COMPUTE_32F_PEDANTIC
        else:
            number, computed = runtime.CUDA_R_16BF, blas.CUBLAS_COMPUTE_32F
        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        out = self.empty((m, n), np.float32)
        # cuBLAS counts columns first, so it sees every array transposed: out.T = w x.T.
        w_turned, w_pitch = _pitch(w, "w")
        x_turned, x_pitch = _pitch(x, "x")
        with self._cupy.cuda.Device(self._id) as device:
            blas.gemmEx(
                device.cublas_handle,
                blas.CUBLAS_OP_N if w_turned else blas.CUBLAS_OP_T,
                blas.CUBLAS_OP_T if x_turned else blas.CUBLAS_OP_N,
                n,
                m,
                k,
                one.ctypes.data,
                w.data.ptr,
                number,
                w_pitch,
                x.data.ptr,
                number,
                x_pitch,
                zero.ctypes.data,
                out.data.ptr,
                runtime.CUDA_R_32F,
                n,
                computed,
                blas.CUBLAS_GEMM_DEFAULT,
            )
        return out

    def settle(self) -> None:
        """Wait for the current stream; an error while it is being captured in a graph."""
        with self._cupy.cuda.Device(self._id):
            stream = self._cupy.cuda.get_current_stream()
            if stream.is_capturing():
                raise RuntimeError(
                    "the first product of this weight makes what its kernel works with, which a "
                    "graph cannot hold: call it once before the capture"
                )
            stream.synchronize()

    def address(self, array: Any) -> int:
        """Return where an array begins."""
        found: int = array.data.ptr
        return found

    encode = staticmethod(tensor_maps.encode)

    @staticmethod
    def by_value(data: bytes) -> Any:
        """Return an argument for a parameter that is a struct of these bytes."""
        return _by_value(np.frombuffer(data, f"V{len(data)}"))

    def tensor_map(self, array: Any, box: tuple[int, int], *, swizzle: int) -> Any:
        """Return an argument for a parameter of type `lb::TensorMap`; the array has to stay."""
        return _encoded(
            array.data.ptr, array.shape, array.strides, array.itemsize, tuple(box), swizzle
        )


class _Loaded:
    """A kernel on its GPU, launched on the stream that is current when it is called."""

    def __init__(self, cupy: Any, device_id: int, function: Any) -> None:
        self._current, self._device = cupy.cuda.runtime.getDevice, cupy.cuda.Device(device_id)
        self._id = device_id
        self._function = function

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Launch."""
        if self._current() == self._id:
            self._function(grid, block, args, shared_mem)
        else:
            with self._device:
                self._function(grid, block, args, shared_mem)


def cublas() -> Any:
    """Return CuPy's binding of cuBLAS, which CuPy finds where pip or a toolkit has put it."""
    try:
        from cupy_backends.cuda.libs import cublas as found
    except ImportError as error:
        raise ImportError(f"cuBLAS is not found: {compile.remedy()}") from error
    return found


def _pitch(array: Any, name: str) -> tuple[bool, int]:
    """Whether columns lie together instead of rows, and the numbers from one to the next."""
    (rows, columns), size = array.shape, array.itemsize
    down, along = (stride // size for stride in array.strides)
    if (columns == 1 or along == 1) and (rows == 1 or down >= columns):
        return False, columns if rows == 1 else down
    if (rows == 1 or down == 1) and (columns == 1 or along >= rows):
        return True, rows if columns == 1 else along
    raise ValueError(
        f"matmul: want {name} with rows or columns without gaps, got shape {array.shape}, strides "
        f"{array.strides}"
    )


@lru_cache(maxsize=1024)
def _encoded(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    box: tuple[int, int],
    swizzle: int,
) -> Any:
    """What cuTensorMapEncodeTiled makes of an array, as a launch passes it."""
    _refuse_tensor_map(address, shape, strides, itemsize, box, swizzle)
    wanted = TensorMap(
        f"uint{8 * itemsize}", address, shape[::-1], strides[:1], box[::-1], swizzle
    )  # fmt: skip
    return _by_value(np.frombuffer(tensor_maps.encode(wanted), "V128"))


def _refuse_tensor_map(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    box: tuple[int, int],
    swizzle: int,
) -> None:
    """Say in words what the driver says by a number."""
    rows, columns = box
    why = None
    if len(shape) != 2 or not math.prod(shape) or itemsize not in (1, 2):
        why = f"a matrix of 1- or 2-byte numbers, got shape {shape}, {itemsize} bytes each"
    elif swizzle not in (0, 128):
        why = f"a swizzle of 0 or 128 bytes, got {swizzle}"
    elif not (1 <= rows <= 256 and 1 <= columns <= 256) or columns * itemsize % 16:
        why = f"a box of 1..256 rows and columns, those of a multiple of 16 bytes, got {box}"
    elif swizzle and columns * itemsize > swizzle:
        why = f"a box no wider than the swizzle's 128 bytes, got {columns} columns"
    elif strides[1] != itemsize or strides[0] % 16 or not 0 < strides[0] < 2**40:
        why = f"columns without gaps and rows at multiples of 16 bytes, got strides {strides}"
    elif address % 16:
        why = f"an array at a multiple of 16 bytes, got address {address:#x}"
    if why is not None:
        raise ValueError(f"tensor_map: want {why}")

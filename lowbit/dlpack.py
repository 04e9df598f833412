"""DLPack for the dtypes that NumPy refuses to exchange: bfloat16, float8 and packed float4.

A capsule's tensor is allocated per export, so its four-byte dtype may be rewritten before anybody
consumes it: to a plain integer on the way into NumPy, to the true dtype on the way out. Ownership,
deleter, strides, offset and the read-only flag stay with NumPy's and the producer's own C code.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_FLOAT4_PAIRS = (17, 4, 2)

# DLPack's (code, bits, lanes) of the dtypes that NumPy cannot name itself.
_DTYPES: dict[tuple[int, int, int], np.dtype[Any]] = {
    (4, 16, 1): np.dtype(ml_dtypes.bfloat16),
    (7, 8, 1): np.dtype(ml_dtypes.float8_e3m4),
    (8, 8, 1): np.dtype(ml_dtypes.float8_e4m3),
    (9, 8, 1): np.dtype(ml_dtypes.float8_e4m3b11fnuz),
    (10, 8, 1): np.dtype(ml_dtypes.float8_e4m3fn),
    (11, 8, 1): np.dtype(ml_dtypes.float8_e4m3fnuz),
    (12, 8, 1): np.dtype(ml_dtypes.float8_e5m2),
    (13, 8, 1): np.dtype(ml_dtypes.float8_e5m2fnuz),
    (14, 8, 1): np.dtype(ml_dtypes.float8_e8m0fnu),
    _FLOAT4_PAIRS: np.dtype(np.uint8),
}
_LABELS = {dtype: label for label, dtype in _DTYPES.items() if label != _FLOAT4_PAIRS}
_CARRIERS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.uint16}
_UNSIGNED = 1

_DEVICES = {1: "cpu", 2: "cuda", 3: "cuda_host", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm"}
_DEVICES |= {11: "rocm_host", 13: "cuda_managed", 14: "oneapi", 15: "webgpu", 16: "hexagon"}
# Managed memory (13) is left out: a kernel of the producer may still be writing it.
_HOST = (1, 3, 11)

# NumPy 2.0 exports and reads capsules without a version, and its __dlpack__ knows `stream` only.
_VERSIONED = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


class _Tensor(ctypes.Structure):
    """The beginning of DLTensor; its shape, strides and offset are nobody's business here."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


class _Versioned(ctypes.Structure):
    """The beginning of DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Own prototypes: ctypes.pythonapi's function objects are shared by the whole process.
_is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _tensor(capsule: Any) -> _Tensor:
    """Return the tensor inside a capsule, which the capsule goes on owning."""
    if _is_capsule(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_address(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            # Only the fields before the tensor keep their places across major versions.
            raise BufferError(f"DLPack version {versioned.major} is not understood, 1 would be")
        tensor: _Tensor = versioned.tensor
        return tensor
    if _is_capsule(capsule, b"dltensor"):
        return _Tensor.from_address(_address(capsule, b"dltensor"))
    raise BufferError(f"__dlpack__ gave {capsule!r}, not a capsule that nobody has consumed yet")


class Relabelled:
    """Stands between a producer and NumPy or CuPy, and makes integers of dtypes they refuse."""

    __slots__ = ("label", "producer")

    def __init__(self, producer: Any) -> None:
        self.producer = producer
        self.label = (0, 0, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        device_type, device_id = self.producer.__dlpack_device__()
        return int(device_type), int(device_id)

    def __dlpack__(
        self, *, stream: Any = None, max_version: tuple[int, int] | None = None, **_: Any
    ) -> Any:
        order = {} if stream is None else {"stream": stream}
        try:
            capsule = self.producer.__dlpack__(max_version=max_version, **order)
        except TypeError:  # a producer older than DLPack 1.0
            capsule = self.producer.__dlpack__(**order)
        tensor = _tensor(capsule)
        self.label = label = (tensor.code, tensor.bits, tensor.lanes)
        if label in _DTYPES:
            tensor.code, tensor.bits, tensor.lanes = _UNSIGNED, max(8, tensor.bits), 1
        elif tensor.bits < 8 or tensor.lanes != 1:
            raise BufferError(
                f"elements of {tensor.bits} bits in {tensor.lanes} lanes (DLPack code "
                f"{tensor.code}) have no NumPy dtype; pass them as uint8 codes"
            )
        return capsule

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """What the integers of the last capsule have to be viewed as, if anything."""
        return None if self.label == _FLOAT4_PAIRS else _DTYPES.get(self.label)


def from_dlpack(x: Any) -> NDArray[Any]:
    """View any object with `__dlpack__` in host memory, float8 and bfloat16 included.

    Packed pairs of float4 are the exception: they come back as a copy, one value per element,
    with the last axis twice as long.
    """
    producer = Relabelled(x)
    device_type, device_id = producer.__dlpack_device__()
    if device_type not in _HOST:
        name = _DEVICES.get(device_type, f"DLPack device {device_type}")
        raise BufferError(f"the memory is on {name}:{device_id}; copy it to the host first")
    array: NDArray[Any] = np.from_dlpack(producer)
    if producer.label == _FLOAT4_PAIRS:
        return unpack_float4(array)
    dtype = producer.dtype
    return array if dtype is None else array.view(dtype)


def unpack_float4(pairs: NDArray[np.uint8]) -> NDArray[Any]:
    """Spread bytes of two float4 values, the first in the low nibble, over a last axis of 2n."""
    if not pairs.ndim:
        raise BufferError("one pair of float4 values without an axis; reshape it to (1,)")
    values = np.stack((pairs & 15, pairs >> 4), axis=-1)
    shape = (*pairs.shape[:-1], 2 * pairs.shape[-1])
    return values.reshape(shape).view(ml_dtypes.float4_e2m1fn)


class Exported:
    """An array that torch.from_dlpack and jax.dlpack.from_dlpack take, bfloat16 and float8 too.

    It shares the memory and follows the rules of the array's library: a read-only array of NumPy
    goes only to consumers that ask for DLPack 1.0, and memory is given where it is, on the host
    or, of a CuPy array, on its GPU.
    """

    __slots__ = ("_carrier", "_device", "_label")

    def __init__(self, array: NDArray[Any]) -> None:
        dtype = array.dtype
        self._device = (1, 0) if isinstance(array, np.ndarray) else _place(array)
        if not dtype.isnative:
            raise BufferError(f"DLPack has native byte order only, not {dtype.str}; use .astype()")
        if min(array.strides, default=0) < 0:
            # torch 2.13 takes such a capsule and aborts the process.
            raise BufferError(
                f"strides {array.strides} are negative, which consumers of DLPack do not "
                "survive; pass np.ascontiguousarray(array)"
            )
        label = _LABELS.get(dtype)
        if label is None and dtype.type.__module__ == "ml_dtypes":
            raise BufferError(f"DLPack has no one-byte {dtype.name}; pass array.view(np.uint8)")
        self._label = label
        self._carrier: Any = array if label is None else array.view(_CARRIERS[dtype.itemsize])

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's kind and number of the device: the host's are (1, 0)."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a capsule; the keywords are those of the array API."""
        if dl_device is not None and tuple(map(int, dl_device)) != self._device:
            name = f"{_DEVICES[self._device[0]]}:{self._device[1]}"
            raise BufferError(f"the memory is on {name}, not on DLPack device {tuple(dl_device)}")
        if _VERSIONED or not isinstance(self._carrier, np.ndarray):
            capsule = self._carrier.__dlpack__(stream=stream, max_version=max_version, copy=copy)
        else:
            carrier = self._carrier.copy() if copy else self._carrier
            capsule = carrier.__dlpack__(stream=stream)
        if self._label is not None:
            tensor = _tensor(capsule)
            tensor.code, tensor.bits, tensor.lanes = self._label
        return capsule


def _place(array: Any) -> tuple[int, int]:
    kind, number = array.__dlpack_device__()
    return int(kind), int(number)

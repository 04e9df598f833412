"""Descriptors of arrays that TMA copies in boxes."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

KINDS = (
    "uint8",
    "uint16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "float32, subnormal numbers as zeros",
    "tfloat32",
    "tfloat32, subnormal numbers as zeros",
    "uint4",
)
"""In the order of CUtensorMapDataType. Of uint4, sixteen lie in 8 bytes, here and there."""
SWIZZLES = (0, 32, 64, 128)
"""Bytes, in the order of CUtensorMapSwizzle."""


@dataclass(frozen=True)
class TensorMap:
    """What a descriptor says; axes begin with the one whose numbers lie side by side."""

    kind: str
    """Type of a number, one of KINDS."""
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """Bytes from one to the next, of every axis but the first."""
    box: tuple[int, ...]
    swizzle: int = 0
    """Bytes of a row in shared memory whose pieces trade places."""
    piece: int = 16
    """Bytes of such a piece; 32 of rows of 128 only."""

    @property
    def swizzling(self) -> int:
        """As CUtensorMapSwizzle numbers it."""
        return SWIZZLES.index(self.swizzle) + (self.piece == 32)


def encode(wanted: TensorMap) -> bytes:
    """The 128 bytes that the driver makes of it."""
    rank = len(wanted.sizes)
    held = (ctypes.c_uint64 * 24)()
    place = (ctypes.addressof(held) + 63) // 64 * 64  # the driver wants 64-byte alignment here
    status = _encode_tiled()(
        place,
        KINDS.index(wanted.kind),
        rank,
        wanted.address,
        (ctypes.c_uint64 * rank)(*wanted.sizes),
        (ctypes.c_uint64 * rank)(*wanted.strides, 0),
        (ctypes.c_uint32 * rank)(*wanted.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # no interleaving
        wanted.swizzling,
        2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
        0,  # zeros outside of the array
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: CUDA error {status} for {wanted}")
    return ctypes.string_at(place, 128)


@cache
def _encode_tiled() -> ctypes._NamedFuncPointer:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    function = library.cuTensorMapEncodeTiled
    number, longs, words = (
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint32),
    )
    function.argtypes = [
        ctypes.c_void_p, number, ctypes.c_uint32, ctypes.c_void_p, longs, longs, words, words,
        number, number, number, number,
    ]  # fmt: skip
    return function

"""Capsules carry the dtypes that NumPy refuses, and follow NumPy's rules in all else."""

import ctypes
import gc
import sys
import weakref
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit import dlpack
from lowbit.dlpack import Exported, from_dlpack, unpack_float4
from lowbit.interop import NUMPY, empty, to_numpy

TORCH_FLOATS = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
JAX_FLOATS = (*TORCH_FLOATS, "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz")


class Producer:
    """Any framework's array that is neither NumPy's, torch's nor JAX's."""

    def __init__(self, array, device=None):
        self.array = array
        self.device = device

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


class OldProducer(Producer):
    """From before DLPack 1.0: knows no keyword."""

    def __dlpack__(self, **options):
        if options:
            raise TypeError(f"unexpected keywords {options}")
        return self.array.__dlpack__()


class Capsule(Producer):
    """Gives a capsule made beforehand."""

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        return self.array


def fields(capsule: Any) -> Any:
    """Where a capsule's version or flags (8 bytes) and its dtype (4 bytes) are."""
    get = ctypes.PYFUNCTYPE(ctypes.c_size_t, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    versioned = "dltensor_versioned" in repr(capsule)
    address = get(capsule, b"dltensor_versioned" if versioned else b"dltensor")
    dtype = (ctypes.c_uint8 * 4).from_address(address + 20 + (32 if versioned else 0))
    if not versioned:
        return None, None, dtype
    major = ctypes.c_uint32.from_address(address)
    return major, ctypes.c_uint64.from_address(address + 24), dtype


def pointer(array):
    return array.__array_interface__["data"][0]


def every_code(name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    codes = empty((256**dtype.itemsize,), np.dtype(f"u{dtype.itemsize}"))
    codes[...] = np.arange(codes.size)
    return codes.view(dtype)


# --- in


@pytest.mark.parametrize("kind", [Producer, OldProducer])
@pytest.mark.parametrize("name", [*TORCH_FLOATS, "float32", "int8", "uint64"])
def test_torch_memory_is_viewed_through_dlpack(kind, name):
    codes = torch.arange(96, dtype=torch.uint8).reshape(3, 32)
    tensor = codes.view(getattr(torch, name))[:, ::2]
    array, origin = to_numpy(kind(tensor), "x")
    assert origin is NUMPY
    assert array.dtype == np.dtype(name)
    assert pointer(array) == tensor.data_ptr() == codes.data_ptr()
    size = array.itemsize
    expected = codes.numpy().reshape(3, -1, size)[:, ::2]
    np.testing.assert_array_equal(
        np.ascontiguousarray(array).view(np.uint8), expected.reshape(3, -1)
    )
    assert array.flags.writeable == (kind is Producer)  # NumPy trusts versioned capsules only


@pytest.mark.parametrize("name", TORCH_FLOATS)
def test_every_code_of_torch_comes_in_unchanged(name):
    x = every_code(name)
    carrier = torch.from_numpy(x.view(f"u{x.itemsize}"))
    tensor = carrier.view(getattr(torch, name))
    array = from_dlpack(tensor)
    assert pointer(array) == pointer(x)
    assert (array.dtype, array.tobytes()) == (x.dtype, x.tobytes())


@pytest.mark.parametrize("name", JAX_FLOATS)
def test_every_code_of_jax_comes_in_unchanged(name):
    x = every_code(name)
    there = jax.device_put(x)
    array = from_dlpack(there)
    assert pointer(array) == there.unsafe_buffer_pointer()
    assert (array.dtype, array.tobytes()) == (x.dtype, x.tobytes())
    assert not array.flags.writeable


def test_pairs_of_float4_are_unpacked_low_nibble_first():
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    array = from_dlpack(codes.view(torch.float4_e2m1fn_x2))
    assert (array.dtype, array.shape) == (ml_dtypes.float4_e2m1fn, (16, 32))
    np.testing.assert_array_equal(array.view(np.uint8)[:, 0::2], codes.numpy() & 15)
    np.testing.assert_array_equal(array.view(np.uint8)[:, 1::2], codes.numpy() >> 4)
    with pytest.raises(BufferError, match=r"without an axis; reshape it to \(1,\)"):
        unpack_float4(np.array(3, np.uint8))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ((10, 0), "rocm:0"),
        ((13, 0), "cuda_managed:0"),
        ((99, 3), "device 99:3"),
    ],
)
def test_memory_that_is_not_the_hosts_is_refused_with_its_device(device, name):
    with pytest.raises(BufferError, match=rf"\Aweight: .*Producer .*on .*{name}; copy it to the"):
        to_numpy(Producer(np.ones(3), device), "weight")


@pytest.mark.parametrize("device", [(3, 0), (11, 0)])
def test_pinned_memory_is_the_hosts(device):
    x = np.ones(3)
    assert pointer(from_dlpack(Producer(x, device))) == pointer(x)


def labelled(code, bits, lanes, array=None):
    capsule = (np.zeros(8, np.uint8) if array is None else array).__dlpack__(max_version=(1, 0))
    fields(capsule)[2][:] = [code, bits, lanes % 256, lanes // 256]
    return Capsule(capsule)


@pytest.mark.parametrize("label", [(0, 4, 1), (1, 2, 4), (17, 4, 1), (15, 6, 1), (2, 32, 4)])
def test_elements_without_a_numpy_dtype_are_refused(label):
    text = f"elements of {label[1]} bits in {label[2]} lanes .*code {label[0]}.*uint8 codes"
    with pytest.raises(BufferError, match=rf"\Ax: .*{text}"):
        to_numpy(labelled(*label), "x")


def test_unknown_and_unreal_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"\Ax: .*Unsupported dtype"):
        to_numpy(labelled(99, 8, 1), "x")
    with pytest.raises(TypeError, match=r"\Ax: dtype bool "):
        to_numpy(Producer(np.ones(3, bool)), "x")
    with pytest.raises(TypeError, match=r"\Ax: dtype complex64 "):
        to_numpy(Producer(torch.ones(3, dtype=torch.complex64)), "x")


def test_a_capsule_of_another_major_version_is_not_read():
    capsule = np.ones(3).__dlpack__(max_version=(1, 0))
    major, _, label = fields(capsule)
    before = list(label)
    major.value = 2
    with pytest.raises(BufferError, match=r"\Ax: .*DLPack version 2 is not understood, 1 would be"):
        to_numpy(Capsule(capsule), "x")
    assert list(label) == before


def test_what_is_not_a_fresh_capsule_is_refused():
    used = np.ones(3).__dlpack__()
    torch.from_dlpack(used)
    for thing in (used, None, 3):
        with pytest.raises(BufferError, match="not a capsule that nobody has consumed"):
            from_dlpack(Capsule(thing))


# --- out


@pytest.mark.parametrize("name", TORCH_FLOATS)
def test_every_code_goes_out_to_torch_unchanged(name):
    x = every_code(name)
    tensor = torch.from_dlpack(Exported(x))
    assert tensor.dtype == getattr(torch, name)
    assert tensor.data_ptr() == pointer(x)
    assert tensor.view({1: torch.uint8, 2: torch.uint16}[x.itemsize]).tolist() == list(
        range(x.size)
    )


@pytest.mark.parametrize("name", JAX_FLOATS)
def test_every_code_goes_out_to_jax_unchanged(name):
    x = every_code(name)
    there = jax.dlpack.from_dlpack(Exported(x))
    assert there.dtype == x.dtype
    assert there.unsafe_buffer_pointer() == pointer(x)
    assert np.asarray(there).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int64"])
def test_native_dtypes_go_out_as_numpy_sends_them(dtype):
    x = np.arange(12).reshape(3, 4).astype(dtype)[:, ::2]
    assert pointer(np.from_dlpack(Exported(x))) == pointer(x)
    tensor = torch.from_dlpack(Exported(x))
    assert tensor.data_ptr() == pointer(x)
    assert tensor.tolist() == x.tolist()


def test_numpy_refuses_the_label_instead_of_misreading_it():
    with pytest.raises(RuntimeError, match="Unsupported dtype"):
        np.from_dlpack(Exported(np.ones(3, ml_dtypes.bfloat16)))
    back = from_dlpack(Exported(np.ones(3, ml_dtypes.bfloat16)))
    assert back.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_read_only_arrays_go_only_to_those_who_can_know(dtype):
    x = np.ones(3, dtype)
    x.flags.writeable = False
    for old in (None, (0, 8)):
        with pytest.raises(BufferError, match="readonly"):
            Exported(x).__dlpack__(max_version=old)
    _, flags, _ = fields(Exported(x).__dlpack__(max_version=(1, 0)))
    assert flags.value & 1
    x = np.ones(3, dtype)
    _, flags, _ = fields(Exported(x).__dlpack__(max_version=(1, 0)))
    assert flags.value == 0


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_version_is_negotiated(dtype):
    x = Exported(np.ones(3, dtype))
    assert '"dltensor"' in repr(x.__dlpack__())
    assert '"dltensor"' in repr(x.__dlpack__(max_version=(0, 8)))
    assert '"dltensor_versioned"' in repr(x.__dlpack__(max_version=(1, 3)))
    assert list(fields(x.__dlpack__())[2]) == list(fields(x.__dlpack__(max_version=(1, 0)))[2])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.float8_e4m3fn])
def test_copies_are_made_on_request_and_marked(dtype):
    x = np.ones(4, dtype)
    copied = torch.from_dlpack(Exported(x), copy=True)
    assert copied.data_ptr() != pointer(x)
    assert copied.dtype == torch.from_dlpack(Exported(x), copy=False).dtype
    assert torch.from_dlpack(Exported(x), copy=False).data_ptr() == pointer(x)
    _, flags, _ = fields(Exported(x).__dlpack__(max_version=(1, 0), copy=True))
    assert flags.value == 2


def test_other_devices_and_streams_are_refused():
    x = Exported(np.ones(3, ml_dtypes.bfloat16))
    assert x.__dlpack_device__() == (1, 0)
    assert "dltensor" in repr(x.__dlpack__(dl_device=(1, 0)))
    with pytest.raises(BufferError, match=r"on cpu:0, not on DLPack device \(2, 0\)"):
        x.__dlpack__(dl_device=(2, 0))
    with pytest.raises(RuntimeError, match="stream"):
        x.__dlpack__(stream=1)


def test_what_consumers_would_misread_is_not_exported():
    # torch 2.13 aborts the process on the first.
    with pytest.raises(BufferError, match=r"strides \(-8,\) are negative.*np.ascontiguousarray"):
        Exported(np.ones(3)[::-1])
    with pytest.raises(BufferError, match=r"native byte order only, not >f4; use \.astype"):
        Exported(np.ones(3, ">f4"))
    for name in ("float4_e2m1fn", "float6_e2m3fn", "int4", "uint2"):
        with pytest.raises(BufferError, match=f"no one-byte {name}; pass array.view"):
            Exported(np.zeros(3, getattr(ml_dtypes, name)))


# --- lifetimes


@pytest.mark.parametrize("consume", [torch.from_dlpack, jax.dlpack.from_dlpack, from_dlpack])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_exported_memory_lives_as_long_as_the_consumer(consume, dtype):
    x = empty((64,), dtype)
    x[...] = 1
    alive = weakref.ref(x.base)
    there = consume(Exported(x))
    del x
    gc.collect(0)
    assert alive() is not None
    assert float(there[63]) == 1
    del there
    gc.collect(0)
    assert alive() is None


def test_an_unused_capsule_lets_go():
    x = np.ones(3, ml_dtypes.bfloat16)
    references = sys.getrefcount(x)
    Exported(x).__dlpack__(max_version=(1, 0))
    Exported(x).__dlpack__()
    assert sys.getrefcount(x) == references


@pytest.mark.parametrize("consume", [torch.from_dlpack, jax.dlpack.from_dlpack, from_dlpack])
def test_ten_thousand_exports_leave_no_reference(consume):
    x = empty((64,), ml_dtypes.bfloat16)
    references = sys.getrefcount(x), sys.getrefcount(x.base)
    for _ in range(10_000):
        consume(Exported(x))
    gc.collect(0)
    assert (sys.getrefcount(x), sys.getrefcount(x.base)) == references


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_ten_thousand_imports_leave_no_reference(framework):
    x = empty((64,), np.float32)
    alive = weakref.ref(x.base)
    there = torch.from_numpy(x) if framework == "torch" else jax.device_put(x)
    producer = Producer(there.view(torch.bfloat16) if framework == "torch" else there)
    references = sys.getrefcount(producer), sys.getrefcount(there)
    for _ in range(10_000):
        from_dlpack(producer)
    assert (sys.getrefcount(producer), sys.getrefcount(there)) == references
    del x, there, producer
    gc.collect(0)
    assert alive() is None


def test_refused_capsules_leave_no_reference():
    x = np.zeros(8, np.uint8)
    references = sys.getrefcount(x)
    for _ in range(100):
        with pytest.raises(BufferError):
            from_dlpack(labelled(0, 4, 1, x))
    assert sys.getrefcount(x) == references


# --- NumPy 2.0


class Numpy20(np.ndarray):
    """An array whose `__dlpack__` is that of NumPy 2.0."""

    def __dlpack__(self, **options):
        if options.keys() - {"stream"}:
            raise TypeError(f"unexpected keywords {options}")
        return super().__dlpack__()


def test_numpy_20_exports_without_versions(monkeypatch):
    monkeypatch.setattr(dlpack, "_VERSIONED", False)
    x = np.arange(4).astype(ml_dtypes.bfloat16).view(Numpy20)
    tensor = torch.from_dlpack(Exported(x))
    assert tensor.dtype == torch.bfloat16
    assert tensor.data_ptr() == pointer(x)
    copied = torch.from_dlpack(Exported(x), copy=True)
    assert copied.data_ptr() != pointer(x)
    assert copied.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert '"dltensor"' in repr(Exported(x).__dlpack__(max_version=(1, 0)))
    x.flags.writeable = False
    with pytest.raises(BufferError, match="readonly"):
        Exported(x).__dlpack__(max_version=(1, 0))

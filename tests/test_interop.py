"""Every framework's arrays go in and come back, sharing memory, bit by bit, or are refused."""

import gc
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lowbit.interop import NUMPY, Origin, empty, from_numpy, to_numpy

TORCH = Origin("torch")
JAX = Origin("jax", str(jax.devices("cpu")[0]))

NATIVE = tuple(np.dtype(code) for code in "bBhHiIqQefd")
TORCH_FLOATS = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
JAX_FLOATS = (*TORCH_FLOATS, "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz")
SMALL = {name: np.dtype(getattr(ml_dtypes, name)) for name in JAX_FLOATS}


def pointer(array):
    return array.__array_interface__["data"][0]


def bits(array):
    """The bytes of an array's elements in order, whatever its layout and byte order."""
    return array.astype(array.dtype.newbyteorder("="), order="C").tobytes()


def every_code(dtype):
    """All 256 or 65,536 values, in memory that JAX takes as it is."""
    codes = empty((256**dtype.itemsize,), np.dtype(f"u{dtype.itemsize}"))
    codes[...] = np.arange(codes.size)
    return codes.view(dtype)


def memmap(array):
    with tempfile.TemporaryFile() as file:
        copy = np.memmap(file, array.dtype, "w+", shape=array.shape)
    copy[...] = array
    return copy


def unaligned(array):
    copy = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def strided(array):
    copy = np.zeros(tuple(2 * size + 1 for size in array.shape), array.dtype)
    view = copy[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def readonly(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def aligned(array):
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


LAYOUTS = {
    "aligned": aligned,
    "bigendian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "broadcast": lambda array: np.broadcast_to(array, (3, *array.shape)),
    "fortran": np.asfortranarray,
    "memmap": memmap,
    "offset": lambda array: np.concatenate([array[:1], array])[1:],
    "readonly": readonly,
    "reversed": lambda array: np.ascontiguousarray(array[::-1])[::-1],
    "strided": strided,
    "unaligned": unaligned,
}
# What torch can hold: torch.from_numpy refuses the others.
TORCH_LAYOUTS = ("aligned", "fortran", "memmap", "offset", "strided", "unaligned")
SHAPES = st.lists(st.sampled_from([1, 2, 3, 16, 17]), min_size=1, max_size=3).map(tuple)


@st.composite
def arrays(draw, dtypes, layouts=tuple(LAYOUTS)):
    """Every bit pattern of every dtype, NaNs included, in hostile memory."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(SHAPES)
    codes = np.random.default_rng(draw(st.integers(0, 99))).bytes(
        int(np.prod(shape)) * dtype.itemsize
    )
    layout = draw(st.sampled_from(layouts))
    return layout, LAYOUTS[layout](np.frombuffer(codes, dtype).reshape(shape).copy())


# --- NumPy


@given(arrays((*NATIVE, *SMALL.values())))
def test_numpy_arrays_pass_in_any_layout(case):
    layout, x = case
    array, origin = to_numpy(x, "x")
    assert origin is NUMPY
    assert type(array) is np.ndarray
    assert pointer(array) == pointer(x)
    assert (array.strides, array.dtype, array.flags.writeable) == (
        x.strides,
        x.dtype,
        x.flags.writeable,
    )
    if layout != "memmap":
        assert array is x
    assert from_numpy(array, origin) is array


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]])),
        (((1.5, 2), (3, 4)), np.array([[1.5, 2], [3, 4]])),
        (3, np.array(3)),
        (2.5, np.array(2.5)),
        (np.float32(2.5), np.array(2.5, np.float32)),
        (ml_dtypes.bfloat16(2.5), np.array(2.5, ml_dtypes.bfloat16)),
        (range(3), np.arange(3)),
        (memoryview(b"\x01\x02"), np.array([1, 2], np.uint8)),
        ([np.float32(1), np.float32(2)], np.array([1, 2], np.float32)),
        ([], np.zeros(0)),
    ],
)
def test_numbers_and_nested_lists_become_what_asarray_makes_of_them(x, expected):
    array, origin = to_numpy(x, "x")
    assert origin is NUMPY
    assert type(array) is np.ndarray
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_objects_with_only_array_are_read_through_it():
    class Frame:
        values = np.arange(6.0).reshape(2, 3)

        def __array__(self, dtype=None, copy=None):
            return self.values

    array, origin = to_numpy(Frame(), "x")
    assert array is Frame.values
    assert origin is NUMPY


# --- torch


def torch_from(x):
    """The same memory as a tensor, not through the code under test."""
    if x.dtype in NATIVE:
        return torch.from_numpy(x.view(x.dtype.str))  # torch knows one of two uint64
    return torch.from_numpy(x.view(f"i{x.dtype.itemsize}")).view(getattr(torch, x.dtype.name))


TORCH_DTYPES = (*NATIVE, *(SMALL[name] for name in TORCH_FLOATS))


@given(arrays(TORCH_DTYPES, TORCH_LAYOUTS))
def test_torch_tensors_are_viewed_in_place(case):
    _, x = case
    tensor = torch_from(x)
    array, origin = to_numpy(tensor, "x")
    assert origin == TORCH
    assert origin is to_numpy(tensor, "y")[1]
    assert array.dtype == x.dtype
    assert pointer(array) == tensor.data_ptr() == pointer(x)
    assert array.shape == x.shape
    assert [s for s, n in zip(array.strides, x.shape, strict=True) if n > 1] == [
        s for s, n in zip(x.strides, x.shape, strict=True) if n > 1
    ]
    assert array.flags.writeable
    assert array.flags.aligned == x.flags.aligned
    assert bits(array) == bits(x)


@given(arrays(TORCH_DTYPES))
def test_torch_gets_the_memory_unless_it_could_not_hold_it(case):
    layout, x = case
    tensor = from_numpy(x, TORCH)
    assert type(tensor) is torch.Tensor
    assert str(tensor.dtype) == f"torch.{x.dtype.name}"
    assert tuple(tensor.shape) == x.shape
    assert bits(to_numpy(tensor, "tensor")[0]) == bits(x)
    behaved = x.flags.behaved and x.dtype.isnative and min(x.strides) >= 0
    assert (tensor.data_ptr() == pointer(x)) == behaved, layout
    if not behaved:
        assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("origin", [TORCH, JAX], ids=lambda origin: origin.framework)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_scalars_and_empty_arrays_keep_shape_and_dtype(shape, origin, dtype):
    x = aligned(np.ones(shape, np.float32).astype(dtype))
    there = from_numpy(x, origin)
    assert tuple(there.shape) == shape
    back, came_from = to_numpy(there, "x")
    assert came_from == origin
    assert (back.shape, back.dtype, bits(back)) == (shape, x.dtype, bits(x))


def test_one_row_reversed_counts_as_contiguous_and_still_reaches_torch():
    x = np.arange(4.0).reshape(1, 4)[::-1]
    assert x.flags.carray
    assert x.strides[0] < 0
    assert from_numpy(x, TORCH).tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_writing_through_the_view_writes_the_tensor():
    tensor = torch.zeros(3, dtype=torch.bfloat16)
    to_numpy(tensor, "out")[0][1] = 2.5
    assert tensor.tolist() == [0.0, 2.5, 0.0]


def test_tensors_of_older_torch_can_be_written_too(monkeypatch):
    # Without a version there is no flag, and NumPy takes such a capsule to be read-only.
    export = torch.Tensor.__dlpack__
    monkeypatch.setattr(torch.Tensor, "__dlpack__", lambda self, stream=None: export(self))
    tensor = torch.zeros(3, dtype=torch.bfloat16)
    assert not np.from_dlpack(tensor.view(torch.int16)).flags.writeable
    array, _ = to_numpy(tensor, "out")
    array[1] = 2.5
    assert tensor.tolist() == [0.0, 2.5, 0.0]
    assert pointer(array) == tensor.data_ptr()


def test_reading_a_tensor_leaves_its_storage_resizable():
    # tensor.numpy() would not: FSDP frees and restores the storage of its parameters.
    tensor = torch.ones(4)
    array, _ = to_numpy(tensor, "x")
    del array
    tensor.untyped_storage().resize_(64)
    assert tensor.untyped_storage().nbytes() == 64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_are_read_where_grad_mode_is_off(mode):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    with mode():
        array, origin = to_numpy(parameter, "x")
    assert origin == TORCH
    assert pointer(array) == parameter.data_ptr()
    with mode():
        result = from_numpy(array, origin)
    assert not result.requires_grad


def test_tensor_subclasses_that_only_watch_functions_are_read():
    class Watched(torch.Tensor):
        pass

    tensor = torch.arange(3.0).as_subclass(Watched)
    array, origin = to_numpy(tensor, "x")
    assert origin == TORCH
    assert pointer(array) == tensor.data_ptr()


def test_pairs_of_float4_come_apart_low_nibble_first():
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)[:, ::2]
    tensor = torch.from_numpy(np.ascontiguousarray(codes)).view(torch.float4_e2m1fn_x2)
    array, origin = to_numpy(tensor, "x")
    assert origin == TORCH
    assert array.dtype == ml_dtypes.float4_e2m1fn
    assert array.shape == (16, 16)
    np.testing.assert_array_equal(array.view(np.uint8)[:, 0::2], codes & 15)
    np.testing.assert_array_equal(array.view(np.uint8)[:, 1::2], codes >> 4)


def test_torch_compile_runs_it_on_real_tensors_or_tells_why_not():
    def function(x):
        return from_numpy(to_numpy(x + 1, "x")[0] * 2, TORCH) + 3

    torch._dynamo.reset()
    broken = torch.compile(function, backend="eager")
    assert broken(torch.arange(3.0)).tolist() == [5.0, 7.0, 9.0]
    assert broken(torch.arange(4.0)).tolist() == [5.0, 7.0, 9.0, 11.0]
    torch._dynamo.reset()
    whole = torch.compile(function, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"x: torch\.compile traces .*registered custom op"):
        whole(torch.arange(3.0))


# --- JAX


@pytest.mark.parametrize("dtype", [*NATIVE, *SMALL.values()], ids=str)
def test_jax_arrays_share_memory_both_ways(dtype):
    with jax.enable_x64(True):
        x = aligned(np.arange(15).reshape(3, 5).astype(dtype))
        there = from_numpy(x, JAX)
        assert isinstance(there, jax.Array)
        assert there.committed
        assert there.devices() == {jax.devices("cpu")[0]}
        assert (there.dtype, there.shape) == (dtype, (3, 5))
        assert there.unsafe_buffer_pointer() == pointer(x)
        back, origin = to_numpy(there, "x")
    assert origin == JAX
    assert pointer(back) == pointer(x)
    assert not back.flags.writeable
    assert (back.dtype, bits(back)) == (dtype, bits(x))


@given(arrays((np.dtype(np.float32), SMALL["bfloat16"], SMALL["float8_e4m3fn"])))
def test_jax_gets_every_layout(case):
    _, x = case
    there = from_numpy(x, JAX)
    assert there.dtype == x.dtype.newbyteorder("=")
    assert bits(np.asarray(there)) == bits(x)
    if x.flags.c_contiguous and x.dtype.isnative and pointer(x) % 64 == 0:
        assert there.unsafe_buffer_pointer() == pointer(x)


def test_read_only_memory_is_shared_with_jax_whose_arrays_are_read_only_too():
    x = aligned(np.arange(4, dtype=np.float32))
    x.flags.writeable = False
    assert from_numpy(x, JAX).unsafe_buffer_pointer() == pointer(x)


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "uint2", "float4_e2m1fn"])
def test_sub_byte_jax_arrays_are_unpacked(name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    x = np.arange(8).astype(dtype)
    array, origin = to_numpy(jnp.asarray(x), "x")
    assert origin == JAX
    assert array.dtype == dtype
    assert array.tolist() == x.tolist()


def test_jax_values_are_waited_for():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 30, lambda _, y: jnp.tanh(y @ y), x)

    x = jnp.eye(300)
    expected = slow(x).block_until_ready()
    for _ in range(3):
        np.testing.assert_array_equal(to_numpy(slow(x), "x")[0], expected)


def test_a_jax_array_that_was_read_can_still_be_donated():
    x = jnp.arange(1 << 12, dtype=jnp.float32) * 2
    before = x.unsafe_buffer_pointer()
    array, _ = to_numpy(x, "x")
    del array
    y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
    assert y.unsafe_buffer_pointer() == before


def test_a_view_keeps_its_values_when_the_jax_array_is_donated():
    x = jnp.arange(1 << 12, dtype=jnp.float32) * 2
    array, _ = to_numpy(x, "x")
    jax.jit(lambda x: x + 1, donate_argnums=0)(x).block_until_ready()
    np.testing.assert_array_equal(array, np.arange(1 << 12, dtype=np.float32) * 2)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64])
def test_jax_does_not_narrow_a_result_in_silence(dtype):
    with pytest.raises(ValueError, match=f"{np.dtype(dtype)} result.*jax_enable_x64.*out_dtype="):
        from_numpy(np.ones(3, dtype), JAX)


# --- every bit


@pytest.mark.parametrize("name", TORCH_FLOATS)
def test_every_code_goes_through_torch_unchanged(name):
    x = every_code(SMALL[name])
    tensor = from_numpy(x, TORCH)
    assert tensor.dtype == getattr(torch, name)
    raw = {1: torch.uint8, 2: torch.uint16}[x.itemsize]
    assert tensor.view(raw).tolist() == list(range(x.size))
    back, _ = to_numpy(tensor, "x")
    assert pointer(back) == tensor.data_ptr() == pointer(x)
    assert (back.dtype, bits(back)) == (x.dtype, bits(x))


@pytest.mark.parametrize("name", JAX_FLOATS)
def test_every_code_goes_through_jax_unchanged(name):
    x = every_code(SMALL[name])
    there = from_numpy(x, JAX)
    assert there.dtype == x.dtype
    raw = jax.lax.bitcast_convert_type(there, {1: jnp.uint8, 2: jnp.uint16}[x.itemsize])
    assert raw.tolist() == list(range(x.size))
    back, _ = to_numpy(there, "x")
    assert pointer(back) == there.unsafe_buffer_pointer() == pointer(x)
    assert (back.dtype, bits(back)) == (x.dtype, bits(x))


# --- memory for results


@given(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.sampled_from([np.float32, np.dtype(np.float64), "int8", ml_dtypes.bfloat16]),
)
def test_empty_is_aligned_contiguous_and_writeable(shape, dtype):
    array = empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert pointer(array) % 64 == 0
    assert array.flags.carray
    base = array.base
    assert pointer(base) <= pointer(array)
    assert pointer(array) + array.nbytes <= pointer(base) + base.nbytes


# --- lifetimes


def watched(shape=(16,), dtype=np.float32):
    """Aligned memory, and a weak reference that dies with it."""
    array = empty(shape, dtype)
    array[...] = 1
    return array, weakref.ref(array.base)


@pytest.mark.parametrize("origin", [TORCH, JAX], ids=lambda origin: origin.framework)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_memory_lives_exactly_as_long_as_its_last_view(origin, dtype):
    array, alive = watched(dtype=dtype)
    there = from_numpy(array, origin)
    del array
    gc.collect()
    assert alive() is not None
    back, _ = to_numpy(there, "x")
    del there
    gc.collect()
    assert alive() is not None
    assert back.astype(np.float32).tolist() == [1.0] * 16
    del back
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("origin", [TORCH, JAX], ids=lambda origin: origin.framework)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ten_thousand_reads_leave_no_reference(origin, dtype):
    array, alive = watched(dtype=dtype)
    there = from_numpy(array, origin)
    del array
    views = []
    references = sys.getrefcount(there)
    for _ in range(10_000):
        view, _ = to_numpy(there, "x")
        views.append(weakref.ref(view))
    del view
    gc.collect()
    assert sys.getrefcount(there) == references
    assert not any(view() is not None for view in views)
    del there
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("origin", [TORCH, JAX], ids=lambda origin: origin.framework)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ten_thousand_results_leave_no_reference(origin, dtype):
    array, alive = watched(dtype=dtype)
    references = sys.getrefcount(array), sys.getrefcount(array.base)
    for _ in range(10_000):
        from_numpy(array, origin)
    gc.collect()
    assert (sys.getrefcount(array), sys.getrefcount(array.base)) == references
    del array
    gc.collect()
    assert alive() is None


# --- other processes


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr


def test_no_framework_is_imported_nor_needed():
    run(
        """
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "jax", "cupy"):
                    raise AssertionError(f"{name} was imported")

        sys.meta_path.insert(0, Absent())
        import numpy as np
        from lowbit.interop import NUMPY, empty, from_numpy, to_numpy

        for x in (np.ones(3), [1.0, 2.0], np.ones(3).view(np.memmap), memoryview(b"ab")):
            array, origin = to_numpy(x, "x")
            assert origin is NUMPY and from_numpy(array, origin) is array
        try:
            to_numpy(np.ma.ones(3), "x")
        except TypeError:
            pass
        empty((3,), np.float32)
        heavy = {"torch", "jax", "cupy", "numba", "llvmlite", "rich", "typer"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )


def test_jax_results_return_to_their_device_and_sharded_arrays_are_refused():
    run(
        """
        import jax, numpy as np
        from lowbit.interop import empty, from_numpy, to_numpy

        first, second = jax.devices("cpu")
        x = jax.device_put(np.arange(4, dtype=np.float32), second)
        array, origin = to_numpy(x, "x")
        assert array.tolist() == [0, 1, 2, 3] and origin.device == str(second)
        result = empty((4,), np.float32)
        result[...] = 7
        there = from_numpy(result, origin)
        assert there.devices() == {second} and there.committed
        assert there.unsafe_buffer_pointer() == result.__array_interface__["data"][0]

        mesh = jax.sharding.Mesh(np.array([first, second]), "a")
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
        try:
            to_numpy(jax.device_put(np.ones((4, 4), np.float32), rows), "weight")
        except BufferError as error:
            text = str(error)
            assert text.startswith("weight: ") and "jax.device_put(weight" in text, text
            assert str(first) in text and str(second) in text, text
        else:
            raise AssertionError("a sharded array was read as if it were whole")
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_PLATFORMS="cpu",
    )


# --- refusals


class Wrapper(torch.Tensor):
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


def quantized_tensor():
    scale, zero = torch.tensor(0.1), torch.tensor(0)
    return torch._make_per_tensor_quantized_tensor(torch.ones(3, dtype=torch.int8), scale, zero)


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
    "proxy": (lambda: torch.fx.Graph().placeholder("x"), TypeError, "dtype object "),
    "torch bool": (lambda: torch.ones(3) > 0, TypeError, r"torch\.bool .*to\(torch\.uint8\)"),
    "torch complex": (lambda: torch.ones(3) * 1j, TypeError, r"torch\.complex64 .*imaginary"),
    "torch int4": (
        lambda: torch.empty(3, dtype=torch.int4),
        TypeError,
        r"torch\.int4 .*whole bytes .*weight\.view\(torch\.uint8\)",
    ),
    "torch uint2": (lambda: torch.empty(3, dtype=torch.uint2), TypeError, r"torch\.uint2 "),
    "torch quantized": (quantized_tensor, TypeError, r"qint8 .*weight\.dequantize\(\)"),
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
    "torch zero": (lambda: torch._efficientzerotensor((3,)), TypeError, "no memory of its own"),
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


def test_tensors_elsewhere_are_refused_with_their_device():
    # It takes no GPU to have a tensor without memory that says it is on one.
    class Elsewhere(Wrapper):
        pass

    tensor = torch.Tensor._make_wrapper_subclass(Elsewhere, (3,), device="cuda:0")
    Elsewhere.__torch_dispatch__ = torch.Tensor.__torch_dispatch__
    with pytest.raises(BufferError, match=r"\Ax: .* on cuda:0, .*pass x\.cpu\(\)"):
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


def test_origins_are_values():
    assert Origin("torch") == TORCH
    assert Origin("torch") != NUMPY
    assert len({TORCH, NUMPY, JAX, Origin("jax", JAX.device)}) == 3
    with pytest.raises(AttributeError):
        TORCH.framework = "numpy"

"""Every framework's arrays go in and come back, sharing memory, bit by bit, or are refused."""

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


LAYOUTS: dict[str, Callable[[Any], Any]] = {
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

        def __getattr__(self, name):
            if name.startswith("__dlpack"):
                return self  # protocols belong to types: a column may have any name
            raise AttributeError(name)

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


def test_single_rows_count_as_contiguous_whatever_their_stride_and_reach_torch():
    x = np.arange(4.0).reshape(1, 4)[::-1]
    assert x.flags.carray
    assert x.strides[0] < 0
    assert from_numpy(x, TORCH).tolist() == [[0.0, 1.0, 2.0, 3.0]]
    field = np.ones(1, "f4,i1")["f0"]
    assert field.flags.carray
    assert field.strides == (5,)
    assert from_numpy(field, TORCH).tolist() == [1.0]


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
    class Watched(torch.Tensor):  # type: ignore[misc]
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


def test_origins_are_values():
    assert Origin("torch") == TORCH
    assert Origin("torch") != NUMPY
    assert len({TORCH, NUMPY, JAX, Origin("jax", JAX.device)}) == 3
    with pytest.raises(AttributeError):
        TORCH.framework = "numpy"  # type: ignore[misc]

"""Memory for results, which lives as long as its last view in whatever framework."""

import gc
import sys
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.interop import Origin, empty, from_numpy, to_numpy

TORCH = Origin("torch")
JAX = Origin("jax", str(jax.devices("cpu")[0]))


def pointer(array):
    return array.__array_interface__["data"][0]


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
    assert base is not None
    assert pointer(base) <= pointer(array)
    assert pointer(array) + array.nbytes <= pointer(base) + base.nbytes


def settle():
    """Let JAX drop foreign memory, which waits for a collection; no cycle is broken up by it."""
    gc.collect(0)


def watched(dtype):
    """Aligned memory, and a weak reference that dies with it."""
    array = empty((16,), dtype)
    array[...] = 1
    return array, weakref.ref(array.base)


@pytest.mark.parametrize("origin", [TORCH, JAX], ids=lambda origin: origin.framework)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_memory_lives_exactly_as_long_as_its_last_view(origin, dtype):
    array, alive = watched(dtype)
    there = from_numpy(array, origin)
    del array
    settle()
    assert alive() is not None
    back, _ = to_numpy(there, "x")
    del there
    settle()
    assert alive() is not None
    assert back.astype(np.float32).tolist() == [1.0] * 16
    del back
    settle()
    assert alive() is None


@pytest.mark.parametrize("origin", [TORCH, JAX], ids=lambda origin: origin.framework)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ten_thousand_reads_leave_no_reference(origin, dtype):
    array, alive = watched(dtype)
    there = from_numpy(array, origin)
    del array
    references = sys.getrefcount(there)
    views = [weakref.ref(to_numpy(there, "x")[0]) for _ in range(10_000)]
    settle()
    assert sys.getrefcount(there) == references
    assert not any(view() is not None for view in views)
    del there
    settle()
    assert alive() is None


@pytest.mark.parametrize("origin", [TORCH, JAX], ids=lambda origin: origin.framework)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ten_thousand_results_leave_no_reference(origin, dtype):
    array, alive = watched(dtype)
    references = sys.getrefcount(array), sys.getrefcount(array.base)
    for _ in range(10_000):
        from_numpy(array, origin)
    settle()
    assert (sys.getrefcount(array), sys.getrefcount(array.base)) == references
    del array
    settle()
    assert alive() is None

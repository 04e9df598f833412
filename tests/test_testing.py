"""lowbit.testing gives what it says, and needs Hypothesis only for strategies."""

import subprocess
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit.formats import reference
from lowbit.testing import conformance, exact_operands, random_qarray, strategies


def python(code):
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_oracles_do_not_load_hypothesis():
    code = "import lowbit.testing.conformance; print('hypothesis' in sys.modules)"
    assert python(code) == "False\n"


def test_strategies_say_what_they_need():
    said = python(
        "sys.modules['hypothesis'] = None\n"
        "import lowbit.testing\n"
        "try: import lowbit.testing.strategies\n"
        "except ImportError as error: print(error)"
    )
    assert said == "lowbit.testing.strategies needs Hypothesis: pip install hypothesis\n"


@pytest.mark.parametrize("kind", strategies.MEMORY)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8])
@pytest.mark.parametrize("shape", [(5, 7), (3,), (2, 0), (2, 3, 4)])
def test_memory_of_a_kind_holds_the_same_numbers(kind, dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    held = strategies.in_memory(array, kind)
    assert held.shape == array.shape
    assert held.dtype.name == array.dtype.name
    assert (held == array).all()
    assert held is not array
    if array.size > 3 and array.ndim > 1:
        hostile = {
            "F": not held.flags.c_contiguous,
            "strided": held.strides[-1] == 2 * held.itemsize,
            "reversed": held.strides[-1] < 0,
            "offset": not held.flags.c_contiguous,
            "unaligned": held.itemsize == 1 or not held.flags.aligned,
            "read-only": not held.flags.writeable,
            "big-endian": held.dtype.kind != "f" or not held.dtype.isnative,
            "memmap": isinstance(held, np.memmap),
        }
        assert hostile.get(kind, True)


@given(strategies.formats())
def test_drawn_formats_are_names(name):
    assert lb.format(name).name == name


@given(st.data())
def test_drawn_arrays_hold_every_part(data):
    name = data.draw(strategies.formats("int4"))
    array = data.draw(strategies.qarrays(name, 5, 40))
    assert array.shape == (5, 40)
    assert array.format.name == name
    assert np.isfinite(array.dequantize()).all()


def test_random_arrays_repeat_and_hold_every_code():
    one, two = (random_qarray("float8_e4m3fn_row", 64, 64, nonfinite=True) for _ in range(2))
    assert (one.codes.view(np.uint8) == two.codes.view(np.uint8)).all()
    assert (one.scales == two.scales).all()
    assert len(np.unique(one.codes.view(np.uint8))) == 256
    finite = random_qarray("float8_e4m3fn_row", 64, 64)
    assert len(np.unique(finite.codes.view(np.uint8))) == 254
    assert (one.scales < 0).any()
    assert (one.scales == 0).any()


@pytest.mark.parametrize("name", ["int8_row", "uint4_g64_asym", "fp4", "mxfp8", "nvfp4"])
def test_exact_operands_reach_every_code(name):
    """Between them the two kinds draw whatever is finite, and never a whole row of zeros."""
    seen: set[int] = set()
    for seed in range(8):
        for single in (False, True):
            case = exact_operands(4, 64, 64, name, single=single, seed=seed)
            parts = case.w._rows()
            seen |= set(np.unique(reference.element_codes(parts)).tolist())
    values = np.array(lb.format(name).element.values)
    assert seen == set(np.flatnonzero(np.isfinite(values)).tolist())


def test_exact_operands_want_a_power_of_two():
    with pytest.raises(ValueError, match="alpha: want a power of two, got 3"):
        exact_operands(2, 2, 2, "int8_row", alpha=3)


@settings(max_examples=30)
@given(st.fractions(min_value=-(2**30), max_value=2**30))
def test_single_rounds_to_nearest_even(number):
    got = conformance.single(number)
    near = np.float32(float(number))
    steps = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    assert all(abs(got - number) <= abs(Fraction(float(s)) - number) for s in steps)


def test_single_ties():
    assert conformance.single(Fraction(2**24 + 1)) == 2**24
    assert conformance.single(Fraction(2**24 + 3)) == 2**24 + 4
    # float64 rounds this onto the tie: two roundings would give 2**24
    assert conformance.single(2**24 + 1 + Fraction(1, 2**40)) == 2**24 + 2

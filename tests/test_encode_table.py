"""The look-up by upper half is the search in the ladder, wherever rounding changes over."""

import numpy as np
import pytest

from lowbit import formats
from lowbit.formats import codes

ELEMENTS = {
    named.format.element.name: named.format.element
    for named in formats.declared().values()
    if named.summary != "user codebook"
}


def tricky(element):
    """Every edge with its float32 neighbours, special numbers, and random bit patterns."""
    edges = codes.ladder(element).edges.astype(np.float32)
    around = [edges]
    for end in (-np.inf, np.inf):
        near = edges
        for _ in range(2):
            near = np.nextafter(near, np.float32(end))
            around.append(near)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38], np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    return np.concatenate([*around, special, bits])


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS.keys())
def test_lookup_equals_search(element):
    table = codes._by_upper_half(element)
    if table is None:
        assert element.name in ("nf4", "fp4", "uint8")  # edges that no bfloat16 number hits
        return
    x = tricky(element)
    x = x[~np.isnan(x)] if element.nan_code is None else x
    np.testing.assert_array_equal(table[codes._upper_half(x)], codes._nearest(element, x))

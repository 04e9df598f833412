"""Arrangements of weights are bijections, and the compiled packing gives the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.formats import codes as bitstream
from lowbit.formats.declare import integer
from lowbit.kernels import layouts
from lowbit.kernels.cpu import gemm
from lowbit.kernels.cpu.isa import runnable

Array = npt.NDArray[Any]


def rows_of(n: int, size: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (n, size), dtype=np.uint8)


heights, lengths, seeds = st.integers(0, 70), st.integers(0, 200), st.integers(0, 2**32 - 1)


@given(heights, lengths, st.sampled_from(layouts.WIDTHS), seeds)
def test_words16_and_back(n: int, size: int, bits: int, seed: int) -> None:
    canonical = rows_of(n, size, seed)
    panels = layouts.words16(canonical, bits)
    assert panels.dtype == np.uint32
    assert panels.shape == (-(-n // 16), -(-size // 4), 16)
    assert (layouts.rows(panels, n, size) == canonical).all()
    # What the rows do not have is zero, so that equal weights have equal panels.
    assert int(panels.view(np.uint8).astype(np.int64).sum()) == int(canonical.sum(dtype=np.int64))


@pytest.mark.parametrize("bits", layouts.WIDTHS)
def test_a_word_holds_consecutive_codes_of_one_row(bits: int) -> None:
    n, k = 21, 77
    codes = np.random.default_rng(bits).integers(0, 2**bits, (n, k), dtype=np.uint8)
    panels = layouts.words16(bitstream.pack(codes, bits), bits)
    each = layouts.codes_per_word(integer(bits))
    for row in range(n):
        for column in range(k):
            word = int(panels[row // 16, column // each, row % 16])
            assert word >> (column % each * bits) & (2**bits - 1) == codes[row, column]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_widths_that_do_not_divide_a_word_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits: words16"):
        layouts.words16(np.zeros((1, 4), np.uint8), bits)
    with pytest.raises(ValueError, match="layout: words16"):
        gemm.Spec("fma", integer(bits), "words16")


@given(heights, st.integers(0, 9), st.sampled_from(["float32", "float16", "uint8"]), seeds)
def test_panels16_and_back(n: int, blocks: int, dtype: str, seed: int) -> None:
    scales = np.random.default_rng(seed).integers(1, 100, (n, blocks)).astype(dtype)
    panels = layouts.panels16(scales)
    assert panels.shape == (-(-n // 16), blocks, 16)
    assert (layouts.unpanel16(panels, n) == scales).all()
    for row in range(n):
        assert (panels[row // 16, :, row % 16] == scales[row]).all()
    assert np.count_nonzero(panels) == np.count_nonzero(scales)


@pytest.mark.parametrize("isa", runnable(), ids=[isa.name for isa in runnable()])
@given(n=st.integers(1, 70), size=lengths, spare=st.integers(0, 5), seed=seeds)
def test_the_compiled_packing_gives_the_same_bits(
    isa: Any, n: int, size: int, spare: int, seed: int
) -> None:
    wide = rows_of(n, size + spare, seed)
    panels = -(-n // 16)
    out = np.full((panels * -(-size // 4) * 16 + 32,), 0xA5A5A5A5, np.uint32)
    gemm.build_pack(isa)(
        codes=wide.__array_interface__["data"][0],
        stride=size + spare,
        n=n,
        size=size,
        out=out[16:].__array_interface__["data"][0],
    )
    expected = layouts.words16(np.ascontiguousarray(wide[:, :size]), 8)
    assert (out[16:-16].reshape(expected.shape) == expected).all()
    assert (out[:16] == 0xA5A5A5A5).all()
    assert (out[-16:] == 0xA5A5A5A5).all()

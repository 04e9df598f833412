"""Arrangements of a weight that kernels ask for, each a bijection with the canonical rows.

Canonical: every row of codes is a little-endian bit stream padded to a byte.

words16: sixteen rows (a panel) lie side by side, 32 bits of each at a time,

    panels[p, w, lane] = word w of row 16 p + lane,

so that one vector load gives the same columns of k for sixteen outputs. Missing rows and the end of
the last word are zero. Scales, zero points and biases follow as panels16[p, block, lane].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.formats.declare import Element

Array = npt.NDArray[Any]

PANEL = 16  # rows of w side by side
GROUP = 4  # panels that one tile of a kernel works on
WIDTHS = (1, 2, 4, 8)  # bits of a code that fill a word exactly


def word_bits(element: Element) -> int:
    """Bits that a code has in a word: its own, or a byte where 32 is no multiple of them."""
    return element.bits if element.bits in WIDTHS else 8


def codes_per_word(element: Element) -> int:
    """Codes of a 32-bit word."""
    return 32 // word_bits(element)


def word_columns(element: Element, k: int) -> int:
    """`k` rounded up to whole words: the length that rows of x are padded to, with zeros."""
    step = codes_per_word(element)
    return -(-k // step) * step


def words16(rows: Array, bits: int) -> Array:
    """Rows uint8 [n, bytes] of codes of `bits` bits to uint32 [panels, words, 16]."""
    if bits not in WIDTHS:
        raise ValueError(f"bits: words16 has codes of {WIDTHS} bits, got {bits}")
    rows = rows.view(np.uint8)
    n, size = rows.shape
    panels, words = -(-n // PANEL), -(-size // 4)
    padded = np.zeros((panels * PANEL, words * 4), np.uint8)
    padded[:n, :size] = rows
    lanes = padded.view("<u4").reshape(panels, PANEL, words)
    return np.ascontiguousarray(lanes.transpose(0, 2, 1)).astype(np.uint32, copy=False)


def rows(panels: Array, n: int, size: int) -> Array:
    """The `n` rows of `size` bytes that `words16` arranged."""
    lanes = panels.transpose(0, 2, 1).astype("<u4")
    flat = np.ascontiguousarray(lanes).view(np.uint8)
    rows = flat.reshape(len(panels) * PANEL, 4 * panels.shape[1])
    return np.ascontiguousarray(rows[:n, :size])


def panels16(blocks: Array) -> Array:
    """[n, blocks] of any dtype to [panels, blocks, 16]; missing rows are zero bytes."""
    n, count = blocks.shape
    panels = -(-n // PANEL)
    padded = np.zeros((panels * PANEL, count), blocks.dtype)
    padded[:n] = blocks
    return np.ascontiguousarray(padded.reshape(panels, PANEL, count).transpose(0, 2, 1))


def unpanel16(panels: Array, n: int) -> Array:
    """The [n, blocks] that `panels16` arranged."""
    flat = panels.transpose(0, 2, 1).reshape(len(panels) * PANEL, panels.shape[1])
    return np.ascontiguousarray(flat[:n])

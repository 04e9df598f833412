"""Arrangements of a weight that kernels ask for, each a bijection with the canonical rows.

Canonical: every row of codes is a little-endian bit stream padded to a byte.

words16: sixteen rows (a panel) lie side by side, 32 bits of each at a time,

    panels[p, w, lane] = word w of row 16 p + lane,

so that one vector load gives the same columns of k for sixteen outputs. Missing rows, and columns
behind the last one, are zero. Codes of 1, 2, 4 or 8 bits fill words evenly: a row's words are its
stream. Codes of 3, 5, 6 or 7 bits are cut into planes of such widths, the lowest bits of a code in
the widest plane; the planes of one granule of codes follow each other. Codes 0 to 31 of 3 bits:

    bits of a word       0   2   4   6      8  10  12  14     16  18  20  22     24  26  28  30
    word 0, low bits     0   4   8  12      1   5   9  13      2   6  10  14      3   7  11  15
    word 1, low bits    16  20  24  28     17  21  25  29     18  22  26  30     19  23  27  31

    bits of a word      0 1 2  3  4 ..     8 9 ..             16 ..              24 ..       31
    word 2, top bit     0 4 8 12 16 ..     1 5 ..              2 ..               3 ..       31

So codes 4 i to 4 i + 3, a byte each, are the same fields of all bytes, or-ed over the planes:

    (word[i // (8 // width)] >> width * (i % (8 // width)) & mask) << low

Scales, zero points and biases follow as panels16[p, block, lane].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PANEL = 16  # rows of w side by side
GROUP = 4  # panels that one tile of a kernel works on
WIDTHS = (1, 2, 4, 8)  # bits of a code that fill a word exactly


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, widest (the lowest bits) first: 7 is (4, 2, 1)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: words16 has codes of 1 to 8 bits, got {bits}")
    return tuple(width for width in reversed(WIDTHS) if bits & width)


def granule(bits: int) -> int:
    """Codes whose planes fill whole words, the fewest of them."""
    return 32 // planes(bits)[-1]


def granule_words(bits: int) -> int:
    """Words of a granule: `bits` bits for each of its codes."""
    return granule(bits) * bits // 32


def row_words(bits: int, k: int) -> int:
    """Words of a row of `k` codes: whole granules."""
    return -(-k // granule(bits)) * granule_words(bits)


def words16(rows: Array, bits: int, k: int) -> Array:
    """Rows [n, bytes] of `k` codes of `bits` bits to uint32 [panels, row_words, 16]."""
    rows = rows.view(np.uint8)
    n, size = rows.shape
    panels, words = -(-n // PANEL), row_words(bits, k)
    padded = np.zeros((panels * PANEL, words * 4), np.uint8)
    padded[:n, :size] = rows
    lanes = _planed(padded, bits).view("<u4").reshape(panels, PANEL, words)
    return np.ascontiguousarray(lanes.transpose(0, 2, 1)).astype(np.uint32, copy=False)


def rows(panels: Array, n: int, bits: int, k: int) -> Array:
    """The `n` rows of `k` codes that `words16` arranged, uint8 [n, bytes]."""
    lanes = np.ascontiguousarray(panels.transpose(0, 2, 1).astype("<u4"))
    flat = lanes.view(np.uint8).reshape(len(panels) * PANEL, 4 * panels.shape[1])
    return np.ascontiguousarray(_streamed(flat, bits)[:n, : -(-k * bits // 8)])


def _planed(rows: Array, bits: int) -> Array:
    """Whole granules of each row, from stream to planes."""
    if bits in WIDTHS:
        return rows
    n, each, granules = _granules(rows, bits)
    # Axes: row, granule, four codes, code, bit.
    stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(n, granules, each // 4, 4, bits)
    found, low = [], 0
    for width in planes(bits):
        fields = stream[..., low : low + width]
        fields = fields.reshape(n, granules, each * width // 32, 8 // width, 4, width)
        found.append(fields.swapaxes(3, 4).reshape(n, granules, each * width))
        low += width
    planar = np.concatenate(found, -1).reshape(n, granules * each * bits)
    return np.packbits(planar, axis=1, bitorder="little")


def _streamed(rows: Array, bits: int) -> Array:
    """Whole granules of each row, from planes to stream."""
    if bits in WIDTHS:
        return rows
    n, each, granules = _granules(rows, bits)
    planar = np.unpackbits(rows, axis=1, bitorder="little").reshape(n, granules, each * bits)
    found, first = [], 0
    for width in planes(bits):
        fields = planar[..., first : first + each * width]
        fields = fields.reshape(n, granules, each * width // 32, 4, 8 // width, width)
        found.append(fields.swapaxes(3, 4).reshape(n, granules, each, width))
        first += each * width
    stream = np.concatenate(found, -1).reshape(n, granules * each * bits)
    return np.packbits(stream, axis=1, bitorder="little")


def _granules(rows: Array, bits: int) -> tuple[int, int, int]:
    """Rows, codes of a granule, granules of a row."""
    return len(rows), granule(bits), rows.shape[1] // (4 * granule_words(bits))


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

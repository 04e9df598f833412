"""The parts of an array in the arrangement that compiled CPU kernels read without repacking."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lowbit.formats import Format
from lowbit.formats.reference import Packed
from lowbit.kernels import layouts
from lowbit.kernels.declare import Array


@dataclass(frozen=True, eq=False)
class Words16:
    """Codes as (..., panels, words, 16) uint32: sixteen rows interleaved by 32-bit words.

    Scales, zero points and biases of single rows lie alongside, (..., panels, blocks, 16), in
    their own dtypes; those of blocks of several rows stay as they are.
    """

    layout: ClassVar[str] = "words16"

    format: Format
    shape: tuple[int, ...]
    codes: Array
    scales: Array
    zeros: Array | None = None
    biases: Array | None = None
    tensor_scale: Array | None = None

    @staticmethod
    def suits(parts: Packed) -> bool:
        """Whether compiled kernels read it: they decode whole granules, of one scale.

        A code of a width that fills words evenly has the same granule in canonical rows.
        """
        bits, block = parts.format.element.bits, parts.format.scale.block[1]
        if bits in layouts.WIDTHS or block is None or block >= parts.shape[-1]:
            return True
        return block % layouts.granule(bits) == 0

    @staticmethod
    def meets(fmt: Format, x: Format | str, k: int) -> bool:
        """Whether scales of x change between granules as well; else rows are read."""
        if isinstance(x, str) or fmt.element.bits in layouts.WIDTHS:
            return True
        block = x.scale.block[1]
        return block is None or block >= k or block % layouts.granule(fmt.element.bits) == 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.shape[-2], self.shape[-1]

    @classmethod
    def of(cls, parts: Packed) -> Words16:
        """Rearrange canonical parts."""
        from lowbit.kernels.cpu import packing  # the code generator comes with the first use

        single = parts.format.scale.block[0] == 1
        codes = packing.words16(parts.codes, parts.format.element.bits, parts.shape[-1])
        scales, zeros, biases = (
            p if p is None else _each(p, layouts.panels16) if single else np.ascontiguousarray(p)
            for p in (parts.scales, parts.zeros, parts.biases)
        )
        assert scales is not None
        return cls(parts.format, parts.shape, codes, scales, zeros, biases, parts.tensor_scale)

    def rows(self) -> Packed:
        """Restore the canonical parts, bit for bit."""
        from lowbit.kernels.cpu import packing

        fmt, (rows, columns) = self.format, self.matrix
        single = fmt.scale.block[0] == 1
        codes = packing.rows(self.codes, rows, fmt.element.bits, columns)
        scales, zeros, biases = (
            p if p is None or not single else _each(p, lambda a: layouts.unpanel16(a, rows), 3)
            for p in (self.scales, self.zeros, self.biases)
        )
        assert scales is not None
        return Packed(fmt, self.shape, codes, scales, zeros, biases, self.tensor_scale)

    def __getitem__(self, lead: tuple[int, ...]) -> Words16:
        """One matrix of a stack."""
        zeros = None if self.zeros is None else self.zeros[lead]
        biases = None if self.biases is None else self.biases[lead]
        second = None if self.tensor_scale is None else self.tensor_scale[lead]
        return replace(
            self,
            shape=self.shape[-2:],
            codes=self.codes[lead],
            scales=self.scales[lead],
            zeros=zeros,
            biases=biases,
            tensor_scale=second,
        )


def _each(part: Array, change: Callable[[Array], Array], axes: int = 2) -> Array:
    """Apply a change of matrices to a stack of them."""
    lead, matrix = part.shape[:-axes], part.shape[-axes:]
    if not lead:
        return change(part)
    if 0 in lead:
        one = change(np.zeros(matrix, part.dtype))
        return np.zeros((*lead, *one.shape), one.dtype)
    changed = np.stack([change(m) for m in part.reshape(math.prod(lead), *matrix)])
    return changed.reshape(*lead, *changed.shape[1:])

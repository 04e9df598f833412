"""lowbit's own codes and scales, for peers that can hold exactly the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import lowbit as lb
from harness.work import Array, Operands


@dataclass(frozen=True)
class Integers:
    """Symmetric integer weights: value = codes * scales of the group."""

    codes: Array
    """(n, k) int8."""
    scales: Array
    """(n, groups) float32."""
    group: int
    bits: int

    @property
    def half(self) -> int:
        """What makes the codes unsigned."""
        return 1 << (self.bits - 1)

    def rows(self, index: Array) -> Array:
        """float64 values of some rows."""
        return self.codes[index] * self._spread(index)

    def shifted_size(self, index: Array) -> Array:
        """Size of the two parts that (code + half) * scale - half * scale is computed from."""
        return (self.codes[index] + 2.0 * self.half) * self._spread(index)

    def unsigned(self) -> Array:
        """codes + half, as uint8."""
        return (self.codes.astype(np.int16) + self.half).astype(np.uint8)

    def _spread(self, index: Array) -> Array:
        scales = np.repeat(self.scales[index].astype(np.float64), self.group, axis=1)
        return scales[:, : self.codes.shape[1]]


def integers(operands: Operands) -> Integers:
    """What lowbit quantizes the weight to, unpacked; for int4 and int8 in groups or rows."""
    work = operands.work
    quantized = lb.quantize(operands.weight, work.weight)
    bits = quantized.format.element.bits
    codes = np.asarray(quantized.codes)
    if bits == 4:
        # Column 2 j is the low half of byte j, two's complement.
        both = codes.view(np.int8)
        codes = np.stack([(both << 4) >> 4, both >> 4], axis=-1).reshape(work.n, -1)[:, : work.k]
    return Integers(codes.view(np.int8), np.asarray(quantized.scales, np.float32), work.group, bits)


def is_integer(work_weight: str, bits: int) -> bool:
    """Whether a format is symmetric int`bits` with float32 scales in groups or rows."""
    words = work_weight.split("_")
    rest = words[1:]
    plain = len(rest) == 1 and (rest[0] == "row" or rest[0][0] == "g")
    return words[0] == f"int{bits}" and plain

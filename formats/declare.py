"""The words a format is declared in. Nothing here knows how to quantize or to multiply."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

WHOLE = None  # a block that spans its whole axis
FLOATS = ("float32", "float16", "bfloat16")  # dtypes that a scale or a zero point may have


@dataclass(frozen=True)
class Element:
    """One code. `values[code]` is the number it stands for: the table is the whole meaning.

    Parameters
    ----------
    name : str
        Unique; the first word of every format name that uses the element.
    bits : int
        Width of a code, 1 to 8.
    values : tuple of float
        All 2**bits numbers, in code order; NaN and infinities mark special codes.
    storage : str
        dtype of the public code array where a code fills its byte; narrower codes are a bit
        stream of uint8.
    """

    name: str
    bits: int
    values: tuple[float, ...] = field(repr=False, compare=False)
    storage: str = field(default="uint8", repr=False)
    digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"{self.name}: a code has 1 to 8 bits, got {self.bits}")
        if len(self.values) != 2**self.bits:
            raise ValueError(
                f"{self.name}: {self.bits} bits need {2**self.bits} values, got {len(self.values)}"
            )
        if not any(math.isfinite(v) for v in self.values):
            raise ValueError(f"{self.name}: no value of the table is finite")
        if any(_float32(v) != v for v in self.values if math.isfinite(v)):
            raise ValueError(f"{self.name}: every value has to be a float32; round them first")
        table = struct.pack(f"{len(self.values)}d", *self.values)
        object.__setattr__(self, "digest", hashlib.sha256(table).hexdigest()[:16])

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        return max(v for v in self.values if math.isfinite(v))

    @cached_property
    def min(self) -> float:
        """Smallest finite value."""
        return min(v for v in self.values if math.isfinite(v))

    @cached_property
    def integral(self) -> bool:
        """Every code is a whole number, so sums of products are exact in integers."""
        return all(v == round(v) if math.isfinite(v) else False for v in self.values)

    @cached_property
    def nan_code(self) -> int | None:
        """The first code that means NaN, or None."""
        return next((c for c, v in enumerate(self.values) if math.isnan(v)), None)


def integer(bits: int, *, signed: bool = True) -> Element:
    """Two's complement when signed; int1 is {0, -1}."""
    half = 2 ** (bits - 1)
    values = [c - 2 * half if signed and c >= half else c for c in range(2**bits)]
    name = f"{'' if signed else 'u'}int{bits}"
    return Element(name, bits, tuple(map(float, values)), name if bits == 8 else "uint8")


def floating(exponent: int, mantissa: int, *, specials: str) -> Element:
    """Sign, exponent, mantissa, as OCP and ml_dtypes name them.

    `specials` is "none" (every code is a number), "fn" (the all-ones codes are NaN), "ieee"
    (infinities and NaN as in IEEE 754) or "fnuz" (0x80 is the only NaN, no negative zero, and
    the exponent bias is one larger).
    """
    bias = 2 ** (exponent - 1) - (0 if specials == "fnuz" else 1)
    top = 2**exponent - 1
    magnitudes = []
    for e, m in itertools.product(range(2**exponent), range(2**mantissa)):
        if specials == "ieee" and e == top:
            magnitudes.append(math.inf if m == 0 else math.nan)
        elif specials == "fn" and e == top and m == 2**mantissa - 1:
            magnitudes.append(math.nan)
        elif e == 0:
            magnitudes.append(math.ldexp(m, 1 - bias - mantissa))
        else:
            magnitudes.append(math.ldexp(2**mantissa + m, e - bias - mantissa))
    negatives = [-v for v in magnitudes]
    if specials == "fnuz":
        negatives[0] = math.nan
    suffix = {"none": "fn", "fn": "fn", "ieee": "", "fnuz": "fnuz"}[specials]
    bits = 1 + exponent + mantissa
    name = f"float{bits}_e{exponent}m{mantissa}{suffix}"
    return Element(name, bits, (*magnitudes, *negatives), name if bits == 8 else "uint8")


def power_of_two() -> Element:
    """OCP E8M0: exponent only, unsigned, bias 127; code 255 is NaN."""
    values = (*(math.ldexp(1.0, c - 127) for c in range(255)), math.nan)
    return Element("float8_e8m0fnu", 8, values, "float8_e8m0fnu")


def codebook(name: str, values: Iterable[float]) -> Element:
    """Any table of 2, 4, ... 256 numbers, rounded to float32."""
    table = tuple(_float32(float(v)) for v in values)
    bits = max(1, (len(table) - 1).bit_length())
    return Element(name, bits, table)


def _float32(value: float) -> float:
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        raise ValueError(f"values: {value:g} is beyond the largest float32") from None
    return rounded


@dataclass(frozen=True)
class Scale:
    """One number shared by a block of codes; `block` is (rows, columns), WHOLE for an axis."""

    element: Element | str  # a table, or a dtype of FLOATS
    block: tuple[int | None, int | None]

    def __post_init__(self) -> None:
        if isinstance(self.element, str) and self.element not in FLOATS:
            raise ValueError(f"scale dtype {self.element!r} is not one of {', '.join(FLOATS)}")
        if any(b is not None and b < 1 for b in self.block):
            raise ValueError(f"a scale block has at least one row and column, got {self.block}")


@dataclass(frozen=True)
class Format:
    """value = (values[code] - zero[block]) * scale[block] * tensor_scale + bias[block].

    Blocks are counted over the last two axes (rows, columns); columns are the contraction axis,
    and the last block of an axis may be short. Every leading axis repeats the scheme.

    Parameters
    ----------
    element : Element
        What a code stands for.
    scale : Scale
        The shared factor: its type and its block.
    zero : Element, str or None
        Zero point of each block: an integer element, a float dtype, or none.
    bias : bool
        One more addend for each block, of the scale's dtype (MLX, HQQ, Q4_1).
    tensor_scale : bool
        One more float32 factor for the whole matrix (NVFP4).

    Examples
    --------
    >>> import lowbit as lb
    >>> fmt = lb.format("int4_g128")
    >>> fmt.name, fmt.grid((64, 300)), fmt.row_bytes(300)
    ('int4_g128', (64, 3), 150)
    """

    element: Element
    scale: Scale
    zero: Element | str | None = None
    bias: bool = False
    tensor_scale: bool = False
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        if self.zero is not None and not self.element.integral:
            raise ValueError(f"{self.element.name} is no integer, so it cannot have a zero point")
        if isinstance(self.zero, str) and self.zero not in FLOATS:
            raise ValueError(f"zero dtype {self.zero!r} is not one of {', '.join(FLOATS)}")
        if isinstance(self.zero, Element):
            if not self.zero.integral:
                raise ValueError(f"zero element {self.zero.name} is neither an integer nor a float")
            # They are stored as int8 or uint8.
            if self.zero.min < -128 or self.zero.max > (127 if self.zero.min < 0 else 255):
                raise ValueError(f"zero points of {self.zero.name} do not fit a byte")
        if self.bias and self.zero is not None:
            raise ValueError("a format has a zero point or a bias, not both")
        if self.bias and isinstance(self.scale.element, Element):
            raise ValueError("a bias has the scale's dtype, which must then be a float dtype")
        # Dispatch looks formats up in dictionaries, so the hash is made once; not by hash(), which
        # of a string differs in the process that unpickles it.
        parts = (self.element, self.scale, self.zero, self.bias, self.tensor_scale)
        object.__setattr__(self, "_hash", zlib.crc32(repr(parts).encode()))

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"lowbit.format({self.name!r})"

    @property
    def name(self) -> str:
        """The one spelling that `lowbit.format` reads back as this format."""
        from lowbit.formats import names

        return names.spell(self)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Scale blocks along rows and columns of a matrix of this shape; the last may be short."""
        return (
            _blocks(shape[0], self.scale.block[0]),
            _blocks(shape[1], self.scale.block[1]),
        )

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of codes: a bit stream padded to a byte."""
        return -(-columns * self.element.bits // 8)


def _blocks(length: int, block: int | None) -> int:
    if block is None:
        return min(length, 1)
    return -(-length // block)


@dataclass(frozen=True)
class Named:
    """A format under a name; further words after the name change its parts.

    `short` names are read but never printed.
    """

    name: str
    format: Format
    summary: str
    short: bool = False

"""Hypothesis strategies: shapes that straddle tiles, every kind of format, hostile memory.

Needs Hypothesis, which lowbit itself does not: ``pip install hypothesis``.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import checks
from lowbit.array import QArray
from lowbit.formats import WHOLE, Format, Scale, declared
from lowbit.formats.names import SCALE_WORDS
from lowbit.kernels.declare import ACTIVATIONS
from lowbit.quantizing import from_parts
from lowbit.testing.operands import random_qarray

try:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp
except ImportError as error:
    raise ImportError(
        "lowbit.testing.strategies needs Hypothesis: pip install hypothesis"
    ) from error

Array = npt.NDArray[Any]

# Around the widths of vectors, words and tiles; uniform numbers would miss the edges.
LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 300)
GROUPS = (1, 2, 8, 16, 24, 32, 33, 64, 100, 128)
DTYPES = ("float32", "float16", "bfloat16", "float64")
MEMORY = (
    "C",
    "F",
    "strided",
    "reversed",
    "offset",
    "unaligned",
    "read-only",
    "big-endian",
    "memmap",
)


def lengths(most: int = 300) -> st.SearchStrategy[int]:
    """Lengths of an axis that straddle tiles.

    Parameters
    ----------
    most : int
        No length is larger.

    Returns
    -------
    SearchStrategy of int
    """
    return st.sampled_from([length for length in LENGTHS if length <= most]) | st.integers(0, most)


def in_memory(array: Array, kind: str) -> Array:
    """Copy an array into memory of some kind.

    Parameters
    ----------
    array : ndarray
    kind : str
        One of `MEMORY`. bfloat16 has no foreign byte order and an empty array no file: these
        come back as they are.

    Returns
    -------
    ndarray
        Equal to `array`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowbit.testing.strategies import in_memory
    >>> in_memory(np.ones((2, 3), np.float32), "reversed").strides
    (-12, -4)
    """
    if kind == "F":
        return np.array(array, order="F")
    if kind == "strided":
        wide = _noise([2 * length for length in array.shape], array.dtype)
        every = wide[(slice(None, None, 2),) * array.ndim]
        every[...] = array
        return every
    if kind == "reversed":
        back = (slice(None, None, -1),) * array.ndim
        return np.ascontiguousarray(array[back])[back]
    if kind == "offset":
        wide = _noise([length + 3 for length in array.shape], array.dtype)
        inner = wide[(slice(2, -1),) * array.ndim]
        inner[...] = array
        return inner
    if kind == "unaligned":
        octets = np.zeros(array.nbytes + 1, np.uint8)[1:]
        odd = octets.view(array.dtype).reshape(array.shape)
        odd[...] = array
        return odd
    if kind == "memmap" and array.size:
        with tempfile.TemporaryFile() as file:
            mapped = np.memmap(file, array.dtype, "w+", shape=array.shape)
        mapped[...] = array
        return mapped
    if kind == "big-endian" and array.dtype.kind == "f":
        return array.astype(array.dtype.newbyteorder(">"))
    copied = array.copy()
    copied.flags.writeable = kind != "read-only"
    return copied


def _noise(shape: list[int], dtype: np.dtype[Any]) -> Array:
    """Memory that must not be read: NaN of every float dtype."""
    octets = np.full(math.prod(shape) * dtype.itemsize, 255, np.uint8)
    return octets.view(dtype).reshape(shape)


def memory(array: Array) -> st.SearchStrategy[Array]:
    """The same values in C, Fortran, strided, reversed, unaligned, ... memory.

    Parameters
    ----------
    array : ndarray

    Returns
    -------
    SearchStrategy of ndarray
    """
    return st.sampled_from(MEMORY).map(lambda kind: in_memory(array, kind))


def numbers(dtype: str = "float32") -> st.SearchStrategy[float]:
    """Numbers of a dtype: small whole ones, zeros of both signs, subnormal and large ones.

    Parameters
    ----------
    dtype : {"float32", "float16", "bfloat16", "float64"}

    Returns
    -------
    SearchStrategy of float
    """
    width = {"float64": 64, "float32": 32, "bfloat16": 32, "float16": 16}[dtype]
    edges = [0.0, -0.0, 1.0, -8.0, 0.5, 7.5, 448.0, 2.0**-14, -(2.0**-24)]
    if width > 16:
        edges += [2.0**-126, -(2.0**-149), 3e38, 1e20, -1e-20]
    return st.one_of(
        st.integers(-16, 16).map(float),
        st.floats(-64, 64, width=width),  # type: ignore[arg-type]
        st.sampled_from(edges),
    )


@st.composite
def dense(draw: st.DrawFn, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """Dense operands, in hostile memory.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    shape : tuple of int
    dtype : {"float32", "float16", "bfloat16", "float64"}

    Returns
    -------
    SearchStrategy of ndarray
    """
    target = checks.float_dtype(dtype, "dtype")
    wide = draw(hnp.arrays(np.float64, shape, elements=numbers(dtype), fill=numbers(dtype)))
    return draw(memory(wide.astype(target)))


@st.composite
def formats(draw: st.DrawFn, name: str | None = None) -> str:
    """Names of formats of every kind: what the declared ones can be varied to.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    name : str, optional
        A declared name whose element to keep.

    Returns
    -------
    SearchStrategy of str
        For `lowbit.format`; names are drawn since they read better than what they stand for.
    """
    if name is None:
        # A user's codebook may hold numbers that no zero point of a byte reaches.
        names = (n for n, named in declared().items() if named.summary != "user codebook")
        name = draw(st.sampled_from(sorted(names)))
    base = declared()[name].format
    sides = st.one_of(st.just(WHOLE), st.sampled_from(GROUPS))
    block = draw(st.tuples(st.one_of(st.just(1), sides), sides))
    scale = draw(st.sampled_from([base.scale.element, *SCALE_WORDS.values()]))
    fmt = replace(base, scale=Scale(scale, block), tensor_scale=draw(st.booleans()))
    offsets: list[dict[str, Any]] = [{}]
    if isinstance(scale, str):
        offsets.append({"bias": True})
    if base.element.integral:
        offsets += [{"zero": z} for z in (base.element, "float32", "float16", "bfloat16")]
    return replace(fmt, **draw(st.sampled_from(offsets))).name


@st.composite
def qarrays(
    draw: st.DrawFn, format: Format | str, rows: int, columns: int, *, nonfinite: bool = False
) -> QArray:
    """Quantized arrays from arbitrary parts: every code, scales of either sign and zero.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    format : Format or str
    rows, columns : int
    nonfinite : bool
        Codes of NaN and infinities too.

    Returns
    -------
    SearchStrategy of QArray
    """
    fmt = checks.as_format(format, "format")
    made = random_qarray(
        fmt,
        rows,
        columns,
        seed=draw(st.integers(0, 2**32 - 1)),
        spread=draw(st.sampled_from([0.0, 1.0, 8.0])),
        nonfinite=nonfinite,
    )
    parts = made._rows()
    return from_parts(
        fmt,
        draw(memory(parts.codes)),
        draw(memory(parts.scales)),
        zeros=None if parts.zeros is None else draw(memory(parts.zeros)),
        biases=None if parts.biases is None else draw(memory(parts.biases)),
        tensor_scale=parts.tensor_scale,
        shape=(rows, columns),
    )


@dataclass(frozen=True)
class Product:
    """Operands and options of one call of `lowbit.matmul`."""

    x: Any
    w: QArray
    """(N, K); multiply by ``w.T``."""
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def products(
    draw: st.DrawFn,
    w_format: Format | str,
    x: Format | str = "float32",
    *,
    most: int = 300,
    epilogue: bool = False,
) -> Product:
    """Products of an x and a w of given kinds: any shape, memory and epilogue.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    w_format : Format or str
    x : Format or str
        A format, or the dtype of a dense x.
    most : int
        Longest axis.
    epilogue : bool
        Draw alpha, bias, activation, residual and result dtype too.

    Returns
    -------
    SearchStrategy of Product
    """
    m, n, k = (draw(lengths(most)) for _ in range(3))
    w = draw(qarrays(w_format, n, k))
    plain = isinstance(x, str) and x in DTYPES
    left = draw(dense((m, k), str(x)) if plain else qarrays(x, m, k))
    options: dict[str, Any] = {}
    if epilogue:
        options = {
            "alpha": draw(st.sampled_from([1.0, -1.0, 0.0, 2.0, 1 / 3, 1e-3])),
            "activation": draw(st.sampled_from([None, *ACTIVATIONS])),
            "out_dtype": draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        }
        if draw(st.booleans()):
            options["bias"] = draw(dense((n,), draw(st.sampled_from(DTYPES))))
        if draw(st.booleans()):
            shape = draw(st.sampled_from([(m, n), (1, n), (m, 1), (n,)]))
            options["residual"] = draw(dense(shape, draw(st.sampled_from(DTYPES))))
    return Product(left, w, options)

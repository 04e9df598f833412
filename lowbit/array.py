"""The array: a format and its parts, behaving like the matrix of numbers they stand for."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lowbit import device as places
from lowbit.formats import Element, Format, reference
from lowbit.formats.codes import rounded
from lowbit.formats.reference import Packed
from lowbit.kernels.words16 import Words16
from lowbit.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = npt.NDArray[Any]


class Content:
    """What all transposed views of one array share; a traced graph names it by its key."""

    __slots__ = ("__weakref__", "columns", "divisor", "dtype", "key", "parts", "place", "plans")

    def __init__(
        self,
        parts: Packed | Words16,
        dtype: np.dtype[Any],
        columns: Array | None,
        divisor: Array | None,
    ) -> None:
        self.parts, self.dtype, self.columns, self.divisor = parts, dtype, columns, divisor
        self.place = places.of(parts.codes)
        self.plans: dict[Any, Any] = {}
        self.key = next(_keys)
        contents[self.key] = self


_keys = itertools.count(1)
contents: weakref.WeakValueDictionary[int, Content] = weakref.WeakValueDictionary()


class QArray(Refusals):
    """A quantized array: packed codes, shared scales, a logical shape and dtype.

    Made by `lowbit.quantize` or `lowbit.from_parts`; immutable. It multiplies like a matrix of
    its values, slices, joins, copies and pickles, and turns into floats only when told to
    (`dequantize`).

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(4, 64, dtype=np.float32), "int4_g32")
    >>> w
    QArray(shape=(4, 64), format='int4_g32', dtype=float32, 160 bytes)
    >>> (np.ones((2, 64), np.float32) @ w.T).shape
    (2, 4)
    """

    __slots__ = (
        "__weakref__",
        "_columns",
        "_content",
        "_divisor",
        "_dtype",
        "_parts",
        "_transposed",
        "_vector",
    )
    __array_priority__ = 10000.0

    _parts: Packed | Words16
    _transposed: bool
    _vector: bool
    _dtype: np.dtype[Any]
    _columns: Array | None
    _divisor: Array | None
    _content: Content

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("QArray is made by lowbit.quantize or lowbit.from_parts")

    @classmethod
    def _of(
        cls,
        parts: Packed | Words16,
        dtype: np.dtype[Any],
        *,
        transposed: bool = False,
        vector: bool = False,
        columns: Array | None = None,
        divisor: Array | None = None,
        content: Content | None = None,
    ) -> QArray:
        self = object.__new__(cls)
        self._parts, self._dtype = parts, dtype
        self._transposed, self._vector = transposed, vector
        self._columns, self._divisor = columns, divisor
        self._content = Content(parts, dtype, columns, divisor) if content is None else content
        return self

    def _with(self, parts: Packed | Words16 | None = None, **changes: Any) -> QArray:
        """A copy that differs in the named fields."""
        fields = {
            "transposed": self._transposed,
            "vector": self._vector,
            "columns": self._columns,
            "divisor": self._divisor,
        }
        dtype = changes.pop("dtype", self._dtype)
        return QArray._of(self._parts if parts is None else parts, dtype, **{**fields, **changes})

    def _view(self, *, transposed: bool, vector: bool = False) -> QArray:
        """The same content seen as another matrix."""
        return QArray._of(
            self._parts,
            self._dtype,
            transposed=transposed,
            vector=vector,
            columns=self._columns,
            divisor=self._divisor,
            content=self._content,
        )

    # What it is

    @property
    def format(self) -> Format:
        """What the codes and scales mean."""
        return self._parts.format

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: that of the values."""
        if self._vector:
            return self._parts.shape[-1:]
        if self._transposed:
            return (*self._parts.shape[:-2], self._parts.shape[-1], self._parts.shape[-2])
        return self._parts.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 1 if self._vector else len(self._parts.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self._parts.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the numbers that the array stands for; takes part in promotion."""
        return self._dtype

    @property
    def device(self) -> str:
        """Where the parts live, as the array API names it: "cpu", or "cuda:0" and so on."""
        return self._place.name

    @property
    def _place(self) -> places.Place:
        return self._content.place

    @property
    def layout(self) -> str:
        """Arrangement of the codes: "rows", or what `prepare` chose."""
        return "rows" if isinstance(self._parts, Packed) else self._parts.layout

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as they are held now."""
        extra = (self._columns, self._divisor)
        return self._parts_nbytes() + sum(a.nbytes for a in extra if a is not None)

    def _parts_nbytes(self) -> int:
        p = self._parts
        held = (p.codes, p.scales, p.zeros, p.biases, p.tensor_scale)
        return sum(a.nbytes for a in held if a is not None)

    # The parts

    def _rows(self) -> Packed:
        """The parts in the canonical arrangement."""
        return self._parts if isinstance(self._parts, Packed) else self._parts.rows()

    def _public(self, part: Array | None, element: Element | str | None) -> Any:
        if part is None:
            return None
        view = part.view(element.storage) if isinstance(element, Element) else part.view()
        if self._vector:
            view = view[0] if view.ndim > 1 else view
        self._place.exporting(view)
        return view

    @property
    def codes(self) -> Array:
        """Packed codes, read-only (on a GPU by agreement): (..., rows, bytes) uint8.

        Each row is a little-endian bit stream padded to a byte; 8-bit elements keep their own
        dtype. Rows are those of the array that was quantized, so `.T` leaves them as they are.
        """
        element = self.format.element
        parts: Array = self._public(self._rows().codes, element if element.bits == 8 else None)
        return parts

    @property
    def scales(self) -> Array:
        """Scale of each block, read-only, in the scale's own dtype: one a block."""
        scales: Array = self._public(self._rows().scales, self.format.scale.element)
        return scales

    @property
    def zeros(self) -> Array | None:
        """Zero point of each block, or None."""
        zeros: Array | None = self._public(self._rows().zeros, None)
        return zeros

    @property
    def biases(self) -> Array | None:
        """Addend of each block, or None."""
        biases: Array | None = self._public(self._rows().biases, None)
        return biases

    @property
    def tensor_scale(self) -> Array | None:
        """float32 factor of each whole matrix, or None."""
        part = self._rows().tensor_scale
        if part is None:
            return None
        view = part.view()
        self._place.exporting(view)
        return view

    @property
    def columns(self) -> Array | None:
        """Permutation: stored column j holds logical column columns[j]; None is the identity."""
        columns: Array | None = self._public(self._columns, None)
        return columns

    @property
    def divisor(self) -> Array | None:
        """float32 divisor of each logical column (AWQ, SmoothQuant), or None."""
        divisor: Array | None = self._public(self._divisor, None)
        return divisor

    # Values

    def dequantize(self, dtype: npt.DTypeLike | None = None) -> Array:
        """Return the values as a new array of NumPy, or of CuPy on the array's own GPU.

        Parameters
        ----------
        dtype : dtype-like, optional
            float64, float32, float16 or bfloat16; the logical dtype if left out. Values are
            computed exactly (float64) and rounded once. On a GPU float64, and an array with a
            divisor, go through the host, which is slow.

        Returns
        -------
        ndarray
            Of the logical shape.

        Examples
        --------
        >>> import numpy as np, lowbit as lb
        >>> lb.quantize(np.array([[0.0, 7.0, -3.4]], np.float32), "int4_g128").dequantize()
        array([[ 0.,  7., -3.]], dtype=float32)
        """
        from lowbit import checks

        target = self._dtype if dtype is None else checks.float_dtype(dtype, "dtype")
        parts, place = self._rows(), self._place
        if place is not places.HOST and self._divisor is not None:
            there: Array = place.put(self.to_device("cpu").dequantize(target))
            return there
        with place.current():
            out = place.xp.empty(parts.shape, target)
        if self._divisor is None:
            place.dequantize_to(parts, out)
        else:
            divisor = self._divisor.astype(np.float64)
            if self._columns is not None:
                divisor = divisor[self._columns]
            out[...] = rounded(reference.dequantize(parts) / divisor, target)
        if self._columns is not None:
            with place.current():
                ordered = place.xp.empty_like(out)
                ordered[..., self._columns] = out
            out = ordered
        values: Array = out
        if self._vector:
            row: Array = values[0]
            return row
        return values.swapaxes(-1, -2) if self._transposed else values

    def prepare(self) -> QArray:
        """Return the array in the arrangement that compiled kernels like best.

        The codes are held *instead of* the canonical ones (`nbytes` tells the truth); every
        operation still works, and `codes` restores the canonical bytes exactly. An array whose
        rows suit the kernels better comes back as it is, and so does one on a GPU, whose kernels
        read rows.
        """
        if not self._place.prepares:
            return self
        if isinstance(self._parts, Packed) and Words16.suits(self._parts):
            return self._with(Words16.of(self._parts))
        return self

    # Shape

    @property
    def T(self) -> QArray:
        """Transpose of a matrix, without copying."""
        if self.ndim > 2:
            raise ValueError(
                f"T: the array has {self.ndim} axes; .mT swaps the last two, .transpose(axes) more"
            )
        return self if self._vector else self._view(transposed=not self._transposed)

    @property
    def mT(self) -> QArray:
        """Swap the last two axes, without copying."""
        if self._vector:
            raise ValueError("mT: the array has one axis, two are needed")
        return self._view(transposed=not self._transposed)

    def transpose(self, *axes: Any) -> QArray:
        """Permute axes; the last two stay the last two, in either order."""
        from lowbit import shaping

        return shaping.transpose(self, axes)

    def swapaxes(self, first: int, second: int) -> QArray:
        """Swap two axes; the last two stay the last two."""
        from lowbit import shaping

        axes = list(range(self.ndim))
        for axis in (first, second):
            if not -self.ndim <= axis < self.ndim:
                raise ValueError(f"swapaxes: axis {axis} is out of range for {self.ndim} axes")
        axes[first], axes[second] = axes[second], axes[first]
        return shaping.transpose(self, (axes,))

    def reshape(self, *shape: Any) -> QArray:
        """Regroup the leading axes and rows; the contraction axis keeps its length."""
        from lowbit import shaping

        with self._place.current():
            return shaping.reshape(self, shape)

    def __getitem__(self, index: Any) -> QArray:
        from lowbit import indexing

        with self._place.current():
            return indexing.getitem(self, index)

    def __len__(self) -> int:
        return self.shape[0]

    # Copies

    def copy(self) -> QArray:
        """Return an array with memory of its own, in the canonical arrangement."""
        from lowbit import shaping

        return shaping.copy(self)

    def __copy__(self) -> QArray:
        return self

    def __deepcopy__(self, memo: Any) -> QArray:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        from lowbit import pickling

        return pickling.reduce(self)

    def to_device(self, device: str, /, *, stream: Any = None) -> QArray:
        """Return the array on a device, as the array API has it.

        Parameters
        ----------
        device : str
            "cpu", "cuda" (the current GPU) or "cuda:1".
        stream : optional
            Stream of CuPy or torch, or its number, that the copy is made on; the current one if
            left out. A copy to the host waits for it, one to a GPU from pageable memory may.

        Returns
        -------
        QArray
            This one where it is there already. Copies have the canonical arrangement.

        Examples
        --------
        >>> import numpy as np, lowbit as lb
        >>> w = lb.quantize(np.ones((1, 32), np.float32), "int8_row")
        >>> w.to_device("cpu") is w
        True
        """
        from lowbit import moving

        return moving.to_device(self, device, stream)

    # Products

    def __matmul__(self, other: Any) -> Any:
        from lowbit.products import matmul

        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        from lowbit.products import matmul

        return matmul(other, self)

    def __neg__(self) -> QArray:
        from lowbit import arithmetic

        with self._place.current():
            return arithmetic.negate(self)

    def __pos__(self) -> QArray:
        return self

    def __mul__(self, other: Any) -> QArray:
        from lowbit import arithmetic

        with self._place.current():
            return arithmetic.multiply(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> QArray:
        from lowbit import arithmetic

        return arithmetic.divide(self, other)

    # Protocols

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        from lowbit import protocols

        return protocols.array_ufunc(ufunc, method, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from lowbit import protocols

        return protocols.array_function(func, args, kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        from lowbit import protocols

        return protocols.torch_function(func, args, kwargs or {})

    # How it looks

    def __repr__(self) -> str:
        from lowbit import render

        return render.text(self)

    def _repr_html_(self) -> str:
        from lowbit import render

        return render.html(self)

    def __rich__(self) -> Any:
        from lowbit import render

        return render.rich_table(self)

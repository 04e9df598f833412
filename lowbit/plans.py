"""Bound products: everything but the arithmetic done once, for one weight and one kind of x."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lowbit import binding, checks, interop, products
from lowbit import device as places
from lowbit.array import QArray
from lowbit.dispatch import rearranged
from lowbit.explaining import Explanation, explained
from lowbit.kernels import Epilogue

Array = npt.NDArray[Any]


class Plan:
    """A product with one weight, for x of one shape and dtype; made by `lowbit.plan`.

    Called with x, and with ``residual=`` and ``out=`` where wanted, it gives the bits of
    `lowbit.matmul` for a few microseconds less. Any number of threads may call it at once; those
    of a plan that was made with ``out=`` write to the same memory.

    Attributes
    ----------
    weight : QArray
        Kept alive by the plan, which reads its parts where they are and copies none.
    kernel : str
        Name of the kernel that was chosen when the plan was made.
    shape : tuple of int
        Of the result.
    dtype : dtype
        Of the result.
    """

    __slots__ = (
        "_after",
        "_dtype",
        "_kind",
        "_out",
        "_product",
        "_shape",
        "_taken",
        "_target",
        "kernel",
        "weight",
    )

    def __init__(
        self,
        x: Array | QArray,
        weight: QArray,
        product: binding.Product,
        after: Epilogue,
        out: Any,
        kernel: str | None,
    ) -> None:
        self.weight, self._product, self._after = weight, product, after
        self._taken = _described(x)
        # None is no array's shape: where the plan is for a QArray, no dense x compares equal.
        self._shape = None if isinstance(x, QArray) else x.shape
        self._dtype = x.dtype
        self._kind = np.ndarray if product.place is places.HOST else places.gpu_array
        self._out, self._target = out, None
        if out is not None:
            self._target = products.writable(out, kept=True)
            places.on(product.place, self._target, "out")
            products.fits(self._target, product)
        self.kernel = explained(product.stated, kernel).kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self._product.kept

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the result."""
        return self._product.dtype

    def explain(self) -> Explanation:
        """Why this kernel was chosen; see `lowbit.explain`.

        Examples
        --------
        >>> import numpy as np, lowbit as lb
        >>> w = lb.quantize(np.eye(64, dtype=np.float32), "int4_g32")
        >>> lb.plan(np.ones((1, 64)), w.T).explain().problem.out
        'float64'
        """
        return explained(self._product.stated, self.kernel)

    def __call__(self, x: Any, *, residual: Any = None, out: Any = None) -> Any:
        """Multiply.

        Parameters
        ----------
        x : array or QArray
            Of the shape and dtype (or format) that the plan was made for.
        residual : array_like, optional
            In place of the plan's own, of its dtype.
        out : array, optional
            Where to write the result; returned.

        Returns
        -------
        array
            In the framework, and on the device, of x.
        """
        product = self._product
        after = self._after if residual is None else self._with(residual)
        target = self._target if out is None else self._checked(out)
        if type(x) is self._kind and x.shape == self._shape and x.dtype == self._dtype:
            if target is None:
                return product(x, after)
            product.into(target, x, after)
        else:
            given, origin = self._read(x)
            with interop.stream(origin, product.place):
                if target is None:
                    return product.answer(given, after, origin)
                product.into(target, given, after)
        out = self._out if out is None else out
        interop.written(out)
        return out

    def _read(self, x: Any) -> tuple[Array | QArray, interop.Origin]:
        """x as the product takes it, and where the result goes."""
        given, origin, same = x, interop.NUMPY, False
        if not isinstance(x, QArray):
            given, origin = interop.read(x, "x")
            same = given.shape == self._shape and given.dtype == self._dtype
        if not same and _described(given) != self._taken:
            self._refuse(given)
        held = given._parts.codes if isinstance(given, QArray) else given
        places.on(self._product.place, held, "x")
        return given, origin

    def _refuse(self, x: Array | QArray) -> NoReturn:
        remedy = "make another plan for it, or call lowbit.matmul, which takes any"
        if not isinstance(x, QArray) and x.shape == self._shape:
            wanted = self._dtype.name
            raise TypeError(
                f"plan: x is {x.dtype.name}, the plan is for {wanted}; cast x to {wanted}, "
                f"or {remedy}"
            )
        raise ValueError(f"plan: x is {_described(x)}, the plan is for {self._taken}; {remedy}")

    def _with(self, residual: Any) -> Epilogue:
        given, after = products.numbers(residual, "residual"), self._after
        if after.residual is None:
            raise ValueError(
                "residual: the plan was made without one; give lowbit.plan a residual= of the "
                f"dtype that comes, {given.dtype.name}"
            )
        fresh = products.epilogue(
            after.alpha, None, given, after.activation, self._product
        ).residual
        assert fresh is not None
        if fresh.dtype.name != after.residual.dtype.name:
            raise TypeError(
                f"residual: the plan adds {after.residual.dtype.name}, got {given.dtype.name}; "
                "cast it, or make another plan"
            )
        return Epilogue(after.alpha, after.bias, after.activation, fresh)

    def _checked(self, out: Any) -> Array:
        target = products.writable(out)
        places.on(self._product.place, target, "out")
        products.fits(target, self._product)
        if target.dtype.newbyteorder("=") != self.dtype:
            raise TypeError(
                f"out: the plan gives {self.dtype.name}, got {target.dtype.name}; make the plan "
                "with out_dtype="
            )
        return target

    def __repr__(self) -> str:
        return (
            f"Plan({self._taken} @ {_described(self.weight)} -> {self.shape} {self.dtype.name}, "
            f"kernel={self.kernel!r})"
        )


def _described(operand: Array | QArray) -> str:
    """Everything that a plan depends on, of x or of a weight, in words."""
    if not isinstance(operand, QArray):
        return f"{operand.shape} {operand.dtype.name}"
    words = f"{operand.shape} {operand.format.name} for {operand.dtype.name}"
    if operand._transposed and not operand._vector:
        words += ", transposed"
    if rearranged(operand):
        words += ", columns permuted or divided"
    return words


def plan(
    x: Any,
    w: QArray,
    *,
    alpha: float = 1.0,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    x_format: Any = None,
    x_scale: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
    kernel: str | None = None,
) -> Plan:
    """Bind a product: checks, choice of the kernel and preparation are done here, once.

    Parameters
    ----------
    x : array_like or QArray, (..., M, K) or (K,)
        An example of what will come: its shape and dtype count, its values do not.
    w : QArray, (..., K, N) or (K,)
        The weight; one quantized as (N, K) comes in as ``w.T``.
    alpha, activation, x_format, out_dtype, batch_invariant, kernel
        As for `matmul`.
    bias, x_scale, residual : array_like, optional
        As for `matmul`, copied now. Calls may bring a residual of their own, of the same dtype.
    out : array, optional
        Memory that every call writes to and returns.

    Returns
    -------
    Plan
        ``plan(x)`` is ``lowbit.matmul(x, w, ...)``, bit for bit.

    Raises
    ------
    TypeError, ValueError
        As for `matmul`.

    Notes
    -----
    The weight is not copied. One whose rows do not lie at one distance in memory (a slice of
    columns, or some steps of a slice) is gathered anew at each call, by `matmul` as well;
    ``w.copy()`` ends that. Inside torch.compile and jax.jit call `matmul`, which is one operation
    there. The choice stays when `set_num_threads` changes the number of threads; the number that
    a call uses follows.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize(np.eye(3, 32, dtype=np.float32), "int8_row")
    >>> layer = lb.plan(np.empty((1, 32), np.float32), w.T, bias=np.ones(3), activation="relu")
    >>> layer(np.arange(32, dtype=np.float32)[None])
    array([[1., 2., 3.]], dtype=float32)
    >>> layer(np.ones((2, 32), np.float32))
    Traceback (most recent call last):
    ...
    ValueError: plan: x is (2, 32) float32, the plan is for (1, 32) float32; make another plan ...
    """
    if not isinstance(w, QArray):
        raise TypeError(
            f"plan: w is the quantized weight, on the right of the product; got "
            f"{type(w).__name__}. Of w @ x plan the transpose, x.T @ w.T."
        )
    left, right, origin = products.operands_of(x, w)
    assert isinstance(right, QArray)
    with interop.stream(origin, w._place):
        target = None if out is None else products.writable(out)
        added = None if bias is None else products.numbers(bias, "bias").copy()
        rest = None if residual is None else products.numbers(residual, "residual").copy()
        scale = None if x_scale is None else interop.to_numpy(x_scale, "x_scale")[0].copy()
        options = products.options_of(
            left,
            added,
            activation,
            rest,
            x_format,
            scale,
            target,
            out_dtype,
            batch_invariant,
            kernel,
        )
        product = binding.make(left, right, options, scale)
        factor = checks.finite_scalar(alpha, "alpha")
        after = products.epilogue(factor, added, rest, activation, product)
        return Plan(left, right, product, after, out, kernel)

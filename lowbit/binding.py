"""A stated product becomes a function: kernel chosen, built and bound to the weight's parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import cuda_interop, interop, kernels, stacks
from lowbit import device as places
from lowbit.array import QArray
from lowbit.device import address
from lowbit.dispatch import (
    Operand,
    Options,
    Stated,
    adapted,
    adapted_dtype,
    rearranged,
    reference_alone,
    state,
)
from lowbit.formats import reference
from lowbit.formats.codes import rounded
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.declare import NOT_FINITE, FusedBind
from lowbit.kernels.reference import finish
from lowbit.kernels.words16 import Words16
from lowbit.quantizing import quantize_on_the_way
from lowbit.stacks import Execute, Parts

Array = npt.NDArray[Any]
BARE = Epilogue()
_MOST_PRODUCTS = 64  # shapes of x and options that one weight remembers
_BYTES = np.dtype(np.uint8)


class Product:
    """A stated product whose kernel is chosen, built and bound to the weight's parts.

    Called, it computes one result in fresh memory from the operand that is not the weight. Any
    number of threads may do so at once.
    """

    __slots__ = ("_bytes", "dtype", "execute", "inside", "kept", "shape", "stated")
    place: places.Place = places.HOST

    def __init__(self, stated: Stated, execute: Execute, inside: bool = False) -> None:
        self.stated, self.execute = stated, execute
        self.inside = inside  # the kernel itself quantizes x to x_format
        self.shape, self.kept, self.dtype = stated.shape, stated.kept, stated.dtype
        self._bytes = math.prod(self.shape) * self.dtype.itemsize + interop.ALIGNMENT

    def __call__(self, x: Any, after: Epilogue) -> Array:  # noqa: D102  (said above)
        # interop.empty with its arithmetic done beforehand.
        memory = np.empty(self._bytes, _BYTES)
        offset = -address(memory) % interop.ALIGNMENT
        out: Array = np.ndarray(self.shape, self.dtype, memory, offset)
        self.execute(x, after, out)
        return out if self.kept is self.shape else out.reshape(self.kept)

    def into(self, target: Array, x: Any, after: Epilogue) -> None:
        """Compute into memory of the result's dtype, which may be that of an operand."""
        if apart(self.place, target, x, after):
            self.execute(
                x, after, target if self.kept is self.shape else target.reshape(self.shape)
            )
        else:
            target[...] = self(x, after)

    def answer(self, x: Any, after: Epilogue, origin: interop.Origin) -> Any:
        """The result in the framework of an operand."""
        return interop.from_numpy(self(x, after), origin)


class DeviceProduct(Product):
    """A product on a GPU: nothing in it waits, so that a graph of CUDA may capture it."""

    __slots__ = ("_current", "gpu", "place")

    def __init__(
        self, stated: Stated, execute: Execute, place: places.Gpu, inside: bool = False
    ) -> None:
        super().__init__(stated, execute, inside)
        self.gpu = self.place = place
        self._current = place.xp.cuda.runtime.getDevice

    def __call__(self, x: Any, after: Epilogue) -> Array:  # noqa: D102  (said above)
        if self._elsewhere(x):
            with self.gpu.current():
                return self(x, after)
        # Quicker than cupy.empty, and the type of a dtype quicker than the dtype.
        out: Array = self.gpu.xp.ndarray(self.shape, self.dtype.type)
        self.execute(x, after, out)
        return out if self.kept is self.shape else out.reshape(self.kept)

    def into(self, target: Array, x: Any, after: Epilogue) -> None:  # noqa: D102
        if self._elsewhere(x):
            with self.gpu.current():
                self.into(target, x, after)
        else:
            super().into(target, x, after)

    def _elsewhere(self, x: Any) -> bool:
        """Whether another GPU is current; an array x has to lie on this one."""
        if type(x) is places.gpu_array and x.data.device_id != self.gpu.number:
            places.on(self.gpu, x, "x")
        return bool(self._current() != self.gpu.number)

    def answer(self, x: Any, after: Epilogue, origin: interop.Origin) -> Any:  # noqa: D102
        if origin.framework != "torch":
            return super().answer(x, after, origin)
        result, target = cuda_interop.torch_result(self.kept, self.dtype, origin.device)
        with self.place.current():
            self.execute(x, after, target.reshape(self.shape))
        return result


def apart(place: places.Place, target: Array, x: Any, after: Epilogue) -> bool:
    """Whether a kernel can write there: rows without gaps, and no operand's memory."""
    flags, here = target.flags, place is places.HOST
    if not (flags.c_contiguous and target.dtype.isnative and (not here or flags.aligned)):
        return False
    share = place.xp.may_share_memory
    for each in (x, after.bias, after.residual):
        if each is not None and not isinstance(each, QArray) and share(target, each):
            return False
    return True


def key_of(
    shape: tuple[int, ...], kind: Any, w: QArray, options: Options, mark: int, turned: bool = False
) -> tuple[Any, ...]:
    """What a weight remembers a bound product by.

    `kind` is the dtype of a dense x, `mark` is that of the place.
    """
    return shape, kind, w._transposed, w._vector, options, turned, mark


def find(left: Operand, right: Operand, options: Options, most: int = _MOST_PRODUCTS) -> Product:
    """The bound product of such operands, made now or remembered with the weight.

    At most `most` of one matrix are remembered.
    """
    if isinstance(right, QArray):
        x, w, turned = left, right, False
    else:
        assert isinstance(left, QArray)
        x, w, turned = right, left, True
    kind: Any = x.dtype
    if isinstance(x, QArray):
        kind = x.format, kind, x._transposed, x._vector, rearranged(x)
    key = key_of(x.shape, kind, w, options, w._place.mark(), turned)
    plans = w._content.plans
    found: Product | None = plans.get(key)
    if found is None:
        found = make(left, right, options)
        matrices = math.prod(w._parts.shape[:-2])
        if len(plans) >= max(4, most // max(1, matrices)):
            plans.clear()
        plans[key] = found
    return found


def make(left: Operand, right: Operand, options: Options, x_scale: Any = None) -> Product:
    """State a product, choose its kernel and bind it; `x_scale` are static scales of x_format.

    Of x only what it is counts, not its values.
    """
    stated = state(left, right, options)
    if not isinstance(right, QArray):
        assert isinstance(left, QArray)
        return _product(stated, _weight_left(stated, left, options), left)
    execute, inside = _weight_right(stated, left, right, options, x_scale)
    if stated.adapted:
        execute = _after_adapting(execute, right._columns, right._divisor)
    return _product(stated, execute, right, inside)


def _product(stated: Stated, execute: Execute, w: QArray, inside: bool = False) -> Product:
    place = w._place
    if isinstance(place, places.Gpu):
        return DeviceProduct(stated, execute, place, inside)
    return Product(stated, execute, inside)


def _after_adapting(execute: Execute, columns: Array | None, divisor: Array | None) -> Execute:
    return lambda x, after, out: execute(adapted(x, columns, divisor), after, out)


# The weight on the right: the kernels' own orientation


def _weight_right(
    stated: Stated, left: Operand, w: QArray, options: Options, x_scale: Any
) -> tuple[Execute, bool]:
    """How to compute it, and whether the kernel quantizes x inside."""
    fmt, parts = options.x_format, w._parts
    exact = _exact(w, options.kernel, turned=False) if stated.exact else None

    def with_values(dense: bool) -> Execute:
        if exact is not None:
            return exact
        problem, kernel = stated.problem, options.kernel
        together = kernels.choose(problem, kernel).kernel.asked(problem).batches > 1
        return stacks.matrices(stated, parts, _runs(problem, kernel), dense, together)

    if fmt is None:
        return with_values(not isinstance(left, QArray)), False

    def quantizing() -> Execute:
        inner = with_values(dense=False)
        return lambda x, after, out: inner(quantize_on_the_way(x, fmt, x_scale), after, out)

    if exact is not None or x_scale is not None:
        return quantizing(), False
    dtype = adapted_dtype(left.dtype, w if stated.adapted else None).name
    bind = fused(stated.problem, options.kernel, dtype)
    if bind is None:
        return quantizing(), False
    problem = stated.problem

    def bound(each: Parts) -> Execute:
        return _dense(_steadied(_bound(bind, each, problem), problem))

    inside = stacks.matrices(stated, parts, bound, dense=True)

    def execute(x: Array, after: Epilogue, out: Array) -> None:
        if inside(x, after, out) is NOT_FINITE:
            quantizing()(x, after, out)  # says what is not finite, and where

    return execute, True


@lru_cache(maxsize=4096)
def fused(problem: Problem, kernel: str | None, dtype: str) -> FusedBind | None:
    """The chosen kernel's own way to quantize a dense x of this dtype, if it has one."""
    chosen = kernels.choose(problem, kernel).kernel
    return None if chosen.fused is None else chosen.fused(chosen.asked(problem), dtype)


def _dense(run: Execute) -> Execute:
    """What fused kernels are promised: rows without gaps, aligned, in native byte order."""

    def execute(x: Array, after: Epilogue, out: Array) -> object:
        if not isinstance(x, np.ndarray):
            x = places.of(x).xp.ascontiguousarray(x)
        elif not (x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative):
            x = np.array(x, x.dtype.newbyteorder("="), order="C")
        return run(x, after, out)

    return execute


def _runs(problem: Problem, kernel: str | None) -> Callable[[Parts], Execute]:
    """From one matrix's parts to a run of the chosen kernel."""
    bind = kernels.prepared(problem, kernel)

    if problem.device.startswith("cpu"):
        return lambda parts: _steadied(_bound(bind, parts, problem), problem)
    if kernels.choose(problem, kernel).kernel.device == "any":
        return lambda parts: _through_host(lambda: bind(places.changed(_gathered(parts), _host)))
    return lambda parts: _steadied(_near(_bound(bind, parts, problem), problem), problem)


def _host(array: Array) -> Array:
    return places.of(array).get(array)


def _through_host(bound: Callable[[], Execute]) -> Execute:
    """Run on copies of GPU operands on the host, and copy the result back; waits for the GPU."""

    def execute(x: Any, after: Epilogue, out: Array) -> object:
        if isinstance(x, QArray):
            x = x.to_device("cpu")
        else:
            x = places.changed(x, _host) if isinstance(x, Packed) else _host(x)
        bias, residual = (None if p is None else _host(p) for p in (after.bias, after.residual))
        result: Array = np.empty(out.shape, out.dtype)
        bound()(x, Epilogue(after.alpha, bias, after.activation, residual), result)
        out[...] = places.of(out).put(result)
        return None

    return execute


def _near(run: Execute, problem: Problem) -> Execute:
    """The run with parts of x as kernels of a GPU read them; a dense x they see to themselves."""
    if isinstance(problem.x, str):
        return run

    def execute(x: Packed, after: Epilogue, out: Array) -> object:
        return run(x if readable(x, "rows") else _gathered(x), after, out)

    return execute


def _bound(bind: Callable[[Parts], Execute], parts: Parts, problem: Problem) -> Execute:
    if readable(parts, problem.layout):
        return bind(parts)

    def execute(x: Any, after: Epilogue, out: Array) -> object:
        gathered = _gathered(parts)  # each time anew, or a copy of the weight would stay; a run
        return bind(gathered)(x, after, out)  # knows addresses, so this name keeps the memory

    return execute


def readable(parts: Parts, layout: str) -> bool:
    """Whether kernels can read the parts where they are: rows at one distance, without gaps."""
    if isinstance(parts, Words16):
        return layout == parts.layout
    others = (parts.scales, parts.zeros, parts.biases)
    steady = parts.codes.strides[-1] == 1 and parts.codes.strides[0] > 0
    return steady and all(p is None or p.flags.c_contiguous for p in others)


def _gathered(parts: Parts) -> Packed:
    if isinstance(parts, Words16):
        return parts.rows()
    xp = places.of(parts.codes).xp
    codes, scales, zeros, biases = (
        p if p is None else xp.ascontiguousarray(p)
        for p in (parts.codes, parts.scales, parts.zeros, parts.biases)
    )
    assert codes is not None
    assert scales is not None
    return Packed(parts.format, parts.shape, codes, scales, zeros, biases, parts.tensor_scale)


def _steadied(run: Execute, problem: Problem) -> Execute:
    """The run with a residual as kernels read it: aligned, rows without gaps, in native order."""
    if problem.residual is None:
        return run

    def execute(x: Any, after: Epilogue, out: Array) -> object:
        residual = after.residual
        assert residual is not None
        if not (
            residual.dtype.isnative
            and (not isinstance(residual, np.ndarray) or residual.flags.aligned)
            and residual.strides[-1] == residual.itemsize
        ):
            xp = places.of(residual).xp
            residual = xp.ascontiguousarray(residual, residual.dtype.newbyteorder("="))
            after = Epilogue(after.alpha, after.bias, after.activation, residual)
        return run(x, after, out)

    return execute


# The weight on the left, and what no kernel describes


def _weight_left(stated: Stated, w: QArray, options: Options) -> Execute:
    """The kernels compute the transpose, the epilogue follows."""
    if stated.exact:
        return _exact(w, options.kernel, turned=True)
    problem = stated.problem
    runs = stacks.of_every_matrix(stated.shape[:-2], w._parts, _runs(problem, options.kernel))
    wide, place = np.dtype(problem.out), w._place

    def execute(x: Array, after: Epilogue, out: Array) -> None:
        turned = x.swapaxes(-1, -2) if x.ndim > 1 else x[None]
        for index, run in runs:
            here, one = place is places.HOST, stacks.at(after, index)
            empty = interop.empty if here else place.xp.empty
            product = empty((problem.m, problem.n), wide)
            run(stacks.matrix_of(turned, index), BARE, product)
            if one.alpha == 1 and one.bias is None and not one.activation and one.residual is None:
                out[index] = rounded(product.T, out.dtype)
            elif here:
                _finished(product.T, one, out[index])
            else:
                _through_host(lambda: _finished)(product.T, one, out[index])

    return execute


def _finished(product: Array, after: Epilogue, out: Array) -> None:
    out[...] = rounded(finish(product.astype(np.float64), after), out.dtype)


def _exact(w: QArray, kernel: str | None, *, turned: bool) -> Execute:
    """A product that no kernel describes: float64 values, one rounding at the end."""
    if kernel is not None:
        kernels.pick(reference_alone(), kernel)
    # Another view: one of the content that remembers this function would keep itself alive.
    held = w._with()
    held = held._view(transposed=not turned) if held._vector else held
    if w._place is not places.HOST:
        return _through_host(lambda: _exact(held.to_device("cpu"), kernel, turned=turned))

    def execute(x: Any, after: Epilogue, out: Array) -> None:
        if isinstance(x, QArray):
            x = (x._view(transposed=False) if x._vector else x).dequantize(np.float64)
        elif x.ndim == 1:
            x = x[:, None] if turned else x[None]
        values = held.dequantize(np.float64)
        left, right = (values, x) if turned else (x, values)
        out[...] = rounded(finish(reference.matmul(left, right), after), out.dtype)

    return execute

"""The product as a JAX primitive: jit, vmap and eval_shape see one operation.

Imported only while JAX traces. The weight is a constant of the traced function, as every array
is that a jitted function closes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from lowbit import checks, products, tracing
from lowbit.array import QArray


@dataclass(frozen=True, eq=False)
class Call:
    """Everything about a product but its traced operands: x, then bias and residual if any."""

    weight: QArray
    left: bool
    bias: bool
    residual: bool
    options: dict[str, Any]

    def __call__(self, *operands: Any) -> Any:
        """Run it on host memory, and with a weight on a GPU there, by copies."""
        place = self.weight._place
        x, *rest = (place.put(np.asarray(o)) for o in operands)
        bias = rest.pop(0) if self.bias else None
        residual = rest.pop(0) if self.residual else None
        first, second = (self.weight, x) if self.left else (x, self.weight)
        result = products.matmul(first, second, bias=bias, residual=residual, **self.options)
        return place.get(result)

    def shape(self, x: Any) -> Any:
        """Shape and dtype of the result."""
        name = tracing.result_dtype(x.dtype.name, self.weight, self.options["out_dtype"])
        shape = tracing.result_shape(x.shape, self.weight.shape, self.left)
        return jax.ShapeDtypeStruct(shape, checks.float_dtype(name, "out_dtype"))


_matmul = Primitive("lowbit_matmul")


def _callback(*operands: Any, call: Call) -> Any:
    # JAX runs batches of a callback one by one: what a leading axis of the bias or the residual
    # would mean to matmul is not what vmap means.
    return jax.pure_callback(call, call.shape(operands[0]), *operands, vmap_method="sequential")


def _abstract(x: Any, *rest: Any, call: Call) -> Any:
    result = call.shape(x)
    return ShapedArray(result.shape, result.dtype)


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, call: Call) -> tuple[Any, int]:
    mapped = tuple(a if isinstance(a, int) else None for a in axes)
    many = jax.vmap(lambda *o: _callback(*o, call=call), in_axes=mapped)
    return many(*operands), 0


_matmul.def_impl(_callback)
_matmul.def_abstract_eval(_abstract)
batching.primitive_batchers[_matmul] = _batch
mlir.register_lowering(_matmul, mlir.lower_fun(_callback, multiple_results=False))


def matmul(x: Any, weight: QArray, left: bool, **options: Any) -> Any:
    """Record the operation."""
    bias, residual = options.pop("bias"), options.pop("residual")
    call = Call(weight, left, bias is not None, residual is not None, options)
    operands = [x, *(o for o in (bias, residual) if o is not None)]
    return _matmul.bind(*operands, call=call)

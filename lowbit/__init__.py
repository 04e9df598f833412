"""Low-precision arrays and their matrix products, NumPy style.

>>> import lowbit as lb
>>> w = lb.quantize(weight, "int4_g128")     # (N, K) floats to codes and scales  # doctest: +SKIP
>>> y = x @ w.T                              # x of NumPy, PyTorch or JAX  # doctest: +SKIP
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  (names bfloat16 and the 8-bit floats to NumPy)
import numpy  # noqa: F401

if TYPE_CHECKING:
    from lowbit import testing as testing
    from lowbit.arithmetic import array_equal as array_equal
    from lowbit.array import QArray as QArray
    from lowbit.explaining import Explanation as Explanation
    from lowbit.explaining import explain as explain
    from lowbit.formats import Format as Format
    from lowbit.grouped import grouped_matmul as grouped_matmul
    from lowbit.kernels.cpu.pool import get_num_threads as get_num_threads
    from lowbit.kernels.cpu.pool import set_num_threads as set_num_threads
    from lowbit.layering import quantize_rmsnorm as quantize_rmsnorm
    from lowbit.layering import quantize_silu_mul as quantize_silu_mul
    from lowbit.plans import plan as plan
    from lowbit.products import linear as linear
    from lowbit.products import matmul as matmul
    from lowbit.quantizing import codebook as codebook
    from lowbit.quantizing import dequantize as dequantize
    from lowbit.quantizing import format as format
    from lowbit.quantizing import from_parts as from_parts
    from lowbit.quantizing import quantize as quantize
    from lowbit.shaping import concatenate as concatenate
    from lowbit.shaping import stack as stack

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: `import lowbit` costs little more than
# `import numpy`, however much the library grows.
_HOMES = {
    "Explanation": "explaining",
    "Format": "formats",
    "QArray": "array",
    "array_equal": "arithmetic",
    "codebook": "quantizing",
    "concatenate": "shaping",
    "dequantize": "quantizing",
    "explain": "explaining",
    "format": "quantizing",
    "from_parts": "quantizing",
    "get_num_threads": "kernels.cpu.pool",
    "grouped_matmul": "grouped",
    "linear": "products",
    "matmul": "products",
    "plan": "plans",
    "quantize": "quantizing",
    "quantize_rmsnorm": "layering",
    "quantize_silu_mul": "layering",
    "set_num_threads": "kernels.cpu.pool",
    "stack": "shaping",
}

__all__ = [*_HOMES, "testing"]


def __getattr__(name: str) -> Any:
    """Public names on first use, and a constructor for every declared format: `lowbit.int4()`."""
    if name in _HOMES:
        value = getattr(import_module(f"lowbit.{_HOMES[name]}"), name)
    elif name == "testing":
        value = import_module("lowbit.testing")
    else:
        if find_spec(f"lowbit.{name}"):  # `from lowbit import checks` asks here first
            raise AttributeError(name)
        if name not in import_module("lowbit.formats").declared():
            raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
        value = import_module("lowbit.quantizing").constructor(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    declared = import_module("lowbit.formats").declared()
    return sorted({*__all__, *declared, "__version__"})

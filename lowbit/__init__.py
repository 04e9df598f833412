"""Low-precision arrays and their matrix products, NumPy style.

    import lowbit as lb
    w = lb.quantize(weight, "int4_g128")     # (N, K) floats -> packed codes and scales
    y = x @ w.T                              # x of NumPy, PyTorch or JAX; y likewise
"""

from importlib import import_module
from typing import Any

from lowbit.arithmetic import array_equal
from lowbit.array import QArray
from lowbit.explain import Explanation, explain
from lowbit.formats import Format, declared
from lowbit.kernels.cpu.pool import get_num_threads, set_num_threads
from lowbit.matmul import linear, matmul
from lowbit.quantizing import codebook, constructor, dequantize, format, from_parts, quantize
from lowbit.shaping import concatenate, stack

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Format",
    "QArray",
    "array_equal",
    "codebook",
    "concatenate",
    "dequantize",
    "explain",
    "format",
    "from_parts",
    "get_num_threads",
    "linear",
    "matmul",
    "quantize",
    "set_num_threads",
    "stack",
    "testing",
]


def __getattr__(name: str) -> Any:
    """Format constructors: every declared name is a function, `lowbit.int4(group=128)`."""
    if name == "testing":
        return import_module("lowbit.testing")
    if name in declared():
        return constructor(name)
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *declared(), "__version__"})

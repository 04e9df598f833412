"""What follows a product, as a tree of CUTLASS's visitors (EVT): C++ types and their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.kernels.cutlass import elements
from lowbit.kernels.cutlass.records import EMPTY, Layout, record

_FUSION = "cutlass::epilogue::fusion"
_ROUND = "cutlass::FloatRoundStyle::round_to_nearest"
_CODES = {"float": "f", "int32_t": "i", "int8_t": "b", "uint8_t": "B"}
FMA = "cutlass::homogeneous_multiply_add"
KERNEL = """extern "C" __global__ void __cluster_dims__({clusters})
__launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
lowbit_gemm(__grid_constant__ const Kernel::Params params) {{
    extern __shared__ char shared[];
    Kernel()(params, shared);
}}
"""


@dataclass(frozen=True)
class Node:
    """A subtree."""

    text: str
    """C++ type."""
    layout: Layout
    """Of its Params."""
    operands: Mapping[str, str]
    """Name of an operand: path of the member that is set to it."""


SUM = Node(f"{_FUSION}::Sm90AccFetch", EMPTY, {})
"""The product."""


def along(
    axis: str, name: str, dtype: str = "float32", number: str = "float", *, pointers: bool = False
) -> Node:
    """A vector with a number for each row ("rows") or column of the result, or one for all.

    Operands: `name`, an address, 0 for the default; `name`.default; `name`.step, 1, or 0 where one
    number is for all; `name`.batch, numbers to the next matrix. They are computed with as `number`.
    With `pointers`, `name` is where the addresses of every matrix's numbers are.
    """
    given = elements.DTYPES[dtype]
    kind, steps = ("Col", "bool, cute::_0") if axis == "rows" else ("Row", "cute::_0, bool")
    stride = f"cute::Stride<{steps}, int64_t>"
    text = f"{_FUSION}::Sm90{kind}Broadcast<0, Tile, {given}{'*' * pointers}, {number}, {stride}>"
    layout = record(
        ("pointer", "Q"), ("default", _CODES[number if axis == "rows" else given]),
        ("steps", record(("step", "?"), ("batch", "q"))),
    )  # fmt: skip
    members = {"": "pointer", ".default": "default", ".step": "steps.step", ".batch": "steps.batch"}
    return Node(text, layout, {name + key: path for key, path in members.items()})


def scalar(name: str) -> Node:
    """One float32 number, by value; the operand is `name`."""
    text = f"{_FUSION}::Sm90ScalarBroadcast<float, cute::Stride<cute::_0, cute::_0, int64_t>>"
    layout = record(("scalars", "f"), ("pointers", "Q"), ("strides", "q"))
    return Node(text, layout, {name: "scalars"})


def source(dtype: str) -> Node:
    """The matrix that is added, read by TMA."""
    return Node(f"{_FUSION}::Sm90SrcFetch<{elements.DTYPES[dtype]}>", EMPTY, {})


def compute(function: str, *children: Node, out: str = "float", number: str = "float") -> Node:
    """A function of numbers, element by element; `number` is what it computes with."""
    name = f"{_FUSION}::Sm90Compute<{function}, {out}, {number}, {_ROUND}>"
    text = f"{_FUSION}::Sm90EVT<{', '.join([name, *(child.text for child in children)])}>"
    layouts = [*(child.layout for child in children), EMPTY]
    operands = {
        operand: f"op_{i}.{path}"
        for i, child in enumerate(children)
        for operand, path in child.operands.items()
    }
    return Node(text, record(*((f"op_{i}", part) for i, part in enumerate(layouts))), operands)

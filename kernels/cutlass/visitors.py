"""What follows a product on GPUs without TMA: a tree of the visitors of CUTLASS 2.x.

The counterpart of epilogue.py, whose nodes are CUTLASS 3.x's.
"""

from __future__ import annotations

from lowbit.kernels.cutlass import elements
from lowbit.kernels.cutlass.epilogue import Node
from lowbit.kernels.cutlass.records import EMPTY, block, record

_SPACE = "cutlass::epilogue::threadblock"
_ROUND = "cutlass::FloatRoundStyle::round_to_nearest"
_ROWS = "cute::Stride<int64_t, cute::_1, int64_t>"

SUM = Node(f"{_SPACE}::VisitorAccFetch", EMPTY, {})
"""The product."""


def along(axis: str, name: str) -> Node:
    """A float32 vector with a number for each row ("rows") or column of the result.

    Operands: `name`, an address, 0 for `name`.default everywhere; `name`.batch, numbers to the next
    matrix. Of rows, `name`.step is 1, or 0 where one number is for all. Columns are read four at a
    time, from a multiple of 16 bytes.
    """
    rows = axis == "rows"
    kind, stride = ("Col", "bool, cute::_0") if rows else ("Row", "cute::_0, cute::_1")
    text = f"{_SPACE}::Visitor{kind}Broadcast<Threads, float, cute::Stride<{stride}, int64_t>>"
    steps = record(*([("step", "?")] if rows else []), ("batch", "q"))
    layout = record(("pointer", "Q"), ("default", "f"), ("steps", steps))
    members = {"": "pointer", ".default": "default", ".batch": "steps.batch"}
    if rows:
        members[".step"] = "steps.step"
    return Node(text, layout, {name + key: path for key, path in members.items()})


def scalar(name: str) -> Node:
    """One float32 number, by value; the operand is `name`."""
    layout = record(("scalars", "f"), ("pointers", "Q"), ("strides", EMPTY))
    return Node(f"{_SPACE}::VisitorScalarBroadcast<float>", layout, {name: "scalars"})


def source(name: str, dtype: str) -> Node:
    """A matrix, read row by row; operands `name`, `name`.row and `name`.batch, in its numbers."""
    number, size = elements.DTYPES[dtype], 4 if dtype == "float32" else 2
    layout = record(("matrix", "Q"), ("default", block(size, size)), ("steps", _STEPS))
    return Node(f"{_SPACE}::VisitorAuxLoad<Threads, {number}, {_ROWS}>", layout, _operands(name))


def compute(function: str, *children: Node, out: str = "float") -> Node:
    """A function of numbers, element by element, in float32."""
    return _tree(
        Node(f"{_SPACE}::VisitorCompute<{function}, {out}, float, {_ROUND}>", EMPTY, {}), *children
    )


def store(name: str, dtype: str, child: Node) -> Node:
    """Write the result; operands as `source` has them."""
    text = f"{_SPACE}::VisitorAuxStore<Threads, {elements.DTYPES[dtype]}, {_ROUND}, {_ROWS}>"
    layout = record(("matrix", "Q"), ("steps", _STEPS))
    return _tree(Node(text, layout, _operands(name)), child)


_STEPS = record(("row", "q"), ("batch", "q"))


def _operands(name: str) -> dict[str, str]:
    return {name: "matrix", f"{name}.row": "steps.row", f"{name}.batch": "steps.batch"}


def _tree(node: Node, *children: Node) -> Node:
    parts = [*children, node]
    text = f"{_SPACE}::Sm80EVT<{', '.join([node.text, *(child.text for child in children)])}>"
    operands = {
        operand: f"op_{i}.{path}"
        for i, part in enumerate(parts)
        for operand, path in part.operands.items()
    }
    return Node(text, record(*((f"op_{i}", part.layout) for i, part in enumerate(parts))), operands)

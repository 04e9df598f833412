"""How a QArray looks: in a terminal, in a notebook, in rich."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.array import QArray


def text(w: QArray) -> str:
    """One line: what it is and what it costs."""
    held = "" if w.layout == "rows" else f", layout={w.layout!r}"
    held += "" if w.device == "cpu" else f", device={w.device!r}"
    return (
        f"QArray(shape={w.shape}, format={w.format.name!r}, dtype={w.dtype.name}{held}, "
        f"{w.nbytes} bytes)"
    )


def _facts(w: QArray) -> list[tuple[str, str]]:
    dense = w.size * w.dtype.itemsize
    ratio = f", {dense / w.nbytes:.2f} times less than {w.dtype.name}" if w.nbytes else ""
    return [
        ("shape", " x ".join(map(str, w.shape)) or "()"),
        ("format", w.format.name),
        ("dtype", w.dtype.name),
        ("layout", w.layout),
        ("device", w.device),
        ("bytes", f"{w.nbytes:,}{ratio}"),
    ]


def html(w: QArray) -> str:
    """A table for notebooks."""
    rows = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in _facts(w))
    return f"<table><caption>QArray</caption>{rows}</table>"


def rich_table(w: QArray) -> Any:
    """A table for rich's console."""
    from rich.table import Table
    from rich.text import Text

    table = Table("QArray", "", title=None, show_edge=False)
    for key, value in _facts(w):
        table.add_row(key, Text(value))  # no markup: a name may hold brackets
    return table

"""What came out on a GPU, for a person: a line for each point, met or missed by how much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from harness.records import OURS, Row
from harness.report import notes
from harness.roofline import Side
from harness.targets import Roofs, Verdict, alike

SIDES = (
    Side("weights", "int4 weights x bfloat16", ("bf16",)),
    Side("both", "fp8 x fp8, a scale a row", ("bf16", "fp8"), weight="fp8_row"),
    Side("both", "int8 x int8, a scale a row", ("int8",), weight="int8_row"),
)


def group_table(rows: Sequence[Row], verdicts: Sequence[Verdict], roofs: Roofs) -> Group:
    """Our rows, with the peers that do the same beside them."""
    ours = [row for row in rows if row.name.partition(".")[0] == OURS]
    others = [row for row in rows if row not in ours]
    names = list(dict.fromkeys(row.name for row in others if row.times))
    work = rows[0].work
    table = Table(
        title=f"{rows[0].section}: ({work.n}, {work.k})", title_justify="left", title_style="bold"
    )
    headings = ("what", "M", "us", "GB/s %", "Top/s %", *(n.replace(".", "\n") for n in names))
    for heading in (*headings, "bars"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in sorted(ours, key=lambda r: (ours_order(r, ours), r.m)):
        beside = [
            next((o for o in others if o.name == n and o.m == row.m and alike(o, row)), None)
            for n in names
        ]
        judged = [v for v in verdicts if v.row is row]
        table.add_row(
            Text(what(row)),
            str(row.m),
            *_speed(row, roofs),
            *(_against(other, row) for other in beside),
            _bars(judged),
        )
    return Group(table, *notes(rows))


def ours_order(row: Row, ours: Sequence[Row]) -> int:
    """Works in the order in which they were met, each with all its rows."""
    return [(r.name, r.work) for r in ours].index((row.name, row.work))


def what(row: Row) -> str:
    """Step, formats, and the shape."""
    work, step = row.work, row.name.partition(".")[2]
    words = f"{work.weight} x {work.x}" if not row.moved else f"{work.x} <-> {work.weight}"
    return f"{step} {words} ({work.n}, {work.k})".strip()


def _speed(row: Row, roofs: Roofs) -> list[Text]:
    if not row.times:
        return [Text(row.note.partition(":")[0], "dim"), Text(""), Text("")]
    seconds = row.seconds
    if row.moved:
        return [_us(row), _share(row.moved / seconds, 1e9, roofs.copy), Text("")]
    peak = roofs.operations.get(kind(row))
    return [
        _us(row),
        _share(row.weight_bytes / seconds, 1e9, roofs.read),
        _share(row.operations / seconds, 1e12, peak),
    ]


def kind(row: Row) -> str:
    """The dense rate that a row is measured by: of x's own kind."""
    if row.work.x.startswith("int8"):
        return "int8"
    return "fp8" if row.work.x.startswith("fp8") else "bf16"


def _share(rate: float, unit: float, roof: float | None) -> Text:
    return Text(f"{rate / unit:.0f}" + (f" {rate / roof:.0%}" if roof else ""))


def _us(row: Row) -> Text:
    """The median in microseconds; with a tilde where the quartiles lie far apart."""
    return Text(("~" if row.noisy else "") + f"{row.seconds * 1e6:.4g}")


def _against(other: Row | None, ours: Row) -> Text:
    if other is None:
        return Text("")
    if not other.times:
        return Text(other.note.partition(":")[0], "dim")
    cell = _us(other)
    if ours.times:
        cell.append(f" {other.seconds / ours.seconds:.2f}x", "dim")
    return cell


def _bars(verdicts: Iterable[Verdict]) -> Text:
    cell = Text()
    for verdict in verdicts:
        cell.append("\n" if cell else "")
        cell.append(said(verdict), "green" if verdict.met else "red")
    return cell


def said(verdict: Verdict) -> str:
    """Whether a bar is met, by how much, and which."""
    distance = verdict.ratio / verdict.wanted - 1
    word = "met" if verdict.met else "missed"
    wanted = "" if verdict.wanted == 1 else f"{verdict.wanted:.3g} of "
    return f"{word} {distance:+.0%}: {wanted}{verdict.against}"


def roofs_text(roofs: Roofs) -> str:
    """The measured limits in a line."""
    rates = ", ".join(f"{k} {rate / 1e12:.0f} Top/s" for k, rate in roofs.operations.items())
    return (
        f"measured roofs: reads {roofs.read / 1e9:.0f} GB/s, copies {roofs.copy / 1e9:.0f} GB/s"
        + (f", {rates}" if rates else "")
    )

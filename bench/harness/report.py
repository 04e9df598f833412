"""What came out, for a person: a table for each group, and how the targets were met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from harness.records import OURS, Row
from harness.targets import Roofs, Verdict, operation_share, read_share


def group_table(rows: Sequence[Row], verdicts: Sequence[Verdict], roofs: Roofs) -> Group:
    """Contenders side by side where they do one work, else a line for each row."""
    points = {(row.name, row.m) for row in rows}
    contest = len({row.work for row in rows}) == 1 and len(points) == len(rows)
    contest = contest and all((OURS, m) in points for _, m in points)
    table = (_contest if contest else _list)(rows, verdicts, roofs)
    return Group(table, *notes(rows))


def _contest(rows: Sequence[Row], verdicts: Sequence[Verdict], roofs: Roofs) -> Table:
    """One line for each number of rows of x."""
    names = list(dict.fromkeys(row.name for row in rows if row.name != OURS))
    present = [n for n in names if any(row.times for row in rows if row.name == n)]
    table = Table(title=str(rows[0].work), title_justify="left", title_style="bold")
    headings = (
        "M",
        "lowbit\nms",
        *_rates(rows[0], roofs),
        *(n.replace(".", "\n") for n in present),
    )
    for heading in (*headings, "targets"):
        table.add_column(heading, justify="right")
    for m in dict.fromkeys(row.m for row in rows):
        here = {row.name: row for row in rows if row.m == m}
        ours = here[OURS]
        judged = [v for v in verdicts if v.row is ours]
        cells = [Text(str(m)), *_speed(ours, roofs)]
        cells += [_against(here[name], ours, judged) for name in present]
        table.add_row(*cells, _own(judged, present))
    return table


def _list(rows: Sequence[Row], verdicts: Sequence[Verdict], roofs: Roofs) -> Table:
    table = Table(title=rows[0].section, title_justify="left", title_style="bold")
    for heading in ("what", "M", "threads", "ms", *_rates(rows[0], roofs), "targets"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        judged = [v for v in verdicts if v.row is row]
        step = row.name.partition(".")[2]
        what = f"{step} {row.work}" if step else str(row.work)
        table.add_row(
            Text(what), str(row.m), str(row.threads), *_speed(row, roofs), _own(judged, ())
        )
    return table


def _rates(row: Row, roofs: Roofs) -> list[str]:
    """Headings of the two columns of rates."""
    if row.name != OURS:
        return ["GB/s\n% copy", ""]
    peaks = "\n".join(f"% {kind}" for kind in _kinds(row, roofs))
    return ["GB/s\n% read", f"Gop/s\n{peaks}"]


def _kinds(row: Row, roofs: Roofs) -> list[str]:
    """The peaks that bound a row's operations."""
    kinds = ("int8_dot", "amx_int8") if row.work.integer else ("fma", "bf16_dot", "amx_bf16")
    return [kind for kind in kinds if kind in roofs.operations]


def _speed(row: Row, roofs: Roofs) -> list[Text]:
    """Milliseconds, bandwidth and operations with their shares of the roofs."""
    if not row.times:
        return [Text(row.note.partition(":")[0], "dim"), Text(""), Text("")]
    if row.moved:
        moved = row.moved / row.seconds
        return [_ms(row), Text(f"{moved / 1e9:.1f} {moved / roofs.copy:.0%}"), Text("")]
    memory = f"{row.weight_bytes / row.seconds / 1e9:.1f} {read_share(row, roofs):.0%}"
    shares = [f"{operation_share(row, kind, roofs):.0%}" for kind in _kinds(row, roofs)]
    rate = f"{row.operations / row.seconds / 1e9:.0f}"
    return [_ms(row), Text(memory), Text(" ".join([rate, *shares]))]


def _against(row: Row, ours: Row, verdicts: Iterable[Verdict]) -> Text:
    """Milliseconds of a peer, and how many times as long as lowbit that is."""
    if not row.times:
        return Text(row.note.partition(":")[0], "dim")
    cell = _ms(row)
    if ours.times:
        verdict = next((v for v in verdicts if v.against == row.name), None)
        style = "dim" if verdict is None else "green" if verdict.met else "red"
        cell.append(f" {row.seconds / ours.seconds:.2f}x", style)
    return cell


def _own(verdicts: Iterable[Verdict], shown: Iterable[str]) -> Text:
    """Verdicts that no other column shows."""
    cell = Text()
    for verdict in verdicts:
        if verdict.against not in shown:
            text = f"{verdict.ratio:.2f} (>= {verdict.wanted:.2f}) {verdict.against}"
            cell.append("\n" if cell else "")
            cell.append(text, "green" if verdict.met else "red")
    return cell


def notes(rows: Iterable[Row]) -> list[Text]:
    """Why contenders have no times, each reason once."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.note:
            reasons.setdefault((row.name, row.note), []).append(row.m)
    return [
        Text(f"  {name}, M = {', '.join(map(str, ms))}: {note}", _style(note))
        for (name, note), ms in reasons.items()
    ]


def _style(note: str) -> str:
    return "dim" if note.startswith(("absent", "left out")) else "bold red"


def summary(verdicts: Iterable[Verdict]) -> Table:
    """How often each target was met, and the worst point."""
    table = Table(title="Targets", title_justify="left", title_style="bold")
    for heading in ("section", "against", "wanted", "met", "noisy", "worst", "at"):
        table.add_column(heading)
    kinds: dict[tuple[str, str, float], list[Verdict]] = {}
    for verdict in verdicts:
        what = verdict.against
        if verdict.unit:
            what = f"our own, per {verdict.unit}"
        kinds.setdefault((verdict.row.section, what, verdict.wanted), []).append(verdict)
    for (section, what, wanted), found in kinds.items():
        met = sum(v.met for v in found)
        worst = min(found, key=lambda v: (v.met, v.ratio))
        table.add_row(
            section,
            what,
            f"{wanted:.2f}",
            Text(f"{met} of {len(found)}", "green" if met == len(found) else "red"),
            str(sum(v.noisy for v in found) or ""),
            f"{worst.ratio:.2f}",
            f"{worst.row.work}, M={worst.row.m}",
        )
    return table


def roofs_table(roofs: Iterable[Roofs]) -> Table:
    """The measured limits."""
    roofs = list(roofs)
    table = Table(title="Measured roofs", title_justify="left", title_style="bold")
    kinds = list(dict.fromkeys(kind for each in roofs for kind in each.operations))
    for heading in ("threads", "read GB/s", "copy GB/s", *(f"{kind} Gop/s" for kind in kinds)):
        table.add_column(heading, justify="right")
    for each in roofs:
        peaks = [f"{each.operations[kind] / 1e9:.0f}" for kind in kinds]
        table.add_row(str(each.threads), f"{each.read / 1e9:.1f}", f"{each.copy / 1e9:.1f}", *peaks)
    return table


def console() -> Console:
    """Standard output, wide enough for the tables where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def _ms(row: Row) -> Text:
    """The median; with a tilde where the quartiles lie far apart."""
    shown = row.seconds * 1e3
    digits = f"{shown:.3g}" if shown < 1000 else f"{shown:.0f}"
    return Text(f"~{digits}" if row.noisy else digits)

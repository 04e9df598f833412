"""The roofline picture: operations a second over operations a byte, under the measured roofs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness.records import OURS, Row
from harness.targets import Roofs


@dataclass(frozen=True)
class Side:
    """One panel: a format's work in a section, under these peaks."""

    section: str
    name: str
    kinds: tuple[str, ...]
    weight: str = "int4_g128"


SIDES = (
    Side("int4xint8", "int4 weights x dynamic int8", ("int8_dot", "amx_int8")),
    Side("bfloat16", "int4 weights x bfloat16", ("fma", "bf16_dot", "amx_bf16")),
)
MARKERS = "os^Dv<>pPX*hd"
OTHERS = ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#bcbd22")


def draw(
    rows: Iterable[Row], roofs: Roofs, title: str, path: str, sides: Sequence[Side] = SIDES
) -> Figure | None:
    """Write a PNG of one shape of each side; None where nothing of it was timed."""
    rows = [row for row in rows if row.times]
    drawn = [(side, _one_work(side, rows)) for side in sides]
    drawn = [(side, chosen) for side, chosen in drawn if chosen]
    if not drawn:
        return None
    figure = Figure(figsize=(7.6 * len(drawn), 6.4), dpi=130, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for number, (side, chosen) in enumerate(drawn, start=1):
        _panel(figure.add_subplot(1, len(drawn), number), side, chosen, roofs)
    canvas.draw()
    figure.savefig(path)
    return figure


def _one_work(side: Side, rows: Sequence[Row]) -> list[Row]:
    """The rows of the side's work that is nearest to 4096 x 4096, dense peers among them."""
    here = [r for r in rows if r.section == side.section and r.work.weight == side.weight]
    if not here:
        return []
    work = min(
        (r.work for r in here),
        key=lambda w: abs(math.log(w.n / 4096)) + abs(math.log(w.k / 4096)),
    )
    dense = [r for r in rows if r.section == side.section and r.work.dense]
    beside = [r for r in dense if (r.work.n, r.work.k) == (work.n, work.k)]
    return [r for r in here if r.work == work] + beside


def _panel(axes: Any, side: Side, rows: Sequence[Row], roofs: Roofs) -> None:
    names = sorted({row.name for row in rows}, key=lambda n: (n != OURS, n))
    for number, each in enumerate(names):
        line = sorted((r for r in rows if r.name == each), key=lambda r: r.m)
        ours = each == OURS
        axes.plot(
            [r.operations / r.traffic for r in line],
            [r.operations / r.seconds / 1e9 for r in line],
            marker=MARKERS[number % len(MARKERS)],
            markersize=8 if ours else 5.5,
            linewidth=2.2 if ours else 0.9,
            color="#c0392b" if ours else OTHERS[number % len(OTHERS)],
            zorder=4 if ours else 3,
            label=each,
        )
    peaks = {k: roofs.operations[k] / 1e9 for k in side.kinds if k in roofs.operations}
    left = 0.7 * min(r.operations / r.traffic for r in rows)
    right = 1.6 * max(r.operations / r.traffic for r in rows)
    fastest = max(r.operations / r.seconds / 1e9 for r in rows)
    top = max([*peaks.values(), fastest])
    xs = [left, top / (roofs.read / 1e9)]
    axes.plot(xs, [x * roofs.read / 1e9 for x in xs], color="#333333", linewidth=1.4)
    axes.annotate(
        f"reads {roofs.read / 1e9:.1f} GB/s",
        (2 * left, 2 * left * roofs.read / 1e9),
        xytext=(8, -6),
        textcoords="offset points",
        va="top",
        fontsize=8.5,
    )
    for kind, peak in peaks.items():
        axes.plot([peak / (roofs.read / 1e9), right], [peak, peak], color="#333333", linewidth=1.4)
        axes.annotate(f"{kind} {peak:,.0f}", (right, peak), ha="right", va="bottom", fontsize=8.5)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(None, 1.6 * top))
    work = rows[0].work
    axes.set_title(f"{side.name}, N = {work.n}, K = {work.k}", fontsize=10.5, loc="left")
    axes.set_xlabel("operations a byte of weights, x and y")
    axes.set_ylabel("Gop/s")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left")  # above the roof, where nothing can be

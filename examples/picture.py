"""Bytes against accuracy, one labelled point a format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Array = npt.NDArray[Any]

MARKER = 9  # pixels from the middle of a marker to its edge
REACH = 24  # a label farther than this gets a line to its point
LEAST_ERROR = 1e-7  # where a cosine of 1 stands on the logarithmic axis: float32's rounding


@dataclass(frozen=True)
class Point:
    """One format: megabytes, mean cosine, and how it is drawn."""

    label: str
    megabytes: float
    cosine: float
    family: str
    hollow: bool = False


FAMILIES = {
    "integer": ("#1f6fb4", "o"),
    "integer with zero point": ("#4fb3bf", "s"),
    "float8": ("#d1495b", "D"),
    "MX, NVFP4": ("#7b4fa6", "^"),
    "codebook": ("#c98a00", "v"),
}


def draw(points: Sequence[Point], baseline: float, title: str, path: str) -> Figure:
    """Write a PNG; `baseline` is the megabytes of float32, whose cosine is 1."""
    figure = Figure(figsize=(10, 6.6), dpi=150, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for family, (colour, marker) in FAMILIES.items():
        for hollow in (False, True):
            chosen = [p for p in points if p.family == family and p.hollow == hollow]
            if chosen:
                axes.scatter(
                    [p.megabytes for p in chosen],
                    [_error(p) for p in chosen],
                    s=52,
                    marker=marker,
                    facecolor="white" if hollow else colour,
                    edgecolor=colour,
                    linewidth=1.6,
                    zorder=3,
                    label=family + (", activations too (W8A8)" if hollow else ""),
                )
    _scale(axes, points)
    axes.annotate(
        f"float32: {baseline:.1f} MB, cosine 1 \N{RIGHTWARDS ARROW}",
        (0.985, 0.975),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=9.5,
        color="#555555",
    )
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel("MB of linear weights, codes and scales")
    axes.set_ylabel("mean cosine to the float32 embeddings")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    if points:
        axes.legend(loc="lower right", fontsize=8.5, framealpha=0.95)
    canvas.draw()
    figure.set_layout_engine("none")  # labels stand at pixels of the picture as it is now
    if points:
        _label(axes, canvas, points)
    figure.savefig(path, format="png")
    return figure


def _error(point: Point) -> float:
    return max(1 - point.cosine, LEAST_ERROR)


def _scale(axes: Any, points: Sequence[Point]) -> None:
    """A logarithmic axis of errors that reads as cosines; better is up."""
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.margins(x=0.09)
    errors = [_error(p) for p in points] or [1.0]
    top = 10.0 ** math.floor(math.log10(min(errors)))
    axes.set_ylim(max(1.6, 1.3 * max(errors)), top * 0.8)
    exponents = range(round(math.log10(top)), 1)
    axes.set_yticks([10.0**e for e in exponents], [f"{1 - 10.0**e:.{-e}f}" for e in exponents])


def _label(axes: Any, canvas: Any, points: Sequence[Point]) -> None:
    """Put each label near its point where nothing is covered, with a line where it is far."""
    renderer = canvas.get_renderer()
    centres = np.array([axes.transData.transform((p.megabytes, _error(p))) for p in points])
    furniture = [text.get_window_extent(renderer) for text in axes.texts]
    if legend := axes.get_legend():
        furniture.append(legend.get_window_extent(renderer))
    texts = [
        axes.annotate(
            point.label,
            tuple(centre),
            xycoords="figure pixels",
            fontsize=8.5,
            color=FAMILIES[point.family][0],
            ha="center",
            va="center",
        )
        for point, centre in zip(points, centres, strict=True)
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = np.array([(e.width + 6, e.height + 4) for e in extents])
    inside = axes.get_window_extent(renderer).padded(-6)
    boxes = _arrange(centres, sizes, inside.extents, np.array([b.extents for b in furniture]))
    for text, box, centre in zip(texts, boxes, centres, strict=True):
        text.set_position(tuple((box[:2] + box[2:]) / 2))
        edge = np.clip(centre, box[:2], box[2:])
        if np.hypot(*(edge - centre)) > REACH:
            axes.annotate(
                "",
                tuple(centre),
                tuple(edge),
                xycoords="figure pixels",
                textcoords="figure pixels",
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.8},
                zorder=2,
            )


def _arrange(centres: Array, sizes: Array, inside: Array, furniture: Array) -> Array:
    """Boxes (x0, y0, x1, y1) of the labels: each in turn takes its cheapest place, four times.

    A place costs its distance in pixels, 500 for each thing that it or its line covers, and more
    than all that outside the axes.
    """
    turns = np.arange(24) * (np.pi / 12)
    circle = np.stack([np.cos(turns), np.sin(turns)], axis=-1)
    markers = np.concatenate([centres - MARKER, centres + MARKER], axis=1)
    boxes = np.tile(furniture[0], (len(centres), 1))  # nowhere yet: covered already
    lines = np.full((len(centres), 16, 2), -1.0)
    for i in [*range(len(centres))] * 4:
        radii = sizes[i] / 2 + MARKER + 2 + 6 * np.arange(16)[:, None]
        middles = (centres[i] + circle * radii[:, None, :]).reshape(-1, 2)
        places = np.concatenate([middles - sizes[i] / 2, middles + sizes[i] / 2], axis=1)
        edges = np.clip(centres[i], places[:, :2], places[:, 2:])
        distances = np.hypot(*(edges - centres[i]).T)
        along = edges[:, None] + np.linspace(0, 1, 16)[:, None] * (centres[i] - edges)[:, None]
        along[distances <= REACH] = -1.0
        rest = np.arange(len(centres)) != i
        foreign = np.abs(centres - centres[i]).max(axis=1) > 2 * MARKER
        drawn = lines[rest][lines[rest, :, 0] >= 0]
        covered = _overlaps(places, np.concatenate([markers, furniture, boxes[rest]])).sum(axis=1)
        covered += _holds(places, drawn).any(axis=1)
        blocked = np.concatenate([drawn - 4, drawn + 4], axis=1)
        blocked = np.concatenate([markers[foreign], boxes[rest], blocked])
        covered += _holds(blocked, along.reshape(-1, 2)).any(axis=0).reshape(-1, 16).any(axis=1)
        outside = ((places[:, :2] < inside[:2]) | (places[:, 2:] > inside[2:])).any(axis=1)
        best = int(np.argmin(distances + 500 * covered + 9999 * outside))
        boxes[i], lines[i] = places[best], along[best]
    return boxes


def _overlaps(a: Array, b: Array) -> Array:
    """[a, b]: two boxes share a pixel."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    shared: Array = np.all(low < high, axis=-1)
    return shared


def _holds(boxes: Array, points: Array) -> Array:
    """[box, point]: the point lies in the box; negative ones are no points."""
    found = (boxes[:, None, :2] < points) & (points < boxes[:, None, 2:]) & (points >= 0)
    held: Array = np.all(found, axis=-1)
    return held

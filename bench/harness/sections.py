"""What is measured, section by section, beside the targets for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.measuring import Entrant, Group
from harness.targets import OURS, Beside, Faster, Reaches, Target
from harness.work import Work

GGML_BUFFERS = ("plain", "repack", "amx")
HALF_WIDE = ("torch.bfloat16",)
Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Choice:
    """What of everything is measured; empty is the section's own."""

    shapes: Shapes = ()
    """(n, k) each."""
    rows: tuple[int, ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class Section:
    """Groups of entrants, and targets for lowbit's rows among them."""

    name: str
    title: str
    groups: tuple[Group, ...]
    targets: tuple[Target, ...]


def int4_times_int8(choice: Choice) -> Section:
    """int4 weights, x quantized to int8 on the way in."""
    grid = tuple((n, k) for n in (2048, 4096, 11008) for k in (2048, 4096, 11008))
    shapes = choice.shapes or (((4096, 4096),) if choice.quick else grid)
    rows = choice.rows or ((1, 16, 128) if choice.quick else (1, 4, 16, 64, 128, 512))
    peers = ("onnxruntime.acc4", *(f"ggml.{k}.{b}" for k in ("q4_0", "q4_k") for b in GGML_BUFFERS))
    groups = [
        _all("w4a8", Work(n, k, f"int4_g{g}", inner=f"int8_g{g}"), peers, rows)
        for g in (128, 32)
        for n, k in shapes
    ]
    return Section("w4a8", "int4 x dynamic int8", tuple(groups), ())


SECTIONS: dict[str, Callable[[Choice], Section]] = {}


def _all(section: str, work: Work, peers: Iterable[str], rows: Iterable[int]) -> Group:
    entrants = [Entrant(name, work) for name in (OURS, *peers)]
    return Group(section, tuple(tuple((e, m) for e in entrants) for m in rows))

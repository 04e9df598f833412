"""Which tile computes a product soonest: a list for each family, and what its tiles reach.

tiles.json holds the list. `share` is what a tile reaches of the tensor cores' peak while every
multiprocessor works on one; `bench/gpu.py --tune-cutlass` measures it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowbit.kernels.cuda import costs, launch
from lowbit.kernels.cutlass.schedulers import Tiling, grid
from lowbit.kernels.declare import Problem

PATH = Path(__file__).parent / "tiles.json"
_FILL = 1.5e-6  # seconds until the first tile's columns are there, and the last one's are written


@dataclass(frozen=True)
class Tile:
    """A way to cut a product into blocks."""

    shape: tuple[int, int, int]
    """Rows of the first operand, of the second, columns."""
    cluster: tuple[int, int]
    schedule: str
    turned: bool
    """w is the first operand."""
    share: float

    def tiling(self, p: Problem) -> Tiling:
        """Tiles of a product."""
        first, second = (p.n, p.m) if self.turned else (p.m, p.n)
        m, n, _ = self.shape
        return Tiling(-(-first // m), -(-second // n), 1, self.cluster)

    def waves(self, p: Problem) -> float:
        """Tiles that each block computes, one after the other."""
        tiling = self.tiling(p)
        blocks, (a, b, _) = tiling.blocks, grid(tiling, launch.parse(p.device).processors)
        return -(-blocks[0] * blocks[1] // (a * b))

    def __str__(self) -> str:
        shape, cluster = ("x".join(map(str, each)) for each in (self.shape, self.cluster))
        turned = ", w first" if self.turned else ""
        return f"tile {shape}, cluster {cluster}, {self.schedule.lower()}{turned}"


@cache
def listed(family: str) -> tuple[Tile, ...]:
    """The tiles of a family."""
    found = json.loads(PATH.read_text(encoding="utf-8"))[family]
    shapes = ({**each, **{key: tuple(each[key]) for key in ("shape", "cluster")}} for each in found)
    return tuple(Tile(**each) for each in shapes)


def seconds(p: Problem, tile: Tile, faster: float) -> float:
    """Estimate; `faster` is the rate of these operands over that of 16-bit ones."""
    device = launch.parse(p.device)
    rates = costs.rates(device.capability)
    m, n, _ = tile.shape
    rate = rates.dense * faster * tile.share / device.processors
    computed = tile.waves(p) * 2 * m * n * p.k / rate
    blocks = tile.tiling(p).blocks
    moved = p.bytes / (rates.bandwidth * min(1.0, blocks[0] * blocks[1] / device.processors))
    return costs.LAUNCH + _FILL + max(moved, computed)


def best(p: Problem, family: str, faster: float, usable: Callable[[Tile], bool]) -> Tile | None:
    """The tile of the least estimate among the usable ones; None where there is none."""
    fitting = [tile for tile in listed(family) if usable(tile)]
    return min(fitting, key=lambda tile: seconds(p, tile, faster), default=None)

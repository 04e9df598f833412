"""Which tile computes a product soonest: a list for each family, and what its tiles reach.

tiles.json holds the list. `share` is what a tile reaches of the tensor cores' peak while every
multiprocessor works on one; `bench/gpu.py --tune-cutlass` measures it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowbit.kernels.cuda import costs, launch
from lowbit.kernels.cutlass import streamk
from lowbit.kernels.cutlass.schedulers import Tiling, grid
from lowbit.kernels.cutlass.streamk import Sharing
from lowbit.kernels.declare import Problem

PATH = Path(__file__).parent / "tiles.json"
_TURN = 1e-6  # seconds for a block's sums to be added to those of the block before it
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
    shared: bool = False
    """Blocks share the columns of tiles, where that fills the GPU better."""
    swizzle: int = 1
    """Most tiles side by side that blocks take before they go on: what they read stays near."""

    @property
    def tile(self) -> Tile:
        """Itself, as `families.Way` has it."""
        return self

    def tiling(self, p: Problem) -> Tiling:
        """Tiles of a product."""
        first, second = (p.n, p.m) if self.turned else (p.m, p.n)
        m, n, _ = self.shape
        return Tiling(-(-first // m), -(-second // n), p.batches, self.cluster, self.swizzle)

    def sharing(self, p: Problem) -> Sharing:
        """How blocks share the columns."""
        if not self.shared:
            return Sharing()
        steps = -(-p.k // self.shape[2])
        return streamk.chosen(self.tiling(p), steps, launch.parse(p.device).processors)

    def blocks(self, p: Problem) -> int:
        """That a product keeps busy, if the GPU has so many."""
        (m, n), sharing = self.tiling(p).blocks, self.sharing(p)
        return max(m * n * p.batches * sharing.splits, sharing.units)

    def waves(self, p: Problem) -> float:
        """Tiles that each block computes, one after the other, or parts of them."""
        tiling, sharing = self.tiling(p), self.sharing(p)
        (m, n), on = tiling.blocks, streamk.grid if self.shared else grid
        a, b, _ = on(tiling, launch.parse(p.device).processors)
        if sharing.tiles:
            return (m * n - sharing.tiles) / (a * b) + sharing.tiles / sharing.units
        return -(-m * n * p.batches * sharing.splits // (a * b)) / sharing.splits

    def __str__(self) -> str:
        shape, cluster = ("x".join(map(str, each)) for each in (self.shape, self.cluster))
        notes = (", w first" if self.turned else "") + (", shared" if self.shared else "")
        notes += f", swizzle {self.swizzle}" if self.swizzle > 1 else ""
        return f"tile {shape}, cluster {cluster}, {self.schedule.lower()}{notes}"


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
    busy = min(1.0, tile.blocks(p) / device.processors)
    moved = p.bytes / (rates.bandwidth * busy)
    sharing = tile.sharing(p)
    turns = sharing.most - 1
    added = turns * (_TURN + 8 * m * n * sharing.partial(tile.tiling(p)) / rates.bandwidth)
    return costs.LAUNCH + _FILL + max(moved, computed) + added

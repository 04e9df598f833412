"""Blocks that share the columns of a tile: arguments of CUTLASS's stream-K scheduler.

Where tiles do not fill the GPU's last wave, each of its blocks gets as many columns, of one tile or
of the end of one and the beginning of the next. Their sums are added up in the order of the columns
(CUTLASS's deterministic reduction), so a result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowbit.kernels.cutlass.records import (
    DIVISOR,
    NARROW,
    POWER,
    Value,
    divisor,
    narrow,
    power,
    record,
)
from lowbit.kernels.cutlass.schedulers import Tiling, resident

HEURISTIC, DATA_PARALLEL, SPLIT_K, STREAM_K = (
    "Heuristic",
    "DataParallel",
    "SplitK",
    "StreamK",
)
LEAST = 8
"""Steps along the columns that a block takes at least, where CUTLASS shares them."""
_FEWEST = 4  # where we do
_GROUPS = 8  # most groups that blocks which share columns are divided into

PARAMETERS = record(
    ("cluster_major", POWER),
    ("cluster_minor", POWER),
    ("batch", DIVISOR),
    ("tiles_major", DIVISOR),
    ("clusters", DIVISOR),
    ("groups", DIVISOR),
    ("units_per_group", DIVISOR),
    ("units", "Q"),
    ("steps", NARROW),
    ("log_swizzle", "i"),
    ("raster", "i"),
    ("splits", NARROW),
    ("big_units", "I"),
    ("big_groups", "I"),
    ("partial", "Q"),
    ("shared_tiles", "I"),
    ("shared_units", "I"),
    ("steps_per_unit", NARROW),
    ("steps_per_big_unit", NARROW),
    ("reduction", "i"),
    ("subtiles", DIVISOR),
    ("reduction_units", "I"),
    ("alignment", "I"),
    ("locks", "Q"),
)
"""cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamKParams, then lb::StreamK's."""


@dataclass(frozen=True)
class Sharing:
    """How the columns of tiles are shared."""

    splits: int = 1
    """Blocks for every tile."""
    tiles: int = 0
    """Or the first tiles, by units that may begin and end within one."""
    units: int = 0
    groups: int = 1

    @property
    def most(self) -> int:
        """Blocks that any tile has."""
        # A unit may end just after a tile begins, and another one begin just before it ends; and
        # units differ by a step.
        return -(-self.units // self.tiles) + 2 if self.tiles else self.splits

    def partial(self, tiling: Tiling) -> int:
        """Tiles that hold sums of some of their columns."""
        m, n = tiling.blocks
        return m * n * tiling.batches if self.splits > 1 else self.tiles


def grid(tiling: Tiling, processors: int) -> tuple[int, int, int]:
    """Blocks to launch: as many as stay."""
    a, b = tiling.cluster
    staying = max(a * b, processors if a * b == 1 else resident(processors, a * b))
    return (staying // b, b, 1) if tiling.along_m else (a, staying // a, 1)


def chosen(tiling: Tiling, steps: int, processors: int) -> Sharing:
    """What we choose: as many blocks for every tile, where they nearly fill the GPU.

    That is fewer blocks to a tile than CUTLASS's choice, and they add up one after the other.
    """
    (m, n), (across, down, _) = tiling.blocks, grid(tiling, processors)
    total, wave = m * n * tiling.batches, across * down
    most = steps // _FEWEST
    splits = min(wave // total, most)
    if splits > 1 and (splits == most or 8 * splits * total >= 7 * wave):
        return shared(tiling, steps, processors, SPLIT_K, splits)
    return shared(tiling, steps, processors)


def shared(
    tiling: Tiling, steps: int, processors: int, mode: str = HEURISTIC, splits: int = 1
) -> Sharing:
    """What CUTLASS chooses; a tile takes so many steps along the columns."""
    if mode == SPLIT_K or (mode == HEURISTIC and splits > 1):
        return Sharing(min(splits, processors, steps))
    m, n = tiling.blocks
    total, cluster = m * n * tiling.batches, tiling.cluster[0] * tiling.cluster[1]
    across, down, _ = grid(tiling, processors)
    wave = across * down
    tiles = _shared_tiles(total, wave, cluster, steps, mode)
    whole = wave // cluster * cluster
    units = min(whole, steps * tiles // LEAST // cluster * cluster)
    if mode == DATA_PARALLEL or tiles == 0 or units == 0:
        return Sharing()
    if mode == HEURISTIC and tiles < units and units % tiles == 0:
        return Sharing(units // tiles)
    return Sharing(1, tiles, units, _groups(tiling, tiles, units, steps))


def _shared_tiles(total: int, wave: int, cluster: int, steps: int, mode: str) -> int:
    full = total // wave
    if mode in (DATA_PARALLEL, SPLIT_K) or total % wave == 0 or steps <= LEAST:
        return 0
    if mode == HEURISTIC and 2 * (total - full * wave) >= wave:
        return 0
    rest = total - max(full - 1, 0) * wave
    return rest // cluster * cluster


def _groups(tiling: Tiling, tiles: int, units: int, steps: int) -> int:
    """Groups of units that share tiles among themselves, so that neighbours read the same rows."""
    (m, n), (a, b) = tiling.blocks, tiling.cluster
    clusters, sharing = tiles // (a * b), units // (a * b)

    def valid(groups: int) -> bool:
        each = clusters // groups * a * b * steps // (units // groups)
        return sharing % groups == 0 and each >= LEAST

    def ideal(groups: int) -> bool:
        return clusters % groups == 0

    counts = range(min(_GROUPS, m // a if tiling.along_m else n // b), 1, -1)
    return _first(counts, lambda g: valid(g) and ideal(g)) or _first(counts, valid) or 1


def _first(counts: range, wanted: Callable[[int], bool]) -> int:
    return next((count for count in counts if wanted(count)), 0)


def parameters(
    name: str, tiling: Tiling, steps: int, sharing: Sharing, partial: int, locks: int
) -> dict[str, Value]:
    """Members of the scheduler's arguments.

    `partial` is where sums wait, 32 bits for every number of `Sharing.partial` tiles; `locks` is of
    int32 zeros, two for each of those tiles, that the kernel leaves as zeros.
    """
    (m, n), (a, b) = tiling.blocks, tiling.cluster
    total, cluster = m * n * tiling.batches, a * b
    major, minor, along = (a, b, m // a) if tiling.along_m else (b, a, n // b)
    found = {
        **power(f"{name}.cluster_major", major),
        **power(f"{name}.cluster_minor", minor),
        **divisor(f"{name}.batch", m * n),
        **divisor(f"{name}.tiles_major", along),
        **divisor(f"{name}.groups", sharing.groups),
        **narrow(f"{name}.steps", steps),
        f"{name}.log_swizzle": tiling.log_swizzle,
        f"{name}.raster": 0 if tiling.along_m else 1,
        **narrow(f"{name}.splits", sharing.splits),
        f"{name}.partial": partial,
        f"{name}.alignment": 1,
        f"{name}.locks": locks,
    }
    if not sharing.tiles:
        each = steps // sharing.splits
        return found | {
            **divisor(f"{name}.clusters", total // cluster),
            **divisor(f"{name}.units_per_group", 1),
            f"{name}.units": total,
            f"{name}.big_units": steps % sharing.splits,
            **narrow(f"{name}.steps_per_unit", each),
            **narrow(f"{name}.steps_per_big_unit", each + 1),
        }
    clusters, units, groups = sharing.tiles // cluster, sharing.units, sharing.groups
    in_group = steps * (clusters // groups) * cluster
    each = in_group // (units // groups)
    return found | {
        **divisor(f"{name}.clusters", units // cluster),
        **divisor(f"{name}.units_per_group", units // groups),
        f"{name}.units": total - sharing.tiles + units,
        f"{name}.big_units": in_group % units // cluster,
        f"{name}.big_groups": clusters % groups,
        f"{name}.shared_tiles": sharing.tiles,
        f"{name}.shared_units": units,
        **narrow(f"{name}.steps_per_unit", each),
        **narrow(f"{name}.steps_per_big_unit", each + 1),
        **divisor(f"{name}.subtiles", 1),
    }

"""How tiles are handed to blocks that stay: CUTLASS's persistent scheduler, and its grid."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.kernels.cutlass.records import DIVISOR, POWER, Value, divisor, power, record

_PER_CLUSTER_OF_SM = 18  # multiprocessors of a graphics processing cluster of GH100

_ROOM = ((3, 6), (2, 3), (1, 2))  # for a swizzle of 2^s tiles: how many there must be

PERSISTENT = record(
    ("cluster_major", POWER),
    ("cluster_minor", POWER),
    ("batch", DIVISOR),
    ("tiles_major", DIVISOR),
    ("blocks", "Q"),
    ("log_swizzle", "i"),
    ("raster", "i"),
    ("tiles_m", "I"),
    ("tiles_n", "I"),
    ("tiles_l", "I"),
    ("cluster_m", "I"),
    ("cluster_n", "I"),
)
"""cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Params."""


def log_swizzle(tiles: int) -> int:
    """Of the widest swizzle that so many tiles have room for."""
    return next((s for s, least in _ROOM if tiles >= least), 0)


@dataclass(frozen=True)
class Tiling:
    """Tiles of a result, in blocks, rounded up to whole clusters."""

    m: int
    n: int
    batches: int
    cluster: tuple[int, int]
    swizzle: int = 1
    """Most tiles side by side that blocks take before they go on: 1, 2, 4 or 8."""

    @property
    def log_swizzle(self) -> int:
        """Of the swizzle that there is room for."""
        small = min(self._clustered)
        return min(log_swizzle(small), self.swizzle.bit_length() - 1)

    @property
    def _clustered(self) -> tuple[int, int]:
        (m, n), (a, b) = (self.m, self.n), self.cluster
        return -(-m // a) * a, -(-n // b) * b

    @property
    def blocks(self) -> tuple[int, int]:
        """Along both axes, whole swizzles of clusters."""
        (m, n), (a, b) = self._clustered, self.cluster
        a, b = a << self.log_swizzle, b << self.log_swizzle
        return -(-m // a) * a, -(-n // b) * b

    @property
    def along_m(self) -> bool:
        """Whether neighbours follow each other along m."""
        m, n = self.blocks
        return n > m


def persistent(name: str, tiling: Tiling) -> dict[str, Value]:
    """Members of the scheduler's arguments."""
    (m, n), (a, b) = tiling.blocks, tiling.cluster
    major, minor, tiles = (a, b, m // a) if tiling.along_m else (b, a, n // b)
    return {
        **power(f"{name}.cluster_major", major),
        **power(f"{name}.cluster_minor", minor),
        **divisor(f"{name}.batch", m * n),
        **divisor(f"{name}.tiles_major", tiles),
        f"{name}.blocks": m * n * tiling.batches,
        f"{name}.log_swizzle": tiling.log_swizzle,
        f"{name}.raster": 0 if tiling.along_m else 1,
        f"{name}.tiles_m": m // a,
        f"{name}.tiles_n": n // b,
        f"{name}.tiles_l": tiling.batches,
        f"{name}.cluster_m": a,
        f"{name}.cluster_n": b,
    }


def grid(tiling: Tiling, processors: int) -> tuple[int, int, int]:
    """Blocks to launch: as many as stay, or one for every tile."""
    (m, n), (a, b) = tiling.blocks, tiling.cluster
    total = m * n * tiling.batches
    staying = max(a * b, processors if a * b == 1 else resident(processors, a * b))
    if tiling.along_m:
        return min(staying // b, total // b), b, 1
    return a, min(staying // a, total // a), 1


def resident(processors: int, cluster: int) -> int:
    """Blocks that fit at a time, clusters never across graphics processing clusters."""
    whole = max(1, processors // _PER_CLUSTER_OF_SM)
    rest = processors % _PER_CLUSTER_OF_SM if processors >= _PER_CLUSTER_OF_SM else 0
    fitting = whole * (_PER_CLUSTER_OF_SM // cluster * cluster) + rest // cluster * cluster
    return min(processors, fitting)

"""What is measured, what is hoped for, and what came out: records without any behaviour."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.work import Work

OURS = "lowbit"
NOISY = 0.3
"""Distance of the quartiles over the median from which on a row is marked."""


@dataclass(frozen=True)
class Entrant:
    """A contender with a work to do."""

    name: str
    work: Work
    threads: int = 0
    """0 is as many as lowbit would use."""


@dataclass(frozen=True)
class Faster:
    """At least `factor` times as fast as a peer, or at the bandwidth where that is less."""

    peer: str
    factor: float
    first: int = 1
    """Rows of x from which on this holds."""
    last: int = 1 << 30
    of: Work | None = None
    """The only work of ours that this holds for; None is all of the group."""
    bandwidth: float | None = None
    """Share of the read bandwidth that is enough."""


@dataclass(frozen=True)
class Reaches:
    """At least this share of a roof: "read", "copy" or one of the operations."""

    roof: str
    share: float
    first: int = 1
    last: int = 1 << 30
    of: Work | None = None


@dataclass(frozen=True)
class Beside:
    """Within a factor of another of our own rows, for each unit of what there is to do.

    `per` is "call", "byte" (of weights) or "operation".
    """

    entrant: Entrant
    other: Entrant
    per: str
    least: float
    """Rate of the entrant over that of the other, at least."""
    m: int
    other_m: int


@dataclass(frozen=True)
class Within:
    """A call takes at most these seconds."""

    seconds: float
    first: int = 1
    last: int = 1 << 30
    of: Work | None = None


@dataclass(frozen=True)
class Rate:
    """At least these multiplications and additions a second, whatever the machine's peak."""

    operations: float
    first: int = 1
    last: int = 1 << 30
    of: Work | None = None


Target = Faster | Reaches | Beside | Within | Rate


@dataclass(frozen=True)
class Group:
    """Entrants that are compared with each other, so measured in turn.

    A turn is a list of (entrant, rows of x): all of a turn are alternated.
    """

    section: str
    turns: tuple[tuple[tuple[Entrant, int], ...], ...]
    targets: tuple[Target, ...] = ()

    @property
    def entrants(self) -> list[Entrant]:
        """Each once, in order."""
        return list(dict.fromkeys(entrant for turn in self.turns for entrant, _ in turn))

    def rows(self, entrant: Entrant) -> int:
        """Most rows that an entrant's x has."""
        return max(m for turn in self.turns for each, m in turn if each == entrant)


@dataclass
class Row:
    """What one entrant did with one number of rows."""

    section: str
    name: str
    work: Work
    m: int
    threads: int
    note: str = ""
    """Why there are no times: absent, wrong, failed, lost, or left out."""
    weight_bytes: int = 0
    rotated: int = 0
    """Bytes of weights taken in turn."""
    moved: int = 0
    """Bytes read and written by a call, where those are not weights, x and y."""
    out_bytes: int = 0
    """Of an entry of y; 0 is two where x has 16 bits and else four."""
    share_of_bound: float = 0.0
    """How much of its error bound the answer used; above 1 is wrong and is not timed."""
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median; NaN where nothing was timed."""
        return statistics.median(self.times) if self.times else float("nan")

    @property
    def best(self) -> float:
        """Shortest call."""
        return min(self.times, default=float("nan"))

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        if len(self.times) < 4:
            return float("nan")
        low, _, high = statistics.quantiles(self.times, n=4)
        return (high - low) / self.seconds

    @property
    def noisy(self) -> bool:
        """Whether half of the calls lie far apart: the machine did something else as well."""
        return self.spread > NOISY

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.work.n * self.work.k

    @property
    def traffic(self) -> int:
        """Bytes of weights, x and y, each once."""
        x_bytes = {"float32": 4, "float16": 2, "bfloat16": 2}.get(self.work.x, 1)
        y_bytes = self.out_bytes or (2 if x_bytes == 2 else 4)
        work = self.work
        return self.weight_bytes + self.m * (work.k * x_bytes + work.n * y_bytes)

    def record(self) -> dict[str, Any]:
        """For JSON: the statistics instead of all times."""
        plain = asdict(self) | {"calls": len(self.times)}
        del plain["times"]
        if self.times:
            spread = None if len(self.times) < 4 else self.spread
            plain |= {"seconds": self.seconds, "best": self.best, "spread": spread}
            plain["noisy"] = self.noisy
        return plain

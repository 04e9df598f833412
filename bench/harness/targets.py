"""Whether rows reach the targets of their group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from harness.records import (
    OURS,
    Beside,
    Entrant,
    Faster,
    Rate,
    Reaches,
    Row,
    Target,
    Within,
)


@dataclass(frozen=True)
class Roofs:
    """Measured limits of this machine for a number of threads, per second."""

    threads: int
    read: float
    """Bytes read from memory."""
    copy: float
    """Bytes read plus bytes written."""
    operations: Mapping[str, float]
    """Multiplications and additions of fma, vnni, bf16, amx_int8, amx_bf16: what there is."""


@dataclass(frozen=True)
class Verdict:
    """One target at one point."""

    row: Row
    against: str
    """In words what it is compared with."""
    ratio: float
    wanted: float
    unit: str = ""
    """Of what there is to do, where another of our own rows is compared."""
    noisy: bool = False
    """One of the two sides is."""
    enough: str = ""
    """Why it is met although the ratio is less."""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return bool(self.enough) or self.ratio >= self.wanted

    def record(self) -> dict[str, Any]:
        """For JSON."""
        row = self.row
        return {
            "section": row.section,
            "work": asdict(row.work),
            "m": row.m,
            "against": self.against,
            "unit": self.unit,
            "ratio": self.ratio,
            "wanted": self.wanted,
            "enough": self.enough,
            "met": self.met,
            "noisy": self.noisy,
        }


def read_share(row: Row, roofs: Roofs) -> float:
    """Weights read a second over what the memory gives."""
    return row.weight_bytes / row.seconds / roofs.read


def operation_share(row: Row, roof: str, roofs: Roofs) -> float:
    """Operations a second over a peak; NaN where this machine has none such."""
    return row.operations / row.seconds / roofs.operations.get(roof, math.nan)


def judge(
    targets: Iterable[Target], rows: Iterable[Row], roofs: Mapping[int, Roofs]
) -> list[Verdict]:
    """Verdicts wherever both sides were timed.

    Parameters
    ----------
    targets : iterable of Target
    rows : iterable of Row
        Of one section.
    roofs : mapping
        Number of threads to roofs.
    """
    timed = [row for row in rows if row.times]
    verdicts: list[Verdict] = []
    for target in targets:
        if isinstance(target, Beside):
            verdicts += _beside(target, timed)
            continue
        for row in timed:
            ours = row.name.partition(".")[0] == OURS and target.of in (None, row.work)
            if ours and target.first <= row.m <= target.last:
                if isinstance(target, Faster):
                    verdicts += _faster(target, row, timed, roofs[row.threads])
                elif isinstance(target, Within | Rate):
                    verdicts.append(_absolute(target, row))
                else:
                    verdicts += _reaches(target, row, roofs[row.threads])
    return verdicts


def _faster(target: Faster, row: Row, timed: list[Row], roofs: Roofs) -> Iterable[Verdict]:
    for other in timed:
        same = (other.name, other.m, other.threads) == (target.peer, row.m, row.threads)
        if same and alike(other, row):
            ratio, enough = other.seconds / row.seconds, ""
            if ratio < target.factor and target.bandwidth is not None:
                share = read_share(row, roofs)
                if share >= target.bandwidth:
                    enough = f"{share:.0%} of the read bandwidth"
            yield Verdict(
                row,
                target.peer,
                ratio,
                target.factor,
                noisy=row.noisy or other.noisy,
                enough=enough,
            )


def alike(other: Row, row: Row) -> bool:
    """Whether a peer does the row's work, or multiplies dense weights of the same shape."""
    dense = other.work.dense and (other.work.n, other.work.k) == (row.work.n, row.work.k)
    return dense or other.work == row.work


def _absolute(target: Within | Rate, row: Row) -> Verdict:
    if isinstance(target, Within):
        against = f"{target.seconds * 1e6:g} us"
        return Verdict(row, against, target.seconds / row.seconds, 1.0, noisy=row.noisy)
    against = f"{target.operations / 1e12:g} Top/s"
    rate = row.operations / row.seconds
    return Verdict(row, against, rate / target.operations, 1.0, noisy=row.noisy)


def _reaches(target: Reaches, row: Row, roofs: Roofs) -> Iterable[Verdict]:
    if target.roof == "read":
        share = read_share(row, roofs)
    elif target.roof == "copy":
        share = row.moved / row.seconds / roofs.copy
    else:
        share = operation_share(row, target.roof, roofs)
    if not math.isnan(share):
        yield Verdict(row, f"{target.roof} roof", share, target.share, noisy=row.noisy)


def _beside(target: Beside, timed: list[Row]) -> Iterable[Verdict]:
    row = _find(target.entrant, target.m, timed)
    other = _find(target.other, target.other_m, timed)
    if row is None or other is None:
        return
    units = {
        "call": 1.0,
        "byte": row.weight_bytes / other.weight_bytes,
        "operation": row.operations / other.operations,
    }
    ratio = other.seconds / row.seconds * units[target.per]
    against = f"{_difference(row, other)}, per {target.per}"
    noisy = row.noisy or other.noisy
    yield Verdict(row, against, ratio, target.least, target.per, noisy)


def _difference(row: Row, other: Row) -> str:
    """What sets the other row apart, in a few words."""
    words = []
    if row.work.weight != other.work.weight:
        words.append(other.work.weight)
    if (row.work.n, row.work.k) != (other.work.n, other.work.k):
        words.append(f"({other.work.n}, {other.work.k})")
    if row.m != other.m:
        words.append(f"M={other.m}")
    if row.threads != other.threads:
        words.append(f"{other.threads} thread" + "s" * (other.threads > 1))
    return " ".join(words) or "itself"


def _find(entrant: Entrant, m: int, timed: list[Row]) -> Row | None:
    for row in timed:
        if (row.name, row.work, row.m) == (entrant.name, entrant.work, m):
            if entrant.threads in (0, row.threads):
                return row
    return None

"""A group of contenders on one GPU: built, checked, then timed in turn, round by round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import peers.gpu
from peers.gpu import Built

from harness.checking import Wrong
from harness.gpu_clock import MOST_CALLS, Broken, Clock
from harness.gpu_work import Operands
from harness.records import Entrant, Group, Row
from harness.work import Work


@dataclass(frozen=True)
class Pace:
    """How long and how often to measure."""

    seconds: float = 0.02
    """Of calls, in each round."""
    rounds: int = 7
    rotate: int = 256 << 20
    """Bytes of weights that are taken in turn; several times the second-level cache."""
    most_copies: int = 64
    deadline: float = float("inf")
    """Of `time.monotonic`: no turn begins after it."""


class Contender:
    """One entrant with its copies."""

    def __init__(self, built: Built, pace: Pace) -> None:
        self.built, self.copies, self._next = built, 1, 0
        while self.copies < 2 or (
            self.copies * built.weight_bytes < pace.rotate and self.copies < pace.most_copies
        ):
            built.copy()
            self.copies += 1
        self._taken: Any = None

    def check(self, m: int) -> float:
        """Take m rows and compare an answer of each copy's kind with the exact one."""
        self._taken = self.built.take(m)
        return self.built.check(self.built.call(self._taken, 0), m)

    def call(self, _: int) -> object:
        """Use the copy that was used longest ago."""
        copy, self._next = self._next, (self._next + 1) % self.copies
        return self.built.call(self._taken, copy)

    def forget(self) -> None:
        """Let go of operands of the last rows."""
        self._taken = None


class Running:
    """The contenders of a group, and why some are away."""

    def __init__(
        self,
        group: Group,
        pace: Pace,
        clock: Clock,
        xp: Any,
        build: Callable[[str, Operands], Built] = peers.gpu.build,
        refusal: Callable[[str, Work], str | None] = peers.gpu.refusal,
    ) -> None:
        self.group, self.pace, self.clock = group, pace, clock
        self.contenders: dict[Entrant, Contender] = {}
        self.failed: dict[Entrant, str] = {}
        for entrant in group.entrants:
            why = refusal(entrant.name, entrant.work)
            if why:
                self.failed[entrant] = f"absent: {why}"
                continue
            operands = Operands(entrant.work, group.rows(entrant), xp)
            try:
                self.contenders[entrant] = Contender(build(entrant.name, operands), pace)
                clock.synchronize()
            except Exception as error:
                self.failed[entrant] = self._said(error, entrant, "while it was built")

    def turn(self, turn: Iterable[tuple[Entrant, int]]) -> list[Row]:
        """Check everyone of a turn, then time them in turn."""
        rows = {}
        late = time.monotonic() > self.pace.deadline
        for entrant, m in turn:
            row = Row(self.group.section, entrant.name, entrant.work, m, threads=1)
            rows[entrant] = row
            row.note = self.failed.get(entrant, "left out: no time left" if late else "")
            if not row.note:
                self._checked(entrant, row)
        counts = {e: self._count(e, row) for e, row in rows.items() if not row.note}
        gc.collect()
        gc.disable()
        try:
            for _ in range(self.pace.rounds):
                for entrant, count in counts.items():
                    row = rows[entrant]
                    if not row.note:
                        seconds = self._batch(entrant, row, count)
                        row.times += [] if row.note else [seconds]
        finally:
            gc.enable()
        for contender in self.contenders.values():
            contender.forget()
        return list(rows.values())

    def _checked(self, entrant: Entrant, row: Row) -> None:
        contender = self.contenders[entrant]
        built = contender.built
        if row.m < built.least_rows:
            row.note = f"absent: wants at least {built.least_rows} rows"
            return
        row.weight_bytes, row.out_bytes = built.weight_bytes, built.out_bytes
        row.rotated = contender.copies * built.weight_bytes
        row.moved = built.moved(row.m) if built.moved else 0
        try:
            row.share_of_bound = contender.check(row.m)
            self.clock.synchronize()
        except Wrong as wrong:
            row.note = f"wrong: {wrong}"
        except Exception as error:
            row.note = self._said(error, entrant, f"with M = {row.m}")

    def _count(self, entrant: Entrant, row: Row) -> int:
        """Calls of a round: each copy is met once beforehand, which says how long one takes."""
        first = min(max(3, self.contenders[entrant].copies), MOST_CALLS)
        seconds = self._batch(entrant, row, first)
        return max(1, min(MOST_CALLS, round(self.pace.seconds / max(seconds, 1e-7))))

    def _batch(self, entrant: Entrant, row: Row, count: int) -> float:
        """Seconds of a call; where one fails the row says so, and is not timed any more."""
        contender = self.contenders[entrant]
        measure = self.clock.host if contender.built.host else self.clock.batch
        try:
            return measure(contender.call, count)
        except Exception as error:
            row.note, row.times = self._said(error, entrant, f"with M = {row.m}"), []
            return 1.0

    def _said(self, error: Exception, entrant: Entrant, when: str) -> str:
        """What a row notes; raises `Broken` where the device is lost."""
        try:
            self.clock.synchronize()
        except Broken as broken:
            raise Broken(f"{entrant.name} {entrant.work} {when}: {broken}") from error
        return f"failed: {type(error).__name__}: {error}"

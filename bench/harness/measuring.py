"""A group of entrants measured in turn: all are checked, then timed, round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import peers

from harness.processes import Contender, Lost
from harness.records import Entrant, Group, Row
from harness.work import Work
from harness.worker import Task


@dataclass(frozen=True)
class Pace:
    """How long and how often to measure."""

    seconds: float = 0.15
    """Of calls, in each round."""
    rounds: int = 3
    rotate: int = 256 << 20
    most_copies: int = 128
    slowest: float = 4.0
    """Seconds that a single call may take by what fewer rows took; slower ones are left out."""


class Running:
    """The processes of a group, and what is known of each."""

    def __init__(
        self,
        group: Group,
        pace: Pace,
        threads: int,
        start: Callable[[Task], Contender] = Contender,
        refusal: Callable[[str, Work], str | None] = peers.refusal,
    ) -> None:
        self.group, self.pace = group, pace
        self.processes: dict[Entrant, Contender] = {}
        self.failed: dict[Entrant, str] = {}
        self.versions: dict[str, str] = {}
        self.last: dict[Entrant, Row] = {}
        self.threads = {e: e.threads or threads for e in group.entrants}
        for entrant in group.entrants:
            why = refusal(entrant.name, entrant.work)
            if why:
                self.failed[entrant] = f"absent: {why}"
                continue
            task = Task(
                entrant.name,
                entrant.work,
                group.rows(entrant),
                self.threads[entrant],
                pace.rotate,
                pace.most_copies,
            )
            try:
                process = start(task)
            except Lost as lost:
                self.failed[entrant] = f"lost: {lost}"
                continue
            self.processes[entrant] = process
            if "absent" in process.ready:
                self._fail(entrant, f"absent: {process.ready['absent']}")
            else:
                self.versions[entrant.name] = process.ready["version"]

    def turn(self, turn: Iterable[tuple[Entrant, int]]) -> list[Row]:
        """Check everyone of a turn, then time them in turn."""
        rows = {}
        for entrant, m in turn:
            row = Row(self.group.section, entrant.name, entrant.work, m, self.threads[entrant])
            rows[entrant, m] = row
            row.note = self.failed.get(entrant, "") or self._too_slow(entrant, m)
            if not row.note:
                row.weight_bytes = self.processes[entrant].ready["weight_bytes"]
                self._checked(entrant, row)
        for _ in range(self.pace.rounds):
            for (entrant, _), row in rows.items():
                if not row.note:
                    self._timed(entrant, row)
        for (entrant, _), row in rows.items():
            if row.times:
                self.last[entrant] = row
        return list(rows.values())

    def close(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            process.close()

    def _checked(self, entrant: Entrant, row: Row) -> None:
        reply = self._ask(entrant, row, {"m": row.m})
        row.share_of_bound = reply.get("share_of_bound", 0.0)

    def _timed(self, entrant: Entrant, row: Row) -> None:
        reply = self._ask(entrant, row, {"m": row.m, "seconds": self.pace.seconds})
        row.times += reply.get("times", [])
        row.rotated, row.moved = reply.get("rotated", 0), reply.get("moved", 0)

    def _ask(self, entrant: Entrant, row: Row, request: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = self.processes[entrant].ask(request)
        except Lost as lost:
            self._fail(entrant, f"lost: {lost}")
            reply = {"note": self.failed[entrant]}
        if "note" in reply:
            row.note, row.times = reply["note"], []
        return reply

    def _fail(self, entrant: Entrant, why: str) -> None:
        self.failed[entrant] = why
        self.processes.pop(entrant).close()

    def _too_slow(self, entrant: Entrant, m: int) -> str:
        before = self.last.get(entrant)
        if before is None or before.m > m:
            return ""
        guess = before.seconds * m / before.m
        return f"left out: about {guess:.1f} s a call" if guess > self.pace.slowest else ""

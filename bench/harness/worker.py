"""One contender in a process of its own: it builds, checks and times what it is told to.

    python -P bench/harness/worker.py '{"name": "lowbit", "work": {...}, ...}'

Requests and replies are lines of JSON on standard input and output. Whatever a library prints
goes to standard error.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python -P leaves it out

import numpy as np
import peers

from harness.checking import Wrong
from harness.work import Operands, Work

PATIENCE = 10.0
"""Seconds that copying the weights, and touching all copies once, may take at most."""
FEWEST = 3
"""Calls of a measurement, unless a single one takes longer than `PATIENCE`."""


@dataclass(frozen=True)
class Task:
    """What a process is started for."""

    name: str
    work: Work
    rows: int
    """Most rows that x will have."""
    threads: int
    rotate: int
    """Bytes of weights that are taken in turn, so that none stay in the caches."""
    most_copies: int

    @classmethod
    def read(cls, text: str) -> Task:
        """From JSON."""
        fields = json.loads(text)
        return cls(**fields | {"work": Work(**fields["work"])})


class Measurer:
    """Weights in many copies, and calls that take them in turn."""

    def __init__(self, task: Task) -> None:
        self.operands = Operands(task.work, task.rows)
        self.built = peers.found()[task.name].build(task.name, self.operands, task.threads)
        wanted = min(-(-task.rotate // self.built.weight_bytes), task.most_copies)
        self.copies = 1
        start = time.perf_counter()
        while self.copies < wanted and time.perf_counter() - start < PATIENCE:
            self.built.copy()
            self.copies += 1
        self._rows, self._taken, self._touched, self._next = 0, None, 0, 0

    def check(self, m: int) -> float:
        """Share of the bound that the product of m rows uses; raises `Wrong`."""
        self._take(m)
        answer = self.built.read(self.built.call(self._taken, 0))
        return self.built.check(answer, self.operands.x[:m])

    def times(self, m: int, seconds: float) -> list[float]:
        """Seconds of each call with m rows, for about as long as `seconds`."""
        self._take(m)
        found: list[float] = []
        gc.collect()
        gc.disable()
        total = 0.0
        while total < seconds or (len(found) < FEWEST and total < PATIENCE):
            found.append(self._time())
            total += found[-1]
        gc.enable()
        return found

    def _take(self, m: int) -> None:
        """Set x to m rows, and call once with each copy: what is allocated late is then there."""
        if m == self._rows:
            return
        self._rows, self._taken = m, self.built.take(np.ascontiguousarray(self.operands.x[:m]))
        self._touched = self._next = 0
        total = 0.0
        # Two at least: what was used last must not be what is used next.
        while self._touched < min(2, self.copies) or (
            self._touched < self.copies and total < PATIENCE / 5
        ):
            self._touched += 1
            self._next = self._touched - 1
            total += self._time()
        self._next = 0

    def _time(self) -> float:
        copy, self._next = self._next, (self._next + 1) % self._touched
        start = time.perf_counter()
        self.built.call(self._taken, copy)
        return time.perf_counter() - start

    @property
    def rotated(self) -> int:
        """Bytes of the weights that are really taken in turn."""
        return self._touched * self.built.weight_bytes


def answer(measurer: Measurer, request: dict[str, Any]) -> dict[str, Any]:
    """What a request is replied with."""
    m = request["m"]
    if "seconds" in request:
        times = measurer.times(m, request["seconds"])
        moved = measurer.built.moved(m) if measurer.built.moved else 0
        return {"times": times, "rotated": measurer.rotated, "moved": moved}
    return {"share_of_bound": measurer.check(m)}


def serve(task: Task, requests: Any, reply: Any) -> None:
    """Reply to each line until there are no more."""

    def send(message: dict[str, Any]) -> None:
        reply.write(json.dumps(message) + "\n")
        reply.flush()

    try:
        why = peers.refusal(task.name, task.work)
        if why:
            raise peers.Refused(why)
        measurer = Measurer(task)
    except peers.Refused as refused:
        send({"absent": str(refused)})
        return
    version = peers.found()[task.name].version()
    send({"weight_bytes": measurer.built.weight_bytes, "version": version})
    for line in requests:
        try:
            send(answer(measurer, json.loads(line)))
        except Wrong as wrong:
            send({"note": f"wrong: {wrong}"})
        except Exception as error:  # one shape that fails is no reason to leave out the others
            send({"note": f"failed: {type(error).__name__}: {error}"})


def main() -> None:
    """Keep standard output for replies alone."""
    with os.fdopen(os.dup(1), "w") as reply:
        os.dup2(2, 1)
        with contextlib.suppress(BrokenPipeError):
            serve(Task.read(sys.argv[1]), sys.stdin, reply)


if __name__ == "__main__":
    main()

"""Measuring this machine: timed products, and the rates that explain them best.

What is fitted are the numbers of `lowbit.kernels.cpu.machine.Rates`, about twenty, all of them
physical: no table of shapes. Prices follow for every problem.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lowbit
from lowbit import kernels
from lowbit.kernels import Problem
from lowbit.kernels.cpu import isa, machine
from lowbit.kernels.cpu.machine import Rates, Tuning

Array = npt.NDArray[Any]
Report = Callable[[int, int], object]
"""report(done, of all): called after every step."""

_NAMES = tuple(each.name for each in fields(Rates))
_OFF = 0.1  # relative distance from which a time counts less and less: it was disturbed
_TRUST = 0.05  # that a rate has its nominal value, against a measured time that says it has not
_FARTHEST = np.log(30.0)  # from nominal values
_LONGEST = 5e-3  # seconds of a call, by the nominal rates: long calls are always disturbed
_ROTATED = 128 << 20  # bytes of weights that calls go through, and how many weights at most
_MOST_COPIES = 64
DENSE = ("float32", "float16", "bfloat16", "float64")
FMA, BF16, DOT = "matmul.cpu.fma", "matmul.cpu.bf16", "matmul.cpu.dot"


@dataclass(frozen=True)
class Case:
    """A product that is timed."""

    m: int
    n: int
    k: int
    weight: str
    x: str
    """dtype, or name of a format."""
    kernel: str
    prepared: bool = True
    threads: int = 1


@dataclass(frozen=True)
class Sample:
    """What a product took, at best."""

    problem: Problem
    kernel: str
    seconds: float


def cases(threads: int) -> list[Case]:
    """Products that show every rate: a weight's together.

    Most run on one thread, which is disturbed least where a machine has other work.
    """
    own = {FMA: "float32", BF16: "bfloat16", DOT: "int8_row"}
    found = []
    for weight in ("int4_g128", "int8_row", "fp8_row", "nf4_g64", "mxfp4"):
        for kernel, x in own.items():
            if kernel != DOT or weight.startswith("int"):
                found += [Case(m, 512, 4096, weight, x, kernel) for m in (1, 2, 4, 16, 64)]
    for kernel, x in own.items():
        # Scales of 32; x that is arranged for 64 columns; results that are no work; a bare call.
        found += [Case(m, 512, 4096, "int4_g32", x, kernel) for m in (4, 64)]
        found += [Case(m, 64, 8192, "int4_row", x, kernel) for m in (4, 64)]
        found += [Case(64, 4096, 32, "int4_row", x, kernel)]
        found += [Case(1, 16, 32, "int4_row", x, kernel)]
        found += [
            Case(m, 512, 4096, weight, x, kernel, prepared=False)
            for weight in ("int4_g128", "int8_row", "int3_g128")
            for m in (1, 64)
        ]
    found += [Case(m, 512, 4096, "int4_g128", "bfloat16", FMA) for m in (1, 4, 64)]
    if threads > 1:
        for kernel, x in own.items():
            for weight in ("int4_g128", "int8_row"):
                found += [
                    Case(1, 4096, 4096, weight, x, kernel, threads=each) for each in (1, threads)
                ]
                found += [
                    Case(m, 64 * threads, 4096, weight, x, kernel, threads=threads)
                    for m in (16, 64)
                ]
    return sorted(found, key=_group)


def _group(case: Case) -> tuple[str, int, int, bool]:
    return case.weight, case.n, case.k, case.prepared


class Weights:
    """Equal weights in as many places as it takes to find none of them in a cache."""

    def __init__(self, name: str, n: int, k: int, prepared: bool = True) -> None:
        w = lowbit.quantize(_numbers(n, k), name)
        w = w.prepare() if prepared else w
        copies = max(1, min(_MOST_COPIES, _ROTATED // max(1, w.nbytes)))
        self.copies = [w, *(w.copy() for _ in range(copies - 1))]

    def plans(self, m: int, x: str, kernel: str | None) -> list[lowbit.plans.Plan]:
        """The product with each of them."""
        return [lowbit.plan(self.x(m, x), w.T, kernel=kernel) for w in self.copies]

    def x(self, m: int, x: str) -> Any:
        """What they are multiplied by."""
        return _left(m, self.copies[0].shape[1], x)

    def problem(self, m: int, x: str) -> Problem:
        """What dispatch is asked."""
        return lowbit.explain(self.x(m, x), self.copies[0].T).problem


@lru_cache(maxsize=4)
def _numbers(rows: int, columns: int) -> Array:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


@lru_cache(maxsize=64)
def _left(m: int, k: int, x: str) -> Any:
    if x in DENSE:
        return _numbers(m, k).astype(x)
    return lowbit.quantize(_numbers(m, k), x)


class Timer:
    """The best time of a call, on and on: ask as often as there is patience."""

    def __init__(self, weights: Weights, m: int, x: str, kernel: str) -> None:
        self.kernel, self.seconds = kernel, float("inf")
        self._plans, self._x, self._next = weights.plans(m, x, kernel), weights.x(m, x), 0
        self._plans[0](self._x)

    def spend(self, seconds: float) -> None:
        """Call for some time, once at least."""
        stop = time.perf_counter() + seconds
        more = True
        while more:
            plan = self._plans[self._next % len(self._plans)]
            self._next += 1
            start = time.perf_counter()
            plan(self._x)
            now = time.perf_counter()
            self.seconds = min(self.seconds, now - start)
            more = now < stop


@contextlib.contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """As many threads meanwhile."""
    before = lowbit.get_num_threads()
    lowbit.set_num_threads(threads)
    try:
        yield
    finally:
        lowbit.set_num_threads(before)


def measure(
    chosen: Iterable[Case],
    *,
    seconds: float = 0.015,
    rounds: int = 10,
    report: Report = lambda done, of: None,
) -> list[Sample]:
    """Time products, those of one weight in turn.

    Parameters
    ----------
    chosen : iterable of Case
        Kernels that refuse a product are left out.
    seconds : float
        Of calls, for each product and round.
    rounds : int
        Turns, so that a product has another chance where it was disturbed for a while.
    report : callable
        Learns how many products are done.
    """
    samples: list[Sample] = []
    chosen = list(chosen)
    done = 0
    for (name, n, k, prepared), group in groupby(chosen, _group):
        weights = Weights(name, n, k, prepared)
        timers: list[tuple[Problem, int, Timer]] = []
        for case in group:
            done += 1
            with threads_set(case.threads):
                problem = weights.problem(case.m, case.x)
                problem = replace(problem, threads=case.threads)
                if _affordable(problem, case.kernel):
                    timer = Timer(weights, case.m, case.x, case.kernel)
                    timers.append((problem, case.threads, timer))
        for _ in range(rounds):
            for _, threads, timer in timers:
                with threads_set(threads):
                    timer.spend(seconds)
        samples += [Sample(problem, timer.kernel, timer.seconds) for problem, _, timer in timers]
        report(done, len(chosen))
    return samples


def _affordable(problem: Problem, kernel: str) -> bool:
    """Whether the kernel accepts it, and is not so slow that no call is undisturbed."""
    verdict = next(v for v in kernels.judge(problem) if v.kernel.name == kernel)
    return verdict.seconds is not None and (verdict.seconds < _LONGEST or problem.m == 1)


def fit(samples: Iterable[Sample], name: str) -> Rates:
    """The rates of an instruction set with which the prices come nearest to measured times.

    Distances are those of logarithms; from `_OFF` on they count linearly (Huber), because a time
    that other work disturbed may be far off. A rate that no sample shows stays nominal.
    Levenberg's and Marquardt's steps, with differences for derivatives.
    """
    chosen = list(samples)
    if not chosen:
        raise ValueError("fit: no product was measured")
    first = np.log([getattr(machine.nominal(name), each) for each in _NAMES])
    measured = np.log([sample.seconds for sample in chosen])
    before = machine.use(())

    def distances(logarithms: Array) -> Array:
        machine.use((_tuned(name, 1, Rates(*np.exp(logarithms).tolist())),))
        off = np.log(_prices(chosen)) - measured
        return np.concatenate([off, _TRUST * (logarithms - first)])

    def loss(found: Array) -> float:
        far = np.abs(found)
        return float(np.where(far < _OFF, far**2 / 2, _OFF * (far - _OFF / 2)).sum())

    try:
        at, damping = first, 1e-2
        found = distances(at)
        for _ in range(60):
            slopes = np.stack([distances(at + step) - found for step in 1e-4 * np.eye(len(at))], 1)
            slopes /= 1e-4
            weights = np.minimum(1.0, _OFF / np.maximum(np.abs(found), 1e-12))
            normal = slopes.T @ (weights[:, None] * slopes)
            downhill = slopes.T @ (weights * found)
            for _ in range(8):
                step = np.linalg.solve(normal + damping * np.eye(len(at)), downhill)
                trial = np.clip(at - step, first - _FARTHEST, first + _FARTHEST)
                there = distances(trial)
                if loss(there) < loss(found):
                    break
                damping *= 4
            else:
                break
            gained = loss(found) - loss(there)
            at, found, damping = trial, there, damping / 4
            if gained < 1e-7 * loss(found):
                break
    finally:
        machine.use(before)
    return Rates(*(float(f"{number:.4g}") for number in np.exp(at)))


def _tuned(name: str, threads: int, rates: Rates) -> Tuning:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Tuning(name, machine.processor(), threads, machine.version(), now, rates)


def tune(*, quick: bool = False, report: Report = lambda done, of: None) -> tuple[Tuning, float]:
    """Measure this machine, and fit its rates; nothing is written and nothing used.

    Returns
    -------
    Tuning
    float
        Relative distance between price and time that half of the products are within.
    """
    threads, name = lowbit.get_num_threads(), isa.host().name
    pace = {"rounds": 2} if quick else {}
    before = machine.use(())
    try:
        samples = measure(cases(threads), **pace, report=report)
        found = _tuned(name, threads, fit(samples, name))
        machine.use((found,))
        off = np.abs(np.log(_prices(samples)) - np.log([each.seconds for each in samples]))
        return found, float(np.expm1(np.median(off)))
    finally:
        machine.use(before)


def _prices(samples: Iterable[Sample]) -> list[float]:
    """By the rates in use."""
    known = {kernel.name: kernel for kernel in kernels.registered()}
    return [known[each.kernel].cost(each.problem) for each in samples]


def write(tuning: Tuning, path: Path) -> None:
    """Put a tuning into a file, beside those of other machines; at once, or not at all."""
    kept: list[Tuning] = []
    with contextlib.suppress(OSError, ValueError):
        kept = [t for t in machine.read(path) if _stays(t, tuning)]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(machine.text([*kept, tuning]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(unfinished).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(unfinished).unlink()
        raise


def _stays(other: Tuning, tuning: Tuning) -> bool:
    """Not what the new one replaces, nor of another version on the same machine."""
    stale = other.processor == tuning.processor and other.version != tuning.version
    return other.key != tuning.key and not stale

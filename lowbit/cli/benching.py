"""`lowbit bench`: this machine's products beside their prices, and the rates behind those."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lowbit
from lowbit import checks, kernels, tuning
from lowbit.explaining import time_text
from lowbit.kernels.cpu import machine

WEIGHTS = ("int4_g128", "int8_row", "fp8", "nf4_g64", "mxfp4")
LEFTS = ("bfloat16", "float32", "int8_g128")
ROWS = (1, 4, 16, 64, 256)
SHAPES = ((4096, 4096),)
NOTABLE = 0.05
"""Part of its time by which a chosen kernel may miss the fastest one."""

_SECONDS = 0.01  # of calls of a kernel in its turn


@dataclass(frozen=True)
class Outcome:
    """A product by every kernel."""

    m: int
    n: int
    k: int
    x: str
    weight: str
    source: str
    """Of the prices: measured or estimated rates."""
    kernel: str
    """The chosen one."""
    seconds: dict[str, float]
    """What each kernel took, at best."""
    prices: dict[str, float]

    @property
    def fastest(self) -> str:
        """The kernel that took least."""
        return min(self.seconds, key=lambda name: self.seconds[name])

    @property
    def regret(self) -> float:
        """Part of the fastest kernel's time that the chosen one takes longer."""
        return self.seconds[self.kernel] / self.seconds[self.fastest] - 1

    def record(self) -> dict[str, Any]:
        """What --json prints."""
        return asdict(self) | {"fastest": self.fastest, "regret": self.regret}


def outcomes(
    weights: tuple[str, ...],
    lefts: tuple[str, ...],
    rows: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    rounds: int,
) -> Iterator[Outcome | None]:
    """Measure the grid; None where only the reference computes a product.

    Kernels take turns, so that what disturbs one disturbs the others. Where the chosen one was late
    they go on for as long again, twice: chance alone shall not accuse it.
    """
    for n, k in shapes:
        for weight in weights:
            held = tuning.Weights(weight, n, k)
            for x in lefts:
                for m in rows:
                    yield _outcome(held, weight, x, m, rounds)


def _outcome(held: tuning.Weights, weight: str, x: str, m: int, rounds: int) -> Outcome | None:
    problem = held.problem(m, x)
    chosen, *others = (v for v in kernels.judge(problem) if v.refusal is None)
    if chosen.kernel.name == "reference":
        return None
    verdicts = [chosen, *(v for v in others if v.kernel.name != "reference")]
    timers = {v.kernel.name: tuning.Timer(held, m, x, v.kernel.name) for v in verdicts}
    found = Outcome(
        m,
        problem.n,
        problem.k,
        x,
        weight,
        machine.known(problem.device, problem.threads).word,
        chosen.kernel.name,
        {},
        {v.kernel.name: v.seconds for v in verdicts if v.seconds is not None},
    )
    for _ in range(3):
        for _ in range(rounds):
            for timer in timers.values():
                timer.spend(_SECONDS)
        found.seconds.update((name, timer.seconds) for name, timer in timers.items())
        if found.regret <= NOTABLE:
            break
    return found


def _progress() -> Progress:
    """How far it is, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def measured(
    weights: tuple[str, ...],
    lefts: tuple[str, ...],
    rows: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    quick: bool,
) -> list[Outcome]:
    """The outcomes of a grid, with a bar while it lasts.

    Raises
    ------
    TypeError, ValueError
        A name is not known.
    """
    for name in weights:
        checks.as_format(name, "--weights")
    for name in lefts:
        if name not in tuning.DENSE:
            checks.as_format(name, "--x")
    rounds = 2 if quick else 10
    found = []
    with _progress() as bar:
        total = len(weights) * len(lefts) * len(rows) * len(shapes)
        task = bar.add_task("products", total=total)
        for each in outcomes(weights, lefts, rows, shapes, rounds):
            bar.advance(task)
            if each is not None:
                found.append(each)
    return found


def tuned(quick: bool, as_json: bool) -> str:
    """Measure and fit, with a bar while it lasts; write it, and say what was found.

    Raises
    ------
    ValueError
        There is no place to write to.
    """
    path, why = machine.place()
    if path is None:
        raise ValueError(f"--tune: nowhere to write to: {why}")
    with _progress() as bar:
        task = bar.add_task("products", total=None)
        found, off = tuning.tune(
            quick=quick, report=lambda done, of: bar.update(task, completed=done, total=of)
        )
    tuning.write(found, path)
    if as_json:
        return json.dumps({"path": str(path), "off": off, **asdict(found)}, indent=1)
    usual = asdict(machine.nominal(found.isa))
    lines = [f"{found.processor}, kernels for {found.isa}, {found.threads} threads"]
    lines.append(f"{'':<16}{'measured':>10}{'nominal':>10}")
    for name, rate in asdict(found.rates).items():
        lines.append(f"{name:<16}{rate:>10.3g}{usual[name]:>10.3g}")
    lines.append(f"half of the timed products are within {off:.0%} of their price")
    return "\n".join([*lines, f"written: {path}"])


def table(found: list[Outcome]) -> str:
    """A line for each product, and how good the choices were."""
    titles = ("x", "weight", "n x k", "m", "kernel", "took", "price", "off", "faster", "by")
    lines: list[tuple[str, ...]] = [titles]
    for each in found:
        took, price = each.seconds[each.kernel], each.prices[each.kernel]
        late = each.regret > NOTABLE
        lines.append(
            (
                each.x,
                each.weight,
                f"{each.n} x {each.k}",
                str(each.m),
                _short(each.kernel),
                time_text(took),
                time_text(price),
                f"{price / took - 1:+.0%}",
                _short(each.fastest) if late else "",
                f"{each.regret:.0%}" if late else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*shown, _summary(found)])


def record(found: list[Outcome]) -> str:
    """What --json prints."""
    threads = lowbit.get_num_threads()
    told = {"threads": threads, "products": [each.record() for each in found]}
    return json.dumps(told, indent=1)


def _short(kernel: str) -> str:
    return kernel.removeprefix("matmul.cpu.")


def _summary(found: list[Outcome]) -> str:
    late = [each for each in found if each.regret > NOTABLE]
    worst = max((each.regret for each in late), default=0.0)
    sources = " and ".join(sorted({each.source for each in found})) or "not asked for"
    return (
        f"{len(found)} products on {lowbit.get_num_threads()} threads, prices are {sources}; at "
        f"{len(late)} another kernel was more than {NOTABLE:.0%} faster"
        + (f", by {worst:.0%} at most" if late else "")
    )


def names(text: str) -> tuple[str, ...]:
    """'a,b' as names."""
    return tuple(word for word in text.split(",") if word)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """'1,16' as numbers from 1 up."""
    found = names(text)
    if not all(word.isdecimal() and int(word) > 0 for word in found):
        raise ValueError(f"{option}: want numbers from 1 up, as in 1,16; got {text!r}")
    return tuple(int(word) for word in found)


def sides(text: str, option: str) -> tuple[tuple[int, int], ...]:
    """'4096x4096,97x64' as (n, k)."""
    found = []
    for word in names(text):
        pair = word.split("x")
        if len(pair) != 2 or not all(side.isdecimal() and int(side) > 0 for side in pair):
            raise ValueError(f"{option}: want NxK, as in 4096x4096; got {word!r}")
        found.append((int(pair[0]), int(pair[1])))
    return tuple(found)

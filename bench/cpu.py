"""lowbit's products on the CPU beside everybody else's, under the measured roofs.

    python -P bench/cpu.py [--quick] [--sections LIST] [--shapes LIST] [--rows LIST] [--json FILE]

Each contender runs in a process of its own, on the same operands; its answers are checked before
anything is timed, and a wrong one is not timed. See bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import machine
import peers
import roofs
from harness import report, roofline
from harness.measuring import Pace, Running
from harness.records import OURS, Group, Row
from harness.sections import SECTIONS, Choice
from harness.targets import Roofs, Verdict, judge

import lowbit as lb

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write and draw."""
    options = parser().parse_args(arguments)
    if options.list:
        listing(Choice(options.shapes, options.rows, options.quick))
        return
    groups = chosen(options)
    pace = Pace(options.seconds, options.rounds, options.rotate << 20)
    threads = lb.get_num_threads()
    console = report.console()
    measured = roofs.measure(threads, pace.rotate)
    console.print(report.roofs_table([measured]))
    console.print(
        f"{len(groups)} groups, about {estimate(groups, pace) / 60:.0f} minutes. Medians of "
        f"{pace.rounds} rounds in turn; weights rotate over {options.rotate} MiB.\n"
    )
    rows: list[Row] = []
    verdicts: list[Verdict] = []
    versions: dict[str, str] = {}
    for group in groups:
        found, judged = measure(group, pace, threads, measured, versions)
        rows, verdicts = rows + found, verdicts + judged
        console.print(report.group_table(found, judged, measured))
        if options.json:
            write(options.json, options, measured, rows, verdicts, versions)
    console.print(report.summary(verdicts))
    if options.json:
        picture = options.json.with_suffix(".png")
        title = f"{machine.describe()['processor']}, {threads} threads, lowbit {lb.__version__}"
        drawn = roofline.draw(rows, measured, title, str(picture))
        console.print(f"written: {options.json}" + (f", {picture}" if drawn else ""))
    else:
        console.print("nothing written; a part of the benchmark is written where --json says")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--quick", action="store_true", help="one shape and few rows in each section")
    add("--sections", type=names, default=tuple(SECTIONS), help=", ".join(SECTIONS))
    add("--shapes", type=shapes, default=(), help="NxK,... instead of each section's own")
    add("--rows", type=numbers, default=(), help="M,... instead of each section's own")
    add("--peers", type=names, help="names or their beginnings; 'none' is lowbit alone")
    add("--json", type=Path, help=f"default for a whole run: {RESULTS.name}/cpu.json")
    add("--seconds", type=float, default=Pace.seconds, help="of calls, a round and contender")
    add("--rounds", type=int, default=Pace.rounds, help="turns that contenders take")
    add("--rotate", type=int, default=Pace.rotate >> 20, help="MiB of weights taken in turn")
    add("--list", action="store_true", help="print sections and contenders, and who is absent")
    return found


def names(text: str) -> tuple[str, ...]:
    """'a,b' as names."""
    return tuple(word for word in text.split(",") if word)


def numbers(text: str) -> tuple[int, ...]:
    """'1,16' as numbers from 1 up."""
    found = tuple(int(word) for word in names(text))
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"want numbers from 1 up, got {text!r}")
    return found


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """'4096x4096,97x4096' as (n, k)."""
    found = []
    for word in names(text):
        sides = word.split("x")
        if len(sides) != 2 or not all(s.isdecimal() and int(s) for s in sides):
            raise argparse.ArgumentTypeError(f"want NxK, got {word!r}")
        found.append((int(sides[0]), int(sides[1])))
    return tuple(found)


def chosen(options: argparse.Namespace) -> list[Group]:
    """The groups that the command line asks for; sets where a whole run is written."""
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        raise SystemExit(f"--sections: no {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    whole = not (options.quick or options.shapes or options.rows or options.peers)
    if whole and options.sections == tuple(SECTIONS) and options.json is None:
        options.json = RESULTS / "cpu.json"
    choice = Choice(options.shapes, options.rows, options.quick)
    groups = [group for name in options.sections for group in SECTIONS[name](choice)]
    if options.peers is None:
        return groups
    wanted = tuple(name for name in options.peers if name != "none")
    known = tuple(peers.found())
    for name in wanted:
        if not any(each.startswith(name) for each in known):
            raise SystemExit(f"--peers: no {name!r}; there are {', '.join(known)}")
    return [only(group, wanted) for group in groups]


def only(group: Group, beginnings: tuple[str, ...]) -> Group:
    """The group without contenders other than lowbit's and those whose name begins so."""
    kept = (OURS, *beginnings)
    return replace(
        group,
        turns=tuple(
            tuple((e, m) for e, m in turn if e.name.startswith(kept)) for turn in group.turns
        ),
    )


def measure(
    group: Group, pace: Pace, threads: int, measured: Roofs, versions: dict[str, str]
) -> tuple[list[Row], list[Verdict]]:
    """All turns of a group; `versions` learns what was measured."""
    running = Running(group, pace, threads)
    try:
        rows = [row for turn in group.turns for row in running.turn(turn)]
    finally:
        running.close()
    versions |= running.versions
    return rows, judge(group.targets, rows, {threads: measured})


def estimate(groups: list[Group], pace: Pace) -> float:
    """Seconds that a run takes, roughly."""
    total = 0.0
    for group in groups:
        here = [e for e in group.entrants if not peers.refusal(e.name, e.work)]
        total += sum(2.0 + e.work.n * e.work.k / 4e7 for e in here)
        calls = sum(e in here for turn in group.turns for e, _ in turn)
        total += calls * (1.0 + pace.rounds * pace.seconds)
    return total


def write(
    path: Path,
    options: argparse.Namespace,
    measured: Roofs,
    rows: list[Row],
    verdicts: list[Verdict],
    versions: dict[str, str],
) -> None:
    """Everything known so far: an interrupted run keeps what it has."""
    record: dict[str, Any] = {
        "machine": machine.describe(),
        "contenders": versions,
        "options": {"seconds": options.seconds, "rounds": options.rounds, "MiB": options.rotate},
        "roofs": asdict(measured),
        "rows": [row.record() for row in rows],
        "verdicts": [verdict.record() for verdict in verdicts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def listing(choice: Choice) -> None:
    """Sections with their size, and contenders with what keeps them away."""
    for name, section in SECTIONS.items():
        groups = section(choice)
        minutes = estimate(groups, Pace()) / 60
        print(f"{name:<12}{(section.__doc__ or '').splitlines()[0]}", end=" ")
        print(f"({len(groups)} groups, about {minutes:.0f} minutes)")
    print()
    for name, peer in peers.found().items():
        print(f"{name:<22}{peer.missing() or peer.version()}")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")

"""lowbit's kernels on a GPU beside everybody else's, under the measured roofs.

    python -P bench/gpu.py [--quick | --all] [--sections LIST] [--peers LIST] [--json FILE]

Answers are checked before anything is timed, and a wrong one is not timed. A whole run writes
bench/results/gpu-<card>.json and the roofline picture beside it. See bench/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import peers.gpu
from harness import gpu_device, gpu_report, gpu_roofs, gpu_sources, report, roofline
from harness.gpu_clock import Broken, Clock
from harness.gpu_measuring import Pace, Running
from harness.gpu_sections import SECTIONS, Choice
from harness.records import OURS, Group, Row
from harness.targets import Roofs, Verdict, judge
from harness.work import Work

import lowbit as lb
from lowbit.kernels.cuda import launch

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_MINUTES = 9.0
CACHES = 4
"""Times the second-level cache that the weights taken in turn fill."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write and draw."""
    options = parser().parse_args(arguments)
    groups = chosen(options)
    if options.list:
        listing(options)
        return
    if options.compile:
        print(gpu_sources.compiled(gpu_sources.points_of(groups), options.compile))
        return
    why = gpu_device.absence()
    if why is not None:
        raise SystemExit(f"bench/gpu.py measures a GPU, and there is none: {why}")
    import cupy

    Run(options, groups, cupy).all()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    size = found.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a sample of everything, within ten minutes"
    )
    size.add_argument("--all", action="store_true", help="every format, shape and number of rows")
    add("--sections", type=names, default=tuple(SECTIONS), help=", ".join(SECTIONS))
    add("--peers", type=names, help="names or their beginnings; 'none' is lowbit alone")
    add("--json", type=Path, help=f"default for a whole run: {RESULTS.name}/gpu-<card>.json")
    add("--date", default=datetime.date.today().isoformat(), help="written into the result")
    add("--minutes", type=float, help=f"no turn begins later; {QUICK_MINUTES:g} with --quick")
    add("--resume", type=Path, help="go on with a result that was not finished")
    add("--compile", type=launch.parse, help="cuda:90:132 and no measuring: needs no GPU")
    add("--list", action="store_true", help="print sections and contenders, and who is absent")
    return found


def names(text: str) -> tuple[str, ...]:
    """'a,b' as names."""
    return tuple(word for word in text.split(",") if word)


def choice_of(options: argparse.Namespace) -> Choice:
    """How much is measured."""
    return Choice("quick" if options.quick else "all" if options.all else "usual")


def chosen(options: argparse.Namespace) -> list[Group]:
    """The groups that the command line asks for."""
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        raise SystemExit(f"--sections: no {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    choice = choice_of(options)
    groups = [group for name in options.sections for group in SECTIONS[name](choice)]
    if options.peers is None:
        return groups
    wanted = tuple(name for name in options.peers if name != "none")
    known = tuple(peers.gpu.found())
    for name in wanted:
        if not any(each.startswith(name) for each in known):
            raise SystemExit(f"--peers: no {name!r}; there are {', '.join(known)}")
    kept = (OURS, *wanted)
    return [
        replace(
            g, turns=tuple(tuple(t for t in turn if t[0].name.startswith(kept)) for turn in g.turns)
        )
        for g in groups
    ]


class Run:
    """A run on one GPU: what is known so far stands in the file after every group."""

    def __init__(self, options: argparse.Namespace, groups: list[Group], cupy: Any) -> None:
        self.options, self.groups, self.cupy = options, groups, cupy
        self.machine = gpu_device.describe(cupy)
        self.clock = Clock(cupy)
        minutes = options.minutes or (QUICK_MINUTES if options.quick else float("inf"))
        self.pace = Pace(
            rounds=5 if options.quick else Pace.rounds,
            rotate=max(Pace.rotate, CACHES * int(self.machine["l2_bytes"])),
            deadline=time.monotonic() + 60 * minutes,
        )
        self.path = self._path()
        self.console = report.console()
        self.rows: list[Row] = []
        self.roofs: Roofs | None = None
        self.done = 0
        self.clocks = {"before": gpu_device.clocks()}
        if options.resume:
            self._read(options.resume)

    def all(self) -> None:
        """Every group, then the summary and the picture."""
        print(self._title())
        machine = gpu_device.kind(self.machine)
        print(gpu_sources.compiled(gpu_sources.points_of(self.groups), machine))
        if self.roofs is None:
            self.roofs, self.rows = gpu_roofs.measure(
                self.cupy, self.clock, self.pace, int(self.machine["multiprocessors"])
            )
            for row in self.rows:
                if row.note:
                    print(f"  {row.name} {row.work}: {row.note}")
        print(gpu_report.roofs_text(self.roofs))
        while self.done < len(self.groups):
            group = self.groups[self.done]
            rows: list[Row] = []
            try:
                self._measure(group, rows)
            except Broken as broken:
                self._lost(group, rows, broken)
            self._keep(rows)
            self.console.print(
                gpu_report.group_table(
                    rows, judge(group.targets, rows, {1: self.roofs}), self.roofs
                )
            )
        self._finish()

    def _measure(self, group: Group, rows: list[Row]) -> None:
        """All turns of a group; `rows` has those that came to their end."""
        running = Running(group, self.pace, self.clock, self.cupy)
        for turn in group.turns:
            rows += running.turn(turn)

    def _keep(self, rows: list[Row]) -> None:
        self.rows += rows
        self.done += 1
        self.cupy.get_default_memory_pool().free_all_blocks()
        self.write()

    def _lost(self, group: Group, rows: list[Row], broken: Broken) -> None:
        """Note it, and go on with the next group in a new process: this one has no GPU any more."""
        note = f"failed: the device was lost to {broken}"
        done = {(row.name, row.work, row.m) for row in rows}
        away = [
            Row(group.section, entrant.name, entrant.work, m, 1, note=note)
            for turn in group.turns
            for entrant, m in turn
            if (entrant.name, entrant.work, m) not in done
        ]
        self._keep(rows + away)
        print(f"{note}; going on with a new process", flush=True)
        command = [sys.executable, "-P", __file__, *sys.argv[1:], "--resume", str(self.path)]
        if self.options.minutes or self.options.quick:
            left = max(0.1, (self.pace.deadline - time.monotonic()) / 60)
            command += ["--minutes", f"{left:.2f}"]
        os.execv(sys.executable, command)

    def verdicts(self) -> list[Verdict]:
        """Bars of all groups that are done."""
        assert self.roofs is not None
        found: list[Verdict] = []
        for group in self.groups[: self.done]:
            points = {(e.name, e.work, m) for turn in group.turns for e, m in turn}
            here = [
                r for r in self.rows
                if r.section == group.section and (r.name, r.work, r.m) in points
            ]  # fmt: skip
            found += judge(group.targets, here, {1: self.roofs})
        return found

    def write(self) -> None:
        """Everything known so far: an interrupted run keeps what it has."""
        assert self.roofs is not None
        record = {
            "date": self.options.date,
            "machine": self.machine,
            "clocks": self.clocks | {"after": gpu_device.clocks()},
            "contenders": {
                name: peer.missing() or peer.version() for name, peer in peers.gpu.found().items()
            },
            "options": {
                "size": choice_of(self.options).size,
                "sections": list(self.options.sections),
                "seconds": self.pace.seconds,
                "rounds": self.pace.rounds,
                "MiB": self.pace.rotate >> 20,
            },
            "groups_done": self.done,
            "groups": len(self.groups),
            "roofs": asdict(self.roofs),
            "rows": [row.record() | {"times": row.times} for row in self.rows],
            "verdicts": [v.record() | {"said": gpu_report.said(v)} for v in self.verdicts()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(self.path)

    def _read(self, path: Path) -> None:
        record = json.loads(path.read_text())
        self.rows = [row_of(each) for each in record["rows"]]
        self.roofs = Roofs(**record["roofs"])
        self.done = int(record["groups_done"])
        self.clocks = {"before": record["clocks"]["before"]}

    def _finish(self) -> None:
        assert self.roofs is not None
        self.console.print(report.summary(self.verdicts()))
        for name, peer in peers.gpu.found().items():
            why = peer.missing()
            if why:
                print(f"{name} was not measured: {why}")
        picture = self.path.with_suffix(".png")
        drawn = roofline.draw(self.rows, self.roofs, self._title(), str(picture), gpu_report.SIDES)
        print(f"written: {self.path}" + (f", {picture}" if drawn else ""))

    def _title(self) -> str:
        machine = self.machine
        return (
            f"{machine['card']}, driver {machine['driver']}, CUDA {machine['cuda']['runtime']}, "
            f"lowbit {lb.__version__}, {self.options.date}"
        )

    def _path(self) -> Path:
        if self.options.resume:
            return Path(self.options.resume)
        if self.options.json:
            return Path(self.options.json)
        whole = self.options.sections == tuple(SECTIONS) and self.options.peers is None
        card = gpu_device.short(self.machine["card"])
        return RESULTS / (f"gpu-{card}.json" if whole else f"gpu-{card}-part.json")


def row_of(record: dict[str, Any]) -> Row:
    """A row as `Run.write` wrote it."""
    names = (field.name for field in fields(Row) if field.name != "work")
    known = {name: record[name] for name in names}
    return Row(work=Work(**record["work"]), **known)


def listing(options: argparse.Namespace) -> None:
    """Sections with their size, and contenders with what keeps them away."""
    choice = choice_of(options)
    for name, section in SECTIONS.items():
        groups = section(choice)
        points = sum(len(turn) for group in groups for turn in group.turns)
        print(f"{name:<12}{(section.__doc__ or '').splitlines()[0]}", end=" ")
        print(f"({len(groups)} groups, {points} points)")
    print()
    for name, peer in peers.gpu.found().items():
        print(f"{name:<22}{peer.missing() or peer.version()}")


if __name__ == "__main__":
    main()

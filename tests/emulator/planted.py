"""Bugs planted in kernels on purpose: a test that none of them fails is no test.

A kernel's test lists them, and runs each ::

    PLANTED = (
        Planted("no barrier before the sum", "    __syncthreads();\\n    v =", "    v ="),
        Planted("scale of the next group", "scales[g]", "scales[g + 1]"),
    )

    @pytest.mark.parametrize("bug", PLANTED, ids=str)
    def test_planted_bugs_are_caught(emulator, bug):
        def run(text: str, seed: int) -> None:      # compares with the reference, as the tests do
            emulator.seed = seed
            check(emulator, text, shape)
        bug.must_be_caught(TEXT, run)

The text of a kernel that includes others is that of `flattened`, so that bugs can be planted there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from emulator_build import KERNELS, CompileError, EmulatorError


def mutate(text: str, old: str, new: str) -> str:
    """Replace what occurs exactly once."""
    count = text.count(old)
    if count != 1:
        raise ValueError(f"want text that occurs once, this one occurs {count} times: {old!r}")
    return text.replace(old, new)


def flattened(text: str) -> str:
    """The text with the headers of kernels/cuda in place of their first #include."""
    seen = set()

    def content(found: re.Match[str]) -> str:
        if found[1] in seen or not (KERNELS / found[1]).exists():
            return "" if found[1] in seen else found[0]
        seen.add(found[1])
        return flatten((KERNELS / found[1]).read_text().replace("#pragma once\n", ""))

    def flatten(text: str) -> str:
        return re.sub(r'^#include "(.+)"$', content, text, flags=re.MULTILINE)

    return flatten(text)


@dataclass(frozen=True)
class Planted:
    """A bug: text that occurs once in a kernel, and what stands there instead."""

    name: str
    old: str
    new: str
    seeds: int = 4
    """Under at least one of so many schedules the bug must show."""

    def __str__(self) -> str:
        return self.name

    def must_be_caught(self, text: str, run: Callable[[str, int], None]) -> None:
        """`run(text, seed)` is right without the bug, and raises with it under one of the seeds."""
        broken = mutate(text, self.old, self.new)
        for seed in range(self.seeds):
            try:
                run(broken, seed)
            except CompileError:
                raise
            except (AssertionError, EmulatorError):
                return
        raise AssertionError(f"nobody noticed: {self.name}")

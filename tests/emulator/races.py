"""Runs tests again under ThreadSanitizer, where a launch with a data race raises.

A kernel's test asks for it ::

    def test_no_races():
        races.rerun(__file__, "-k", "small")

The tests it names get an `emulator` whose kernels are instrumented. What orders memory there is
what does in CUDA: barriers, warp-wide synchronisation, fences, acquire and release, mbarriers,
copies that have landed. Blocks of a launch count as concurrent, whatever order they ran in.

Keep launches small: each block's threads are new ones, 0.1 ms each. Not seen: a fence that is
missing where the same thread has another one. An access out of bounds ends the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from emulator_build import COMPILER

ROOT = Path(__file__).parents[2]


def missing() -> str | None:
    """Say what ThreadSanitizer lacks here, or None."""
    return None if _library() else f"{COMPILER} has no libtsan"


def _library() -> str | None:
    ask = [COMPILER, "-print-file-name=libtsan.so"]
    found = Path(subprocess.run(ask, capture_output=True, text=True).stdout.strip())
    return str(found.resolve()) if found.is_absolute() else None


def rerun(*arguments: str) -> None:
    """Run pytest with these arguments under ThreadSanitizer; all that it runs must pass."""
    library = _library()
    assert library, missing()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "LD_PRELOAD": library,
            "LOWBIT_EMULATOR_SANITIZE": "thread",
            "TSAN_OPTIONS": f"log_path={folder}/races:exitcode=0:report_thread_leaks=0",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)


class Log:
    """What ThreadSanitizer has written about this process."""

    def __init__(self) -> None:
        options = os.environ.get("TSAN_OPTIONS", "")
        paths = [o.removeprefix("log_path=") for o in options.split(":") if "log_path=" in o]
        self._path = Path(f"{paths[0]}.{os.getpid()}") if paths else None
        self._read = 0

    def news(self) -> list[str]:
        """Summaries of the races reported since the last call."""
        if self._path is None or not self._path.exists():
            return []
        text = self._path.read_text(errors="replace")[self._read :]
        self._read += len(text)
        return [line for line in text.splitlines() if line.startswith("SUMMARY")]

"""Contenders' processes: started, asked in turn, and stopped while another one is measured."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from harness.worker import Task

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 300.0
"""Seconds until a process that does not answer is ended."""


class Lost(Exception):
    """A process died or did not answer; the message says what it said last."""


class Contender:
    """A contender in a process of its own, asleep except while it is asked.

    Idle threads of OpenMP and of ONNX Runtime spin for a while and would take a processor from
    whoever is measured next; a stopped process takes none.
    """

    def __init__(self, task: Task) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), json.dumps(asdict(task))],
            bufsize=0,  # what a dead process did not read must not be sent again by close
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(task),
        )
        self._pending = b""
        try:
            self.ready = self._reply()
            self._signal("SIGSTOP")
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        assert self._process.stdin is not None
        self._signal("SIGCONT")
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            return self._reply()
        except BrokenPipeError:
            raise Lost(self._last_words()) from None
        finally:
            self._signal("SIGSTOP")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + PATIENCE
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            ready, _, _ = select.select([self._process.stdout], [], [], max(left, 0))
            if not ready:
                self._process.kill()
                raise Lost(f"no answer in {PATIENCE:g} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise Lost(self._last_words())
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if any(c.isalpha() for c in line)]
        # The message of an error may go on for lines after the one that names it.
        lines = [line for line in lines if "Error" in line] or lines
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"{how}: {lines[-1]}" if lines else how

    def _signal(self, name: str) -> None:
        # Windows has neither; there the processes only idle.
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))


def environment(task: Task) -> dict[str, str]:
    """The same number of threads for every library."""
    found = dict(os.environ)
    for name in ("LOWBIT", "OMP", "OPENBLAS", "MKL", "NUMEXPR"):
        found[f"{name}_NUM_THREADS"] = str(task.threads)
    if task.name.startswith("openblas"):
        # A kernel forced by the environment would be measured instead of the processor's own.
        found.pop("OPENBLAS_CORETYPE", None)
        found.pop("OPENBLAS_L2_SIZE", None)
    return found

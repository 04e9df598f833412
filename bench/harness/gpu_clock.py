"""Seconds of work on a GPU, by its own events; seconds of the host that enqueues it.

A batch of calls is enqueued while the GPU is held by a kernel that waits for a word of the host,
so that what is timed never waits for the host:

    hold   start event   call call call ... call   end event   release

`cupy` is a parameter: tests give a module that keeps a list of what it was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

MOST_CALLS = 200
"""Of a batch. The queue of a GPU has room for about a thousand launches; whoever meets its end
waits, and here that would be for ever."""
HELD = 0.2
"""Seconds after which the GPU goes on by itself, should the host have to wait for it."""

HOLD = """
extern "C" __global__ void hold(const volatile int* word, unsigned long long nanoseconds) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (!*word && now - begin < nanoseconds);
}
"""

Call = Callable[[int], object]


class Broken(Exception):
    """The device does not work any more; only a new process can use it."""


class Clock:
    """Times calls that enqueue work on the default stream."""

    def __init__(self, cupy: Any) -> None:
        self._cuda = cupy.cuda
        self._hold = cupy.RawKernel(HOLD, "hold")
        # Pinned memory is mapped: the device reads the host's own word.
        self._memory = cupy.cuda.alloc_pinned_memory(4)
        self._word = np.frombuffer(self._memory, np.int32, 1)

    def batch(self, call: Call, count: int) -> float:
        """Seconds of the GPU, per call, for call(0) ... call(count - 1)."""
        start, end = self._cuda.Event(), self._cuda.Event()
        self._word[0] = 0
        self._hold((1,), (1,), (np.uint64(self._memory.ptr), np.uint64(HELD * 1e9)))
        try:
            start.record()
            for i in range(count):
                call(i)
            end.record()
        finally:
            self._word[0] = 1
        end.synchronize()
        return float(self._cuda.get_elapsed_time(start, end)) / 1e3 / count

    def host(self, call: Call, count: int) -> float:
        """Seconds of the host, per call, while the GPU keeps up or queues."""
        self.synchronize()
        begin = time.perf_counter()
        for i in range(count):
            call(i)
        seconds = time.perf_counter() - begin
        self.synchronize()
        return seconds / count

    def synchronize(self) -> None:
        """Wait for all work.

        Raises
        ------
        Broken
            An earlier call went where it must not: an illegal address, a trap.
        """
        try:
            self._cuda.runtime.deviceSynchronize()
        except self._cuda.runtime.CUDARuntimeError as error:
            raise Broken(str(error)) from error

"""A small native thread pool: tiles that own their outputs, shared between all processors.

The workers are pthreads made by generated code, not Python threads: they need no thread state,
never wait for the interpreter (with or without a GIL), do not show up at its exit, and a fork
simply loses them. Python publishes a job with one call of about 0.3 us; see `pool_ir`.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from lowbit.kernels.cpu import native, pool_ir
from lowbit.kernels.cpu.isa import RECORDS

_pack = struct.Struct("PPPPqqqPq").pack
_word = ctypes.c_size_t.from_address
# NumPy's struct of an array begins with the object's head and goes on with the address of the
# first element (ndarraytypes.h, PyArrayObject_fields); extension modules are compiled upon that.
_DATA = object.__basicsize__


@dataclass(frozen=True)
class _Native:
    """Entry points of the generated module; a call is one packed block."""

    enter: Callable[[bytes], int]
    resume: Callable[[int], int]
    abandon: Callable[[int, int], None]
    create: Callable[[], int | None]
    spawn: Callable[[int, int], int]
    orphan: Callable[[int], None]


@dataclass(frozen=True)
class _Crew:
    """The shared state of this process and its workers."""

    state: int
    workers: int
    full: bool
    """No more workers can be made: the limit, or the system refused."""


class _Spare(threading.local):
    """Scratch memory of a Python thread, taken out while a call uses it."""

    memory: tuple[int, int, object] | None = None


_spare = _Spare()
_lock = threading.Lock()
_crew: _Crew | None = None
_threads = 0  # 0: not yet found out
_automatic = True


def run(
    function: int, argument: int, tiles: int, scratch: int = 0, threads: int | None = None
) -> None:
    """Execute `function(argument, tile, scratch memory)` for every tile in range(tiles).

    The addresses are those of a native `void (ptr, i64, ptr)` and of whatever it expects. Tiles
    run in any order on the calling thread and the pool's workers, at most `threads` in all; each
    thread passes `scratch` bytes of its own, aligned to 64 and left as the tile before left them.
    All tiles are done when this returns. When it raises (a signal's handler did), no thread uses
    the caller's memory any more. A busy pool leaves the job to the calling thread alone.
    """
    if not SUPPORTED:
        _run_serially(function, argument, tiles, scratch)
        return
    entry = _native()
    state = helpers = private = 0
    if tiles > 1:
        helpers = min(threads or _threads or get_num_threads(), tiles) - 1
        if helpers > 0:
            crew = _crew
            if crew is None or (crew.workers < helpers and not crew.full):
                crew = _hire(helpers)
            state, helpers = crew.state, min(helpers, crew.workers)
    memory = None
    if scratch:
        memory, _spare.memory = _spare.memory, None
        if memory is None or memory[1] < scratch:
            memory = _allocate(scratch)
        private = memory[0]
    token = object()
    ticket = id(token)  # unique as long as this call lives; 0 is nobody's
    try:
        status = entry.enter(
            _pack(state, ticket, function, argument, 0, tiles, scratch, private, helpers)
        )
        while status != pool_ir.DONE:
            if status == pool_ir.OPEN:
                status = entry.resume(state)
            elif status == pool_ir.LOST:
                raise RuntimeError(
                    "pool: this process was forked inside a tile, so the job it was part of "
                    "has no workers any more. Fork outside, or leave the child by os._exit."
                )
            else:
                status = entry.enter(
                    _pack(0, 0, function, argument, status, tiles, scratch, private, 0)
                )
    except BaseException:
        # Not one call stands before this one: Python looks for signals after calls.
        if state:
            entry.abandon(state, ticket)
        raise
    finally:
        if memory is not None:
            _spare.memory = memory


def _address(array: np.ndarray[Any, Any]) -> int:
    return _word(id(array) + _DATA).value


def _slow_address(array: np.ndarray[Any, Any]) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


def _choose_address() -> Callable[[np.ndarray[Any, Any]], int]:
    """The quick way where it gives what the slow one does: in CPython, not in every Python."""
    if sys.implementation.name == "cpython":
        sample = np.arange(16, dtype=np.uint8)[3:]
        if _address(sample) == _slow_address(sample):
            return _address
    return _slow_address


address = _choose_address()
"""Of an array's first element, in 0.1 us; `__array_interface__` takes 0.9 us, `ctypes.data` 0.8.

The array has to be alive (named) for as long as the address is used.
"""


def get_num_threads() -> int:
    """Return how many threads a job may use, the calling one included.

    Examples
    --------
    >>> import lowbit as lb
    >>> lb.get_num_threads() >= 1
    True
    """
    global _threads
    if not _threads:
        _threads = _find_num_threads()
    return _threads


def set_num_threads(n: SupportsIndex | None) -> None:
    """Let jobs use n threads; None finds the number out again.

    Automatic is LOWBIT_NUM_THREADS, else OMP_NUM_THREADS, else the processors that this process
    may run on, at most what its control group grants. Results have the same bits for any number.

    Parameters
    ----------
    n : int or None
        At least 1.

    Examples
    --------
    >>> import lowbit as lb
    >>> lb.set_num_threads(1)
    >>> lb.get_num_threads()
    1
    >>> lb.set_num_threads(None)
    """
    global _threads, _automatic
    if n is None:
        _threads, _automatic = _find_num_threads(), True
        return
    try:
        if isinstance(n, bool | np.bool_):
            raise TypeError
        count = index(n)
    except TypeError:
        raise TypeError(
            f"set_num_threads: n is {n!r}; give an int from 1 up, or None for automatic."
        ) from None
    if count < 1:
        raise ValueError(
            f"set_num_threads: n is {count}; give an int from 1 up, or None for automatic."
        )
    _threads, _automatic = count, False


def describe() -> str:
    """Return in words how tiles are executed here."""
    if not SUPPORTED:
        return (
            f"serial: the native pool needs 64-bit Linux, this is "
            f"{platform.system()} {platform.machine()}"
        )
    crew = _crew
    started = crew.workers if crew else 0
    words = f"{get_num_threads()} threads (futex pool, {started} workers started)"
    if crew and crew.full and started < get_num_threads() - 1:
        words += "; no more could be started"
    return words


def _supported() -> bool:
    return (
        sys.platform == "linux"
        and sys.byteorder == "little"
        and sys.maxsize > 2**32
        and platform.machine() in pool_ir.FUTEX_SYSCALL
    )


SUPPORTED = _supported()


@cache
def _native() -> _Native:
    module = native.load(pool_ir.text(platform.machine()), RECORDS[-1])
    address, number = ctypes.c_void_p, ctypes.c_int64

    def entry(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
        return ctypes.CFUNCTYPE(result, *arguments)(module.address(f"lowbit_pool_{name}"))

    return _Native(
        enter=entry("enter", number, ctypes.c_char_p),
        resume=entry("resume", number, address),
        abandon=entry("abandon", None, address, address),
        create=entry("create", address),
        spawn=entry("spawn", number, address, number),
        orphan=entry("orphan", None, address),
    )


def _hire(helpers: int) -> _Crew:
    """Start workers until there are as many as helpers, or as many as can be had."""
    global _crew
    with _lock:
        crew = _crew
        if crew is None:
            state = _native().create()
            if not state:
                raise MemoryError("pool: no memory for the state of the workers")
            crew = _Crew(state, workers=0, full=False)
        if crew.workers < helpers and not crew.full:
            wanted = min(helpers, pool_ir.MOST_WORKERS)
            workers = _native().spawn(crew.state, wanted - crew.workers)
            crew = _Crew(crew.state, workers, full=workers < helpers)
        _crew = crew
        return crew


def _allocate(size: int) -> tuple[int, int, object]:
    memory = np.empty(size + 63, np.uint8)
    return -(-address(memory) // 64) * 64, size, memory


def _run_serially(function: int, argument: int, tiles: int, scratch: int) -> None:
    tile = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(function)
    private = _allocate(scratch) if scratch else (None, 0, None)
    for number in range(tiles):
        tile(argument, number, private[0])


def _forget() -> None:
    """In a forked child: the workers are gone, and locks may be held by threads that are gone."""
    global _crew, _lock, _threads
    _lock = threading.Lock()
    crew, _crew = _crew, None
    if crew is not None:
        _native().orphan(crew.state)
    if _automatic:
        _threads = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _find_num_threads() -> int:
    own = os.environ.get("LOWBIT_NUM_THREADS", "").strip()
    if own:
        if not own.isdecimal() or int(own) < 1:
            raise ValueError(f"LOWBIT_NUM_THREADS: {own!r}; give a whole number from 1 up.")
        return int(own)
    # OpenMP's value may be a list, one number for each level of nesting.
    openmp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if openmp.isdecimal() and int(openmp) >= 1:
        return int(openmp)
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    granted = min(_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), default=math.inf)
    return max(1, min(processors, math.ceil(min(granted, processors))))


def _quotas(membership: Path, root: Path) -> Iterator[float]:
    """Yield the processors granted to this control group and each one above it (v2 and v1)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if not colon or (controllers and "cpu" not in controllers.split(",")):
            continue
        # A container sees its own group at the root, under whatever name the host gave it.
        base = root / "cpu" if controllers else root
        folder = base / group.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            try:
                if controllers:
                    quota = (place / "cpu.cfs_quota_us").read_text()
                    period = (place / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (place / "cpu.max").read_text().split()
                if quota != "max" and int(quota) > 0:
                    yield int(quota) / int(period)
            except (OSError, ValueError):
                continue

"""Many kernels in a few translation units: g++ starts, and reads headers, once for all of them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from emulator import EmulatedFunction, Emulator
from emulator_build import CACHE, build

from lowbit.kernels.cuda.launch import Source

_TOGETHER = 24  # kernels of a translation unit
_COMPILERS = 2  # at a time


class Batch(Emulator):
    """An emulator that first notes what is launched and then compiles all of it together.

    ::

        batch = Batch()
        with batch.noting(), launch.pretending(batch):
            operation(...)      # launches nothing
        with launch.pretending(batch):
            operation(...)      # runs
    """

    noted: list[Source] | None = None

    def function(self, source: Source) -> Any:
        """Take a kernel that is compiled, compile it, or note it."""
        if self.noted is None:
            return super().function(source)
        if source not in self.noted:
            self.noted.append(source)
        return _nothing

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is asked for inside, and compile it at the end."""
        self.noted = []
        try:
            yield
            sources = [s for s in self.noted if (s, self.sanitize) not in self._functions]
        finally:
            self.noted = None
        parts = [sources[i : i + _TOGETHER] for i in range(0, len(sources), _TOGETHER)]
        with _alone(), ThreadPoolExecutor(_COMPILERS) as pool:
            for found in pool.map(self._compile, parts):
                self._functions |= found

    def _compile(self, sources: list[Source]) -> dict[tuple[Source, str], EmulatedFunction]:
        # Texts of declarations are guarded, so that one may come twice.
        text = "\n".join(dict.fromkeys(s.text for s in sources))
        for i, source in enumerate(sources):
            text += (
                f'\nextern "C" const char* emu_launch_{i}(const emu::Launch* launch, void** given)'
                f" {{ return emu::launch(&{source.name}, *launch, given); }}"
                f'\nextern "C" const char* emu_signature_{i}()'
                f" {{ return emu::signature(&{source.name}); }}"
            )
        library = build(text, sources[0].name, self.sanitize)
        return {
            (source, self.sanitize): EmulatedFunction(
                self,
                source,
                {name: library[f"{name}_{i}"] for name in ("emu_launch", "emu_signature")},  # type: ignore[arg-type]
            )
            for i, source in enumerate(sources)
        }


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other processes from compiling the same: they find it in the cache afterwards."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "batch.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """Take the place of a kernel that is only noted."""

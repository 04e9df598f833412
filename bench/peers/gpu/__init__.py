"""The contenders on a GPU: lowbit and its peers, all in one process, on one stream.

A file of this package is a peer, with the names that `peers` lists but for

    build(name, operands)   a `Built`

Calls enqueue their work on the default stream and return; nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from harness.gpu_work import Operands
from harness.work import Work


@dataclass(frozen=True)
class Built:
    """Weights in a contender's own form, and how to use them."""

    weight_bytes: int
    """Of one copy, as the contender reads them: scales included."""
    copy: Callable[[], object]
    """Hold the weights once more, elsewhere in memory. Done before the first `take`."""
    take: Callable[[int], Any]
    """Everything that calls with this many rows want, memory of the answer included."""
    call: Callable[[Any, int], Any]
    """Enqueue the product of what `take` gave with copy number i; timed."""
    check: Callable[[Any, int], float]
    """(answer, rows) to the share of its bound that it uses; raises `checking.Wrong`."""
    moved: Callable[[int], int] | None = None
    """Bytes read and written by a call with m rows, where those are not w, x and y."""
    out_bytes: int = 2
    """Of an entry of the answer."""
    least_rows: int = 1
    host: bool = False
    """Time of the host is what is measured."""


class Peer(Protocol):
    """What a file of this package defines."""

    NAMES: tuple[str, ...]

    def missing(self) -> str | None: ...
    def refusal(self, name: str, work: Work) -> str | None: ...
    def version(self) -> str: ...
    def build(self, name: str, operands: Operands) -> Built: ...


@cache
def found() -> dict[str, Peer]:
    """The peer of each contender's name."""
    peers: dict[str, Peer] = {}
    for module in sorted(info.name for info in iter_modules(__path__)):
        peer = cast("Peer", import_module(f"{__name__}.{module}"))
        peers |= dict.fromkeys(peer.NAMES, peer)
    return peers


def refusal(name: str, work: Work) -> str | None:
    """Why this contender cannot do this work here; None where it can."""
    peer = found().get(name)
    if peer is None:
        return f"no contender {name!r}; there are {', '.join(found())}"
    return peer.missing() or peer.refusal(name, work)


def build(name: str, operands: Operands) -> Built:
    """The named contender with its weights."""
    return found()[name].build(name, operands)

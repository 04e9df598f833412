"""The contenders: lowbit and its peers, one file for each library, all with one small protocol.

A file of this package is a peer. It defines

    NAMES       the contenders it has, "library.path"; the first word is the peer's name
    missing()   None, or in words why the library is not here
    refusal(name, work)   None, or in words why this contender cannot do this work
    version()   what is measured, with whatever decides its speed
    build(name, operands, threads)   a `Built`

A library is imported inside of functions: only the process that measures it loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from harness.checking import Meaning, share_of_bound
from harness.work import Array, Operands, Work


class Refused(Exception):
    """A contender turns out to be unable to do its work while it is built."""


@dataclass(frozen=True)
class Built:
    """Weights in a contender's own form, and how to use them."""

    weight_bytes: int
    """Of one copy, as the contender reads them: scales included."""
    copy: Callable[[], object]
    """Hold the weights once more, elsewhere in memory. Done before the first `take`."""
    take: Callable[[Array], Any]
    """float32 rows of x to whatever `call` wants; not timed."""
    call: Callable[[Any, int], Any]
    """The product of what `take` gave with copy number i; timed. Done when it returns."""
    read: Callable[[Any], Array]
    """What `call` gave as a NumPy array (m, n); not timed."""
    check: Callable[[Array, Array], float]
    """(answer, x) to the share of its bound that it uses; raises `checking.Wrong`."""
    moved: Callable[[int], int] | None = None
    """Bytes read and written by a call with m rows, where those are not w, x and y."""


class Peer(Protocol):
    """What a file of this package defines."""

    NAMES: tuple[str, ...]

    def missing(self) -> str | None: ...
    def refusal(self, name: str, work: Work) -> str | None: ...
    def version(self) -> str: ...
    def build(self, name: str, operands: Operands, threads: int) -> Built: ...


@cache
def found() -> dict[str, Peer]:
    """The peer of each contender's name."""
    peers: dict[str, Peer] = {}
    for module in sorted(info.name for info in iter_modules(__path__) if not info.ispkg):
        peer = cast("Peer", import_module(f"{__name__}.{module}"))
        peers |= dict.fromkeys(peer.NAMES, peer)
    return peers


def refusal(name: str, work: Work) -> str | None:
    """Why this contender cannot do this work here; None where it can."""
    peer = found().get(name)
    if peer is None:
        return f"no contender {name!r}; there are {', '.join(found())}"
    return peer.missing() or peer.refusal(name, work)


def checked_by(meaning: Meaning, work: Work) -> Callable[[Array, Array], float]:
    """`Built.check` of a contender that says what it means."""
    return lambda answer, x: share_of_bound(answer, x, work.n, meaning)

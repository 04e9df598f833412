"""What all families of kernels on CUTLASS do alike: refuse, choose a tile, price, put in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from lowbit.kernels.cuda import compile, launch, product
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cutlass import tiles
from lowbit.kernels.cutlass.tiles import Tile
from lowbit.kernels.declare import Bind, Kernel, Problem, Roundings
from lowbit.kernels.segments import refuse_common

T = TypeVar("T")
SpecT = TypeVar("SpecT")


class Way(Protocol):
    """A tile, or a tile and how warps share it; `str` is for `explain`."""

    @property
    def tile(self) -> Tile:
        """The tile."""
        ...


WayT = TypeVar("WayT", bound=Way)


@dataclass(frozen=True)
class Family(Generic[WayT, SpecT]):
    """Kernels that multiply the same operands, each by its own tile."""

    name: str
    refuse: Callable[[Problem], str | None]
    """Why a product is none of this family, whatever has been compiled; None if it is."""
    ways: Callable[[Problem], Iterable[WayT]]
    faster: float
    """Than tensor cores on 16-bit numbers."""
    spec: Callable[[Problem, WayT], SpecT]
    """What is compiled."""
    source: Callable[[SpecT], Source]
    bind: Callable[[Problem, SpecT], Bind]
    roundings: Callable[[Problem, WayT], Roundings]
    exact: bool = False
    """Sums are whole numbers: the same whatever the order."""
    by_name: bool = False
    stacks: bool = True

    def seconds(self, p: Problem, way: WayT) -> float:
        """Estimate."""
        return tiles.seconds(p, way.tile, self.faster)

    def best(self, p: Problem) -> WayT | None:
        """The way of the least estimate; None where none is compiled or can be."""
        asked = replace(p, m=product.rows_of(p), batches=1) if p.batch_invariant else p
        usable = (way for way in self.ways(p) if self._fits(p, way) and self._lacks(p, way) is None)
        return min(usable, key=lambda way: self.seconds(asked, way), default=None)

    def _fits(self, p: Problem, way: WayT) -> bool:
        # Matrices of a stack are many tiles already. More rows are more tiles as well: fewer blocks
        # share each, and float sums add up otherwise.
        return not way.tile.shared or (p.batches == 1 and (self.exact or not p.batch_invariant))

    def _lacks(self, p: Problem, way: WayT) -> str | None:
        capability = launch.parse(p.device).capability
        return compile.lacking(self.source(self.spec(p, way)), capability)

    def spec_of(self, p: Problem) -> SpecT:
        """The kernel that an accepted product runs."""
        return self.spec(p, found(self.best(p)))

    def accepts(self, p: Problem) -> str | None:
        """As `Kernel.accepts`."""
        refusal = self.refuse(p)
        if refusal is not None or self.best(p) is not None:
            return refusal
        return self._lacks(p, next(iter(self.ways(p))))

    def _describe(self, p: Problem) -> str:
        way = found(self.best(p))
        return f"{way}, {way.tile.waves(p):g} waves"

    @property
    def kernel(self) -> Kernel:
        """Its best way, as one kernel."""
        return Kernel(
            f"matmul.cutlass.{self.name}",
            "cuda",
            accepts=self.accepts,
            cost=lambda p: self.seconds(p, found(self.best(p))),
            build=lambda p: self.bind(p, self.spec_of(p)),
            roundings=lambda p: self.roundings(p, found(self.best(p))),
            describe=self._describe,
            stacks=self.stacks,
            by_name=self.by_name,
        )


def found(way: T | None) -> T:
    """What an accepted product has."""
    assert way is not None
    return way


def refuse(p: Problem, capabilities: tuple[int, ...]) -> str | None:
    """Why a product has no kernel on CUTLASS, whatever its operands are; None if it may."""
    device = launch.parse(p.device)
    if device.plain:
        return "runs on CUTLASS, this device on lowbit's own kernels alone"
    if device.capability not in capabilities:
        word = "capability" if len(capabilities) == 1 else "capabilities"
        listed = ", ".join(str(c / 10) for c in capabilities)
        return f"runs on compute {word} {listed}, this is {device.capability / 10}"
    return refuse_common(p) or product.refuse_sizes(p)

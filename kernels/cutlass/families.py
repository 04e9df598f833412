"""What all families of kernels on CUTLASS say alike: where they run, price, tile in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from lowbit.kernels.cuda import launch, product
from lowbit.kernels.declare import Bind, Kernel, Problem, Roundings
from lowbit.kernels.segments import refuse_common

T = TypeVar("T")


class Way(Protocol):
    """A tile, or a tile and how warps share it; `str` is for `explain`."""

    def waves(self, p: Problem, /) -> float:
        """Tiles that each block computes, one after the other."""
        ...


WayT = TypeVar("WayT", bound=Way)


def kernel(
    name: str,
    *,
    accepts: Callable[[Problem], str | None],
    best: Callable[[Problem], WayT | None],
    seconds: Callable[[Problem, WayT], float],
    build: Callable[[Problem], Bind],
    roundings: Callable[[Problem], Roundings],
    by_name: bool = False,
    stacks: bool = True,
) -> Kernel:
    """A kernel whose price and words are those of its best way."""

    def describe(p: Problem) -> str:
        way = found(best(p))
        return f"{way}, {way.waves(p):g} waves"

    return Kernel(
        f"matmul.cutlass.{name}",
        "cuda",
        accepts=accepts,
        cost=lambda p: seconds(p, found(best(p))),
        build=build,
        roundings=roundings,
        describe=describe,
        by_name=by_name,
        stacks=stacks,
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

"""Every kernel, and the choice between them. Drop a module with KERNELS below this folder."""

if __name__ != "lowbit.kernels":
    raise ImportError("this folder is lowbit.kernels; run Python with -P, or from another folder")

import math
from dataclasses import replace
from functools import cache, lru_cache
from importlib import import_module
from pkgutil import walk_packages

from lowbit.kernels.declare import Bind, Epilogue, Kernel, Problem, Roundings, Run, Verdict

__all__ = [
    "Bind",
    "Epilogue",
    "Kernel",
    "Problem",
    "Roundings",
    "Run",
    "Verdict",
    "choose",
    "cost",
    "judge",
    "prepared",
]

_USUAL = 64  # rows that batch-invariant kernels are chosen for
_LAST = 1e9  # seconds that put a kernel behind all that need not be asked for
_USUAL_THREADS = 4  # that kernels are compared on


@cache
def registered() -> tuple[Kernel, ...]:
    """Return the kernels of every module below this folder."""
    modules = sorted(info.name for info in walk_packages(__path__, f"{__name__}."))
    return tuple(k for m in modules for k in getattr(import_module(m), "KERNELS", ()))


def judge(problem: Problem) -> list[Verdict]:
    """One verdict for every kernel: the usable first, the cheapest first.

    Kernels are compared by their prices on four threads, and with w in the layout that each likes
    best: bits depend neither on the number of threads nor on the layout, so the choice must not.
    """
    verdicts = []
    # Where bits must not depend on m, neither may the choice.
    asked = replace(problem, m=_USUAL, batches=1) if problem.batch_invariant else problem
    compared = replace(asked, threads=_USUAL_THREADS)
    for kernel in registered():
        backend = problem.device.partition(":")[0]
        if kernel.device not in (backend, "any"):
            refusal: str | None = f"runs on {kernel.device}, the operands are on {backend}"
        elif problem.layout not in kernel.layouts:
            refusal = f"reads {' or '.join(kernel.layouts)}, w is held as {problem.layout}"
        else:
            refusal = kernel.accepts(kernel.asked(problem))
        seconds, order = None, math.inf
        if refusal is None:
            seconds = cost(kernel, asked)
            order = cost(kernel, replace(compared, layout=kernel.layouts[-1]))
            if kernel.by_name:
                order += _LAST
        verdicts.append((order, kernel.name, Verdict(kernel, refusal, seconds)))
    return [verdict for *_, verdict in sorted(verdicts, key=lambda found: found[:2])]


def cost(kernel: Kernel, problem: Problem) -> float:
    """Seconds of all matrices."""
    asked = kernel.asked(problem)
    return kernel.cost(asked) * (problem.batches // asked.batches)


def choose(problem: Problem, name: str | None = None) -> Verdict:
    """The cheapest kernel that accepts, or the named one.

    Raises
    ------
    ValueError
        No kernel has that name, or the named one refuses; the message says why.
    """
    return pick(judge(problem), name)


def pick(verdicts: list[Verdict], name: str | None) -> Verdict:
    """The first of judged kernels, or the named one; see `choose`."""
    if name is None:
        if verdicts[0].refusal is not None:
            reasons = "; ".join(f"{v.kernel.name}: {v.refusal}" for v in verdicts)
            raise ValueError(f"no kernel computes this product: {reasons}")
        return verdicts[0]
    for verdict in verdicts:
        if verdict.kernel.name == name:
            if verdict.refusal is not None:
                raise ValueError(f"kernel={name!r} refuses: {verdict.refusal}")
            return verdict
    known = ", ".join(sorted(v.kernel.name for v in verdicts))
    raise ValueError(f"kernel={name!r} is not known; there are {known}")


@lru_cache(maxsize=4096)
def prepared(problem: Problem, name: str | None = None) -> Bind:
    """The chosen kernel, built: what a repeated call runs at once."""
    kernel = choose(problem, name).kernel
    return kernel.build(kernel.asked(problem))

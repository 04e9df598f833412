"""cuBLAS through CuPy: the dense product that every machine with CuPy has."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from harness.checking import Meaning
from harness.gpu_work import Kept, Operands, host, share_of_bound
from harness.work import Work

from peers.gpu import Built

NAMES = ("cupy.dense",)


def missing() -> str | None:
    """CuPy, and the library that it calls."""
    if not find_spec("cupy"):
        return "CuPy is not installed (pip install lowbit[cuda13])"
    try:
        from cupy.cuda import cublas  # noqa: F401
    except ImportError as error:
        return f"CuPy finds no cuBLAS (pip install nvidia-cublas): {str(error).splitlines()[0]}"
    return None


def version() -> str:
    """Release of CuPy, and of the cuBLAS that it found."""
    import cupy
    from cupy.cuda import cublas, device

    return f"cupy {cupy.__version__}, cuBLAS {cublas.getVersion(device.get_cublas_handle())}"


def refusal(name: str, work: Work) -> str | None:
    """Dense products in 16 bits."""
    return None if work.dense else "multiplies dense weights only"


def build(name: str, operands: Operands) -> Built:
    """w in x's dtype."""
    work, xp = operands.work, operands.xp
    weights = [operands.weight().astype(work.weight)]
    held = Kept(lambda rows: host(weights[0][xp.asarray(rows)]))
    # Tensor cores lose 2 u of 17 terms at most for 16 products; see kernels/cuda/gemm.py.
    meaning = Meaning(held, roundings=3 * work.k, out=work.x)

    def take(m: int) -> Any:
        return operands.x(m, work.x), xp.empty((m, work.n), work.x)

    def call(taken: Any, i: int) -> Any:
        x, out = taken
        return xp.matmul(x, weights[i].T, out=out)

    def check(answer: Any, m: int) -> float:
        x = operands.x(m, work.x)
        return share_of_bound(answer, lambda m, rows: host(x[xp.asarray(rows)]), m, work.n, meaning)

    return Built(
        weight_bytes=weights[0].nbytes,
        copy=lambda: weights.append(weights[0].copy()),
        take=take,
        call=call,
        check=check,
    )

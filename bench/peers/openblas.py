"""NumPy's float32 product, on the OpenBLAS in NumPy's wheels: what dequantizing first costs."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from harness.checking import Meaning
from harness.work import Operands, Work

import lowbit as lb
from peers import Built, checked_by

NAMES = ("openblas.float32",)


def missing() -> str | None:
    """Where NumPy is built on something else, its numbers are not OpenBLAS's."""
    blas = _blas()
    return None if "openblas" in blas["name"] else f"this NumPy multiplies with {blas['name']}"


def version() -> str:
    """Releases, and a kernel that the environment forces."""
    forced = os.environ.get("OPENBLAS_CORETYPE")
    kernel = f", kernels of {forced} forced" if forced else ""
    return f"NumPy {np.__version__}, {_blas()['name']} {_blas()['version']}{kernel}"


def refusal(name: str, work: Work) -> str | None:
    """Only plain float x."""
    return None if work.x in ("float32", "bfloat16") else f"wants float32 x, not {work.x}"


def build(name: str, operands: Operands, threads: int) -> Built:
    """Dense float32 weights; the number of threads comes from the environment."""
    work = operands.work
    weight = lb.quantize(operands.weight, work.weight).dequantize(np.float32)
    weights = [weight.T]
    meaning = Meaning(lambda rows: weight[rows].astype(np.float64), roundings=work.k)
    return Built(
        weight_bytes=weight.nbytes,
        copy=lambda: weights.append(weight.copy().T),
        take=lambda x: np.ascontiguousarray(x, np.float32),
        call=lambda x, i: x @ weights[i],
        read=lambda y: y,
        check=checked_by(meaning, work),
    )


def _blas() -> dict[str, Any]:
    configuration: Any = np.show_config(mode="dicts")
    blas: dict[str, Any] = configuration["Build Dependencies"]["blas"]
    return blas

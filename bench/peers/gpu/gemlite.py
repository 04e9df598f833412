"""GemLite: weight-only products by Triton, a wheel of Python alone."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from harness import codes
from harness.checking import UNIT, Meaning
from harness.gpu_work import Kept, Operands, share_of_bound
from harness.work import Array, Work

import lowbit as lb
from peers.gpu import Built, pytorch

NAMES = ("gemlite",)
_SPLITS = 17  # parts of k whose sums meet by atomic adds in the answer's dtype, at most


def missing() -> str | None:
    """GemLite, and what it stands on."""
    if not find_spec("gemlite"):
        return "gemlite is not installed (pip install gemlite)"
    return pytorch.missing() or (None if find_spec("triton") else "triton is not installed")


def version() -> str:
    """The release."""
    return f"gemlite {metadata.version('gemlite')}"


def refusal(name: str, work: Work) -> str | None:
    """int4 in groups, x in 16 bits."""
    if work.x not in ("bfloat16", "float16"):
        return f"wants bfloat16 or float16 x, the work has {work.x}"
    if not codes.is_integer(work.weight, 4) or work.group == work.k:
        return f"wants int4 in groups, not {work.weight}"
    if work.k % work.group or work.k % 32:
        return f"wants k divisible by 32 and the group, got {work.k}"
    return None


def build(name: str, operands: Operands) -> Built:
    """lowbit's codes and scales, the scales rounded to x's dtype."""
    import torch
    from gemlite.core import DType, GemLiteLinear

    torch.set_grad_enabled(False)
    work = operands.work
    kind = getattr(torch, work.x)
    dtype = {"bfloat16": DType.BF16, "float16": DType.FP16}[work.x]
    unsigned, scales = pytorch.unsigned4(lb.quantize(operands.weight(), work.weight))
    rounded = scales.to(kind)

    def layer() -> Any:
        made = GemLiteLinear(
            W_nbits=4,
            group_size=work.group,
            in_features=work.k,
            out_features=work.n,
            input_dtype=dtype,
            output_dtype=dtype,
        )
        made.pack(unsigned, rounded, 8, None)
        return made

    layers = [layer()]

    def rows_of(rows: Array) -> Array:
        spread: Array = np.repeat(pytorch.picked(rounded, rows), work.group, axis=1)
        return (pytorch.picked(unsigned, rows) - 8) * spread

    # Weights are rounded to x's dtype before they are multiplied, partial sums when they meet.
    meaning = Meaning(
        Kept(rows_of), roundings=3 * work.k, relative=(1 + _SPLITS) * UNIT[work.x], out=work.x
    )

    def x_of(m: int) -> Any:
        return pytorch.tensor(operands.x(m, "float32")).to(kind)

    return Built(
        weight_bytes=sum(part.nbytes for part in (layers[0].W_q, layers[0].scales)),
        copy=lambda: layers.append(layer()),
        take=x_of,
        call=lambda x, i: layers[i](x),
        check=lambda answer, m: share_of_bound(
            answer, lambda m, rows: pytorch.picked(x_of(m), rows), m, work.n, meaning
        ),
    )

"""MLX's quantized_matmul on the CPU: groups with a scale and a bias each.

x comes in float32 also where the others take bfloat16: on x86 MLX sums in x's own dtype
(mlx/backend/cpu/quantized.cpp), and for thousands of bfloat16 additions no bound says anything.
MLX gives no say in how many threads an operation uses on the CPU.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

import numpy as np
from harness import codes
from harness.checking import Meaning
from harness.work import Operands, Work

from peers import Built, checked_by

NAMES = ("mlx",)


def missing() -> str | None:
    """The package, with a back end that multiplies on the CPU."""
    if find_spec("mlx") is None:
        return "mlx is not installed (pip install mlx[cpu])"
    return None


def version() -> str:
    """The release."""
    return f"mlx {metadata.version('mlx')}"


def refusal(name: str, work: Work) -> str | None:
    """Groups of 32, 64 or 128 columns that divide k."""
    if not (codes.is_integer(work.weight, 4) or codes.is_integer(work.weight, 8)):
        return f"wants int4 or int8 weights with scales in groups, not {work.weight}"
    if work.group not in (32, 64, 128):
        return f"wants groups of 32, 64 or 128, not {work.group}"
    if work.k % work.group:
        return f"wants k divisible by {work.group}, got {work.k}"
    if work.n % 32:
        return f"wants n divisible by 32, got {work.n}"
    if work.x not in ("float32", "bfloat16"):
        return f"wants float x, not {work.x}"
    return None


def build(name: str, operands: Operands, threads: int) -> Built:
    """lowbit's codes c and scales s as (c + 8) s - 8 s, for 8 bits with 128."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    work = operands.work
    weight = codes.integers(operands)
    unsigned = weight.unsigned()
    if weight.bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    words = np.ascontiguousarray(unsigned).view(np.uint32)
    parts: list[tuple[mx.array, mx.array, mx.array]] = []

    def copy() -> None:
        scales = mx.array(weight.scales)
        parts.append((mx.array(words), scales, scales * -weight.half))
        mx.eval(parts[-1])

    copy()

    def call(x: mx.array, i: int) -> mx.array:
        w, scales, biases = parts[i]
        y = mx.quantized_matmul(x, w, scales, biases, group_size=work.group, bits=weight.bits)
        mx.eval(y)
        return y

    meaning = Meaning(weight.rows, roundings=work.k + 8, size=weight.shifted_size)
    return Built(
        weight_bytes=sum(part.nbytes for part in parts[0]),
        copy=copy,
        take=lambda x: mx.array(np.ascontiguousarray(x, np.float32)),
        call=call,
        read=np.array,
        check=checked_by(meaning, work),
    )

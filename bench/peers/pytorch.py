"""PyTorch: dense products, and its own kernels for integer weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from harness import codes
from harness.checking import Meaning
from harness.work import Array, Operands, Work

import lowbit as lb
from peers import Built, checked_by

NAMES = (
    "torch.float32",
    "torch.bfloat16",
    "torch.int_mm",
    "torch.int4pack",
    "torch.int8pack",
)


def missing() -> str | None:
    """The package."""
    return None if find_spec("torch") else "torch is not installed (pip install torch)"


def version() -> str:
    """The release, and the vector instructions that it says it uses."""
    import torch

    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def refusal(name: str, work: Work) -> str | None:
    """What each of the five takes."""
    path = name.partition(".")[2]
    if path == "int_mm":
        whole = work.x == "int8_row" and work.weight == "int8_row"
        return None if whole else "multiplies int8 codes only: wants int8_row times int8_row"
    if path == "float32":
        return None if work.x in ("float32", "bfloat16") else f"wants float x, not {work.x}"
    if work.x != "bfloat16":
        return f"wants bfloat16 x, the work has {work.x}"
    if path == "int4pack":
        if not codes.is_integer(work.weight, 4) or work.group not in (32, 64, 128, 256):
            return f"wants int4 in groups of 32, 64, 128 or 256, not {work.weight}"
        if work.k % work.group or work.n % 16:
            return f"wants k divisible by the group and n by 16, got {work.k} and {work.n}"
    if path == "int8pack" and work.weight != "int8_row":
        return f"wants int8_row weights, not {work.weight}"
    return None


def build(name: str, operands: Operands, threads: int) -> Built:
    """One of the five."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return _BUILDERS[name.partition(".")[2]](operands)


def _dense(operands: Operands, dtype: str) -> Built:
    import torch

    kind, work = getattr(torch, dtype), operands.work
    values = torch.from_numpy(lb.quantize(operands.weight, work.weight).dequantize(np.float32))
    dense = values.to(kind)
    weights = [dense]
    held = dense.float().numpy()
    # Sums are float32; oneDNN may keep partial sums of bfloat16 products in no less.
    meaning = Meaning(lambda rows: held[rows], roundings=work.k, out=dtype)
    return Built(
        weight_bytes=dense.nbytes,
        copy=lambda: weights.append(dense.clone()),
        take=lambda x: torch.from_numpy(x).to(kind),
        call=lambda x, i: torch.nn.functional.linear(x, weights[i]),
        read=_numpy,
        check=checked_by(meaning, work),
    )


def _int_mm(operands: Operands) -> Built:
    import torch

    work = operands.work
    codes_of = lb.quantize(operands.weight, "int8_row").codes
    # (k, n) in memory order of (n, k): how torch's own users store the weight of a linear layer.
    weights = [torch.from_numpy(np.array(codes_of)).t()]
    held = np.array(codes_of, np.float64)

    def take(x: Array) -> Any:
        return torch.from_numpy(np.array(lb.quantize(x, "int8_row").codes))

    def check(answer: Array, x: Array) -> float:
        exact = Meaning(lambda rows: held[rows], roundings=0, out="int32")
        return checked_by(exact, work)(answer, np.array(lb.quantize(x, "int8_row").codes))

    return Built(
        weight_bytes=weights[0].nbytes,
        copy=lambda: weights.append(torch.from_numpy(np.array(codes_of)).t()),
        take=take,
        call=lambda x, i: torch._int_mm(x, weights[i]),
        read=lambda y: y.numpy(),
        check=check,
    )


def int4_parts(weight: codes.Integers, work: Work) -> tuple[tuple[Any, Any], Meaning]:
    """Packed codes, and scales with zeros, as _weight_int4pack_mm_for_cpu wants them."""
    import torch

    scales = torch.from_numpy(weight.scales.copy()).to(torch.bfloat16)
    shifted = torch.from_numpy(weight.unsigned().astype(np.int32))
    # (groups, n, 2): scale and zero; value = (code - 8) * scale + zero.
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous()
    held = codes.Integers(weight.codes, scales.float().numpy(), weight.group, 4)
    # The product of code and scale may be rounded to bfloat16 before it is multiplied.
    meaning = Meaning(held.rows, roundings=work.k + 8, relative=2.0**-8, out="bfloat16")
    return (torch._convert_weight_to_int4pack_for_cpu(shifted, 1), pairs), meaning


def _int4pack(operands: Operands) -> Built:
    import torch

    work = operands.work
    parts, meaning = int4_parts(codes.integers(operands), work)
    sets = [parts]
    return Built(
        weight_bytes=sum(part.nbytes for part in parts),
        copy=lambda: sets.append((parts[0].clone(), parts[1].clone())),
        take=lambda x: torch.from_numpy(x).to(torch.bfloat16),
        call=lambda x, i: torch._weight_int4pack_mm_for_cpu(x, sets[i][0], work.group, sets[i][1]),
        read=_numpy,
        check=checked_by(meaning, work),
    )


def _int8pack(operands: Operands) -> Built:
    import torch

    work = operands.work
    weight = codes.integers(operands)
    scales = torch.from_numpy(weight.scales[:, 0].copy()).to(torch.bfloat16)
    sets = [(torch.from_numpy(weight.codes.copy()), scales)]
    held = codes.Integers(weight.codes, scales.float().numpy()[:, None], work.k, 8)
    meaning = Meaning(held.rows, roundings=work.k + 8, relative=2.0**-8, out="bfloat16")
    return Built(
        weight_bytes=sum(part.nbytes for part in sets[0]),
        copy=lambda: sets.append((sets[0][0].clone(), scales.clone())),
        take=lambda x: torch.from_numpy(x).to(torch.bfloat16),
        call=lambda x, i: torch._weight_int8pack_mm(x, *sets[i]),
        read=_numpy,
        check=checked_by(meaning, work),
    )


def _numpy(y: Any) -> Array:
    array: Array = y.float().numpy()
    return array


_BUILDERS: dict[str, Callable[[Operands], Built]] = {
    "float32": lambda operands: _dense(operands, "float32"),
    "bfloat16": lambda operands: _dense(operands, "bfloat16"),
    "int_mm": _int_mm,
    "int4pack": _int4pack,
    "int8pack": _int8pack,
}

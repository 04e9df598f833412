"""PyTorch on CUDA: dense products, fp8, int8 and tinygemm's int4."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from harness import codes
from harness.checking import UNIT, Meaning
from harness.gpu_work import Kept, Operands, share_of_bound
from harness.work import Array, Work

import lowbit as lb
from peers.gpu import Built

NAMES = ("torch.dense", "torch.scaled_mm", "torch.int_mm", "torch.tinygemm")


def missing() -> str | None:
    """The package, with CUDA in it."""
    if not find_spec("torch"):
        return "torch is not installed (pip install torch)"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def version() -> str:
    """The release and its CUDA."""
    import torch

    return f"torch {torch.__version__}, CUDA {torch.version.cuda}"


def refusal(name: str, work: Work) -> str | None:
    """What each of the four takes."""
    path = name.partition(".")[2]
    if path == "dense":
        return None if work.dense else "multiplies dense weights only"
    if path == "int_mm":
        whole = work.x == work.weight == "int8_row"
        return None if whole else "multiplies int8 codes only: wants int8_row times int8_row"
    if path == "scaled_mm":
        alike = work.x == work.weight and work.x in ("fp8_row", "fp8_tensor")
        return None if alike else "wants fp8_row or fp8_tensor on both sides"
    if work.x != "bfloat16":
        return f"wants bfloat16 x, the work has {work.x}"
    if not codes.is_integer(work.weight, 4) or work.group not in (32, 64, 128, 256):
        return f"wants int4 in groups of 32, 64, 128 or 256, not {work.weight}"
    if work.k % max(work.group, 128) or work.n % 8:
        return f"wants k divisible by 128 and the group, n by 8, got {work.k} and {work.n}"
    return None


def build(name: str, operands: Operands) -> Built:
    """One of the four."""
    import torch

    torch.set_grad_enabled(False)
    # Partial sums stay in float32, as they do in lowbit and in the bound.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return _BUILDERS[name.partition(".")[2]](operands)


def _dense(operands: Operands) -> Built:
    import torch

    work = operands.work
    kind = getattr(torch, work.x)
    weights = [tensor(operands.weight()).to(kind)]
    meaning = Meaning(Kept(lambda rows: picked(weights[0], rows)), roundings=3 * work.k, out=work.x)

    def take(m: int) -> Any:
        x = tensor(operands.x(m, "float32")).to(kind)
        return x, torch.empty((m, work.n), dtype=kind, device=x.device)

    return _built(
        operands,
        weight_bytes=weights[0].nbytes,
        copy=lambda: weights.append(weights[0].clone()),
        take=take,
        call=lambda taken, i: torch.mm(taken[0], weights[i].t(), out=taken[1]),
        meaning=meaning,
        x=lambda m, rows: picked(tensor(operands.x(m, "float32")).to(kind), rows),
    )


def _scaled_mm(operands: Operands) -> Built:
    """cuBLASLt's fp8, with the fast sums that inference uses: 13 bits or more are kept of them."""
    import torch

    work = operands.work

    def parts(array: lb.QArray) -> tuple[Any, Any]:
        scales = tensor(array.scales)
        number = tensor(array.codes.view(np.uint8)).view(torch.float8_e4m3fn)
        return number, scales.reshape(()) if work.x == "fp8_tensor" else scales

    quantized = lb.quantize(operands.weight(), work.weight)
    sets = [parts(quantized)]
    held = Kept(lambda rows: _scaled(sets[0], rows))
    # An instruction takes 32 columns. 2**-11 is more than what Hopper's sums lose: 13 bits stay.
    meaning = Meaning(held, roundings=work.k // 32 + 32, accumulator="float16", out="bfloat16")
    given: dict[int, tuple[Any, Any]] = {}

    def take(m: int) -> Any:
        given[m] = parts(lb.quantize(operands.x(m, "bfloat16"), work.x))
        return given[m]

    def call(taken: Any, i: int) -> Any:
        (x, x_scale), (w, w_scale) = taken, sets[i]
        columns = w_scale.t() if w_scale.ndim else w_scale
        return torch._scaled_mm(
            x, w.t(), x_scale, columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _built(
        operands,
        weight_bytes=quantized.nbytes,
        copy=lambda: sets.append((sets[0][0].clone(), sets[0][1].clone())),
        take=take,
        call=call,
        meaning=meaning,
        x=lambda m, rows: _scaled(given[m], rows),
    )


def _int_mm(operands: Operands) -> Built:
    import torch

    weights = [tensor(lb.quantize(operands.weight(), "int8_row").codes)]
    exact = Meaning(Kept(lambda rows: picked(weights[0], rows)), roundings=0, out="int32")
    given: dict[int, Any] = {}

    def take(m: int) -> Any:
        given[m] = tensor(lb.quantize(operands.x(m, "bfloat16"), "int8_row").codes)
        return given[m]

    return _built(
        operands,
        weight_bytes=weights[0].nbytes,
        copy=lambda: weights.append(weights[0].clone()),
        take=take,
        call=lambda x, i: torch._int_mm(x, weights[i].t()),
        meaning=exact,
        x=lambda m, rows: picked(given[m], rows),
        least_rows=17,
        out_bytes=4,
    )


def _tinygemm(operands: Operands) -> Built:
    """value = (code - 8) * scale + zero; the first of two columns is in a byte's high half."""
    import torch

    work = operands.work
    unsigned, scales = unsigned4(lb.quantize(operands.weight(), work.weight))
    packed = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous()
    rounded = scales.to(torch.bfloat16)
    pairs = torch.stack([rounded, torch.zeros_like(rounded)], dim=-1).transpose(0, 1).contiguous()
    sets = [(torch._convert_weight_to_int4pack(packed, 8), pairs)]

    def rows_of(rows: Array) -> Array:
        spread: Array = np.repeat(picked(rounded, rows), work.group, axis=1)
        return (picked(unsigned, rows) - 8) * spread

    # The product of code and scale is rounded to bfloat16 before it is multiplied.
    meaning = Meaning(
        Kept(rows_of), roundings=3 * work.k, relative=2 * UNIT["bfloat16"], out="bfloat16"
    )
    return _built(
        operands,
        weight_bytes=sum(part.nbytes for part in sets[0]),
        copy=lambda: sets.append((sets[0][0].clone(), sets[0][1].clone())),
        take=lambda m: tensor(operands.x(m, "float32")).to(torch.bfloat16),
        call=lambda x, i: torch._weight_int4pack_mm(x, sets[i][0], work.group, sets[i][1]),
        meaning=meaning,
        x=lambda m, rows: picked(tensor(operands.x(m, "float32")).to(torch.bfloat16), rows),
    )


def unsigned4(quantized: lb.QArray) -> tuple[Any, Any]:
    """int4 codes plus 8 as uint8 (n, k), and float32 scales (n, groups)."""
    import torch

    both = tensor(quantized.codes)  # column 2 j is the low half of byte j, two's complement
    halves = torch.stack([both & 15, both >> 4], dim=-1).reshape(both.shape[0], -1)
    return halves ^ 8, tensor(quantized.scales)


def tensor(array: Any) -> Any:
    """The same memory as a tensor; copied where it is read-only."""
    import torch

    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array))
    return torch.from_dlpack(array)


def picked(values: Any, rows: Array) -> Array:
    """Some rows in the host's memory, as float64."""
    import torch

    found: Array = values[torch.from_numpy(rows).to(values.device)].double().cpu().numpy()
    return found


def _scaled(parts: tuple[Any, Any], rows: Array) -> Array:
    """Codes times the scale of their row, or the tensor's."""
    import torch

    numbers, scales = parts
    bytes_ = picked(numbers.view(torch.uint8), rows).astype(np.uint8)
    values = bytes_.view("float8_e4m3fn").astype(np.float64)
    return values * (picked(scales, rows) if scales.ndim else float(scales))


def _built(
    operands: Operands,
    *,
    weight_bytes: int,
    copy: Callable[[], object],
    take: Callable[[int], Any],
    call: Callable[[Any, int], Any],
    meaning: Meaning,
    x: Callable[[int, Array], Array],
    least_rows: int = 1,
    out_bytes: int = 2,
) -> Built:
    return Built(
        weight_bytes=weight_bytes,
        copy=copy,
        take=take,
        call=call,
        check=lambda answer, m: share_of_bound(answer, x, m, operands.work.n, meaning),
        least_rows=least_rows,
        out_bytes=out_bytes,
    )


_BUILDERS: dict[str, Callable[[Operands], Built]] = {
    "dense": _dense,
    "scaled_mm": _scaled_mm,
    "int_mm": _int_mm,
    "tinygemm": _tinygemm,
}

"""torchao's tensors for the CPU, called as its users call them: through torch.nn.functional.linear.

The package index has torchao without its own CPU kernels (da8w4), so int4 runs on PyTorch's
_weight_int4pack_mm_for_cpu and int8 on _int_mm and dense products, with torchao's steps around.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import codes
from harness.checking import Dynamic, Meaning
from harness.work import Operands, Work

from peers import Built, checked_by, pytorch

NAMES = ("torchao.int4", "torchao.int8", "torchao.int8dyn")


def missing() -> str | None:
    """PyTorch, and torchao with the tensor of int4 weights for the CPU."""
    package = find_spec("torchao")
    if package is None:
        return "torchao is not installed (pip install torchao)"
    folders = [Path(each) for each in package.submodule_search_locations or ()]
    # Looked up as a folder: asking for a module inside would import all of torchao.
    if not any((each / "prototype" / "quantization" / "int4").is_dir() for each in folders):
        return "this torchao has no Int4OpaqueTensor; 0.18 does"
    return pytorch.missing()


def version() -> str:
    """Both releases."""
    import torchao

    return f"torchao {torchao.__version__} on {pytorch.version()}"


def refusal(name: str, work: Work) -> str | None:
    """What each of the three takes."""
    path = name.partition(".")[2]
    if path == "int4":
        return pytorch.refusal("torch.int4pack", work)
    if work.weight != "int8_row":
        return f"wants int8_row weights, not {work.weight}"
    wanted = ("float32", "int8_row") if path == "int8dyn" else ("bfloat16", None)
    if (work.x, work.inner) != wanted:
        inner = f" quantized to {wanted[1]} inside" if wanted[1] else ", as it is"
        return f"measured with {wanted[0]} x{inner}; the work has {work.x}"
    return None


def build(name: str, operands: Operands, threads: int) -> Built:
    """lowbit's codes and scales in torchao's tensors."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    path, work = name.partition(".")[2], operands.work
    weight = codes.integers(operands)
    tensor, meaning = (_int4 if path == "int4" else _int8)(weight, work)
    weights = [tensor()]
    parts = [getattr(weights[0], each) for each in weights[0].tensor_data_names]
    dtype = getattr(torch, work.x)
    return Built(
        weight_bytes=sum(part.nbytes for part in parts),
        copy=lambda: weights.append(tensor()),
        take=lambda x: torch.from_numpy(x).to(dtype),
        call=lambda x, i: torch.nn.functional.linear(x, weights[i]),
        read=lambda y: y.float().numpy(),
        check=checked_by(meaning, work),
    )


def _int4(weight: codes.Integers, work: Work) -> tuple[Callable[[], Any], Meaning]:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    packed, meaning = pytorch.int4_parts(weight, work)
    shape = weight.codes.shape

    def tensor() -> Any:
        return Int4OpaqueTensor(*(p.clone() for p in packed), [1, weight.group], shape)

    return tensor, meaning


def _int8(weight: codes.Integers, work: Work) -> tuple[Callable[[], Any], Meaning]:
    import torch
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
        QuantizeTensorToInt8Kwargs,
    )

    dtype = getattr(torch, work.x)
    scales = torch.from_numpy(weight.scales.copy()).to(dtype)
    dynamic = work.inner is not None
    extra = {"act_quant_kwargs": QuantizeTensorToInt8Kwargs(granularity=PerRow())}

    def tensor() -> Any:
        qdata = torch.from_numpy(weight.codes.copy())
        kind: dict[str, Any] = extra if dynamic else {}
        return Int8Tensor(qdata, scales.clone(), [1, work.k], dtype, **kind)

    held = codes.Integers(weight.codes, scales.float().numpy(), work.k, 8)
    meaning = Meaning(
        held.rows,
        roundings=8 if dynamic else work.k + 8,
        # The sum is rounded to bfloat16 before it is multiplied with the scale.
        relative=0.0 if dynamic else 2.0**-7,
        out=work.x,
        # torchao spreads -max |x| .. max |x| over the 255 steps from -128 to 127.
        dynamic=Dynamic(work.k, levels=127.5) if dynamic else None,
    )
    return tensor, meaning

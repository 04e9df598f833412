"""ONNX Runtime's MatMulNBits: blocks of K with one scale, codes with an implied zero point.

`accuracy_level` 4 quantizes x to int8 in the same blocks on the way in, 0 multiplies in float32.
Copies are sessions: a session owns its packed weights. All share one pool of threads, or each
session's idle threads would spin against the next one's.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from harness import codes
from harness.checking import Dynamic, Meaning
from harness.work import Array, Operands, Work

from peers import Built, checked_by

NAMES = ("onnxruntime.acc0", "onnxruntime.acc4")


def missing() -> str | None:
    """Both the runtime, and what writes models for it."""
    for package in ("onnxruntime", "onnx"):
        if find_spec(package) is None:
            return f"{package} is not installed (pip install {package})"
    return None


def version() -> str:
    """The release."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def refusal(name: str, work: Work) -> str | None:
    """Integers of 4 or 8 bits; blocks are powers of two from 16 up to 256."""
    if not (codes.is_integer(work.weight, 4) or codes.is_integer(work.weight, 8)):
        return f"wants int4 or int8 weights with float32 scales in groups, not {work.weight}"
    if work.group not in (16, 32, 64, 128, 256):
        return f"wants groups of 16, 32, 64, 128 or 256, not {work.group}"
    if (name == "onnxruntime.acc4") != (work.inner is not None):
        return f"quantizes x {'always' if work.inner is None else 'never'}; the work says otherwise"
    if work.x not in ("float32", "bfloat16"):
        return f"wants float32 x, not {work.x}"
    return None


def build(name: str, operands: Operands, threads: int) -> Built:
    """A model of one node, a session for each copy."""
    import onnxruntime

    work = operands.work
    weight = codes.integers(operands)
    model, size = _model(weight, work, int(name[-1]))
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False

    def session() -> Any:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    sessions = [session()]
    # Sums are exact within blocks where x is quantized, else one rounding a column.
    inner = work.inner is not None
    meaning = Meaning(
        weight.rows,
        roundings=(work.k // 16 if inner else work.k) + 8,
        dynamic=Dynamic(work.group) if inner else None,
    )
    return Built(
        weight_bytes=size,
        copy=lambda: sessions.append(session()),
        take=lambda x: {"x": np.ascontiguousarray(x, np.float32)},
        call=lambda x, i: sessions[i].run(["y"], x)[0],
        read=lambda y: y,
        check=checked_by(meaning, work),
    )


def _model(weight: codes.Integers, work: Work, accuracy: int) -> tuple[bytes, int]:
    """The serialized model, and the bytes of its weights."""
    from onnx import TensorProto, helper, numpy_helper

    blocks = -(-work.k // work.group)
    unsigned: Array = np.full((work.n, blocks * work.group), weight.half, np.uint8)
    unsigned[:, : work.k] = weight.unsigned()
    if weight.bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    stored = unsigned.reshape(work.n, blocks, -1)
    parts: dict[str, Array] = {"w": stored, "scales": weight.scales.reshape(-1)}
    attributes: dict[str, Any] = {
        "K": work.k,
        "N": work.n,
        "bits": weight.bits,
        "block_size": work.group,
        "accuracy_level": accuracy,
    }
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", **attributes
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", work.k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", work.n])],
        [numpy_helper.from_array(part, key) for key, part in parts.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return model.SerializeToString(), sum(part.nbytes for part in parts.values())

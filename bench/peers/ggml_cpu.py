"""llama.cpp's ggml on the CPU, by ctypes: Q4_0, Q4_K and Q8_0, in each kind of buffer it has.

A buffer decides the kernel: "plain" holds the blocks as in a file, "repack" interleaves rows,
"amx" arranges them for matrix tiles. llama.cpp takes the first of amx, repack, plain that can do
the work. x is float32 and quantized inside: Q8_0 (32 columns, float16 scale) for Q4_0 and Q8_0,
Q8_K (256 columns, float32 scale) for Q4_K.

The libraries are those of a llama-cpp-python built from source, or in the folder that
GGML_LIBRARIES names.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from harness import codes
from harness.checking import Dynamic, Meaning
from harness.work import Array, Operands, Work

from peers import Built, Refused, checked_by

BUFFERS = {"plain": "CPU", "repack": "CPU_REPACK", "amx": "AMX"}
NAMES = tuple(f"ggml.{kind}.{buffer}" for kind in ("q4_0", "q4_k", "q8_0") for buffer in BUFFERS)

F32 = 0
HEADER = 4096
"""More than the memory that a tensor's or a small graph's description takes, generously."""


@dataclass(frozen=True)
class Kind:
    """One of ggml's block types."""

    number: int
    """In ggml's enumeration, which never changes."""
    bits: int
    block: int
    dynamic: Dynamic


KINDS = {
    "q4_0": Kind(2, 4, 32, Dynamic(32, "float16")),
    "q4_k": Kind(12, 4, 256, Dynamic(256)),
    "q8_0": Kind(8, 8, 32, Dynamic(32, "float16")),
}


def missing() -> str | None:
    """The shared libraries."""
    if _folder() is None:
        return (
            "ggml's libraries are not here (pip install --no-binary llama-cpp-python "
            "llama-cpp-python, or name their folder in GGML_LIBRARIES)"
        )
    return None


def version() -> str:
    """ggml's own number and commit, and what it was compiled to use."""
    base, cpu = _libraries()
    base.ggml_version.restype = base.ggml_commit.restype = ctypes.c_char_p
    units = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "matmul_int8")
    used = [unit for unit in units if getattr(cpu, f"ggml_cpu_has_{unit}")()]
    return f"ggml {base.ggml_version().decode()} ({base.ggml_commit().decode()}), {', '.join(used)}"


def refusal(name: str, work: Work) -> str | None:
    """Integer weights in groups that blocks fit into, x quantized on the way in."""
    kind = KINDS[name.split(".")[1]]
    if not codes.is_integer(work.weight, kind.bits):
        return f"holds int{kind.bits} weights with scales in groups, not {work.weight}"
    if work.k % kind.block or work.group % 32:
        return f"wants k divisible by {kind.block} and groups by 32, got {work.k} and {work.group}"
    if work.inner is None:
        return "quantizes x always; the work wants it as it is"
    return None


def build(name: str, operands: Operands, threads: int) -> Built:
    """A weight tensor for each copy in one kind of buffer, and a graph of one product."""
    _, spelled, buffer = name.split(".")
    kind, work = KINDS[spelled], operands.work
    blocks, held = _blocks(codes.integers(operands), spelled)
    ggml = _Ggml(threads)

    def tensor() -> int:
        return ggml.weight(kind.number, work, blocks, BUFFERS[buffer])

    weights = [tensor()]
    meaning = Meaning(
        held.rows,
        roundings=work.k // 16 + 16,
        size=held.shifted_size if spelled == "q4_k" else None,
        dynamic=kind.dynamic,
    )
    return Built(
        weight_bytes=blocks.nbytes,
        copy=lambda: weights.append(tensor()),
        take=lambda x: ggml.products(weights, np.ascontiguousarray(x, np.float32), work.n),
        call=ggml.compute,
        read=lambda products: products.answer(),
        check=checked_by(meaning, work),
    )


def _blocks(weight: codes.Integers, spelled: str) -> tuple[Array, codes.Integers]:
    """ggml's bytes for lowbit's codes, and the weights with the scales that ggml can hold."""
    n, k = weight.codes.shape
    scales = np.repeat(weight.scales, weight.group // 32, axis=1)[:, : k // 32]
    if spelled != "q4_k":
        short = scales.astype(np.float16)
        parts = weight.codes.reshape(n, -1, 32)
        if spelled == "q4_0":
            unsigned = weight.unsigned().reshape(n, -1, 2, 16)
            parts = unsigned[:, :, 0] | unsigned[:, :, 1] << 4
        blocks = np.concatenate([short[..., None].view(np.uint8), parts.view(np.uint8)], axis=-1)
        return blocks, codes.Integers(weight.codes, short.astype(np.float32), 32, weight.bits)
    # Scales have 6 bits and a float16 factor for 256 columns; the minimum is that of 8 steps.
    groups = scales.reshape(n, -1, 8)
    factor = (groups.max(-1, keepdims=True) / 63).astype(np.float16)
    wide = factor.astype(np.float32)
    steps = np.clip(np.rint(groups / wide), 0, 63).astype(np.uint8)
    unsigned = weight.unsigned().reshape(n, -1, 4, 2, 32)
    blocks = np.concatenate(
        [
            factor.view(np.uint8),
            (8 * factor).view(np.uint8),
            _packed_steps(steps),
            (unsigned[:, :, :, 0] | unsigned[:, :, :, 1] << 4).reshape(n, k // 256, 128),
        ],
        axis=-1,
    )
    return blocks, codes.Integers(weight.codes, (wide * steps).reshape(n, -1), 32, 4)


def _packed_steps(steps: Array) -> Array:
    """12 bytes of 8 scales and 8 minima of 6 bits, here the same; the last four are cut up."""
    low, high = steps[..., :4], steps[..., 4:]
    first = low | (high >> 4) << 6
    return np.concatenate([first, first, (high & 15) | (high & 15) << 4], axis=-1)


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@dataclass(frozen=True)
class _Products:
    """A graph for each copy of the weights; all write to the same place."""

    graphs: list[int]
    result: int
    shape: tuple[int, int]

    def answer(self) -> Array:
        m, n = self.shape
        return np.array(
            np.ctypeslib.as_array((ctypes.c_float * (m * n)).from_address(self.result))
        ).reshape(m, n)


class _Ggml:
    """The few functions of ggml that a product takes. Nothing is freed: the process ends."""

    def __init__(self, threads: int) -> None:
        self.base, self.cpu = _libraries()
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, data: None
        )
        self._base("ggml_log_set", None)(self._silence, None)
        self.backend = self._cpu("ggml_backend_cpu_init")()
        self._cpu("ggml_backend_cpu_set_n_threads", None)(
            ctypes.c_void_p(self.backend), ctypes.c_int(threads)
        )
        self.plain = self._cpu("ggml_backend_cpu_buffer_type")()
        self._compute = self._base("ggml_backend_graph_compute", ctypes.c_int)

    def weight(self, kind: int, work: Work, blocks: Array, buffer: str) -> int:
        """A tensor (k, n) filled with the blocks, which the buffer rearranges."""
        context = self._context(1)
        tensor: int = self._base("ggml_new_tensor_2d")(
            context, ctypes.c_int(kind), ctypes.c_int64(work.k), ctypes.c_int64(work.n)
        )
        place = self._buffer_type(buffer)
        if not self._base("ggml_backend_alloc_ctx_tensors_from_buft")(context, place):
            raise MemoryError(f"ggml: no memory for {blocks.nbytes} bytes of weights")
        self._supported(tensor, work, buffer)
        self._base("ggml_backend_tensor_set", None)(
            ctypes.c_void_p(tensor),
            ctypes.c_void_p(blocks.ctypes.data),
            ctypes.c_size_t(0),
            ctypes.c_size_t(blocks.nbytes),
        )
        return tensor

    def products(self, weights: list[int], x: Array, n: int) -> _Products:
        """Graphs that multiply x with each of the weights."""
        m, k = x.shape
        context = self._context(3 * len(weights) + 2)
        rows = self._rows(context, m, k)
        gap = -(-x.nbytes // 64) * 64
        total = ctypes.c_size_t(gap + 4 * m * n + 64)
        memory = ctypes.c_void_p(
            self._base("ggml_backend_buft_alloc_buffer")(ctypes.c_void_p(self.plain), total)
        )
        start = self._base("ggml_backend_buffer_get_base")(memory)
        put = self._base("ggml_backend_tensor_alloc", ctypes.c_int)
        put(memory, ctypes.c_void_p(rows), ctypes.c_void_p(start))
        ctypes.memmove(start, x.ctypes.data, x.nbytes)
        graphs = []
        for weight in weights:
            product = self._product(context, weight, rows)
            put(memory, ctypes.c_void_p(product), ctypes.c_void_p(start + gap))
            graph = self._base("ggml_new_graph_custom")(
                context, ctypes.c_size_t(8), ctypes.c_bool(False)
            )
            self._base("ggml_build_forward_expand", None)(
                ctypes.c_void_p(graph), ctypes.c_void_p(product)
            )
            graphs.append(graph)
        return _Products(graphs, start + gap, (m, n))

    def compute(self, products: _Products, copy: int) -> _Products:
        """One product."""
        status = self._compute(
            ctypes.c_void_p(self.backend), ctypes.c_void_p(products.graphs[copy])
        )
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return products

    def _supported(self, weight: int, work: Work, buffer: str) -> None:
        context = self._context(4)
        product = self._product(context, weight, self._rows(context, 1, work.k))
        check = self._base("ggml_backend_supports_op", ctypes.c_bool)
        if not check(ctypes.c_void_p(self.backend), ctypes.c_void_p(product)):
            raise Refused(f"ggml has no kernel for this type and shape in its {buffer} buffer")

    def _product(self, context: Any, weight: int, rows: int) -> int:
        made: int = self._base("ggml_mul_mat")(
            context, ctypes.c_void_p(weight), ctypes.c_void_p(rows)
        )
        return made

    def _rows(self, context: Any, m: int, k: int) -> int:
        made: int = self._base("ggml_new_tensor_2d")(
            context, ctypes.c_int(F32), ctypes.c_int64(k), ctypes.c_int64(m)
        )
        return made

    def _context(self, things: int) -> Any:
        parameters = _Parameters(HEADER * things, None, True)
        return ctypes.c_void_p(self._base("ggml_init")(parameters))

    def _buffer_type(self, wanted: str) -> Any:
        if wanted == "CPU":
            return ctypes.c_void_p(self.plain)
        registry = ctypes.c_void_p(self._cpu("ggml_backend_cpu_reg")())
        address = self._base("ggml_backend_reg_get_proc_address")(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        device = ctypes.c_void_p(self._base("ggml_backend_reg_dev_get")(registry, 0))
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        names, name_of = [], self._base("ggml_backend_buft_name", ctypes.c_char_p)
        for place in extra:
            if place is None:
                break
            names.append(name_of(ctypes.c_void_p(place)).decode())
            if names[-1] == wanted:
                return ctypes.c_void_p(place)
        raise Refused(f"this ggml has no {wanted} buffer here, but {', '.join(names) or 'none'}")

    def _base(self, name: str, result: Any = ctypes.c_void_p) -> Any:
        return _function(self.base, name, result)

    def _cpu(self, name: str, result: Any = ctypes.c_void_p) -> Any:
        return _function(self.cpu, name, result)


def _function(library: ctypes.CDLL, name: str, result: Any) -> Any:
    function = getattr(library, name)
    function.restype = result
    return function


def _folder() -> Path | None:
    given = os.environ.get("GGML_LIBRARIES")
    package = find_spec("llama_cpp")
    folders = [Path(given)] if given else []
    if package is not None:
        folders += [Path(each) / "lib" for each in package.submodule_search_locations or ()]
    return next((f for f in folders if any(f.glob("libggml-cpu.*"))), None)


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    folder = _folder()
    assert folder is not None, "asked only where `missing` says None"
    ending = "dylib" if any(folder.glob("*.dylib")) else "so"
    base = ctypes.CDLL(str(folder / f"libggml-base.{ending}"), mode=ctypes.RTLD_GLOBAL)
    return base, ctypes.CDLL(str(folder / f"libggml-cpu.{ending}"))

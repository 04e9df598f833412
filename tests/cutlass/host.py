"""CUTLASS's own arguments of a kernel: its C++ for the host, with a driver that records."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from recorder import Recorder

from lowbit.kernels.cuda import compile
from lowbit.kernels.cuda.launch import Device, Source
from lowbit.kernels.cuda.tensor_maps import KINDS, TensorMap
from lowbit.kernels.cutlass import package
from lowbit.kernels.cutlass.epilogue import Node
from lowbit.kernels.cutlass.records import Value

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "cutlass"
OPTIONS = (
    "-std=c++17", "-O0", "-fPIC", "-shared", "-w", "-fpermissive", "-DNDEBUG",
    "-DCUTE_USE_PACKED_TUPLE=1", "-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0",
    "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL",
)  # fmt: skip


_RECORDED = "<10Q5H4B"


def recorded(wanted: TensorMap) -> bytes:
    """What shim.hpp makes of a descriptor."""
    rank, void = len(wanted.sizes), [0] * 5

    def five(numbers: tuple[int, ...], count: int = 5) -> list[int]:
        return [*numbers, *void][:count]

    return struct.pack(
        f"{_RECORDED}34x", wanted.address, *five(wanted.sizes), *five(wanted.strides, 4),
        *five(wanted.box), KINDS.index(wanted.kind), rank, wanted.swizzling, 1,
    )  # fmt: skip


def fields(descriptor: bytes) -> tuple[int, ...]:
    """A recorded descriptor: address, 5 sizes, 4 strides, box, kind, rank, swizzle, the rest."""
    return struct.unpack_from(_RECORDED, descriptor)


def memory(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any
) -> np.ndarray[Any, Any]:
    """The host's memory at an address, as an array."""
    size = np.dtype(dtype).itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    held = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
    return np.ndarray(shape, dtype, held.data, 0, strides)


def read(descriptor: bytes, dtype: Any, batch: int = 0) -> np.ndarray[Any, Any]:
    """A matrix that a recorded descriptor is of."""
    address, columns, rows, matrices, _, _, pitch, between, *_ = fields(descriptor)
    assert batch < matrices
    size = np.dtype(dtype).itemsize
    return memory(address + batch * between, (rows, columns), (pitch, size), dtype)


class Watching(Recorder):
    """A machine that keeps what it was asked to launch: source, grid, the argument's bytes.

    Of kernels of lowbit's own, all arguments.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.launched: list[tuple[Source, tuple[int, ...], Any]] = []

    def function(self, source: Source) -> Callable[..., None]:
        """Keep the arguments of launches."""

        def run(grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
            assert (*block, shared_mem) == (source.threads, source.shared)
            self.launched.append((source, grid, args if source.headers is None else args[0]))

        return run

    encode = staticmethod(recorded)

    def by_value(self, data: bytes) -> Any:
        """The bytes."""
        return data

    def address(self, array: Any) -> int:
        """Where an array is."""
        return int(array.ctypes.data)


@cache
def compiled(text: str) -> Any:
    """Compile C++ and load it."""
    compiler = shutil.which("g++")
    assert compiler is not None
    folders = [HERE, package.FOLDER, package.headers(), *compile.includes()]
    headers = [p.read_text() for p in sorted([*HERE.glob("*.hpp")])]
    key = hashlib.sha256(repr((text, headers, OPTIONS)).encode()).hexdigest()[:24]
    made = BUILD / f"{key}.so"
    if not made.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        written = BUILD / f"{key}.cpp"
        written.write_text(text)
        paths = [f"-I{folder}" for folder in folders]
        command = [compiler, *OPTIONS, *paths, str(written), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        assert result.returncode == 0, "\n".join(errors[:20])
    return ctypes.CDLL(str(made))


SELECT = {
    "pointer": "pointer({}, 0)",
    "default": "{}.null_default",
    "steps.step": "step({})",
    "steps.batch": "cute::get<2>(steps({}, 0))",
    "scalars": "{}.scalars[0]",
    **{f"scalars.{i}": f"{{}}.scalars[{i}]" for i in range(3)},
    **{f"pointers.{i}": f"{{}}.scalar_ptrs[{i}]" for i in range(3)},
}
"""Of a visitor's arguments, by the name of its member in epilogue.py."""


def setter(node: Node) -> str:
    """C++ that sets a tree's arguments from numbers in the order of its operands."""
    lines = []
    for i, path in enumerate(node.operands.values()):
        member = next(m for m in SELECT if path.endswith(m))
        visitor = "a." + path.removesuffix("." + member)
        lines.append(f"    put({SELECT[member].format(visitor)}, bits[{i}]);\n")
    head = "inline void set(typename Finish::Arguments& a, const std::uint64_t* bits) {\n"
    return '#include "epilogue.hpp"\n' + head + "".join(lines) + "}\n"


def bits(value: Value) -> int:
    """A member's bytes as a number."""
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<f", value), "little")
    assert isinstance(value, int)
    return value % (1 << 64)

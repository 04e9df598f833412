"""Where memory lies, and what each place can do: the host, or a GPU through CuPy.

Host and GPU answer the same questions, so nothing else in this package asks which one it is. CuPy
is looked up, and imported only when memory of a GPU is there or asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lowbit.formats import Format, reference
from lowbit.formats.reference import Packed
from lowbit.kernels.cpu import pool
from lowbit.kernels.cpu.pool import address as address  # of an array of the host

Array = npt.NDArray[Any]  # of NumPy or of CuPy, whose dtypes are NumPy's

INSTALL = 'pip install "lowbit[cuda13]" ([cuda12] for CUDA 12)'
_LEAST = 1 << 12  # numbers; for fewer it does not pay to load a kernel of the host


_HERE: AbstractContextManager[Any] = nullcontext()


class Host:
    """The memory of this machine: NumPy arrays."""

    name: Final = "cpu"
    backend: Final = "cpu"
    xp: Any = np
    prepares: Final = True
    """Whether kernels like other arrangements of codes than rows."""

    mark = staticmethod(pool.get_num_threads)
    """What tells products bound in one place, or for so many threads, from others."""

    def threads(self) -> int:
        """Threads that a kernel may use."""
        return pool.get_num_threads()

    def put(self, array: Array) -> Array:
        """An array of the host here."""
        return array

    def get(self, array: Array) -> Array:
        """An array of this place on the host."""
        return array

    def exporting(self, array: Array) -> None:
        """Protect a part of an immutable array that a user gets to see."""
        array.flags.writeable = False

    def current(self) -> AbstractContextManager[Any]:
        """Make this the place that new memory and launches belong to."""
        return _HERE

    def quantize(
        self,
        fmt: Format,
        x: Array,
        *,
        method: str,
        rounding: str,
        overflow: str,
        scale: Array | None,
        zero: Array | None,
    ) -> Packed | None:
        """Round by compiled code; None: the reference has to do it, or to say why not."""
        if x.size < _LEAST:
            return None
        from lowbit.kernels.cpu import quantize as compiled

        if compiled.refuse(fmt, x, method=method, rounding=rounding, overflow=overflow):
            return None
        return compiled.quantize(fmt, x, method=method, scale=scale, zero=zero)

    def quantize_silu_mul(self, fmt: Format, gate: Array, up: Array) -> Packed | None:
        """silu(gate) * up in a format by one kernel; None: it takes the layer, then `quantize`."""
        return None

    def quantize_rmsnorm(
        self,
        fmt: Format,
        x: Array,
        weight: Array,
        eps: float,
        residual: Array | None,
        updated: Array | None,
    ) -> Packed | None:
        """Normalized rows in a format by one kernel, x + residual in `updated`; None as there."""
        return None

    def dequantize_to(self, parts: Packed, out: Array) -> None:
        """Write the values, rounded once to the dtype of `out`."""
        if out.size >= _LEAST:
            from lowbit.kernels.cpu import dequantize as compiled

            if compiled.refuse(out.dtype) is None:
                compiled.dequantize_to(parts, out)
                return
        reference.dequantize_to(parts, out)


class Gpu:
    """One GPU's memory: CuPy arrays."""

    backend: Final = "cuda"
    prepares: Final = False

    def __init__(self, number: int, cupy: Any) -> None:
        self.number, self.xp = number, cupy
        self.name = f"cuda:{number}"

    def mark(self) -> int:
        """As `Host.mark`: a number that no number of threads is."""
        return -1 - self.number

    def threads(self) -> int:
        """One: what a launch runs on is the GPU's own business."""
        return 1

    def problem(self, array: Array) -> str:
        """`Problem.device` of work on this array: capability and multiprocessors."""
        from lowbit.kernels.cuda import launch

        return launch.machine_of(array).device.name

    def put(self, array: Array) -> Array:
        """As `Host.put`: a copy, in the order of the current stream."""
        with self.current():
            there: Array = self.xp.asarray(array)
        return there

    def get(self, array: Array) -> Array:
        """As `Host.get`: a copy, after waiting for the current stream."""
        with self.current():
            here: Array = array.get()  # type: ignore[attr-defined]
        return here

    def exporting(self, array: Array) -> None:
        """CuPy has no read-only arrays."""

    def current(self) -> AbstractContextManager[Any]:
        """As `Host.current`."""
        cuda = self.xp.cuda
        if cuda.runtime.getDevice() == self.number:
            return _HERE
        switched: AbstractContextManager[Any] = cuda.Device(self.number)
        return switched

    def quantize(
        self,
        fmt: Format,
        x: Array,
        *,
        method: str,
        rounding: str,
        overflow: str,
        scale: Array | None,
        zero: Array | None,
    ) -> Packed | None:
        """As `Host.quantize`; waits until the device has looked at every number."""
        from lowbit.kernels.cuda import quantize as compiled

        if compiled.refuse(fmt, x, method=method, rounding=rounding, overflow=overflow):
            return None
        with self.current():
            return compiled.quantize(fmt, x, method=method, scale=scale, zero=zero)

    def quantize_later(self, fmt: Format, x: Array, scale: Array | None) -> Packed | None:
        """As `quantize` without waiting: what that refuses makes every value NaN.

        None where that is not said by a factor that all values share, or no kernel does it.
        """
        from lowbit.kernels.cuda import quantize as compiled

        if not (fmt.tensor_scale or isinstance(fmt.scale.element, str)) or compiled.refuse(fmt, x):
            return None
        with self.current():
            pending = compiled.enqueue(fmt, x, scale=scale)
            parts = pending.parts
            shared = parts.scales if parts.tensor_scale is None else parts.tensor_scale
            nan = self.xp.full((), np.nan, shared.dtype)
            self.xp.copyto(shared, nan, where=pending.flag[0] != 0)
        return parts

    def quantize_silu_mul(self, fmt: Format, gate: Array, up: Array) -> Packed | None:
        """As `Host.quantize_silu_mul`; waits until the device has looked at every number."""
        from lowbit.kernels.cuda import fused

        with self.current():
            gate, up = self._in_rows(gate), self._in_rows(up)
            if fused.refuse(fmt, gate, "silu_mul"):
                return None
            return fused.silu_mul_quantize(gate, up, fmt).settled()

    def quantize_rmsnorm(
        self,
        fmt: Format,
        x: Array,
        weight: Array,
        eps: float,
        residual: Array | None,
        updated: Array | None,
    ) -> Packed | None:
        """As `Host.quantize_rmsnorm`; waits until the device has looked at every number."""
        from lowbit.kernels.cuda import fused

        with self.current():
            x, other = self._in_rows(x), None if residual is None else self._in_rows(residual)
            if fused.refuse(fmt, x):
                return None
            narrow = np.float32 if weight.dtype == np.float64 else weight.dtype
            weight = self.xp.ascontiguousarray(weight, narrow)
            pending, _ = fused.rmsnorm_quantize(x, weight, eps, fmt, other, updated)
            return pending.settled()

    def _in_rows(self, x: Array) -> Array:
        """As fused kernels read it: an array, or a copy of it."""
        from lowbit.kernels.cuda import fused

        return x if fused.in_rows(x) else self.xp.ascontiguousarray(x)

    def dequantize_to(self, parts: Packed, out: Array) -> None:
        """As `Host.dequantize_to`; what kernels leave to the reference goes through the host."""
        from lowbit.kernels.cuda import dequantize as compiled

        with self.current():
            if compiled.refuse(out.dtype) is None:
                compiled.dequantize_to(parts, out)
                return
            values = np.empty(out.shape, out.dtype)
            reference.dequantize_to(changed(parts, self.get), values)
            out[...] = self.put(values)


Place = Host | Gpu
HOST = Host()


def host_problem() -> str:
    """`Problem.device` of work on the host: backend and instruction set of this machine."""
    from lowbit.kernels.cpu import isa

    return f"cpu:{isa.host().name}"


@dataclass(frozen=True)
class Limits:
    """What the fastest instructions of a device do in a second."""

    bandwidth: float
    float_operations: float
    bfloat_operations: float
    integer_operations: float
    float8_operations: float
    """float8 by float8."""
    float4_operations: float
    """float4 by float4."""
    word: str
    """How these are called in print: measured or estimated."""


def limits(problem: str, threads: int) -> Limits:
    """Those of a device as `Problem.device` spells it."""
    if problem.startswith("cuda"):
        from lowbit.kernels.cuda import costs, launch

        capability = launch.parse(problem).capability
        rates = costs.rates(capability)
        fast = rates.dense
        float8 = 2 * fast if capability >= 89 else fast
        float4 = 2 * float8 if capability >= 100 else float8
        return Limits(rates.bandwidth, fast / 12, fast, 2 * fast, float8, float4, "estimated")
    from lowbit.kernels.cpu import machine

    found = machine.estimate(problem, threads)
    return Limits(
        found.bandwidth,
        found.float_operations,
        found.bfloat_operations,
        found.integer_operations,
        found.bfloat_operations,
        found.bfloat_operations,
        machine.known(problem, threads).word,
    )


def of(array: Any) -> Place:
    """Where an array of NumPy or CuPy lies."""
    return HOST if isinstance(array, np.ndarray) else _gpu(array.device.id, sys.modules["cupy"])


gpu_array: Any = None
"""CuPy's class of arrays once one has been seen, for the shortest way to a bound product."""


@cache
def _gpu(number: int, cupy: Any) -> Gpu:
    global gpu_array
    gpu_array = cupy.ndarray
    return Gpu(number, cupy)


def is_gpu_array(x: Any) -> bool:
    """Whether it is CuPy's, which whoever passes one has imported."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, getattr(cupy, "ndarray", ()))


def gpu(number: int, reason: str) -> Gpu:
    """One GPU, with CuPy imported for it; `reason` begins the error where there is no CuPy."""
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        raise BufferError(
            f"{reason}, whose memory lowbit reads and writes through CuPy: {INSTALL} ({error})"
        ) from error
    return _gpu(number, cupy)


def named(device: Any) -> Place:
    """The place that the array API's `to_device` names: "cpu", "cuda" or "cuda:0"."""
    if device == "cpu":
        return HOST
    backend, _, number = str(device).partition(":")
    if backend != "cuda" or not (number.isdecimal() or str(device) == "cuda"):
        raise ValueError(f"to_device: want 'cpu', 'cuda' or 'cuda:0', got {device!r}")
    cupy = gpu(0, f"to_device: {device!r} is a GPU").xp
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise ValueError(
            f"to_device: CUDA finds no GPU for {device!r} ({error}); `lowbit doctor` says what "
            "this machine has"
        ) from error
    index = int(number) if number else int(runtime.getDevice())
    if index >= count:
        raise ValueError(f"to_device: {device!r} does not exist, CUDA finds {count} GPUs")
    return _gpu(index, cupy)


def stream_context(place: Gpu, stream: Any) -> AbstractContextManager[Any]:
    """Make a stream current: CuPy's own, another library's, or the number of one."""
    cuda = place.xp.cuda
    context: AbstractContextManager[Any]
    if hasattr(stream, "ptr") and hasattr(type(stream), "__enter__"):  # any of CuPy's kinds
        context = stream
        return context
    number = getattr(stream, "cuda_stream", stream)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(
            f"stream: want a stream of CuPy or torch, or its number, got {type(stream).__name__}"
        )
    context = wrapped_stream(cuda, number)
    return context


class _Numbered:
    """Another library's stream, as CUDA's stream protocol has it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.number


def wrapped_stream(cuda: Any, number: int) -> Any:
    """A stream that another library made, for CuPy to launch on."""
    if hasattr(cuda.Stream, "from_external"):
        return cuda.Stream.from_external(_Numbered(number))
    return cuda.ExternalStream(number)  # CuPy 13


def changed(parts: Packed, change: Callable[[Array], Array]) -> Packed:
    """Every part, the tensor scale too, changed alike."""
    zeros, biases, second = (
        None if p is None else change(p) for p in (parts.zeros, parts.biases, parts.tensor_scale)
    )
    codes, scales = change(parts.codes), change(parts.scales)
    return Packed(parts.format, parts.shape, codes, scales, zeros, biases, second)


def on(place: Place, array: Any, argument: str, other: str = "w") -> None:
    """Refuse an operand that lies elsewhere than another, the weight in most cases."""
    if place is HOST and type(array) is np.ndarray:
        return
    found = of(array)
    if found is not place:
        raise BufferError(
            f"{argument}: it is on {found.name}, {other} is on {place.name}; both have to be on "
            f"one device: {_remedy(argument, place)}"
        )


def _remedy(argument: str, place: Place) -> str:
    if place is HOST:
        return f"{argument}.get() copies it to the host"
    number = place.number if isinstance(place, Gpu) else 0
    return f"with cupy.cuda.Device({number}): {argument} = cupy.asarray({argument})"

"""What `lowbit doctor` looks at. Nothing here raises: a failing look is itself a finding."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lowbit

REQUIRED = (
    "numpy",
    "ml_dtypes",
    "numba",
    "llvmlite",
    "array-api-compat",
    "platformdirs",
    "safetensors",
    "rich",
    "typer",
)
FRAMEWORKS = ("torch", "jax")
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    item: str
    value: str
    remedy: str | None = None
    """What to do about it; None where all is well."""
    usable: bool = True
    """False where lowbit cannot work at all before that is done."""

    def __str__(self) -> str:
        line = f"{self.item:>16}  {self.value}"
        return f"{line}\n{'':>16}  -> {self.remedy}" if self.remedy else line

    def record(self) -> dict[str, Any]:
        """Return what --json prints."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything, in the order of the report."""
    started = time.perf_counter()
    findings = [finding for look in LOOKS for finding in _guarded(look)]
    return [*findings, Finding("took", f"{time.perf_counter() - started:.2f} s")]


def _guarded(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except Exception as error:  # a doctor that dies helps nobody
        name = look.__name__.strip("_")
        yield Finding(
            name, f"{type(error).__name__}: {error}", "please report this line", usable=False
        )


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    yield Finding("lowbit", lowbit.__version__)
    free = not getattr(sys, "_is_gil_enabled", lambda: True)()
    yield Finding(
        "python",
        f"{platform.python_version()}{' free-threaded' if free else ''}, "
        f"{platform.system()} {platform.machine()}",
    )


def _packages() -> Iterator[Finding]:
    for package in REQUIRED:
        version = _installed(package)
        if version is None:
            yield Finding(package, "missing", f"pip install {package}", usable=False)
        else:
            yield Finding(package, version)
    for package in FRAMEWORKS:
        yield Finding(package, _installed(package) or "not installed (optional)")


def _cpu() -> Iterator[Finding]:
    from lowbit.kernels.cpu import isa, machine

    names = ", ".join(each.name for each in isa.runnable())
    model = machine.processor()
    try:
        chosen = isa.host()
    except ValueError as error:
        yield Finding("cpu", f"{model}; runs {names}", str(error), usable=False)
        return
    remedy = None
    if chosen.name == "generic" and len(isa.runnable()) == 1:
        remedy = "no vector unit that lowbit knows: products are right, and slow"
    elif chosen != isa.runnable()[0]:
        remedy = f"LOWBIT_ISA chose it; {isa.runnable()[0].name} is faster"
    yield Finding("cpu", f"{model}; kernels for {chosen.name}, of {names}", remedy)


def _tuning() -> Iterator[Finding]:
    from lowbit.kernels.cpu import isa, machine, pool

    path, why = machine.place()
    if path is None:
        yield Finding("tuning", f"{why}: costs are estimated")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        machine.use(None)
        found = machine.known(f"cpu:{isa.host().name}", pool.get_num_threads())
    if caught:
        yield Finding("tuning", str(caught[0].message), "lowbit bench --tune")
    elif found.measured:
        yield Finding("tuning", f"costs are measured, in {path}")
    else:
        yield Finding("tuning", f"costs are estimated; `lowbit bench --tune` measures, in {path}")


def _threads() -> Iterator[Finding]:
    from lowbit.kernels.cpu import pool

    try:
        threads = pool.get_num_threads()
    except ValueError as error:
        yield Finding("threads", "not known", str(error), usable=False)
        return
    present = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    value = f"{threads}, with {allowed} of {present} processors allowed"
    granted = min(pool._quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), default=math.inf)
    if granted < allowed:
        value += f", and {granted:g} granted by the control group"
    best = max(1, math.ceil(min(allowed, granted)))
    remedy = None
    if threads > best:
        remedy = (
            f"threads beyond the processors only wait for each other: LOWBIT_NUM_THREADS={best}"
        )
    yield Finding("threads", value, remedy)
    if not pool.SUPPORTED:
        yield Finding("pool", pool.describe(), "products run on one thread here")


def _cache() -> Iterator[Finding]:
    from lowbit.kernels import objects

    folder, why = objects.directory()
    if folder is None:
        yield Finding("cache", why, "every process compiles its kernels again")
    elif not os.access(folder, os.W_OK):
        yield Finding(
            "cache", f"{folder} is read-only", "set LOWBIT_CACHE_DIR to a folder of yours"
        )
    else:
        files = [each for each in folder.iterdir() if each.is_file()]
        size = sum(each.stat().st_size for each in files)
        yield Finding("cache", f"{folder}, {len(files)} objects, {size / 1e6:.1f} MB")


def _product() -> Iterator[Finding]:
    """Multiply small integers, for which every kernel must be exact."""
    import numpy as np

    started = time.perf_counter()
    codes = (np.arange(32 * 64).reshape(32, 64) % 15 - 7).astype(np.float32)
    x = (np.arange(3 * 64).reshape(3, 64) % 5 - 2).astype(np.float32)
    w = lowbit.quantize(codes, "int4_g32")
    kernel = lowbit.explain(x, w.T).kernel
    try:
        right = bool((lowbit.matmul(x, w.T) == x @ codes.T).all())
    except Exception as error:
        yield Finding(
            "product",
            f"{kernel} failed: {type(error).__name__}: {error}",
            "LOWBIT_ISA=generic may work meanwhile; please report this output",
            usable=False,
        )
        return
    seconds = time.perf_counter() - started
    if right:
        yield Finding("product", f"int4_g32 through {kernel}: exact, first call {seconds:.2f} s")
    else:
        yield Finding(
            "product",
            f"int4_g32 through {kernel}: WRONG",
            "LOWBIT_ISA=generic may work meanwhile; please report this output",
            usable=False,
        )


def _gpu() -> Iterator[Finding]:
    driver = _cuda_driver()
    package = next((each for each in CUPY if _installed(each)), None)
    if driver is None:
        remedy = None
        if package is not None:
            remedy = f"{package} is here: install NVIDIA's driver, until nvidia-smi lists the GPU"
        yield Finding("gpu", "no NVIDIA driver; products run on the CPU", remedy)
        return
    cuda = f"{driver // 1000}.{driver % 1000 // 10}"
    extra = "cuda13" if driver >= 13000 else "cuda12"
    if package is None:
        yield Finding("gpu", f"driver for CUDA {cuda}, no cupy", f"pip install 'lowbit[{extra}]'")
    else:
        yield from _devices(f"driver for CUDA {cuda}, {package} {_installed(package)}", extra)
        yield _nvrtc()
        yield _cutlass()
        yield _cublas()


def _devices(value: str, extra: str) -> Iterator[Finding]:
    found = []
    try:
        cupy: Any = importlib.import_module("cupy")
        runtime = cupy.cuda.runtime
        for number in range(runtime.getDeviceCount()):
            found.append(runtime.getDeviceProperties(number))
    except Exception as error:
        yield Finding(
            "gpu",
            f"{value}: {type(error).__name__}: {error}",
            f"pip install --force-reinstall 'lowbit[{extra}]', and compare with nvidia-smi",
        )
        return
    yield Finding("gpu", value if found else f"{value}: no device")
    for number, each in enumerate(found):
        yield _device(number, each, runtime.driverGetVersion())


def _device(number: int, properties: dict[str, Any], driver: int) -> Finding:
    from lowbit.kernels.cuda import compile

    major, minor = properties["major"], properties["minor"]
    value = (
        f"{properties['name'].decode()}, compute capability {major}.{minor}, "
        f"{properties['multiProcessorCount']} multiprocessors, "
        f"{properties['totalGlobalMem'] / 2**30:.1f} GiB"
    )
    if major < 8:
        return Finding(f"gpu {number}", value, "kernels want compute capability 8.0 or more")
    kept = compile.packaged(10 * major + minor, driver)
    if kept:
        value += f"; machine code of {kept} kernels comes with lowbit"
    else:
        value += "; kernels are compiled on first use"
    return Finding(f"gpu {number}", value)


def _nvrtc() -> Finding:
    """Look for what compiles the kernels that do not come as machine code."""
    from lowbit.kernels.cuda import compile

    why = compile.missing()
    if why is not None:
        return Finding("nvrtc", "kernels of less common formats cannot be compiled", why)
    major, minor = compile.version()
    return Finding("nvrtc", f"{major}.{minor}, CUDA's headers in {compile.includes()[1]}")


def _cutlass() -> Finding:
    """Look for what kernels on CUTLASS are compiled with, where the package does not bring them."""
    from lowbit.kernels.cutlass import package

    found = package.headers()
    if found is None:
        return Finding("cutlass", f"only kernels that come with lowbit; {package.remedy()}")
    return Finding("cutlass", f"headers of CUTLASS {package.RELEASE} in {found}")


def _cublas() -> Finding:
    """Look for what computes the products that no kernel takes."""
    from lowbit.kernels.cuda import gpu

    try:
        gpu.cublas()
    except ImportError as error:
        return Finding("cublas", "not found; some products have no other way", str(error))
    return Finding("cublas", "found")


def _cuda_driver() -> int | None:
    """Return the newest CUDA that the driver serves, 1000 * major + 10 * minor."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value if status == 0 else None


LOOKS = (_python, _packages, _cpu, _threads, _cache, _tuning, _product, _gpu)

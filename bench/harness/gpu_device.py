"""The GPU that a result was measured on, and why there may be none."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from lowbit.kernels.cuda.launch import Device

PACKAGES = (
    *("lowbit", "numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "torch", "triton"),
    *("gemlite", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cublas"),
)
CLOCKS = {
    "sm_MHz": "clocks.sm",
    "most_sm_MHz": "clocks.max.sm",
    "memory_MHz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "slowed_by": "clocks_event_reasons.active",
}


def absence() -> str | None:
    """Why there is no GPU to measure, in words that say what would help; None where there is."""
    if not find_spec("cupy"):
        return "CuPy is not installed: pip install lowbit[cuda13], or lowbit[cuda12]"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no device ({error}): run on a machine with an NVIDIA GPU and its driver"
    return None if count else "the driver finds no GPU: run on a machine with an NVIDIA GPU"


def describe(cupy: Any, ask: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Card, driver, CUDA and versions: everything that a reader needs to judge a figure."""
    ask = ask or query
    runtime = cupy.cuda.runtime
    facts = runtime.getDeviceProperties(0)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "card": facts["name"].decode(),
        "capability": f"{facts['major']}.{facts['minor']}",
        "multiprocessors": facts["multiProcessorCount"],
        "l2_bytes": facts["l2CacheSize"],
        "memory_bytes": facts["totalGlobalMem"],
        "driver": ask("driver_version"),
        "cuda": {
            "driver": version_of(runtime.driverGetVersion()),
            "runtime": version_of(runtime.runtimeGetVersion()),
        },
        "versions": versions,
    }


def kind(facts: dict[str, Any]) -> Device:
    """What kernels are chosen for, of what `describe` gave."""
    return Device(round(10 * float(facts["capability"])), int(facts["multiprocessors"]))


def clocks(ask: Callable[[str], str] | None = None) -> dict[str, str]:
    """Clocks, heat and power at this moment, as nvidia-smi says them."""
    ask = ask or query
    return {name: ask(field) for name, field in CLOCKS.items()}


def query(field: str) -> str:
    """One field of nvidia-smi; "unknown" where it does not say."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    done = subprocess.run(
        [command, "--id=0", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def version_of(number: int) -> str:
    """13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def short(card: str) -> str:
    """A card's name for files: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
    words = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return words.removeprefix("nvidia-")

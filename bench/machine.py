"""What a result was measured on: processor, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import lowbit as lb
from lowbit.kernels.cpu import isa


def describe() -> dict[str, object]:
    """Everything that a reader needs to judge a figure."""
    versions = {}
    for package in ("lowbit", "numpy", "ml_dtypes", "llvmlite", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": lb.get_num_threads(),
        "isa": isa.host().name,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    """Name and family: cloud machines hide the exact model."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    names = ("model name", "cpu family", "model")
    return ", ".join(
        f"{n} {fields[n]}" if n != "model name" else fields[n] for n in names if n in fields
    )

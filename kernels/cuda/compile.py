"""Text to machine code by NVRTC, through CuPy's binding of it; no driver and no GPU is needed.

What has been compiled once is kept: in memory, in the package (see archive.py), in the user's
cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import threading
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lowbit.kernels import objects
from lowbit.kernels.cuda import archive, elf
from lowbit.kernels.cuda.launch import Source
from lowbit.kernels.cutlass import package

FOLDER = Path(__file__).parent
OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # lambdas and constexpr functions of the device
)
_OWN = ("--fmad=false",)  # a * b + c rounds twice, as the reference and the emulator round it
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(.+)"', re.MULTILINE)
_SPECIFIC = (90, 100, 103)  # their tensor cores are reached by code for just one of them

_lock = threading.Lock()
_memory: dict[tuple[Source, str], Cubin] = {}


class Cubin(NamedTuple):
    """Machine code of one kernel."""

    code: bytes
    name: str
    """Of the kernel, as the linker knows it."""


class CompileError(RuntimeError):
    """NVRTC refused a text, or is not there."""


def cubin(source: Source, capability: int, *, driver: int | None = None) -> Cubin:
    """Return machine code for a GPU, compiled only where it is nowhere kept.

    Parameters
    ----------
    source
        The kernel.
    capability
        Compute capability times ten.
    driver
        Newest CUDA that the driver serves, 1000 * major + 10 * minor: code of a newer toolkit does
        not run on it. None: any.
    """
    with _lock:
        for arch in (architecture_of(source, capability), *_runs_too(capability)):
            found = _memory.get((source, arch)) or _shipped(source, arch, driver)
            if found is not None:
                break
        else:
            arch = architecture_of(source, capability, supported())
            found = _memory.get((source, arch)) or _cached(source, arch)
        _memory[source, arch] = found
        return found


def architecture(capability: int, known: tuple[int, ...] | None = None) -> str:
    """Return NVRTC's name of what runs on a GPU; `known` are the capabilities that it knows."""
    if known is not None and capability not in known:
        older = [c for c in known if c // 10 == capability // 10 and c < capability]
        if not older:
            raise CompileError(
                f"NVRTC {_dotted(version())} compiles for compute capabilities "
                f"{', '.join(str(c / 10) for c in known)}, the GPU has {capability / 10}. "
                f"{remedy()} brings a newer one."
            )
        return f"sm_{max(older)}"
    return f"sm_{capability}{'a' if capability in _SPECIFIC else ''}"


def architecture_of(source: Source, capability: int, known: tuple[int, ...] | None = None) -> str:
    """Return NVRTC's name of what runs a kernel on a GPU: libraries use all that it has."""
    arch = architecture(capability, known)
    return f"{arch}a" if source.headers is not None and arch == "sm_120" else arch


def options_of(source: Source) -> tuple[str, ...]:
    """Return what NVRTC is told beside architecture and folders."""
    return *OPTIONS, *(_OWN if source.headers is None else package.OPTIONS)


@lru_cache(maxsize=4096)
def lacking(source: Source, capability: int) -> str | None:
    """Say why a kernel on a library cannot be had, and what would help; None if it can."""
    arch = architecture_of(source, capability)
    if package.headers() is not None or archive.exists(arch, key(source, arch)):
        return None
    return f"machine code of this one does not come with lowbit; {package.remedy()}"


def key(source: Source, arch: str) -> str:
    """Return what names the machine code of a kernel: a hash of all that decides it but NVRTC."""
    options = options_of(source)
    identity = (objects.SCHEMA, source.text, source.name, arch, options, included(source.text))
    return objects.digest(repr(identity).encode()).hex()


def included(text: str) -> tuple[tuple[str, str], ...]:
    """Return name and text of lowbit's headers that a text includes, directly or not."""
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for name in _INCLUDE.findall(waiting.pop()):
            content = None if name in found else _header(name)
            if content is not None:
                found[name] = content
                waiting.append(content)
    return tuple(sorted(found.items()))


@cache
def _header(name: str) -> str | None:
    paths = (FOLDER / name, package.FOLDER / name)
    return next((p.read_text(encoding="utf-8") for p in paths if p.exists()), None)


def nvrtc(source: Source, arch: str) -> Cubin:
    """Compile, whatever is kept."""
    return nvrtc_said(source, arch)[0]


def nvrtc_said(source: Source, arch: str) -> tuple[Cubin, str]:
    """Compile, and return what the compiler had to say as well."""
    binding = _binding()
    folders = includes()
    if source.headers is not None:
        found = package.headers()
        if found is None:
            raise CompileError(f"{source.name} for {arch} includes CUTLASS: {package.remedy()}")
        folders = (str(package.FOLDER), str(found), *folders)
    options = (
        f"--gpu-architecture={arch}",
        *options_of(source),
        *(f"-I{each}" for each in folders),
    )
    program = binding.createProgram(source.text, "kernel.cu", (), ())
    try:
        binding.addNameExpression(program, source.name)
        try:
            binding.compileProgram(program, options)
        except binding.NVRTCError as error:
            log = binding.getProgramLog(program)
            raise CompileError(f"{source.name} for {arch}: {error}\n{log}") from None
        # CuPy cuts the last byte off, the zero of a text: an ELF file wants its own back.
        code = elf.shortened(binding.getCUBIN(program) + b"\0")
        made = Cubin(code, str(binding.getLoweredName(program, source.name)))
        return made, str(binding.getProgramLog(program))
    finally:
        binding.destroyProgram(program)


def version() -> tuple[int, int]:
    """Return NVRTC's version."""
    major, minor = _binding().getVersion()
    return int(major), int(minor)


def supported() -> tuple[int, ...]:
    """Return the compute capabilities that NVRTC compiles for."""
    return tuple(map(int, _binding().getSupportedArchs()))


def includes() -> tuple[str, ...]:
    """Return the folders of headers: lowbit's, then CUDA's."""
    for folders in _places(version()[0]):
        if any((folder / "cuda_fp16.h").exists() for folder in folders):
            return str(FOLDER), *(str(folder) for folder in folders if folder.exists())
    raise CompileError(
        f"CUDA's headers (cuda_fp16.h) are not found. {remedy()} brings them, or set CUDA_PATH to "
        "the folder of a CUDA toolkit."
    )


def missing() -> str | None:
    """Say what is not there to compile with, and what installs it; None if nothing is missing."""
    try:
        includes()
    except CompileError as error:
        return str(error)
    return None


def remedy() -> str:
    """Return the command that installs what is missing."""
    from importlib.metadata import distributions

    names = {each.metadata["Name"] for each in distributions()}
    return f'pip install "lowbit[{"cuda12" if "cupy-cuda12x" in names else "cuda13"}]"'


def _places(major: int) -> list[list[Path]]:
    """Folders of headers, the likeliest first: pip's packages of NVRTC's own major version."""
    if major >= 13:
        names: tuple[str, ...] = (f"cu{major}/include", f"cu{major}/include/cccl")
    else:
        names = tuple(f"cuda_{each}/include" for each in ("runtime", "cccl", "nvcc"))
    places = [[root / name for name in names] for root in wheels()]
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            folder = Path(os.environ[variable]) / "include"
            places.append([folder, folder / "cccl"])
    return places


def wheels() -> list[Path]:
    """Folders of NVIDIA's packages."""
    spec = importlib.util.find_spec("nvidia")
    return [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]


def _binding() -> Any:
    try:
        from cupy_backends.cuda.libs import nvrtc as binding

        binding.getVersion()
    except ImportError as error:
        raise CompileError(f"CuPy is not installed ({error}): {remedy()}") from None
    except RuntimeError as error:
        raise CompileError(f"NVRTC is not found ({error}): {remedy()}") from None
    return binding


def _dotted(found: tuple[int, int]) -> str:
    return ".".join(map(str, found))


def _runs_too(capability: int) -> tuple[str, ...]:
    """Architectures of the package whose code a GPU runs beside its own."""
    return ("sm_80",) if capability == 86 else ()


def packaged(capability: int, driver: int | None = None) -> int:
    """Return how many kernels the package has machine code of, for a GPU and its driver."""
    found = [_usable(arch, driver) for arch in (architecture(capability), *_runs_too(capability))]
    return sum(len(made.cubins) for made in found if made is not None)


def _usable(arch: str, driver: int | None, alone: str | None = None) -> archive.Archive | None:
    made = archive.load(arch, alone)
    old = made is not None and driver is not None and driver // 1000 < made.nvrtc[0]
    return None if old else made


def _shipped(source: Source, arch: str, driver: int | None) -> Cubin | None:
    name = key(source, arch)
    made = _usable(arch, driver, None if source.headers is None else name)
    found = None if made is None else made.cubins.get(name)
    return None if found is None else Cubin(*found)


def _cached(source: Source, arch: str) -> Cubin:
    entry = f"{key(source, arch)}-nvrtc{_dotted(version())}.cubin"
    kept = objects.read(entry)
    if kept is not None:
        head, code = kept.split(b"\n", 1)
        return Cubin(code, json.loads(head))
    print(f"lowbit: compiling {source.name} for {arch} ...", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        found = nvrtc(source, arch)
    except BaseException:
        print(" failed", file=sys.stderr)
        raise
    print(f" {time.perf_counter() - started:.1f} s", file=sys.stderr)
    objects.write(entry, json.dumps(found.name).encode() + b"\n" + found.code)
    return found

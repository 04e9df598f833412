"""Compiles a kernel's own text for the host: g++, CUDA's headers, and the C++ of this folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lowbit.kernels import cuda

HERE = Path(__file__).parent
KERNELS = Path(cuda.__file__).parent
CACHE = Path(os.environ.get("LOWBIT_EMULATOR_CACHE", HERE.parents[1] / "build" / "emulator"))
COMPILER = "g++"
# Compiling takes longer than running, so -O1. No contraction: an fma is one where the kernel says
# fma. Variables start as a pattern, not as what the stack happens to hold. A symbol of one kernel
# must not be taken for that of another.
FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -fno-gnu-unique -fno-strict-aliasing -ffp-contract=off "
    "-ftrivial-auto-var-init=pattern -Wall -Wno-unknown-pragmas -Wno-class-memaccess "
    "-Wno-unused-function -Wno-parentheses -DLOWBIT_EMU"
).split()
# What C++ leaves undefined ends the launch, see undefined.cpp: a GPU refuses some of it (misaligned
# accesses) and hides the rest (indices outside of an array, shifts too far, sums beyond int).
UNDEFINED = [
    "-fsanitize=alignment,bounds,shift-exponent,signed-integer-overflow,return",
    "-fno-sanitize-recover=all",
]
# ThreadSanitizer watches kernels, not the scheduler: that one only names its fibers.
SANITIZERS: dict[str, tuple[list[str], list[str]]] = {  # for all files, for kernels only
    "": ([], UNDEFINED),
    "thread": (["-DEMU_TSAN"], ["-fsanitize=thread"]),
    "ucontext": (["-DEMU_UCONTEXT"], UNDEFINED),  # stacks as processors other than x86-64 have them
}


class EmulatorError(RuntimeError):
    """A launch that a GPU would refuse, or that does what no kernel may."""


@functools.cache
def headers() -> Path | None:
    """Return the folder of cuda_fp16.h: of CUDA_HOME, else of NVIDIA's packages."""
    places = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    spec = importlib.util.find_spec("nvidia")
    if spec is not None:
        places += [Path(p) / "cu13/include" for p in spec.submodule_search_locations or ()]
    return next((p for p in places if (p / "cuda_fp16.h").exists()), None)


class RaceError(EmulatorError):
    """ThreadSanitizer's: accesses of a launch that nothing orders."""


class CompileError(EmulatorError):
    """A text that is no kernel."""


def missing() -> str | None:
    """Say what the emulator lacks here, or None."""
    if sys.platform != "linux":
        return f"the emulator maps memory as Linux does, this is {sys.platform}"
    if shutil.which(COMPILER) is None:
        return f"the emulator compiles kernels with {COMPILER}, which is not installed"
    if headers() is None:
        return (
            "the emulator wants CUDA's headers: install nvidia-cuda-runtime, nvidia-cuda-crt and "
            "nvidia-cuda-cccl, or set CUDA_HOME"
        )
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(" ".join(command) + "\n" + done.stderr[:6000])


@functools.cache
def _version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout


def _included(text: str, seen: set[str]) -> list[str]:
    """What the text includes by quoted name, and what that includes: texts."""
    found = []
    for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE):
        places = [folder / name for folder in (HERE, KERNELS) if (folder / name).exists()]
        if name not in seen and places:
            seen.add(name)
            content = places[0].read_text()
            found += [content, *_included(content, seen)]
    return found


def _key(text: str, sanitize: str) -> list[str]:
    """All that decides what the compiler makes of a text."""
    return [_version(), str(headers()), *FLAGS, sanitize, text, *_included(text, set())]


def _cached(name: str, suffix: str, key: list[str], make: list[list[str]]) -> Path:
    """Return the file that `make` builds; in its commands OUT is a file, DIR a folder."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]
    result = CACHE / f"{name}-{digest}{suffix}"
    if not result.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Another process may build the same: each in a folder of its own, the last name wins.
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / "made"
            for command in make:
                _run([c.replace("OUT", str(made)).replace("DIR", folder) for c in command])
            made.replace(result)
    return result


def _flags(sanitize: str, *, kernel: bool) -> list[str]:
    for_all, for_kernels = SANITIZERS[sanitize]
    include = [f"-I{HERE}", f"-I{KERNELS}", "-isystem", str(headers())]
    return [COMPILER, *FLAGS, *for_all, *(for_kernels if kernel else []), *include]


@functools.cache
def _scheduler(sanitize: str) -> list[str]:
    """Compile the files of this folder."""
    objects = []
    for file in sorted(HERE.glob("*.cpp")):
        command = [*_flags(sanitize, kernel=False), "-c", str(file), "-o", "OUT"]
        objects.append(str(_cached(file.stem, ".o", _key(file.read_text(), sanitize), [command])))
    return objects


@functools.cache
def _precompiled(sanitize: str) -> Path:
    """Compile what every kernel includes: two thirds of a small kernel's time."""
    text = '#include "emulator.h"\n'
    flags = _flags(sanitize, kernel=True)
    command = [*flags, "-x", "c++-header", str(HERE / "emulator.h"), "-o", "OUT"]
    made = _cached("emulator", ".h.gch", _key(text, sanitize), [command])
    return made.with_suffix("")


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def build(text: str, name: str, sanitize: str) -> ctypes.CDLL:
    """Compile and load the kernel that the name expression `name` denotes in `text`."""
    reason = missing()
    if reason is not None:
        raise EmulatorError(reason)
    text += (
        f'\nextern "C" const char* emu_launch(const emu::Launch* launch, void** arguments)'
        f" {{ return emu::launch(&{name}, *launch, arguments); }}\n"
        f'extern "C" const char* emu_signature() {{ return emu::signature(&{name}); }}\n'
    )
    # The text stays, for reports of sanitizers and debuggers.
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / f"kernel-{digest}.cu"
    if not source.exists():
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
            file.write(text)
        Path(file.name).replace(source)
    flags, objects = _flags(sanitize, kernel=True), _scheduler(sanitize)
    ahead = ["-Winvalid-pch", "-include", str(_precompiled(sanitize))]
    compile_ = [*flags, *ahead, "-x", "c++", "-c", str(source), "-o", "DIR/kernel.o"]
    runtime = ["-fsanitize=thread"] if sanitize == "thread" else []
    link = [COMPILER, "-shared", *runtime, "DIR/kernel.o", *objects, "-o", "OUT"]
    key = [*_key(text, sanitize), *objects]
    return _load(_cached("kernel", ".so", key, [compile_, link]))

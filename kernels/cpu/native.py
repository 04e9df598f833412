"""Text of LLVM IR to callable addresses, through llvmlite.binding alone, with an object cache.

Only llvmlite.binding is imported, on first use (about 50 ms). numba never is.

What LLVM needs, found the hard way:

- ORC with JITLink, not MCJIT: an unresolved symbol is an exception here and abort() there, and
  calls into libc get stubs, so objects are small-model position-independent code everywhere.
- An intrinsic that the record lacks ("Cannot select") aborts the process during compilation.
  Only generators write IR, and they take what they may use from the record.
- Nothing loaded is ever unloaded: pool workers sleep inside loaded code until the process ends.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import threading
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.kernels.cpu.isa import Isa, runnable

if TYPE_CHECKING:
    from collections.abc import Mapping

_SCHEMA = 2
_MAGIC = b"lowbit object %d\n" % _SCHEMA
_DEFINED = re.compile(r"^\s*define\b(?![^@]*\b(?:internal|private)\b)[^@]*@([\w.$]+)\(", re.M)

# Held over a fork too: a child must not inherit LLVM half way through a compilation.
_lock = threading.RLock()
_names = itertools.count()
_loaded: dict[tuple[str, Isa], Module] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


class Module:
    """Loaded machine code; its functions stay callable until the process ends."""

    def __init__(self, addresses: Mapping[str, int]) -> None:
        self._addresses = dict(addresses)

    def address(self, symbol: str) -> int:
        """Return the entry point of an external function that the text defines."""
        try:
            return self._addresses[symbol]
        except KeyError:
            known = ", ".join(sorted(self._addresses))
            raise KeyError(f"no function {symbol!r} in this module; it defines {known}") from None


def load(ir: str, isa: Isa) -> Module:
    """Return the module of this text, compiled, or taken from memory or from the cache."""
    with _lock:
        module = _loaded.get((ir, isa))
        if module is None:
            if isa not in runnable():
                legal = ", ".join(each.name for each in runnable())
                raise ValueError(f"isa: {isa.name} does not run on this machine; {legal} do.")
            module = Module(_link(_object(ir, isa), _DEFINED.findall(ir)))
            _loaded[ir, isa] = module
        return module


def assembly(ir: str, isa: Isa) -> str:
    """Return the assembler text that `load` would make; the record may be a foreign one."""
    with _lock:
        machine, module = _parsed(ir, isa)
        return str(machine.emit_assembly(module))


def object_code(ir: str, isa: Isa) -> bytes:
    """Return the object file that `load` would link; the record may be a foreign one."""
    with _lock:
        machine, module = _parsed(ir, isa)
        return bytes(machine.emit_object(module))


def cache_directory() -> tuple[Path | None, str]:
    """Return the folder of the object cache, or None and why kernels stay in memory only."""
    given = os.environ.get("LOWBIT_CACHE_DIR")
    if given:
        folder = Path(given).absolute()
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("lowbit", appauthor=False))
        if not folder.is_absolute():
            return None, "this user has no home folder. Set LOWBIT_CACHE_DIR."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return None, f"{folder} cannot be made: {error.strerror}"
    why = _distrust(status)
    if why:
        why = f"{folder} is {why}, and kernels are executed from it. Set LOWBIT_CACHE_DIR."
        warnings.warn(f"object cache not used: {why}", RuntimeWarning, stacklevel=2)
        return None, why
    return folder, ""


def _distrust(status: os.stat_result) -> str:
    """Say why somebody else could have written what stands there; empty: only we could."""
    if not hasattr(os, "geteuid"):
        return ""  # Windows: the user's own profile folder, guarded by its access list.
    if status.st_uid != os.geteuid():
        return f"owned by user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"writable by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


@cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


@cache
def _jit() -> Any:
    return _llvm().create_lljit_compiler(use_jit_link=True)


@cache
def _foreign() -> None:
    _llvm().initialize_all_targets()
    _llvm().initialize_all_asmprinters()


def _parsed(ir: str, isa: Isa) -> tuple[Any, Any]:
    llvm = _llvm()
    triple = isa.triple or llvm.get_process_triple()
    if isa not in runnable():
        _foreign()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=isa.cpu, features=isa.features, opt=3, reloc="pic", codemodel="small"
    )
    module = llvm.parse_assembly(ir)
    module.triple = triple
    module.data_layout = str(machine.target_data)
    # No middle-end: the texts are scheduled by hand, and its passes took two thirds of the time.
    module.verify()
    return machine, module


def _link(code: bytes, symbols: list[str]) -> dict[str, int]:
    llvm = _llvm()
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for symbol in symbols:
        builder.export_symbol(symbol)
    tracker = builder.link(_jit(), f"lowbit.{next(_names)}")
    tracker.detach()
    return {symbol: tracker[symbol] for symbol in symbols}


def _object(ir: str, isa: Isa) -> bytes:
    key = _key(ir, isa)
    folder, _ = cache_directory()
    if folder is not None:
        code = _read(folder / key, key)
        if code is not None:
            return code
    code = object_code(ir, isa)
    if folder is not None:
        _write(folder / key, key, code)
    return code


def _key(ir: str, isa: Isa) -> str:
    import llvmlite

    llvm = _llvm()
    identity = (
        _SCHEMA,
        llvmlite.__version__,
        llvm.llvm_version_info,
        llvm.get_process_triple(),
        isa,
        ir,
    )
    return _digest(repr(identity).encode()).hex()


def _digest(data: bytes) -> bytes:
    import hashlib  # here, not at the top: the pool is part of `import lowbit`

    return hashlib.sha256(data).digest()


def _seal(key: str, code: bytes) -> bytes:
    return _MAGIC + _digest(key.encode() + code)


def _read(path: Path, key: str) -> bytes | None:
    try:
        with path.open("rb") as entry:
            if _distrust(os.fstat(entry.fileno())):
                return None
            data = entry.read()
    except OSError:
        return None
    size = len(_MAGIC) + 32
    code = data[size:]
    return code if data[:size] == _seal(key, code) else None


def _write(path: Path, key: str, code: bytes) -> None:
    import tempfile

    # Another process may write the same entry now: each has its own file, the last one stays.
    with suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as entry:
                entry.write(_seal(key, code) + code)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

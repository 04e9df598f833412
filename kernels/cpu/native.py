"""Text of LLVM IR to callable addresses, through llvmlite.binding alone, cached.

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
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

from lowbit.kernels import objects
from lowbit.kernels.cpu.isa import Isa, runnable

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    code = objects.read(key)
    if code is None:
        code = object_code(ir, isa)
        objects.write(key, code)
    return code


def _key(ir: str, isa: Isa) -> str:
    import llvmlite

    llvm = _llvm()
    identity = (
        objects.SCHEMA,
        llvmlite.__version__,
        llvm.llvm_version_info,
        llvm.get_process_triple(),
        isa,
        ir,
    )
    return objects.digest(repr(identity).encode()).hex()

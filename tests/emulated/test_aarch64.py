"""Generated aarch64 code runs under an emulator: every kernel passes what it has to pass elsewhere.

Products go the way of all products but for the last step: a module is linked with `driver.s` into
a small program, and a job of the pool is a run of that program on a file that is its memory.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from absence import absent

import lowbit as lb
from lowbit import dispatch, kernels
from lowbit.formats import declared, reference
from lowbit.kernels.cpu import isa as isas
from lowbit.kernels.cpu import native, pool, quantize
from lowbit.kernels.cpu.isa import RECORDS, Isa
from lowbit.kernels.declare import ACTIVATIONS
from lowbit.testing import conformance, random_qarray

Array = npt.NDArray[Any]
HERE = Path(__file__).parent
ASSEMBLER, LINKER, EMULATOR = "aarch64-linux-gnu-as", "aarch64-linux-gnu-ld", "qemu-aarch64"
PAGE = 4096
BASE, HEAD = (
    int(n, 0) for n in re.findall(r"(?:BASE|HEAD), (\w+)$", (HERE / "driver.s").read_text(), re.M)
)
# What the generic record becomes on such a machine.
PLAIN = replace(RECORDS[-1], name="generic.aarch64", triple="aarch64-unknown-linux-gnu")
ISAS = [*(isa for isa in RECORDS if isa.triple.startswith("aarch64")), PLAIN]
# The oldest processor that has what a record asks for, "max" has everything: an instruction from
# beyond the record is an illegal one.
PROCESSORS = {PLAIN.name: "cortex-a53", "neon": "neoverse-n1"}


@dataclass
class Placed:
    """Memory of arrays, and where it is in the emulated one."""

    root: weakref.ref[Array]
    host: int
    size: int
    guest: int


class Memory:
    """A file that is the memory of emulated jobs from BASE on, mostly holes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._placed: dict[int, Placed] = {}
        self._end = BASE + HEAD
        path.write_bytes(b"")

    def moved(self, array: Array, host: int) -> int:
        """The emulated address of a place in an array; all that it is a view of moves along."""
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        low, high = np.lib.array_utils.byte_bounds(root)
        placed = self._placed.get(low)
        if placed is None or placed.root() is not root:
            placed = Placed(weakref.ref(root), low, high - low, self._reserve(high - low))
            self._placed[low] = placed
        return host - low + placed.guest

    def run(self, program: Path, processor: str, tiles: int, block: bytes, scratch: int) -> None:
        """Let the program work on the arrays as they are; then they are as it left them."""
        self._placed = {low: each for low, each in self._placed.items() if each.root() is not None}
        arrays = list(self._placed.values())
        # Whole cache lines, as the pool has it.
        own = [(self._reserve(size), size) for size in (len(block), -(-scratch // 64) * 64)]
        pieces = [(guest, size) for guest, size in own if size]
        pieces += [(each.guest, each.size) for each in arrays if each.size]
        numbers = [tiles, own[0][0], own[1][0], len(pieces)]
        for address, size in pieces:
            start = address // PAGE * PAGE
            numbers += [start, address + size - start]
        assert 8 * len(numbers) <= HEAD, "too many arrays"
        with self.path.open("r+b") as memory:

            def write(address: int, content: bytes) -> None:
                memory.seek(address - BASE)
                memory.write(content)

            write(BASE, struct.pack(f"<{len(numbers)}q", *numbers))
            write(own[0][0], block)
            for each in arrays:
                write(each.guest, ctypes.string_at(each.host, each.size))
            memory.truncate(self._end - BASE)
            command = [EMULATOR, "-cpu", processor, str(program)]
            done = subprocess.run(command, stdin=memory, capture_output=True, check=False)
            assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr.decode()}"
            for each in arrays:
                memory.seek(each.guest - BASE)
                ctypes.memmove(each.host, memory.read(each.size), each.size)

    def _reserve(self, size: int) -> int:
        """The address of bytes that end where a page ends, with holes around."""
        self._end += PAGE + -(-size // PAGE) * PAGE
        return self._end - size


class Program(NamedTuple):
    """A function of a module, for the pool to call."""

    code: Path
    function: str
    isa: Isa


class Emulator:
    """Stands in for the loader and the pool: a module becomes a program, a job is a run of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        self.memory = Memory(folder / "memory")
        self.jobs = 0
        self.driver = folder / "driver.o"
        call(ASSEMBLER, "-o", self.driver, HERE / "driver.s")

    def load(self, ir: str, isa: Isa) -> native.Module:
        """The address of a function is the number of the program that will call it."""
        code = self.folder / f"code{len(self.programs)}.o"
        code.write_bytes(native.object_code(ir, isa))
        addresses = {}
        for name in native._DEFINED.findall(ir):
            addresses[name] = len(self.programs)
            self.programs.append(Program(code, name, isa))
        return native.Module(addresses)

    def run(
        self, entry: int, argument: int, tiles: int, scratch: int = 0, threads: int | None = None
    ) -> None:
        """One job; what it reads at `argument` holds addresses of the emulated memory."""
        program = self.programs[entry]
        executable = program.code.with_suffix(f".{program.function}")
        if not executable.exists():
            job = f"--defsym=job={program.function}"
            call(LINKER, "-static", job, "-o", executable, self.driver, program.code)
        with Path("/proc/self/mem").open("rb", buffering=0) as own:
            own.seek(argument)
            block = own.read(1024)  # more than there is; the size is the generator's own affair
        processor = PROCESSORS.get(program.isa.name, "max")
        self.memory.run(executable, processor, tiles, block, scratch)
        self.jobs += 1

    def _moving(self, given: Callable[..., int]) -> Callable[..., int]:
        """An address in the emulated memory for one of the kernels' own."""

        def address(array: Array | None, *more: Any) -> int:
            found = given(array, *more)
            return found if array is None else self.memory.moved(array, found)

        return address

    @contextmanager
    def machine(self, isa: Isa) -> Iterator[None]:
        """Products are computed for this instruction set; `jobs` counts anew."""
        self.jobs = 0
        self.memory = Memory(self.folder / "memory")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(isas, "RECORDS", (*RECORDS, PLAIN))
            patch.setattr(native, "load", self.load)
            patch.setattr(pool, "run", self.run)
            host = isas.host
            for name, module in list(sys.modules.items()):
                if name.startswith("lowbit.kernels."):
                    if getattr(module, "host", None) is host:
                        patch.setattr(module, "host", lambda: isa)
                    for helper in ("address", "_address"):
                        if hasattr(module, helper):
                            patch.setattr(module, helper, self._moving(getattr(module, helper)))
            dispatch.device.cache_clear()
            yield
        dispatch.device.cache_clear()


def call(*command: object) -> None:
    subprocess.run([str(each) for each in command], check=True)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    missing = [tool for tool in (ASSEMBLER, LINKER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        reason = f"aarch64 code is not run, there is no {' and no '.join(missing)}: `make emulator`"
        absent(reason)
    return Emulator(tmp_path_factory.mktemp("aarch64"))


COMPILED = [k.name for k in kernels.registered() if k.device == "cpu" and k.name != "reference"]
# One of each way to decode, of each kind of scale, of zero points and of biases.
SOME = (
    "int8_row", "uint8_row_asym", "int4_g40", "int4_4x32_asym", "uint4_g32_zf32", "int2_g16_asym",
    "int1_g32", "uint3_g32_asym", "int7_g32",
    "nf4_g64_bias_bf16", "float8_e4m3fn_16x24", "mxfp6", "nvfp4",
)  # fmt: skip
FORMATS = (*(name for name, named in declared().items() if not named.short), *SOME)
CASES = [(isa, w) for isa in ISAS for w in (FORMATS if isa.name == "neon" else SOME)]


@pytest.mark.parametrize(("isa", "w"), CASES, ids=[f"{isa.name}: {w}" for isa, w in CASES])
def test_products_are_exact_and_within_the_bound(isa: Isa, w: str, emulator: Emulator) -> None:
    with emulator.machine(isa):
        for kernel in COMPILED:
            for x in ("float32", "int8_row"):
                conformance.exact_products(kernel, w, x)
                assert conformance.bounded_products(kernel, w, x) <= 1
    assert emulator.jobs


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
@pytest.mark.parametrize("w", SOME)
def test_bits_are_those_of_this_machine(w: str, isa: Isa, emulator: Emulator) -> None:
    """fma and dot compute the same in the same order everywhere; prepared weights as well."""
    rng = np.random.default_rng(0)
    for kernel, x in (("matmul.cpu.fma", "float32"), ("matmul.cpu.dot", "int8_g32")):
        for m in (1, 22):
            left = conformance.dense_or_quantized(x, m, 200)
            residual = rng.standard_normal((m, 70)).astype(np.float32)
            wanted = product(kernel, left, w, residual)
            with emulator.machine(isa):
                got = product(kernel, left, w, residual)
            assert len(got) == len(wanted)
            for pair in zip(got, wanted, strict=True):
                conformance.same_bits(*pair)
    assert emulator.jobs


def product(kernel: str, x: Any, w_format: str, residual: Array) -> list[Array]:
    """With a weight as it is and a prepared one; what the kernel refuses is left out."""
    w, bias = random_qarray(w_format, 70, 200), residual[0]
    return [
        lb.matmul(x, each.T, kernel=kernel, alpha=1 / 3, bias=bias, residual=residual)
        for each in (w, w.prepare())
        if conformance.refusal(kernel, x, each) is None
    ]


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
def test_rows_longer_than_scratch_and_sums_beyond_int32(isa: Isa, emulator: Emulator) -> None:
    with emulator.machine(isa):
        conformance.long_rows("matmul.cpu.fma", "int3_g32")
        for w in ("int8_row", "int4_g128"):
            conformance.long_rows("matmul.cpu.dot", w, "int8_row")
            conformance.extreme_integers("matmul.cpu.dot", w)
            conformance.documented_order("matmul.cpu.dot", w)
        conformance.long_sums("matmul.cpu.dot", k=140_000)
    assert emulator.jobs


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
def test_activations(isa: Isa, activation: str, emulator: Emulator) -> None:
    with emulator.machine(isa):
        for dtype in ("float32", "float16", "bfloat16"):
            conformance.finished_products("matmul.cpu.fma", "int4_g32", activation, dtype)
    assert emulator.jobs


SEVENS = """
define void @tile(ptr %block, i64 %number, ptr %scratch) {
  %array = load ptr, ptr %block
  %place = getelementptr i32, ptr %array, i64 %number
  store i32 7, ptr %place
  ret void
}"""


@pytest.mark.parametrize("isa", ISAS, ids=[isa.name for isa in ISAS])
@pytest.mark.parametrize("name", SOME)
def test_quantized_numbers_are_those_of_the_reference(
    name: str, isa: Isa, emulator: Emulator
) -> None:
    x = np.random.default_rng(0).standard_normal((48, 200)).astype(np.float32)
    element = lb.format(name).element
    if lb.format(name).zero is None and 0 in (element.min, element.max):
        x = np.copysign(x, element.max - 0.5)  # numbers of one sign only
    for dtype in (np.float32, np.float16):
        wanted = reference.quantize(lb.format(name), x.astype(dtype))
        with emulator.machine(isa):
            got = quantize.quantize(lb.format(name), x.astype(dtype))
        assert got is not None
        for part in ("codes", "scales", "zeros", "biases", "tensor_scale"):
            pair = getattr(got, part), getattr(wanted, part)
            assert (pair[0] is None) == (pair[1] is None)
            if pair[0] is not None:
                conformance.same_bits(*pair)
    assert emulator.jobs


def test_a_step_outside_of_an_array_ends_the_program(emulator: Emulator) -> None:
    entry = emulator.load(SEVENS, PLAIN).address("tile")
    array = np.zeros(8, np.int32)
    host: int = array.__array_interface__["data"][0]
    with emulator.machine(PLAIN):
        moved = struct.pack("<q", emulator.memory.moved(array[2:], host + 8))
        block = np.frombuffer(moved, np.int64)
        argument: int = block.__array_interface__["data"][0]
        emulator.run(entry, argument, 6)
        assert array.tolist() == [0, 0, 7, 7, 7, 7, 7, 7]
        with pytest.raises(AssertionError, match="ended with"):
            emulator.run(entry, argument, 7)

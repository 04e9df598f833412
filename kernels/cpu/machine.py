"""What a CPU does in a second: nominal rates, or those that `lowbit bench --tune` measured.

A file of measured rates is read once, when the first price is asked. It holds numbers and names,
nothing of it is executed, and one that cannot be used costs a warning and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from lowbit.kernels.cpu import isa as isas

SCHEMA = 1
"""Of the file; files of another one are not read."""
_MARK = "lowbit tuning"
_LARGEST = 1 << 20  # bytes of a file that is read at all


@dataclass(frozen=True)
class Rates:
    """What prices are computed from: seconds of a call, bytes a second, and work a thread does."""

    call: float
    """Seconds of a call besides all work: of the product, of arranging x, of spreading scales."""
    read_one: float
    """Bytes a second that one thread takes from memory."""
    read_all: float
    """Bytes a second that all threads take together."""
    together: float
    """Part of its own rates below that a thread keeps where others work beside it."""
    arrange: float
    """Bytes of operands that x is brought into."""
    repack: float
    """Bytes of canonical rows that are brought into words."""
    widen: float
    """Codes of 3, 5, 6 or 7 bits in canonical rows that become bytes."""
    float_narrow: float
    """Codes of up to 4 bits that become float32."""
    float_integer: float
    """Integers of 5 to 8 bits that become float32."""
    float_table: float
    """Other codes of 5 to 8 bits that become float32."""
    bfloat_narrow: float
    """The same three for bfloat16."""
    bfloat_integer: float
    bfloat_table: float
    byte_narrow: float
    """Integers of up to 7 bits that become bytes."""
    fma: float
    """Multiplications of float32."""
    bf16: float
    """Multiplications of bfloat16 in vectors."""
    dot: float
    """Multiplications of bytes in vectors."""
    bf16_tiles: float
    """Multiplications of bfloat16 in tiles."""
    dot_tiles: float
    """Multiplications of bytes in tiles."""
    scale: float
    """Sums of a segment that are scaled and added up."""
    finish: float
    """Results that are finished and written."""


@dataclass(frozen=True)
class Tuning:
    """Rates that were measured, and where."""

    isa: str
    processor: str
    threads: int
    version: str
    """Of lowbit."""
    measured: str
    """When."""
    rates: Rates

    @property
    def key(self) -> tuple[str, str, int]:
        """What a file holds one of."""
        return self.isa, self.processor, self.threads


@dataclass(frozen=True)
class Limits:
    """What lowbit's loops reach on a machine, per second, where nothing else holds them up."""

    bandwidth: float
    """Bytes read from memory."""
    float_operations: float
    """float32 multiplications and additions."""
    bfloat_operations: float
    """bfloat16 multiplications and float32 additions."""
    integer_operations: float
    """8-bit multiplications and additions."""


@cache
def nominal(name: str) -> Rates:
    """What an instruction set is known for, at 3.5 GHz: for machines that were never measured.

    Of full vectors, Intel's servers, whose records have AMX, multiply two a cycle and Zen 4 one.
    bfloat16 products go at twice the rate of float32 ones on Zen 4, at half on Intel's. Loops reach
    nine tenths. Decoding is in vector instructions for each vector of codes, as counted in the
    loops of the AMX record on a Granite Rapids server.
    """
    isa = next((each for each in isas.RECORDS if each.name == name), isas.RECORDS[-1])
    lanes = 3.5e9 * isa.lanes  # of one vector instruction a cycle
    units = 2 if isa.amx or (isa.lanes < 16 and isa.needs) else 1
    reached = 0.9 * units * lanes
    products = {"vpdpbusd512": 4, "vpdpbusd256": 4, "sdot": 4, "smmla": 4, "pmaddubsw": 1.3}
    return Rates(
        call=6e-6,
        read_one=15e9,
        read_all=60e9,
        together=1.0,
        arrange=lanes / 5,
        repack=lanes / 3,
        widen=lanes / 6,
        float_narrow=lanes,
        float_integer=lanes / 1.75,
        float_table=lanes / 4,
        bfloat_narrow=lanes / 1.5,
        bfloat_integer=lanes / 2.5,
        bfloat_table=lanes / 2.75,
        byte_narrow=lanes,
        # Without the instruction, a fused multiply-add takes a score of others.
        fma=reached if isa.needs else reached / 20,
        bf16=0.9 * lanes * (1 if isa.amx else 2),
        dot=reached * products.get(isa.dot, 0.4),
        bf16_tiles=lanes * 11,
        dot_tiles=lanes * 24,
        scale=lanes / 3,
        finish=lanes / 12,
    )


@dataclass(frozen=True)
class Known:
    """What prices on a machine are computed from."""

    rates: Rates
    measured: bool

    @property
    def word(self) -> str:
        """How prices are called in print."""
        return "measured" if self.measured else "estimated"

    def read(self, threads: int) -> float:
        """Bytes a second: a thread's for each of a few, those of all where many wait in turn."""
        one, every = self.rates.read_one * threads, self.rates.read_all
        return float((one**-4 + every**-4) ** -0.25)


def known(device: str, threads: int) -> Known:
    """The measured rates of this machine for such a device, else the nominal ones.

    Of several the one that was measured with the number of threads nearest to this.
    """
    name = device.partition(":")[2]
    found = [each for each in tunings() if each.isa == name]
    if not found:
        return Known(nominal(name), measured=False)
    best = min(found, key=lambda each: (abs(math.log(each.threads / threads)), each.threads))
    return Known(best.rates, measured=True)


def estimate(device: str, threads: int) -> Limits:
    """What the fastest instructions of the device do."""
    found = known(device, threads)
    rates, isa = found.rates, device.partition(":")[2]
    record = next((each for each in isas.RECORDS if each.name == isa), isas.RECORDS[-1])
    bfloat = [rates.fma, *[rates.bf16] * record.bf16, *[rates.bf16_tiles] * record.amx]
    integer = [rates.dot, *[rates.dot_tiles] * record.amx]
    each = 2 * threads * (rates.together if threads > 1 else 1.0)
    return Limits(found.read(threads), each * rates.fma, each * max(bfloat), each * max(integer))


_loaded: tuple[Tuning, ...] | None = None


def tunings() -> tuple[Tuning, ...]:
    """Everything measured on this machine with this version of lowbit; read once."""
    global _loaded
    if _loaded is None:
        _loaded = _fitting()
    return _loaded


def use(found: tuple[Tuning, ...] | None) -> tuple[Tuning, ...] | None:
    """Take these for what was measured; None: read the file when it is needed.

    Choices that were made before stay. What held until now is given back.
    """
    global _loaded
    before, _loaded = _loaded, found
    return before


def _fitting() -> tuple[Tuning, ...]:
    path, _ = place()
    if path is None:
        return ()
    try:
        found = read(path)
    except FileNotFoundError:
        if os.environ.get("LOWBIT_TUNING"):
            _warn(path, "there is no such file; `lowbit bench --tune` writes it")
        return ()
    except (OSError, ValueError) as error:
        _warn(path, str(error))
        return ()
    here = processor(), version()
    fitting = tuple(each for each in found if (each.processor, each.version) == here)
    # A home folder may be shared by many machines, a file that was named is meant for this one.
    if not fitting and os.environ.get("LOWBIT_TUNING"):
        _warn(path, f"it has nothing of {here[0]} with lowbit {here[1]}")
    return fitting


def _warn(path: Path, why: str) -> None:
    warnings.warn(
        f"tuning not used, costs are estimated: {path}: {why}", RuntimeWarning, stacklevel=2
    )


def place() -> tuple[Path | None, str]:
    """Where the file is, or None and why there is none."""
    given = os.environ.get("LOWBIT_TUNING")
    if given == "off":
        return None, "LOWBIT_TUNING=off"
    if given:
        return Path(given).absolute(), ""
    import platformdirs

    folder = Path(platformdirs.user_config_dir("lowbit", appauthor=False))
    if not folder.is_absolute():
        return None, "this user has no home folder. Set LOWBIT_TUNING to a file."
    return folder / "tuning.json", ""


def read(path: Path) -> list[Tuning]:
    """Everything that a file holds, of any machine.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or is none of ours; the message says why.
    """
    with path.open("rb") as file:
        held = file.read(_LARGEST + 1)
    if len(held) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    try:
        told = json.loads(held)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(told, dict) or told.get(_MARK) != SCHEMA:
        raise ValueError(f"it is not a file of tunings (no {_MARK!r}: {SCHEMA})")
    entries = told.get("machines")
    if not isinstance(entries, list):
        raise ValueError("it has no list of machines")
    return [_tuning(entry) for entry in entries]


def text(found: list[Tuning]) -> str:
    """What `read` reads."""
    return json.dumps({_MARK: SCHEMA, "machines": [asdict(each) for each in found]}, indent=1)


def _tuning(entry: Any) -> Tuning:
    kinds = {"isa": str, "processor": str, "threads": int, "version": str, "measured": str}
    if not isinstance(entry, dict) or not isinstance(entry.get("rates"), dict):
        raise ValueError("a machine in it has no rates")
    for name, kind in kinds.items():
        if type(entry.get(name)) is not kind:
            raise ValueError(f"{name} of a machine is {entry.get(name)!r}")
    if entry["threads"] < 1:
        raise ValueError(f"threads of a machine is {entry['threads']}")
    rates, names = entry["rates"], {each.name for each in fields(Rates)}
    if set(rates) != names:
        raise ValueError(f"rates of a machine differ in {sorted(names ^ set(rates))}")
    for name, rate in rates.items():
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not (number and 1e-12 < rate < 1e18):
            raise ValueError(f"the rate {name} of a machine is {rate!r}")
    return Tuning(**{name: entry[name] for name in kinds}, rates=Rates(**rates))


def version() -> str:
    """Return the version of the package that this is a part of."""
    return str(getattr(sys.modules["lowbit"], "__version__"))  # noqa: B009  (no import upwards)


@cache
def processor() -> str:
    """Return the name of the processor's model."""
    parts: dict[str, str] = {}
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            parts.setdefault(name.strip(), value.strip())
    if parts.get("model name"):
        return parts["model name"]
    arm = [parts[name] for name in ("CPU implementer", "CPU part") if parts.get(name)]
    return " ".join(arm) or platform.processor() or platform.machine()

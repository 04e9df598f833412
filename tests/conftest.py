"""Hypothesis is the same in every run here; `make nightly` looks for what it has not seen."""

import os
import signal
from pathlib import Path

import pytest
from absence import absent
from emulator import Emulator, missing
from hypothesis import settings
from launchers import Launcher, no_gpu

from lowbit.kernels.cuda import compile

settings.register_profile("ci", derandomize=True, database=None, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("ci")

# Choices are tested by nominal rates, also on a machine that `lowbit bench --tune` has measured.
os.environ["LOWBIT_TUNING"] = "off"

# What tests compile stays out of the user's own cache, and is there for the next run of them.
os.environ["LOWBIT_CACHE_DIR"] = str(Path(__file__).resolve().parents[1] / "build" / "objects")

# A shell's background jobs ignore SIGINT and hand that down to every child, where Python then
# makes no handler: the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def emulator() -> Emulator:
    """What runs CUDA kernels here; see tests/emulator/emulator.py."""
    reason = missing()
    if reason is not None:
        absent(reason)
    return Emulator()


@pytest.fixture
def nvrtc() -> None:
    """For tests that compile for GPUs."""
    reason = compile.missing()
    if reason is not None:
        absent(reason)


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """The emulator, and with `-m gpu` a GPU: for tests of kernels that hold on both."""
    if request.param == "emulator":
        return Launcher(request.getfixturevalue("emulator"))
    reason = no_gpu()
    if reason is not None:
        pytest.skip(reason)
    from lowbit.kernels.cuda import gpu

    return Launcher(gpu.machine(0))

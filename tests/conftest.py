"""Hypothesis is the same in every run here; `make nightly` looks for what it has not seen."""

import os
import signal

import pytest
from emulator import Emulator, missing
from hypothesis import settings

settings.register_profile("ci", derandomize=True, database=None, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("ci")

# Choices are tested by nominal rates, also on a machine that `lowbit bench --tune` has measured.
os.environ["LOWBIT_TUNING"] = "off"

# A shell's background jobs ignore SIGINT and hand that down to every child, where Python then
# makes no handler: the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def emulator() -> Emulator:
    """What runs CUDA kernels here; see tests/emulator/emulator.py."""
    reason = missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return Emulator()

"""Machine code in the package: that of these sources, and enough of it that no compiler is needed.

`make cubins` writes it.
"""

from __future__ import annotations

import cubins
import numpy as np
import pytest
import usual
from recorder import Recorder

from lowbit.kernels.cuda import archive, compile


@pytest.mark.parametrize("arch", usual.DEVICES)
def test_machine_code_is_that_of_these_sources(arch):
    made = archive.load(arch)
    assert made is not None
    assert set(made.cubins) == cubins.keys(arch), "stale: run make cubins"
    for code, name in made.cubins.values():
        assert code[:4] == b"\x7fELF"
        assert name.encode() in code


def test_the_package_stays_small():
    sizes = [(archive.FOLDER / f"{arch}.xz").stat().st_size for arch in usual.DEVICES]
    assert sum(sizes) <= cubins.BUDGET


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_first_use_needs_neither_nvrtc_nor_headers_nor_a_cache(capability, monkeypatch, tmp_path):
    def refuse():
        raise AssertionError("NVRTC was asked")

    monkeypatch.setattr(compile, "_binding", refuse)
    monkeypatch.setattr(compile, "_memory", {})
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path / "cache"))
    device = usual.DEVICES["sm_80" if capability == 86 else compile.architecture(capability)]
    recorder = Recorder(device)
    usual.products(recorder, usual.SHIPPED[:1])
    assert recorder.sources
    for source in recorder.sources:
        code, name = compile.cubin(source, capability, driver=13000)
        assert np.frombuffer(code[18:20], np.uint16) == 190, "EM_CUDA"
        assert name
    assert not (tmp_path / "cache").exists()

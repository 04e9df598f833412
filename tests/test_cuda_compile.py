"""Text becomes machine code without a GPU, once; nothing stale and nothing foreign is taken."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from lowbit.kernels.cuda import archive, compile
from lowbit.kernels.cuda.compile import CompileError
from lowbit.kernels.cuda.launch import Source

TEXT = """
template <class T> __global__ void twice(T* x) { x[threadIdx.x] += x[threadIdx.x]; }
"""
TWICE = Source(TEXT, "twice<float>", 32)
pytestmark = pytest.mark.usefixtures("nvrtc")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, a process that has compiled nothing, a package without machine code."""
    place = tmp_path / "cache"
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(place))
    monkeypatch.setattr(compile, "_memory", {})
    monkeypatch.setattr(archive, "FOLDER", tmp_path / "cubins")
    archive.load.cache_clear()
    yield place
    archive.load.cache_clear()


def another_process(monkeypatch):
    monkeypatch.setattr(compile, "_memory", {})


def without_nvrtc(monkeypatch):
    def refuse():
        raise AssertionError("NVRTC was asked")

    monkeypatch.setattr(compile, "_binding", refuse)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_architecture_is_compiled_for(folder, capability, capsys):
    code, name = compile.cubin(TWICE, capability)
    assert code[:4] == b"\x7fELF"
    assert name.startswith("_Z")
    assert "twice" in name
    assert name.encode() in code
    arch = compile.architecture(capability)
    assert capsys.readouterr().err.startswith(f"lowbit: compiling twice<float> for {arch} ... ")
    # Offsets of ELF64: e_phoff, e_shoff, e_phnum, e_shnum. The file is whole, to its last byte.
    segments, sections, segment_count, section_count = (
        struct.unpack_from(kind, code, at)[0]
        for kind, at in (("<Q", 0x20), ("<Q", 0x28), ("<H", 0x38), ("<H", 0x3C))
    )
    assert len(code) == max(segments + 56 * segment_count, sections + 64 * section_count)


def test_what_is_compiled_is_kept(folder, monkeypatch, capsys):
    first = compile.cubin(TWICE, 90)
    assert compile.cubin(TWICE, 90) is first
    another_process(monkeypatch)
    assert compile.cubin(TWICE, 90) == first
    assert capsys.readouterr().err.count("compiling") == 1
    (entry,) = folder.iterdir()
    nvrtc = ".".join(map(str, compile.version()))
    assert entry.name == f"{compile.key(TWICE, 'sm_90a')}-nvrtc{nvrtc}.cubin"
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1])
    another_process(monkeypatch)
    assert compile.cubin(TWICE, 90) == first
    assert capsys.readouterr().err.count("compiling") == 1
    assert entry.read_bytes() == whole


def test_a_key_is_all_that_decides(monkeypatch):
    key = compile.key(TWICE, "sm_80")
    assert compile.key(Source(TEXT, "twice<float>", 64, 1024), "sm_80") == key, "launches are free"
    others = [
        compile.key(TWICE, "sm_90a"),
        compile.key(Source(TEXT, "twice<int>", 32), "sm_80"),
        compile.key(Source(TEXT + " ", "twice<float>", 32), "sm_80"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(compile, "OPTIONS", (*compile.OPTIONS, "-G"))
        others.append(compile.key(TWICE, "sm_80"))
    assert len({key, *others}) == 5


def test_a_changed_header_is_another_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "FOLDER", tmp_path)
    compile._header.cache_clear()
    (tmp_path / "one.cuh").write_text('#pragma once\n  #include "two.cuh"\n#include <three.h>\n')
    (tmp_path / "two.cuh").write_text('#include "one.cuh"\nint two;')
    source = Source('#include "one.cuh"\n#include "of_the_emulator.h"\n', "kernel", 32)
    assert [name for name, _ in compile.included(source.text)] == ["one.cuh", "two.cuh"]
    before = compile.key(source, "sm_80")
    (tmp_path / "two.cuh").write_text('#include "one.cuh"\nint three;')
    compile._header.cache_clear()
    assert compile.key(source, "sm_80") != before
    compile._header.cache_clear()


def test_code_of_the_package_needs_no_compiler(folder, monkeypatch):
    made = {compile.key(TWICE, "sm_80"): (b"code", "name")}
    archive.save("sm_80", archive.Archive((13, 0), made), archive.FOLDER)
    archive.load.cache_clear()
    without_nvrtc(monkeypatch)
    assert compile.cubin(TWICE, 80) == (b"code", "name")
    assert compile.cubin(TWICE, 86, driver=13020) == (b"code", "name"), "8.6 runs code of 8.0"
    assert not folder.exists()
    counted = [compile.packaged(80), compile.packaged(86, 13000), compile.packaged(80, 12090)]
    assert counted == [1, 1, 0]
    assert compile.packaged(90) == 0
    another_process(monkeypatch)
    with pytest.raises(AssertionError, match="NVRTC was asked"):
        compile.cubin(TWICE, 89)
    with pytest.raises(AssertionError, match="NVRTC was asked"):
        compile.cubin(TWICE, 80, driver=12090)


def test_an_archive_gives_back_what_it_was_given(tmp_path):
    cubins = {"b": (b"\n1", "one"), "a": (b"", "none"), "c": (b"22\n", "two")}
    size = archive.save("sm_80", archive.Archive((13, 0), cubins), tmp_path)
    first = (tmp_path / "sm_80.xz").read_bytes()
    assert len(first) == size
    archive.save("sm_80", archive.Archive((13, 0), dict(reversed(cubins.items()))), tmp_path)
    assert (tmp_path / "sm_80.xz").read_bytes() == first
    assert archive.unpack(first) == ((13, 0), cubins)


def test_errors_of_a_text_are_nvrtcs_own(folder, capsys):
    with pytest.raises(CompileError, match=r'kernel for sm_80: (.|\n)*"nonsense" is undefined'):
        compile.cubin(Source("__global__ void kernel() { nonsense; }", "kernel", 32), 80)
    assert capsys.readouterr().err == "lowbit: compiling kernel for sm_80 ... failed\n"
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("capability", "known", "arch"),
    [(90, None, "sm_90a"), (90, (80, 90), "sm_90a"), (121, (90, 120), "sm_120"),
     (103, (90, 100), "sm_100"), (86, (80, 86, 90), "sm_86"), (89, (80, 86), "sm_86")],
)  # fmt: skip
def test_architectures(capability, known, arch):
    assert compile.architecture(capability, known) == arch


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(CompileError, match=r"compute capabilities 8.0, 9.0, the GPU has 12.0"):
        compile.architecture(120, (80, 90))


def test_missing_parts_are_named_with_what_installs_them(folder, monkeypatch):
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(compile, "wheels", lambda: [])
        with pytest.raises(CompileError, match=r"cuda_fp16.h.*lowbit\[cuda13\].*CUDA_PATH"):
            compile.cubin(TWICE, 80)
        headers = Path(compile.includes.__globals__["FOLDER"])
        patch.setenv("CUDA_HOME", str(folder))
        (folder / "include").mkdir(parents=True)
        (folder / "include" / "cuda_fp16.h").touch()
        assert compile.includes() == (str(headers), str(folder / "include"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
        with pytest.raises(CompileError, match=r"CuPy is not installed.*lowbit\[cuda13\]"):
            compile.cubin(TWICE, 80)
    binding = compile._binding()
    with monkeypatch.context() as patch:

        def missing():
            raise RuntimeError("libnvrtc.so.13")

        patch.setattr(binding, "getVersion", missing)
        with pytest.raises(CompileError, match=r"NVRTC is not found \(libnvrtc.so.13\): pip inst"):
            compile.cubin(TWICE, 80)

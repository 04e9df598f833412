"""`lowbit doctor` and `lowbit explain`."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app, diagnosis
from lowbit.kernels.cpu import pool
from lowbit.kernels.cuda import archive, compile, gpu
from lowbit.kernels.cutlass import package

ROOT = Path(__file__).parent.parent


def call(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def diagnose():
    done = call("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == (0 if report["usable"] else 1)
    assert report["usable"] == all(each["usable"] for each in report["findings"])
    return {each["item"]: each for each in report["findings"]}, report["usable"]


def diagnose_with(**environment):
    """Run in a process of its own: what the variables choose is remembered for a process's life."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lowbit", "doctor", "--json"],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["usable"] else 1)
    return {each["item"]: each for each in report["findings"]}, report["usable"]


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lowbit", "--version"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{lowbit.__version__}\n"


def test_doctor_finds_this_machine_usable():
    findings, usable = diagnose()
    assert usable
    assert findings["lowbit"]["value"] == lowbit.__version__
    assert findings["numpy"]["value"] == np.__version__
    assert findings["threads"]["value"].startswith(f"{pool.get_num_threads()}, with ")
    assert ": exact, " in findings["product"]["value"]
    assert not [name for name in diagnosis.REQUIRED if findings[name]["remedy"]]


def test_doctor_prints_one_screen():
    done = call("doctor")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    assert f"          lowbit  {lowbit.__version__}" in lines


def test_doctor_asks_for_what_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [re.split("[<>=]", each)[0] for each in project["dependencies"]]
    assert list(diagnosis.REQUIRED) == required


def test_doctor_outlives_what_it_looks_at(monkeypatch):
    def _broken():
        raise RuntimeError("no such organ")
        yield

    monkeypatch.setattr(diagnosis, "LOOKS", (_broken, *diagnosis.LOOKS))
    findings, usable = diagnose()
    assert not usable
    assert findings["broken"]["value"] == "RuntimeError: no such organ"
    assert findings["product"]["usable"]


def test_doctor_names_a_missing_package(monkeypatch):
    monkeypatch.setattr(diagnosis, "_installed", lambda name: None if name == "llvmlite" else "1")
    findings, usable = diagnose()
    assert not usable
    assert findings["llvmlite"]["remedy"] == "pip install llvmlite"


def test_doctor_sees_a_wrong_product(monkeypatch):
    matmul = lowbit.matmul
    monkeypatch.setattr(lowbit, "matmul", lambda x, w: matmul(x, w) + np.float32(1))
    findings, usable = diagnose()
    assert not usable
    assert findings["product"]["value"].endswith("WRONG")


def test_doctor_sees_a_failing_product(monkeypatch):
    def matmul(x, w):
        raise OSError("illegal instruction")

    monkeypatch.setattr(lowbit, "matmul", matmul)
    findings, usable = diagnose()
    assert not usable
    assert "failed: OSError: illegal instruction" in findings["product"]["value"]


def test_doctor_names_the_legal_instruction_sets():
    findings, usable = diagnose_with(LOWBIT_ISA="mmx")
    assert not usable
    assert "LOWBIT_ISA: 'mmx'" in findings["cpu"]["remedy"]
    assert "generic" in findings["cpu"]["remedy"]


def test_doctor_accepts_a_slower_instruction_set():
    findings, usable = diagnose_with(LOWBIT_ISA="generic")
    assert usable
    assert "kernels for generic" in findings["cpu"]["value"]
    assert ": exact, " in findings["product"]["value"]


def test_doctor_refuses_a_thread_count_that_is_none():
    findings, usable = diagnose_with(LOWBIT_NUM_THREADS="many")
    assert not usable
    assert "LOWBIT_NUM_THREADS: 'many'" in findings["threads"]["remedy"]


def test_doctor_warns_of_more_threads_than_processors():
    findings, usable = diagnose_with(LOWBIT_NUM_THREADS="4096")
    assert usable
    assert re.search(r"LOWBIT_NUM_THREADS=\d+$", findings["threads"]["remedy"])


def test_doctor_names_the_control_group(monkeypatch):
    monkeypatch.setattr(pool, "_quotas", lambda membership, root: iter([3.0, 0.5]))
    monkeypatch.setattr(pool, "get_num_threads", lambda: 2)
    findings, usable = diagnose()
    assert usable
    assert "0.5 granted by the control group" in findings["threads"]["value"]
    assert findings["threads"]["remedy"].endswith("LOWBIT_NUM_THREADS=1")


def test_doctor_works_without_a_cache(tmp_path):
    (tmp_path / "file").touch()
    findings, usable = diagnose_with(LOWBIT_CACHE_DIR=str(tmp_path / "file" / "below"))
    assert usable
    assert "cannot be made" in findings["cache"]["value"]
    assert findings["cache"]["remedy"]


@pytest.mark.parametrize(("driver", "extra"), [(12040, "cuda12"), (13020, "cuda13")])
def test_doctor_knows_which_cupy_fits(monkeypatch, driver, extra):
    monkeypatch.setattr(diagnosis, "_cuda_driver", lambda: driver)
    monkeypatch.setattr(diagnosis, "CUPY", ())
    (finding,) = diagnosis._gpu()
    assert finding.remedy == f"pip install 'lowbit[{extra}]'"
    assert finding.usable


def test_doctor_wants_a_driver_only_where_somebody_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(diagnosis, "_cuda_driver", lambda: None)
    for installed, remedy in {
        (): None,
        ("lowbit",): "lowbit is here: install NVIDIA's driver, until nvidia-smi lists the GPU",
    }.items():
        monkeypatch.setattr(diagnosis, "CUPY", installed)
        (finding,) = diagnosis._gpu()
        assert finding.value == "no NVIDIA driver; products run on the CPU"
        assert finding.remedy == remedy


@pytest.fixture
def cards(monkeypatch):
    """What a CuPy sees that stands in for the real one, as lowbit does among the packages."""
    found: list[dict[str, Any]] = []
    runtime = SimpleNamespace(
        getDeviceCount=lambda: len(found),
        getDeviceProperties=lambda number: found[number],
        driverGetVersion=lambda: 13020,
    )
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(gpu, "cublas", lambda: None)
    monkeypatch.setattr(compile, "missing", lambda: "no NVRTC")
    monkeypatch.setattr(diagnosis, "CUPY", ("lowbit",))
    monkeypatch.setattr(diagnosis, "_cuda_driver", lambda: 13020)
    return found


def card(name, major, minor, processors, gib):
    return {
        "name": name,
        "major": major,
        "minor": minor,
        "multiProcessorCount": processors,
        "totalGlobalMem": gib * 2**30,
    }


def test_doctor_reads_the_devices(monkeypatch, cards):
    kept = archive.Archive((13, 0), {"a": (b"", ""), "b": (b"", "")})
    monkeypatch.setattr(archive, "load", {"sm_90a": kept, "sm_80": kept}.get)
    cards += [
        card(b"H200", 9, 0, 132, 139.5),
        card(b"L40S", 8, 9, 142, 44),
        card(b"T4", 7, 5, 40, 15),
        card(b"A10", 8, 6, 72, 22),
    ]
    found = {each.item: each for each in diagnosis._gpu()}
    assert found["gpu"].value == f"driver for CUDA 13.2, lowbit {lowbit.__version__}"
    assert found["gpu 0"].value == (
        "H200, compute capability 9.0, 132 multiprocessors, 139.5 GiB; machine code of 2 kernels "
        "comes with lowbit"
    )
    assert found["gpu 1"].value.endswith("8.9, 142 multiprocessors, 44.0 GiB; kernels are compiled "
        "on first use")  # fmt: skip
    assert found["gpu 2"].remedy == "kernels want compute capability 8.0 or more"
    assert found["gpu 3"].value.endswith("22.0 GiB; machine code of 2 kernels comes with lowbit")
    assert found["nvrtc"].remedy == "no NVRTC"
    assert found["cublas"].value == "found"
    assert all(each.usable for each in found.values()), "the CPU still works"


def test_doctor_says_that_there_is_no_device(cards):
    assert next(diagnosis._gpu()).value.endswith(f"lowbit {lowbit.__version__}: no device")


def test_doctor_looks_for_what_compiles_kernels(monkeypatch):
    monkeypatch.setattr(compile, "missing", lambda: None)
    monkeypatch.setattr(compile, "version", lambda: (13, 0))
    monkeypatch.setattr(compile, "includes", lambda: ("ours", "theirs", "more"))
    assert diagnosis._nvrtc().value == "13.0, CUDA's headers in theirs"
    monkeypatch.setattr(compile, "missing", lambda: 'pip install "lowbit[cuda13]"')
    assert diagnosis._nvrtc().remedy == 'pip install "lowbit[cuda13]"'
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    assert diagnosis._cublas().remedy == f"cuBLAS is not found: {compile.remedy()}"
    monkeypatch.setattr(package, "headers", lambda: None)
    assert 'pip install "lowbit[cutlass]"' in diagnosis._cutlass().value
    monkeypatch.setattr(package, "headers", lambda: Path("there"))
    assert diagnosis._cutlass().value == f"headers of CUTLASS {package.RELEASE} in there"
    libraries = SimpleNamespace(cublas=None)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libraries)
    assert diagnosis._cublas().remedy is None


def test_doctor_outlives_a_broken_cupy(monkeypatch, cards):
    monkeypatch.setitem(sys.modules, "cupy", None)  # import cupy raises
    finding = next(diagnosis._gpu())
    assert "ModuleNotFoundError" in finding.value
    assert finding.remedy
    assert finding.remedy.startswith("pip install --force-reinstall 'lowbit[cuda13]'")


@pytest.mark.parametrize("weight", ["int4_g32", "uint4_g64_asym", "nf4_g64", "mxfp8", "int3_row"])
@pytest.mark.parametrize("m", [0, 1, 40])
def test_explain_agrees_with_the_library(m, weight):
    done = call("explain", m, 24, 128, "--weight", weight, "--json")
    assert done.exit_code == 0, done.stderr
    w = lowbit.quantize(np.ones((24, 128), np.float32), weight)
    expected = lowbit.explain(np.ones((m, 128), np.float32), w.T)
    told = json.loads(done.stdout)
    assert told["kernel"] == expected.kernel
    assert told["bytes"] == expected.problem.bytes
    assert told["operations"] == 2 * m * 24 * 128
    assert told["problem"]["w"] == expected.problem.w.name
    assert [each["kernel"] for each in told["verdicts"]] == [
        each.kernel.name for each in expected.verdicts
    ]


def test_explain_prints_what_the_library_prints():
    done = call("explain", 8, 64, 256, "--weight", "int4_g128", "--x", "bfloat16", "--bias")
    w = lowbit.quantize(np.ones((64, 256), np.float32), "int4_g128")
    x = np.ones((8, 256), "bfloat16")
    expected = lowbit.explain(x, w.T, bias=np.ones(64, np.float32), out_dtype="bfloat16")
    assert done.stdout == f"{expected}\n"


def test_explain_takes_a_quantized_x():
    done = call("explain", 8, 64, 256, "--weight", "int8_row", "--x-format", "int8_row", "--json")
    assert json.loads(done.stdout)["problem"]["x"] == "int8_row"


def test_explain_reaches_machines_that_are_not_here():
    done = call("explain", 1, 64, 256, "--weight", "int4_g128", "--device", "cpu:neon", "--json")
    assert json.loads(done.stdout)["problem"]["device"] == "cpu:neon"


def test_explain_states_the_whole_problem():
    options = "--x float16 --out float32 --bias --activation relu --residual --batch-invariant"
    options += " --threads 7 --weight nf4_g64 --device cpu:avx2 --json"
    stated = json.loads(call("explain", 2, 3, 5, *options.split()).stdout)["problem"]
    expected = {
        **{"m": 2, "n": 3, "k": 5, "x": "float16", "w": "nf4_g64", "out": "float32"},
        **{"bias": True, "activation": "relu", "residual": "float16", "batch_invariant": True},
        **{"threads": 7, "device": "cpu:avx2"},
    }
    assert stated.items() >= expected.items()


def test_explain_obeys_a_kernel():
    done = call("explain", 1, 64, 256, "--weight", "int4_g128", "--kernel", "reference", "--json")
    assert json.loads(done.stdout)["kernel"] == "reference"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weight", "int4_x128"], "int4_x128"),
        (["--weight", "int4_row", "--x", "int8"], "--x: want one of float64"),
        (["--weight", "int4_row", "--out", "int8"], "--out: want one of float64"),
        (["--weight", "int4_row", "--x-format", "int99"], "int99"),
        (["--weight", "int4_row", "--activation", "swish"], "swish"),
        (["--weight", "int4_row", "--kernel", "fastest"], "kernel='fastest' is not known"),
    ],
)
def test_explain_refuses_by_name(arguments, said):
    done = call("explain", 1, 64, 256, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("lowbit explain: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_wants_a_weight():
    assert call("explain", 1, 64, 256).exit_code == 2

"""What is in the wheel and the source distribution. `make dist-check` installs and runs them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lowbit

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "lowbit", "kernels", "formats", "licenses")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
PLANTED = (
    "kernels/cpu/planted.cu",
    "kernels/cpu/planted.cuh",
    "formats/planted.json",
    "kernels/cuda/cubins/planted.xz",
)
DATA = (".py", ".cu", ".cuh", ".json", ".xz")


def checkout(folder: Path) -> Path:
    """Copy what a build reads, links as links."""
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Call the build backend as pip does, which hides what is installed (lowbit, editable)."""
    code = (
        f"import sys; sys.path.remove({str(ROOT / 'src')!r})\n"
        f"from setuptools import build_meta; build_meta.build_{kind}({str(folder / 'dist')!r})"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = checkout(tmp_path_factory.mktemp("wheel"))
    for name in PLANTED:
        (folder / name).touch()
    done = build("wheel", folder)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def sources() -> set[str]:
    """Every module and data file of the three folders, by its place in the installed package."""
    places = {"lowbit": "lowbit", "kernels": "lowbit/kernels", "formats": "lowbit/formats"}
    return {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*")  # does not follow links
        if path.suffix in DATA or path.name == "py.typed"
    }


def test_the_wheel_holds_every_source_and_nothing_else(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == sources() | {f"lowbit/{name}" for name in PLANTED}
    assert {"lowbit/py.typed", "lowbit/formats/declare.py", "lowbit/kernels/cpu/isa.py"} <= packed


def test_the_wheel_says_what_it_is(wheel):
    (folder,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == lowbit.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND BSD-3-Clause"
    for name in ("LICENSE", "licenses/CUTLASS.txt"):
        assert wheel.read(f"{folder}/licenses/{name}") == (ROOT / name).read_bytes()
    assert b"lowbit = lowbit.cli:main" in wheel.read(f"{folder}/entry_points.txt")
    assert b"Root-Is-Purelib: true" in wheel.read(f"{folder}/WHEEL")


def test_the_source_distribution_holds_files_for_links(tmp_path):
    folder = checkout(tmp_path)
    done = build("sdist", folder)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    assert {f"src/{name}" for name in sources()} <= set(members)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= set(members)
    assert not [name for name in members if name.startswith("tests/")]
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]


def test_a_checkout_without_links_does_not_build(tmp_path):
    """A ZIP or a file system without symlinks leaves a text file where src/lowbit was."""
    folder = checkout(tmp_path)
    (folder / "src" / "lowbit").unlink()
    (folder / "src" / "lowbit").write_text("../lowbit")
    done = build("wheel", folder)
    assert done.returncode != 0
    assert "lowbit" in done.stderr
    assert not list(folder.glob("dist/*.whl"))

"""formats <- kernels <- lowbit, and nothing heavy is loaded before it is used."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = frozenset(sys.stdlib_module_names)

# What `import lowbit` may load beyond the standard library; numpy itself may load more of numpy.
LIGHT = frozenset({"lowbit", "numpy", "ml_dtypes"})

# folder -> what its modules may import, at the top or inside a function
ALLOWED = {
    "formats": {"numpy", "ml_dtypes", "lowbit.formats"},
    "kernels": {"numpy", "ml_dtypes", "llvmlite", "numba", "platformdirs", "cupy", "cupy_backends"}
    | {"lowbit.formats", "lowbit.kernels"},
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose path starts with this checkout's src."""
    return subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_by(code: str) -> set[str]:
    """Top-level packages, the standard library left out, that running the code loads."""
    done = python(f"before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    names = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    return {name for name in names - STANDARD if not name.startswith("_")}


@pytest.mark.parametrize("module", ["lowbit", "lowbit.formats", "lowbit.kernels"])
def test_importing_is_light(module):
    loaded = loaded_by(f"import {module}")
    assert "lowbit" in loaded
    assert loaded <= LIGHT


def test_every_declaration_is_light():
    """Discovery imports every module of formats and kernels; compilers come with `build`."""
    loaded = loaded_by(
        "import pkgutil, importlib, lowbit.formats, lowbit.kernels\n"
        "for package in lowbit.formats, lowbit.kernels:\n"
        "    for each in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(each.name)"
    )
    assert loaded <= LIGHT


def test_a_product_loads_the_code_generator_and_no_more():
    """numba takes half a second, and a framework is never imported on its user's behalf."""
    loaded = loaded_by(
        "import numpy, lowbit\n"
        "x = numpy.ones((3, 64), numpy.float32)\n"
        "for each in 'int4_g32', 'nf4_g64', 'int8_row', 'mxfp4':\n"
        "    lowbit.matmul(x, lowbit.quantize(x, each).T)"
    )
    assert loaded <= LIGHT | {"llvmlite", "platformdirs"}


def test_light_is_a_promise_that_can_break():
    assert not loaded_by("import lowbit, platformdirs") <= LIGHT


@pytest.mark.parametrize("folder", ["formats", "kernels"])
def test_folder_under_another_name_is_refused(folder):
    """Run from the top of the checkout without -P, the folders would be found as themselves."""
    done = python(f"sys.path.insert(0, {str(ROOT)!r}); import {folder}")
    assert done.returncode != 0
    assert f"ImportError: this folder is lowbit.{folder}; run Python with -P" in done.stderr


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            assert node.module
            # `from lowbit import formats` means lowbit.formats
            found |= (
                {f"lowbit.{alias.name}" for alias in node.names}
                if node.module == "lowbit"
                else {node.module}
            )
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    "path", sources("formats") + sources("kernels"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_layer_imports_what_lies_below(path):
    allowed = ALLOWED[path.relative_to(ROOT).parts[0]]
    refused = {
        name
        for name in imports(path)
        if name.partition(".")[0] not in STANDARD
        and not any(name == each or name.startswith(each + ".") for each in allowed)
    }
    assert refused == set()


def test_backends_do_not_know_each_other():
    backends = [
        path.name for path in (ROOT / "kernels").iterdir() if (path / "__init__.py").exists()
    ]
    assert "cpu" in backends
    for one in backends:
        for path in sources(f"kernels/{one}"):
            # Kernels on CUTLASS are CUDA's, and CUDA's compiler knows where the headers are.
            own = {"cuda", "cutlass"} if one in ("cuda", "cutlass") else {one}
            others = {f"lowbit.kernels.{other}" for other in set(backends) - own}
            crossing = {i for i in imports(path) for o in others if i == o or i.startswith(o + ".")}
            assert crossing == set(), path


# What looks at machines themselves: one module for arrays, the measuring of rates, public names.
MEETS_BACKENDS = {"device.py", "tuning.py", "__init__.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "lowbit").glob("*.py")), ids=lambda p: p.name)
def test_arrays_meet_backends_in_one_module(path):
    backends = ("lowbit.kernels.cpu", "lowbit.kernels.cuda")
    met = {name for name in imports(path) if name.startswith(backends)}
    assert not met or path.name in MEETS_BACKENDS, met


LINKS = {"src/lowbit": "../lowbit", "lowbit/kernels": "../kernels", "lowbit/formats": "../formats"}


def test_the_three_links_are_relative_links():
    for link, target in LINKS.items():
        assert (ROOT / link).is_symlink(), f"{link} is not a symlink: check out with links"
        assert str((ROOT / link).readlink()) == target


def test_pyright_is_told_every_link():
    """It does not follow them, and calls a folder without files clean."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    told = {(ROOT / folder).resolve() for folder in settings["include"]}
    assert {(ROOT / link).resolve() for link in LINKS} <= told

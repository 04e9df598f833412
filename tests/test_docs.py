"""Documentation that runs: docstrings, pages, the README's table and example."""

import doctest
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import lowbit as lb

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.rst"))
# Doctests need one spelling of floats and arrays on every machine.
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules():
    for info in pkgutil.walk_packages(lb.__path__, "lowbit."):
        if not info.name.endswith("__main__"):
            yield info.name


@pytest.fixture(autouse=True)
def _plain_printing():
    with np.printoptions(legacy=False):
        yield


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=FLAGS).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_examples(page):
    assert doctest.testfile(str(page), module_relative=False, optionflags=FLAGS).failed == 0


def test_every_public_function_has_an_example():
    public = [getattr(lb, name) for name in lb.__all__ if name != "testing"]
    lacking = [
        o.__name__ for o in public if ">>>" not in (o.__doc__ or "") and o.__module__ != "lowbit"
    ]
    assert lacking == []


def test_pages_have_examples_at_all():
    found = sum(page.read_text().count(">>>") for page in PAGES)
    assert found > 30


@pytest.fixture
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_readme_is_fresh(generate):
    assert (ROOT / "README.md").read_text() == generate.readme(), "run: python -P docs/generate.py"


def test_a_stale_table_would_be_noticed(generate, monkeypatch):
    monkeypatch.setattr(generate, "rows", lambda: [["`int9`", "", "9", "255", "unheard of"]])
    assert (ROOT / "README.md").read_text() != generate.readme()


def test_the_readmes_python_runs(capsys):
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    exec(compile(code.replace("4096", "512"), "README.md", "exec"), {})
    assert "matmul.cpu" in capsys.readouterr().out

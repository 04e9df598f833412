"""Sphinx: `make docs`."""

import sys
from pathlib import Path

import lowbit

sys.path.insert(0, str(Path(__file__).parent))
import generate

project = "lowbit"
author = "The lowbit developers"
copyright = "2026, the lowbit developers"
release = version = lowbit.__version__

extensions = [
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = f"lowbit {release}"
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
autodoc_typehints = "none"  # numpydoc's Parameters sections say types in the field's words
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
nitpick_ignore_regex = [("py:.*", r"(optional|array_like|dtype-like|ndarray|sequence|callable).*")]

generate.write()

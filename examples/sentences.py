"""300 first sentences of docstrings of the Python standard library, frozen in a text file.

`python examples/sentences.py` writes the file anew from the running interpreter's library; the
committed one is read otherwise, so that figures do not depend on the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).parent / "data" / "sentences.txt"
COUNT = 300
WORDS = range(4, 61)  # shorter ones say nothing, longer ones are missing full stops
# Under the PSF licence alone: modules whose source has a notice of its own are left out.
MODULES = """
aifc argparse asyncio.base_events asyncio.events asyncio.streams asyncio.tasks base64 bdb calendar
cgitb cmd collections compileall configparser contextlib copy copyreg csv dataclasses datetime
dbm.dumb decimal difflib dis doctest email.policy enum filecmp fileinput fnmatch fractions ftplib
genericpath getopt getpass gettext glob gzip heapq hmac html.parser http.client http.cookiejar
http.server imaplib imp importlib.abc importlib.resources._common importlib.util inspect io json
json.decoder json.encoder keyword linecache locale lzma mailbox mimetypes modulefinder
multiprocessing.shared_memory netrc nntplib operator os pathlib pdb pickle pickletools pkgutil
plistlib poplib posixpath pprint pyclbr pydoc queue quopri random reprlib rlcompleter runpy sched
secrets selectors shelve shlex shutil smtplib socket ssl stat statistics string stringprep
symtable sysconfig tabnanny telnetlib tempfile threading timeit token tokenize traceback
tracemalloc types typing unittest.case unittest.loader unittest.mock unittest.runner
unittest.suite urllib.parse urllib.request uuid warnings wave weakref webbrowser wsgiref.handlers
wsgiref.simple_server wsgiref.util xdrlib xml.dom.minidom xml.dom.pulldom xml.sax.handler
xml.sax.xmlreader xmlrpc.server zipapp zipfile
""".split()
HEADER = """\
# First sentences of docstrings of the Python {version} standard library, one a line:
# module.name, a tab, the sentence. Selected by examples/sentences.py.
# Copyright (c) 2001, 2002, 2003, 2004, 2005, 2006, 2007, 2008, 2009, 2010, 2011, 2012, 2013,
# 2014, 2015, 2016, 2017, 2018, 2019, 2020, 2021, 2022, 2023 Python Software Foundation;
# All Rights Reserved
# Used under the PSF License Agreement, version 2: LICENSE-PYTHON.txt beside this file.
"""


def read(path: Path = FILE) -> list[str]:
    """The sentences of a file: one a line, after its tab if it has one; `#` begins a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [s.rpartition("\t")[2] for s in lines if s.strip() and not s.startswith("#")]


def first_sentence(docstring: str) -> str:
    """Up to the first full stop that ends a word, on one line."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    match = re.match(r".*?(?<![.\s])(?<!e\.g)(?<!i\.e)(?<!k\.a)(?<!etc)[.!?](?=\s|$)", paragraph)
    return match.group() if match else paragraph


def documented(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and of its public classes and functions."""
    pending: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = [(name, tree)]
    while pending:
        qualified, node = pending.pop()
        if text := ast.get_docstring(node):
            yield qualified, text
        if not isinstance(node, ast.FunctionDef):
            pending += [
                (f"{qualified}.{child.name}", child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name[0] != "_"
            ]


def collect(library: Path) -> list[tuple[str, str]]:
    """(qualified name, sentence), COUNT of them: the lowest SHA-256 of all that qualify."""
    found: dict[str, str] = {}
    for module in MODULES:
        path = library.joinpath(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not source.exists():  # removed from a later Python
            continue
        for name, text in documented(ast.parse(source.read_bytes()), module):
            sentence = first_sentence(text)
            prose = sentence.endswith(".") and sentence.isprintable() and ">>>" not in sentence
            if prose and len(sentence.split()) in WORDS:
                found.setdefault(sentence, name)
    chosen = sorted(found, key=lambda s: hashlib.sha256(s.encode()).digest())[:COUNT]
    return sorted((found[s], s) for s in chosen)


def main() -> None:
    found = collect(Path(sysconfig.get_path("stdlib")))
    lines = [f"{name}\t{sentence}\n" for name, sentence in found]
    header = HEADER.format(version=platform.python_version())
    FILE.write_text(header + "".join(lines), encoding="utf-8")
    print(f"{len(found)} sentences written to {FILE}")


if __name__ == "__main__":
    main()

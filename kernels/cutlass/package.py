"""Where CUTLASS's headers are, and how texts that include them are compiled."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

RELEASE = "4.2"
"""Of CUTLASS: the one whose structs the modules beside this one lay out."""
FOLDER = Path(__file__).parent
OPTIONS = (
    "-DNDEBUG",  # else instructions of the tensor cores wait for each other
    "-DCUTE_USE_PACKED_TUPLE=1",
    f"-DLOWBIT_CUTLASS={RELEASE}",
)


class Shipped(NamedTuple):
    """A kernel whose machine code comes with the package; `make cubins` asks each module here."""

    label: str
    """What it is for."""
    argument: int
    """Bytes of its argument, as this package lays it out."""
    cluster: tuple[int, int] = (1, 1)


@cache
def headers() -> Path | None:
    """The folder of the headers that the package nvidia-cutlass brings; None where it is not."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("nvidia-cutlass")
    except PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not installed.startswith(f"{RELEASE}."):
        return None
    return Path((spec.submodule_search_locations or [""])[0]) / "source" / "include"


def remedy() -> str:
    """What installs them."""
    return f'pip install "lowbit[cutlass]" brings the headers of CUTLASS {RELEASE}'

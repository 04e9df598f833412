"""What the bytes mean: every format, by name."""

if __name__ != "lowbit.formats":
    raise ImportError("this folder is lowbit.formats; run Python with -P, or from another folder")

from lowbit.formats.declare import WHOLE, Element, Format, Named, Scale
from lowbit.formats.names import declared, get

__all__ = ["WHOLE", "Element", "Format", "Named", "Scale", "declared", "get"]

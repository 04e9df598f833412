"""Names of formats: found by discovery, read from text, printed back.

    name = base [_block] [_asym | _zint8 | _zf32 | _zf16 | _zbf16 | _bias] [_scaletype] [_ts]

`base` is a declared name; each further word replaces one part of the base's format, in any order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lowbit.formats.declare import WHOLE, Element, Format, Named, Scale
from lowbit.formats.fp8 import E4M3
from lowbit.formats.mx import E8M0

SCALE_WORDS: dict[str, Element | str] = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "e8m0": E8M0,
    "e4m3": E4M3,
}
ZERO_WORDS = {"zf32": "float32", "zf16": "float16", "zbf16": "bfloat16"}

_user: dict[str, Named] = {}


@cache
def _declared() -> dict[str, Named]:
    package = __name__.rpartition(".")[0]
    found: dict[str, Named] = {}
    for module in sorted(info.name for info in iter_modules(import_module(package).__path__)):
        for named in getattr(import_module(f"{package}.{module}"), "FORMATS", ()):
            if named.name in found:
                raise ValueError(f"format {named.name!r} is declared twice, once in {module}.py")
            found[named.name] = named
    return found


def declared() -> dict[str, Named]:
    """Every declared name, user codebooks last."""
    return {**_declared(), **_user}


def register(named: Named) -> None:
    """Add a user's codebook; the same name with another table is an error."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", named.name):
        raise ValueError(
            f"name {named.name!r}: use lower-case words and digits joined by underscores"
        )
    known = declared().get(named.name)
    if known is not None:
        if known.format.element != named.format.element:
            raise ValueError(
                f"name {named.name!r} already stands for another table; choose another"
            )
        return
    # "int4_g32" as the name of a table would change what an existing name means.
    if taken := [word for word in named.name.split("_")[1:] if _is_word(word)]:
        raise ValueError(
            f"name {named.name!r}: {taken[0]!r} is a word of format names; choose another"
        )
    # The caches stay: what failed is in none, and what was read keeps its meaning.
    _user[named.name] = named


def get(name: str) -> Format:
    """The format that a name stands for: `get("int4_g128")`.

    Raises
    ------
    ValueError
        The base is unknown, or a word after it is.
    """
    if not isinstance(name, str):
        raise TypeError(f"format: want a name or a Format, got {type(name).__name__}")
    return _parse(name)


@lru_cache(maxsize=4096)
def _parse(name: str) -> Format:
    known = declared()
    bases = [base for base in known if name == base or name.startswith(base + "_")]
    if not bases:
        raise ValueError(
            f"no format {name!r}; a name starts with one of: {', '.join(sorted(known))}"
        )
    base = max(bases, key=len)
    fmt = known[base].format
    changes: dict[str, Any] = {}
    for word in name[len(base) :].split("_")[1:]:
        part, meaning = _read(word, fmt.element, name)
        if part in changes:
            raise ValueError(f"format {name!r} names its {part} twice")
        changes[part] = meaning
    # All at once: a format half changed may be none.
    return Format(
        fmt.element,
        Scale(changes.get("scale type", fmt.scale.element), changes.get("block", fmt.scale.block)),
        changes.get("zero point", fmt.zero),
        changes.get("bias", fmt.bias),
        changes.get("tensor scale", fmt.tensor_scale),
    )


def _read(word: str, element: Element, name: str) -> tuple[str, Any]:
    """The part of a format that a word is about, and what it makes of it."""
    if word in SCALE_WORDS:
        return "scale type", SCALE_WORDS[word]
    if word == "asym":
        return "zero point", element
    if word in ZERO_WORDS:
        return "zero point", ZERO_WORDS[word]
    if word.startswith("z") and word[1:] in declared():
        return "zero point", declared()[word[1:]].format.element
    if word == "bias":
        return "bias", True
    if word == "ts":
        return "tensor scale", True
    block = _read_block(word)
    if block is None:
        raise ValueError(
            f"format {name!r}: {word!r} is neither a block (tensor, row, g128, 128x128, allx64) "
            f"nor asym, zint8, {', '.join(ZERO_WORDS)}, bias, ts, "
            f"nor a scale type ({', '.join(SCALE_WORDS)})"
        )
    return "block", block


def _is_word(word: str) -> bool:
    try:
        _read(word, get("int8").element, word)
    except ValueError:
        return False
    return True


def _read_block(word: str) -> tuple[int | None, int | None] | None:
    if word == "tensor":
        return WHOLE, WHOLE
    if word == "row":
        return 1, WHOLE
    if match := re.fullmatch(r"g([1-9]\d*)", word):
        return 1, int(match[1])
    if match := re.fullmatch(r"([1-9]\d*|all)x([1-9]\d*|all)", word):
        rows, columns = (WHOLE if side == "all" else int(side) for side in match.groups())
        return rows, columns
    return None


def block_word(block: tuple[int | None, int | None]) -> str:
    """`tensor`, `row`, `g128` or `128x128`."""
    rows, columns = block
    if rows is None and columns is None:
        return "tensor"
    if rows == 1:
        return "row" if columns is None else f"g{columns}"
    return "x".join("all" if side is None else str(side) for side in block)


@lru_cache(maxsize=4096)
def spell(fmt: Format) -> str:
    """The name that `get` reads back as `fmt`."""
    for named in declared().values():
        if not named.short and named.name != named.format.element.name and named.format == fmt:
            return named.name
    words = [fmt.element.name, block_word(fmt.scale.block)]
    if isinstance(fmt.zero, Element):
        words.append("asym" if fmt.zero == fmt.element else f"z{fmt.zero.name}")
    elif fmt.zero is not None:
        words.append(next(w for w, dtype in ZERO_WORDS.items() if dtype == fmt.zero))
    if fmt.bias:
        words.append("bias")
    if fmt.scale.element != "float32":
        words.append(_word_of(SCALE_WORDS, fmt.scale.element, "scale"))
    if fmt.tensor_scale:
        words.append("ts")
    return "_".join(words)


def make(
    base: str,
    *,
    group: int | None = None,
    block: str | tuple[int | None, int | None] | None = None,
    asym: bool = False,
    zero: str | None = None,
    bias: bool = False,
    scale: str | None = None,
    tensor_scale: bool = False,
) -> Format:
    """The format that a constructor builds: `make("int4", group=128)` is `get("int4_g128")`.

    Parameters
    ----------
    base : str
        A declared name.
    group : int, optional
        Columns that share a scale.
    block : {"tensor", "row"} or (rows, columns), optional
        The same for any block; None in a pair spans the axis.
    asym : bool
        A zero point of the element's own kind for each block.
    zero : str, optional
        A zero point of this float dtype or integer element instead.
    bias : bool
        An addend for each block instead.
    scale : str, optional
        dtype of the scales: float32, float16, bfloat16, e8m0 or e4m3.
    tensor_scale : bool
        One more float32 factor for the whole matrix.
    """
    if group is not None and block is not None:
        raise ValueError(f"group={group} and block={block!r} both say what shares a scale")
    if group is not None and (isinstance(group, bool) or int(group) != group or group < 1):
        raise ValueError(f"group: want a whole number of at least 1, got {group!r}")
    words = [base]
    if group is not None:
        words.append(f"g{int(group)}")
    elif block is not None:
        word = block if isinstance(block, str) else block_word(block)
        if _read_block(word) is None:
            raise ValueError(
                f"block: want 'tensor', 'row' or a pair of whole numbers, got {block!r}"
            )
        words.append(word)
    if asym:
        words.append("asym")
    if zero is not None:
        words.append(f"z{zero}" if zero in declared() else _word_of(ZERO_WORDS, zero, "zero"))
    if bias:
        words.append("bias")
    if scale is not None:
        words.append(_word_of(SCALE_WORDS, scale, "scale"))
    if tensor_scale:
        words.append("ts")
    return get("_".join(words))


def _word_of(words: Mapping[str, Element | str], value: Element | str, argument: str) -> str:
    for word, meaning in words.items():
        if value in (word, meaning):
            return word
    legal = [m if isinstance(m, str) else w for w, m in words.items()]
    raise ValueError(f"{argument}: want one of {', '.join(legal)}, got {value!r}")

"""Names: every legal one parses, prints back and equals its constructor; the rest says why not."""

import itertools
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit.formats import WHOLE, Element, Format, Scale, declare, declared, names
from lowbit.formats.mx import E8M0

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)]
BLOCKS: dict[str, dict[str, Any]] = {
    "tensor": {"block": "tensor"},
    "row": {"block": "row"},
    "g1": {"group": 1},
    "g96": {"group": 96},
    "128x128": {"block": (128, 128)},
    "2x1": {"block": (2, 1)},
    "allx64": {"block": (WHOLE, 64)},
    "16xall": {"block": (16, WHOLE)},
}
OFFSETS: dict[str, dict[str, Any]] = {
    "asym": {"asym": True},
    "zint8": {"zero": "int8"},
    "zuint4": {"zero": "uint4"},
    "zf32": {"zero": "float32"},
    "zf16": {"zero": "float16"},
    "zbf16": {"zero": "bfloat16"},
    "bias": {"bias": True},
}
SCALES: dict[str, dict[str, Any]] = {
    "f32": {"scale": "float32"},
    "f16": {"scale": "float16"},
    "bf16": {"scale": "bfloat16"},
    "e8m0": {"scale": "e8m0"},
    "e4m3": {"scale": "e4m3"},
}
# What design section 10 spells out, and what each name has to mean.
DESIGNED = {
    "int4_g128": ("int4", "float32", (1, 128), None, False),
    "uint4_g64_asym": ("uint4", "float32", (1, 64), "uint4", False),
    "int8_row": ("int8", "float32", (1, WHOLE), None, False),
    "float8_e4m3fn_tensor": ("float8_e4m3fn", "float32", (WHOLE, WHOLE), None, False),
    "float8_e4m3fn_128x128": ("float8_e4m3fn", "float32", (128, 128), None, False),
    "nf4_g64": ("nf4", "float32", (1, 64), None, False),
    "int4_g128_bf16": ("int4", "bfloat16", (1, 128), None, False),
    "mxfp8": ("float8_e4m3fn", "float8_e8m0fnu", (1, 32), None, False),
    "mxfp8_e5m2": ("float8_e5m2", "float8_e8m0fnu", (1, 32), None, False),
    "mxfp6": ("float6_e2m3fn", "float8_e8m0fnu", (1, 32), None, False),
    "mxfp6_e3m2": ("float6_e3m2fn", "float8_e8m0fnu", (1, 32), None, False),
    "mxfp4": ("float4_e2m1fn", "float8_e8m0fnu", (1, 32), None, False),
    "mxint8": ("fixed8", "float8_e8m0fnu", (1, 32), None, False),
    "nvfp4": ("float4_e2m1fn", "float8_e4m3fn", (1, 16), None, True),
}


def element_name(part):
    return part.name if isinstance(part, Element) else part


@pytest.fixture
def tables():
    """Forget the codebooks that a test registers."""
    before = dict(names._user)
    yield
    names._user.clear()
    names._user.update(before)
    names._parse.cache_clear()
    names.spell.cache_clear()


# Reading and printing


@pytest.mark.parametrize("name", DESIGNED)
def test_the_names_of_the_design(name):
    fmt = lb.format(name)
    parts = (
        fmt.element.name,
        element_name(fmt.scale.element),
        fmt.scale.block,
        element_name(fmt.zero),
        fmt.tensor_scale,
    )
    assert parts == DESIGNED[name]
    assert fmt.name == name


def test_short_names_are_read_and_never_printed():
    assert lb.format("fp8") == lb.format("float8_e4m3fn_row")
    assert lb.format("fp8_128x128").name == "float8_e4m3fn_128x128"
    assert lb.format("fp8_e5m2_tensor").name == "float8_e5m2_tensor"
    assert lb.format("float4_e2m1fn_g16_e4m3_ts").name == "nvfp4"
    assert lb.format("float8_e4m3fn_g32_e8m0").name == "mxfp8"
    assert lb.format("mxfp4_g16").name == "float4_e2m1fn_g16_e8m0"
    for named in declared().values():
        assert named.format.name != named.name or not named.short


@pytest.mark.parametrize("name", declared())
def test_declared_names_parse_and_print_back(name):
    named = declared()[name]
    assert lb.format(name) == named.format
    assert lb.format(named.format.name) == named.format
    assert getattr(lb, name)() == named.format
    assert lb.format(getattr(lb, name)) == named.format
    assert repr(named.format) == f"lowbit.format({named.format.name!r})"
    assert name in dir(lb)


@pytest.mark.parametrize("base", declared())
def test_every_combination_of_words_prints_back_and_equals_its_constructor(base):
    named = declared()[base]
    offsets = ["", *OFFSETS]
    for block, offset, scale in itertools.product(["", *BLOCKS], offsets, ["", *SCALES]):
        words = [word for word in (block, offset, scale) if word]
        keywords = {
            **BLOCKS.get(block, {}), **OFFSETS.get(offset, {}), **SCALES.get(scale, {}),
        }  # fmt: skip
        make = getattr(lb, base)
        integral = named.format.element.integral
        coded = (
            named.format.scale.element if not scale else lb.format(f"int4_{scale}").scale.element
        )
        possible = (
            not offset
            or (offset == "bias" and isinstance(coded, str))
            or (offset != "bias" and integral)
        )
        if not possible:
            with pytest.raises(ValueError, match=r"zero point|bias"):
                lb.format("_".join([base, *words]))
            with pytest.raises(ValueError, match=r"zero point|bias"):
                make(**keywords)
            continue
        fmt = lb.format("_".join([base, *words]))
        assert lb.format("_".join([base, *reversed(words)])) == fmt
        assert lb.format(fmt.name) == fmt
        assert hash(lb.format(fmt.name)) == hash(fmt)
        assert make(**keywords) == fmt
        assert fmt.element == named.format.element
        if block:
            assert fmt.scale.block == lb.format(f"int8_{block}").scale.block
        if scale:
            assert fmt.scale.element == lb.format(f"int4_{scale}").scale.element


def test_the_words_mean_what_they_say():
    fmt = lb.format("int4_16xall_zf16_bf16_ts")
    assert fmt == Format(
        declare.integer(4), Scale("bfloat16", (16, WHOLE)), "float16", tensor_scale=True
    )
    assert fmt == lb.int4(block=(16, None), zero="float16", scale="bfloat16", tensor_scale=True)
    assert lb.format("uint4_g64_bias").bias
    assert lb.format("int4_asym").zero == declare.integer(4)
    assert lb.format("uint4_g8_zint8").zero == declare.integer(8)
    assert lb.format("int8_row_e8m0").scale.element == E8M0


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_any_group_and_tile(rows, columns):
    assert lb.format(f"int4_g{columns}").scale.block == (1, columns)
    assert lb.format(f"int4_g{columns}").name == f"int4_g{columns}"
    tile = lb.format(f"nf4_{rows}x{columns}")
    assert tile.scale.block == (rows, columns)
    assert lb.format(tile.name) == tile
    assert lb.nf4(block=(rows, columns)) == tile


def test_differing_formats_have_differing_names():
    everything = {
        lb.format("_".join(filter(None, (base, block, offset, scale))))
        for base, block, scale in itertools.product(INTEGERS, BLOCKS, SCALES)
        for offset in ("", "asym", "zf32", "zint8")
    }
    assert len({fmt.name for fmt in everything}) == len(everything)


# Refusals


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("int9", ["no format 'int9'", "int8", "mxfp4", "nvfp4", "nf4"]),
        ("", ["no format ''", "int4"]),
        ("INT4_g128", ["no format 'INT4_g128'", "int4"]),
        ("int4g128", ["no format 'int4g128'", "int4"]),
        ("int4_g0", ["'g0'", "tensor, row, g128, 128x128, allx64", "asym", "zf16", "bf16", "e8m0"]),
        ("int4_g-1", ["'g-1'", "row"]),
        ("int4_g1.5", ["'g1.5'", "row"]),
        ("int4_gx", ["'gx'", "row"]),
        ("int4_0x4", ["'0x4'", "row"]),
        ("int4_f64", ["'f64'", "f32, f16, bf16, e8m0, e4m3"]),
        ("int4_zint9", ["'zint9'", "zint8"]),
        ("int4_", ["'' is neither a block"]),
        ("int4__g32", ["'' is neither a block"]),
        ("int4 g32", ["no format 'int4 g32'"]),
        ("int4_g32_g64", ["names its block twice"]),
        ("int4_asym_zf16", ["names its zero point twice"]),
        ("int4_f16_bf16", ["names its scale type twice"]),
        ("int4_asym_bias", ["zero point or a bias, not both"]),
        ("int4_bias_e8m0", ["float dtype"]),
        ("nf4_asym", ["nf4 is no integer", "zero point"]),
        ("mxfp4_zf32", ["float4_e2m1fn is no integer"]),
        ("int4_znf4", ["zero element nf4 is neither an integer nor a float"]),
    ],
)
def test_a_wrong_name_says_what_is_legal(name, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lb.format(name)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"group": 32, "block": "row"}, "both say what shares a scale"),
        ({"group": 0}, "group: want a whole number of at least 1, got 0"),
        ({"group": -4}, "at least 1, got -4"),
        ({"group": 1.5}, "at least 1, got 1.5"),
        ({"group": True}, "at least 1, got True"),
        ({"block": "asym"}, "block: want 'tensor', 'row' or a pair"),
        ({"block": (0, 3)}, r"block: .* got \(0, 3\)"),
        ({"scale": "float64"}, "scale: want one of float32, float16, bfloat16, e8m0, e4m3"),
        ({"zero": "float64"}, "zero: want one of float32, float16, bfloat16"),
        ({"zero": "nf4"}, "zero element nf4"),
        ({"asym": True, "zero": "int8"}, "names its zero point twice"),
        ({"asym": True, "bias": True}, "not both"),
    ],
)
def test_a_wrong_constructor_argument_says_what_is_legal(keywords, message):
    with pytest.raises(ValueError, match=message):
        lb.int4(**keywords)


def test_what_is_no_name():
    for value in (4, None, b"int4", ("int4",), dict):
        with pytest.raises(
            TypeError, match=r"format: want a (name or a Format|format or its name)"
        ):
            lb.format(value)
    with pytest.raises(TypeError, match="want a name or a Format, got int"):
        names.get(4)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'int9'"):
        _ = lb.int9
    with pytest.raises(TypeError, match="tile"):
        lb.int4(tile=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Scale("float64", (1, 1)), "scale dtype 'float64' is not one of float32"),
        (lambda: Scale("float32", (0, 1)), r"at least one row and column, got \(0, 1\)"),
        (
            lambda: Format(declare.integer(4), Scale("float32", (1, 1)), "int8"),
            "zero dtype 'int8' is not one of",
        ),
        (
            lambda: Format(
                declare.integer(4),
                Scale("float32", (1, 1)),
                declare.codebook("far", [0.0, 300.0]),
            ),
            "zero points of far do not fit a byte",
        ),
    ],
)
def test_a_declaration_that_means_nothing_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_scale_type_without_a_word_is_refused_by_name():
    fmt = Format(declare.integer(4), Scale(lb.format("float8_e5m2").element, (1, 32)))
    with pytest.raises(ValueError, match=r"scale: want one of .*e4m3, got .*float8_e5m2"):
        _ = fmt.name


# Discovery


def test_every_file_of_declarations_is_found():
    for part in ("int4", "float8_e4m3fn", "mxfp4", "nvfp4", "nf4"):
        assert part in declared()
    assert list(declared()) == list(dict.fromkeys(declared()))


def test_two_files_cannot_declare_one_name(monkeypatch):
    from lowbit.formats import nvfp4

    monkeypatch.setattr(nvfp4, "FORMATS", (declared()["int4"],))
    names._declared.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"'int4' is declared twice, once in nvfp4\.py"):
            names._declared()
    finally:
        monkeypatch.undo()
        names._declared.cache_clear()


def test_the_registry_says_all_that_a_table_of_formats_needs():
    """The documentation prints one row a name: name, bits, scale, block, summary."""
    for name, named in declared().items():
        assert named.name == name
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
        assert named.summary
        assert "\n" not in named.summary
        assert 1 <= named.format.element.bits <= 8
        assert names.block_word(named.format.scale.block)
        if named.short:
            target = named.summary.removeprefix("short for ")
            assert declared()[target].format == named.format
        elif name != named.format.element.name:
            assert named.format.name == name
    bases = [named.format for named in declared().values() if not named.short]
    assert len(set(bases)) == len(bases)  # one declared name a format


# Codebooks of users


@pytest.mark.usefixtures("tables")
def test_a_user_codebook_is_a_format_like_any_other():
    fmt = lb.codebook("ternary", [0, 1, -1, 0], group=32)
    assert fmt.name == "ternary_g32"
    assert lb.format("ternary_g32") == fmt
    assert lb.format("ternary").scale.block == (1, WHOLE)
    assert lb.ternary(group=32) == fmt
    assert "ternary" in dir(lb)
    assert lb.codebook("ternary", np.array([0, 1, -1, 0])).name == "ternary_g64"
    assert lb.codebook("ternary", [0, 1, -1, 0], group=None).name == "ternary_row"
    assert lb.codebook("ternary", [0, 1, -1, 0], block=(4, 4), scale="bfloat16").name == (
        "ternary_4x4_bf16"
    )
    w = lb.quantize(np.array([[2.0, -2.0, 0.5, 0.0]], np.float32), fmt)
    assert w.dequantize().tolist() == [[2, -2, 0, 0]]
    with pytest.raises(ValueError, match="'ternary' already stands for another table"):
        lb.codebook("ternary", [0, 1, -1, 2])
    with pytest.raises(ValueError, match="already stands for another table"):
        lb.codebook("ternary", [0, 1])
    assert lb.format("ternary_g32") == fmt


@pytest.mark.usefixtures("tables")
def test_a_name_that_failed_works_once_its_codebook_is_there():
    with pytest.raises(ValueError, match="no format 'signs_g16'"):
        lb.format("signs_g16")
    lb.codebook("signs", [-1, 1])
    assert lb.format("signs_g16").element.values == (-1, 1)


@pytest.mark.usefixtures("tables")
def test_a_codebook_cannot_change_what_a_name_means():
    int4 = lb.format("int4")
    with pytest.raises(ValueError, match="'int4' already stands for another table"):
        lb.codebook("int4", range(16))
    lb.codebook("int4", int4.element.values)  # the same table: nothing to do
    assert lb.format("int4") == int4
    assert declared()["int4"].summary == "two's complement"
    for name, word in (("int4_g32", "g32"), ("mine_row", "row"), ("my_asym_table", "asym")):
        with pytest.raises(ValueError, match=f"'{word}' is a word of format names"):
            lb.codebook(name, [0, 1])
    for name in ("Mine", "my table", "_mine", "4bit", "mine_", "my__table", ""):
        with pytest.raises(ValueError, match="lower-case words and digits"):
            lb.codebook(name, [0, 1])


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("count", [0, 1, 3, 5, 255])
def test_a_codebook_has_a_power_of_two_of_numbers(count):
    with pytest.raises(ValueError, match=rf"need \d+ values, got {count}"):
        lb.codebook("odd", range(count))


@pytest.mark.usefixtures("tables")
def test_a_codebook_has_at_most_256_numbers():
    lb.codebook("large", range(256))
    with pytest.raises(ValueError, match="1 to 8 bits, got 9"):
        lb.codebook("larger", range(512))


# Other processes


READ = """
import pickle, sys
import numpy as np
import lowbit as lb
fmt, hashed, w, values = pickle.load(sys.stdin.buffer)
assert hash(fmt) == hashed, "hash"
assert (w.dequantize() == values).all(), "values"
assert w.format == fmt and w.format.name == fmt.name, "format"
if fmt.name.startswith("mine"):
    mine = lb.codebook("mine", fmt.element.values, group=16)
    assert mine == fmt and {mine: 1}[fmt] == 1, "codebook"
else:
    assert lb.format(fmt.name) == fmt and {fmt: 1}[lb.format(fmt.name)] == 1, "name"
"""


@pytest.mark.usefixtures("tables")
def test_formats_and_arrays_pickle_into_a_fresh_process():
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    mine = lb.codebook("mine", [-3.5, -1, 0.25, 2], group=16)
    for fmt in (mine, lb.format("int4_g32_zf16_bf16"), lb.format("nvfp4")):
        w = lb.quantize(x, fmt)
        message = pickle.dumps((fmt, hash(fmt), w, w.dequantize()))
        done = subprocess.run(
            [sys.executable, "-P", "-c", READ], input=message, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("name", declared())
def test_formats_pickle(name):
    fmt = lb.format(name)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(fmt, protocol))
        assert again == fmt
        assert hash(again) == hash(fmt)
        assert again.element.values == fmt.element.values or fmt.element.nan_code is not None

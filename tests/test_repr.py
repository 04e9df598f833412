"""How an array looks in a terminal, in a notebook and in rich."""

import io

import numpy as np
import pytest

import lowbit as lb


def array(name="int4_g32", shape=(4, 64), dtype=np.float32):
    return lb.quantize(np.ones(shape, dtype), name)


@pytest.mark.parametrize(
    ("w", "text"),
    [
        # 4 rows of 32 bytes and of two float32 scales
        (array(), "QArray(shape=(4, 64), format='int4_g32', dtype=float32, 160 bytes)"),
        (array().T, "QArray(shape=(64, 4), format='int4_g32', dtype=float32, 160 bytes)"),
        (array()[0], "QArray(shape=(64,), format='int4_g32', dtype=float32, 40 bytes)"),
        # 32 bytes, 4 scales of one byte, 4 bytes of tensor scale
        (
            array("nvfp4", (1, 1, 64), np.float16),
            "QArray(shape=(1, 1, 64), format='nvfp4', dtype=float16, 40 bytes)",
        ),
        (
            array("fp8_128x128", (3, 5), "bfloat16"),
            "QArray(shape=(3, 5), format='float8_e4m3fn_128x128', dtype=bfloat16, 19 bytes)",
        ),
        # 16 rows of 32 bytes and of two scales: 12 of them are padding
        (
            array().prepare(),
            "QArray(shape=(4, 64), format='int4_g32', dtype=float32, layout='words16', 640 bytes)",
        ),
        (
            array("int4_g32", (0, 64)),
            "QArray(shape=(0, 64), format='int4_g32', dtype=float32, 0 bytes)",
        ),
    ],
)
def test_the_repr_says_what_it_is_and_what_it_costs(w, text):
    assert repr(w) == text
    assert str(w) == text


def test_nbytes_counts_every_part():
    w = array("int4_g32_asym")
    assert w.nbytes == w.codes.nbytes + w.scales.nbytes + w.zeros.nbytes
    b = array("int4_g32_bias")
    assert b.nbytes == b.codes.nbytes + b.scales.nbytes + b.biases.nbytes
    n = array("nvfp4")
    assert n.nbytes == n.codes.nbytes + n.scales.nbytes + 4
    p = lb.from_parts(
        "int4_g32", w.codes, w.scales, columns=np.arange(64), divisor=np.ones(64, np.float32)
    )
    assert p.nbytes == 160 + 64 * np.dtype(np.intp).itemsize + 64 * 4


def test_html_is_a_table_with_the_saving():
    html = array()._repr_html_()
    assert html.startswith("<table><caption>QArray</caption><tr><th>shape</th><td>4 x 64</td></tr>")
    assert "<tr><th>format</th><td>int4_g32</td></tr>" in html
    assert "<tr><th>dtype</th><td>float32</td></tr>" in html
    assert "<tr><th>layout</th><td>words16</td></tr>" in array().prepare()._repr_html_()
    # 4 * 64 * 4 bytes dense
    assert "<td>160, 6.40 times less than float32</td></tr></table>" in html
    assert "<td>0</td></tr></table>" in array(shape=(0, 64))._repr_html_()
    assert "<td>20,480, 6.40 times less" in array(shape=(512, 64))._repr_html_()


@pytest.fixture
def odd():
    """A format that was never registered may carry any name."""
    element = lb.formats.Element("[red]<b>&", 1, (0.0, 1.0))
    fmt = lb.Format(element, lb.formats.Scale("float32", (1, 8)))
    return lb.from_parts(fmt, np.zeros((1, 1), np.uint8), np.ones((1, 1), np.float32))


def test_html_escapes_names(odd):
    assert "<td>[red]&lt;b&gt;&amp;_g8</td>" in odd._repr_html_()


def test_rich_prints_a_table_and_takes_no_markup(odd):
    from rich.console import Console

    target = io.StringIO()
    Console(file=target, width=80).print(array(), odd)
    printed = target.getvalue()
    for word in ("QArray", "4 x 64", "int4_g32", "160, 6.40 times less than float32", "[red]<b>&"):
        assert word in printed

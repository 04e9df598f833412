"""Packing: one little-endian bit stream a row, for every width."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit.formats import declared
from lowbit.formats.codes import pack, unpack

WIDTHS = range(1, 9)


def stream(row, bits):
    """The bytes of one row by arithmetic on a single big integer: code i is worth 2**(i * bits)."""
    number = sum(code << i * bits for i, code in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


def rows_of(bits):
    code = st.integers(0, 2**bits - 1)
    return st.integers(0, 70).flatmap(
        lambda n: st.lists(st.lists(code, min_size=n, max_size=n), min_size=0, max_size=4).map(
            lambda rows: np.array(rows, np.uint8).reshape(len(rows), n)
        )
    )


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_bytes_are_those_of_one_long_integer(bits, data):
    codes = data.draw(rows_of(bits))
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(codes), -(-codes.shape[1] * bits // 8))
    assert [row.tobytes() for row in packed] == [stream(row.tolist(), bits) for row in codes]
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_unpack_reads_any_bytes(bits, data):
    count = data.draw(st.integers(0, 40))
    octets = data.draw(st.binary(min_size=-(-count * bits // 8), max_size=-(-count * bits // 8)))
    number = int.from_bytes(octets, "little")
    expected = [number >> i * bits & 2**bits - 1 for i in range(count)]
    packed = np.frombuffer(octets, np.uint8)[None]
    np.testing.assert_array_equal(unpack(packed, bits, count), [expected])


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place_of_a_word(bits):
    """Each code alone in each of 34 places: past a byte, past 32 bits and past eight codes."""
    places = 34
    for place in range(places):
        codes = np.zeros((2**bits, places), np.uint8)
        codes[:, place] = np.arange(2**bits)
        packed = pack(codes, bits)
        assert [row.tobytes() for row in packed] == [stream(row.tolist(), bits) for row in codes]
        np.testing.assert_array_equal(unpack(packed, bits, places), codes)


def test_three_bits_cross_bytes_and_words():
    """The layout that checkpoints with 3 bits use: 32 codes in three 32-bit words."""
    codes = np.arange(32, dtype=np.uint8) % 8
    words = pack(codes[None], 3).view("<u4")[0]
    assert len(words) == 3
    k = codes.astype(int)
    assert words[0] == sum(int(k[i]) << 3 * i for i in range(10)) | (k[10] & 3) << 30
    middle = sum(int(k[i]) << 3 * (i - 11) + 1 for i in range(11, 21))
    assert words[1] == k[10] >> 2 | middle | (k[21] & 1) << 31
    assert words[2] == k[21] >> 1 | sum(int(k[i]) << 3 * (i - 22) + 2 for i in range(22, 32))


@pytest.mark.parametrize("bits", WIDTHS)
def test_spare_bits_are_zero(bits):
    for count in range(1, 18):
        packed = pack(np.full((3, count), 2**bits - 1, np.uint8), bits)
        assert (packed[:, -1] >> (count * bits - 1) % 8 == 1).all()  # the last bit of the last code


def test_four_bits_put_the_even_column_into_the_low_nibble():
    assert pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]


def test_any_leading_axes_and_strides():
    codes = np.random.default_rng(0).integers(0, 32, (2, 3, 4, 22), np.uint8)
    packed = pack(codes, 5)
    assert packed.shape == (2, 3, 4, 14)
    for index in np.ndindex(2, 3, 4):
        assert packed[index].tobytes() == stream(codes[index].tolist(), 5)
    other = codes[::-1, :, ::2, ::-3]
    np.testing.assert_array_equal(pack(other, 5), pack(other.copy(), 5))
    np.testing.assert_array_equal(unpack(packed[:, ::-1], 5, 22), codes[:, ::-1])
    np.testing.assert_array_equal(unpack(np.asfortranarray(packed), 5, 22), codes)


@pytest.mark.parametrize("name", declared())
def test_public_codes_are_the_packed_codes_or_the_element_itself(name):
    fmt = lb.format(name)
    x = np.random.default_rng(1).uniform(0.1, 1, (3, 37)).astype(np.float32)
    if name == "int1":
        x = -x  # int1 is {0, -1}
    codes = lb.quantize(x, fmt).codes
    if fmt.element.bits == 8:
        assert codes.shape == x.shape
        assert codes.dtype.name == fmt.element.storage
    else:
        assert codes.shape == (3, fmt.row_bytes(37))
        assert codes.dtype == np.uint8
        assert (codes[:, -1] >> (37 * fmt.element.bits - 1) % 8 + 1 == 0).all()

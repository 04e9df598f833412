"""Codes of a byte each to a bit stream and back: eight codes are `bits` bytes."""

from __future__ import annotations

from lowbit.kernels.cpu.ir import Function, Module, Value, constant


def packer(module: Module, bits: int) -> Function:
    """Function that packs `count` codes of a byte each, nothing above their `bits` bits.

    It writes the bytes that they need and no more; spare bits are 0. `codes` is read up to the
    next multiple of 64.
    """
    f = module.function(f"pack{bits}", {"codes": "ptr", "count": "i64", "out": "ptr"}, "apart")
    codes, count, out = f.parameters
    done = constant("i64", 0)
    if bits == 4:
        # A pair of codes is 16 bits: the upper one moves down next to the lower one.
        done = f.mul(f.op("udiv", count, 64), 64)
        pairs, octets = "<32 x i16>", "<32 x i8>"
        with f.loop(0, done, 64) as loop:
            pair = f.load(pairs, f.at(codes, loop.index), 1)
            both = f.op("or", pair, f.op("lshr", pair, 4))
            place = f.at(out, f.op("lshr", loop.index, 1))
            f.store(f.cast("trunc", both, octets), place, 1)
    # Eight bytes are written where the row has them, however few of them are meant.
    size = f.over(f.mul(count, bits), 8)
    groups = f.over(count, 8)
    easy = f.op("sdiv", f.op("sub", size, 8 - bits), bits)
    easy = f.least(f.greatest(easy, 0), groups)
    begun = f.op("lshr", done, 3)
    with f.loop(begun, easy) as loop:
        word = f.load("i64", f.at(codes, f.mul(loop.index, 8)), 1)
        f.store(_squeezed(f, word, bits), _place(f, out, loop.index, bits), 1)
    with f.loop(f.greatest(begun, easy), groups) as loop:
        first = f.mul(loop.index, 8)
        surplus = f.greatest(f.op("sub", constant("i64", 8), f.op("sub", count, first)), 0)
        kept = f.op("lshr", constant("i64", -1), f.mul(surplus, 8))
        word = _squeezed(f, f.op("and", f.load("i64", f.at(codes, first), 1), kept), bits)
        start = f.mul(loop.index, bits)
        left = f.least(f.op("sub", size, start), bits)
        with f.loop(0, left) as octet:
            part = f.op("lshr", word, f.mul(octet.index, 8))
            f.store(f.cast("trunc", part, "i8"), f.at(out, f.add(start, octet.index)), 1)
    return f


def unpacker(module: Module, bits: int) -> Function:
    """Function that spreads the first `count` codes of a bit stream to a byte each.

    `stream` is read up to its `size` bytes, and `codes` written up to the next multiple of 64.
    """
    f = module.function(
        f"unpack{bits}",
        {"stream": "ptr", "count": "i64", "size": "i64", "codes": "ptr"},
        "apart",
    )
    stream, count, size, codes = f.parameters
    done = constant("i64", 0)
    if bits == 4:
        done = f.mul(f.op("udiv", count, 64), 64)
        pairs, octets = "<32 x i16>", "<32 x i8>"
        with f.loop(0, done, 64) as loop:
            both = f.load(octets, f.at(stream, f.op("lshr", loop.index, 1)), 1)
            wide = f.cast("zext", both, pairs)
            pair = f.op("and", f.op("or", wide, f.op("shl", wide, 4)), 0x0F0F)
            f.store(pair, f.at(codes, loop.index), 1)
    groups = f.over(count, 8)
    # Eight bytes are read where the stream has them, however few of them are needed.
    easy = f.op("sdiv", f.op("sub", size, 8 - bits), bits)
    easy = f.least(f.greatest(easy, 0), groups)
    begun = f.op("lshr", done, 3)
    with f.loop(begun, easy) as loop:
        word = f.load("i64", _place(f, stream, loop.index, bits), 1)
        f.store(_spread(f, word, bits), f.at(codes, f.mul(loop.index, 8)), 1)
    with f.loop(f.greatest(begun, easy), groups) as loop:
        start = f.mul(loop.index, bits)
        left = f.least(f.op("sub", size, start), bits)
        with f.loop(0, left, carried=[constant("i64", 0)]) as octet:
            byte = f.load("i8", f.at(stream, f.add(start, octet.index)), 1)
            part = f.op("shl", f.cast("zext", byte, "i64"), f.mul(octet.index, 8))
            octet.carried = [f.op("or", octet.carried[0], part)]
        f.store(_spread(f, octet.results[0], bits), f.at(codes, f.mul(loop.index, 8)), 1)
    return f


def _place(f: Function, base: Value, group: Value, bits: int) -> Value:
    return f.at(base, f.mul(group, bits))


def _fields(width: int, every: int) -> int:
    """`width` ones at each multiple of `every`, in 64 bits."""
    return sum((2**width - 1) << place for place in range(0, 64, every))


def _signed(mask: int) -> int:
    return mask - 2**64 if mask >= 2**63 else mask


def _squeezed(f: Function, word: Value, bits: int) -> Value:
    """Eight bytes of codes as a stream."""
    if f.module.isa.pdep:
        mask = constant("i64", _signed(_fields(bits, 8)))
        return f.call("llvm.x86.bmi.pext.64", "i64", word, mask)
    # Double: 8 codes to 4 x 16 bits, to 2 x 32, to 64.
    for width in (1, 2, 4):
        low = _fields(width * bits, 16 * width)
        high = f.op("lshr", word, width * (8 - bits))
        upper = f.op("and", high, _signed(low << (width * bits)))
        word = f.op("or", f.op("and", word, _signed(low)), upper)
    return word


def _spread(f: Function, stream: Value, bits: int) -> Value:
    """Code i of the low 8 * bits bits to byte i."""
    if f.module.isa.pdep:
        mask = constant("i64", _signed(_fields(bits, 8)))
        return f.call("llvm.x86.bmi.pdep.64", "i64", stream, mask)
    # Halve: 8 codes to 2 x 32 bits, to 4 x 16, to 8 x 8.
    spread = f.op("and", stream, _signed(2 ** (8 * bits) - 1))
    for width in (4, 2, 1):
        low = _fields(width * bits, 16 * width)
        moved = f.op("shl", spread, width * (8 - bits))
        upper = f.op("and", moved, _signed(low << (8 * width)))
        spread = f.op("or", f.op("and", spread, _signed(low)), upper)
    return spread

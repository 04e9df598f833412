"""Sixteen rows of bytes to panel words (words16), in registers; odd widths to a byte a code first.

Codes, scales and zero points are all rows of bytes, so one transposition serves them all.
"""

from __future__ import annotations

from lowbit.kernels.cpu.decode import Decoder
from lowbit.kernels.cpu.ir import INT, LANES, VECTOR, Function, Module, Value, constant
from lowbit.kernels.layouts import GROUP, PANEL

POINTERS = 8 * PANEL  # bytes of a table of row addresses


def transposer(module: Module) -> Function:
    """words16 of bytes [start, stop) of sixteen rows.

    `rows` is a table of 16 addresses; of these `valid` are rows, the others' words are zero.
    No byte outside of [start, stop) is read, and only whole words are written.
    """
    f = module.function(
        "transpose",
        {"rows": "ptr", "valid": "i64", "start": "i64", "stop": "i64", "out": "ptr"},
        "apart",
    )
    rows, valid, start, stop, out = f.parameters
    keep = _lanes_below(f, valid)
    row = [f.load("ptr", f.at(rows, 8 * i), 8) for i in range(PANEL)]
    size = f.op("sub", stop, start)
    done = constant("i64", 0)  # words
    for count, take in ((16, _sixteen_words), (4, _four_words)):
        # Whole cache lines while 16 of them fit in registers; rows of a power of two of bytes
        # would else lose a line before its last quarter is read.
        if count > module.isa.lanes:
            continue
        end = f.mul(f.op("udiv", size, 4 * count), count)
        with f.loop(done, end, count) as loop:
            offset = f.add(start, f.mul(loop.index, 4))
            to = f.at(out, f.mul(loop.index, VECTOR))
            for i, words in enumerate(take(f, row, offset)):
                f.store(f.op("and", words, keep), f.at(to, i * VECTOR), 4)
        done = end
    words = f.op("udiv", size, 4)
    with f.loop(done, words) as loop:
        offset = f.add(start, f.mul(loop.index, 4))
        gathered = _gather(f, [f.load("i32", f.at(each, offset), 1) for each in row])
        f.store(f.op("and", gathered, keep), f.at(out, f.mul(loop.index, VECTOR)), 4)
    whole = f.mul(words, 4)
    with f.when(f.compare("slt", whole, size)):
        to = f.at(out, f.mul(words, VECTOR))
        with f.loop(0, PANEL) as lane:
            base = f.load("ptr", f.at(rows, f.mul(lane.index, 8)), 8)
            rest = _bytes(f, base, f.add(start, whole), f.op("sub", size, whole), "i32")
            real = f.compare("slt", lane.index, valid)
            kept = f.select(real, rest, 0)
            f.store(kept, f.at(to, f.mul(lane.index, 4)), 4)
    return f


def _lanes_below(f: Function, valid: Value) -> Value:
    """All ones in the lanes below `valid`."""
    count = f.splat(f.cast("trunc", valid, "i32"))
    return f.cast("sext", f.compare("slt", f.lane_numbers(), count), INT)


def _gather(f: Function, lanes: list[Value]) -> Value:
    vector = Value(f"<{len(lanes)} x {lanes[0].type}>", "poison")
    for i, lane in enumerate(lanes):
        vector = f.let(vector.type, f"insertelement {vector}, {lane}, i64 {i}")
    return vector


def _sixteen_words(f: Function, row: list[Value], offset: Value) -> list[Value]:
    """Words 0..15 behind `offset` of all sixteen rows: a whole cache line of each."""
    held = [f.load(INT, f.at(each, offset), 1) for each in row]
    quarters: list[list[Value]] = [[], [], [], []]
    for j in range(4):
        a, b, c, d = held[j::4]
        for half in (0, 8):
            lanes = [*range(half, half + 8), *range(half + 16, half + 24)]
            ab, cd = f.shuffle(a, b, lanes), f.shuffle(c, d, lanes)
            for quarter in (0, 4):
                lanes = [start + i for start in range(quarter, 32, 8) for i in range(4)]
                quarters[(half + quarter) // 4].append(f.shuffle(ab, cd, lanes))
    return [words for mixed in quarters for words in _transposed(f, mixed)]


def _four_words(f: Function, row: list[Value], offset: Value) -> list[Value]:
    """Words 0..3 behind `offset` of all sixteen rows."""
    held = [f.load("<4 x i32>", f.at(each, offset), 1) for each in row]
    mixed = []
    for j in range(4):
        low, high = (f.shuffle(held[a], held[a + 4], list(range(8))) for a in (j, j + 8))
        mixed.append(f.shuffle(low, high, list(range(LANES))))
    return _transposed(f, mixed)


def _transposed(f: Function, mixed: list[Value]) -> list[Value]:
    """Four words of sixteen rows, one vector a word.

    Vector j has them of rows j, j + 4, j + 8, j + 12, so nothing leaves its 128-bit quarter.
    """

    def interleave(a: Value, b: Value, order: tuple[int, int, int, int]) -> Value:
        return f.shuffle(a, b, [4 * q + o % 4 + 16 * (o // 4) for q in range(4) for o in order])

    front, back = (0, 4, 1, 5), (2, 6, 3, 7)
    ab_low, ab_high = (interleave(mixed[0], mixed[1], o) for o in (front, back))
    cd_low, cd_high = (interleave(mixed[2], mixed[3], o) for o in (front, back))
    first, second = (0, 1, 4, 5), (2, 3, 6, 7)
    return [
        interleave(ab_low, cd_low, first),
        interleave(ab_low, cd_low, second),
        interleave(ab_high, cd_high, first),
        interleave(ab_high, cd_high, second),
    ]


def _bytes(f: Function, base: Value, offset: Value, count: Value, kind: str) -> Value:
    """`count` bytes as a little-endian number."""
    with f.loop(0, count, carried=[constant(kind, 0)]) as loop:
        octet = f.cast("zext", f.load("i8", f.at(base, f.add(offset, loop.index)), 1), kind)
        shift = f.mul(loop.index, 8)
        place = shift if kind == "i64" else f.cast("trunc", shift, kind)
        loop.carried = [f.op("or", loop.carried[0], f.op("shl", octet, place))]
    return loop.results[0]


def row_table(module: Module) -> Function:
    """Addresses of rows first, first + 1, ... of which `block` share one; none beyond `count`."""
    f = module.function(
        "row_table",
        {
            **dict.fromkeys(("base", "table"), "ptr"),
            **dict.fromkeys(("stride", "first", "count", "block"), "i64"),
        },
        "apart",
    )
    base, table, stride, first, count, block = f.parameters
    with f.loop(0, PANEL) as loop:
        row = f.least(f.add(first, loop.index), f.op("sub", count, 1))
        shared = f.op("udiv", row, block)
        address = f.at(base, f.mul(shared, stride))
        f.store(address, f.at(table, f.mul(loop.index, 8)), 8)
    return f


def expander(module: Module, bits: int) -> Function:
    """Codes of `bits` bits to a byte each: eight codes are `bits` bytes and become one 64-bit word.

    `start` and `stop` are bytes of the row's stream, which has `size` of them; `start` is a
    multiple of `bits`. `out` has room for whole groups of eight.
    """
    parameters = {"row": "ptr"} | dict.fromkeys(("start", "stop", "size"), "i64")
    f = module.function("expand", parameters | {"out": "ptr"}, "apart")
    row, start, stop, size, out = f.parameters
    # Eight bytes are read where the row has them, however few of them the codes need.
    groups = f.over(f.op("sub", stop, start), bits)
    safe = f.over(f.greatest(f.op("sub", f.op("sub", size, 7), start), 0), bits)
    easy = f.least(groups, safe)
    with f.loop(0, easy) as loop:
        stream = f.load("i64", f.at(row, f.add(start, f.mul(loop.index, bits))), 1)
        f.store(_spread(f, stream, bits), f.at(out, f.mul(loop.index, 8)), 1)
    with f.loop(easy, groups) as loop:
        at = f.add(start, f.mul(loop.index, bits))
        stream = _bytes(f, row, at, f.least(f.op("sub", stop, at), bits), "i64")
        f.store(_spread(f, stream, bits), f.at(out, f.mul(loop.index, 8)), 1)
    return f


def _spread(f: Function, stream: Value, bits: int) -> Value:
    """Code i of the low 8 * bits bits to byte i."""

    def field(width: int, every: int) -> int:
        return sum((2**width - 1) << place for place in range(0, 64, every))

    if f.module.isa.pdep:
        mask = constant("i64", _signed(field(bits, 8)))
        return f.call("llvm.x86.bmi.pdep.64", "i64", stream, mask)
    # Halve: 8 codes to 2 x 32 bits, to 4 x 16, to 8 x 8.
    spread = f.op("and", stream, 2 ** (8 * bits) - 1)
    for codes in (4, 2, 1):
        low = field(codes * bits, 16 * codes)
        moved = f.op("and", f.op("shl", spread, codes * (8 - bits)), _signed(low << 8 * codes))
        spread = f.op("or", f.op("and", spread, _signed(low)), moved)
    return spread


def _signed(mask: int) -> int:
    return mask - 2**64 if mask >= 2**63 else mask


def unpacker(
    module: Module,
    name: str,
    decode: Decoder,
    bits: int,
    *,
    panels: bool,
    integer_offset: int | None = None,
) -> Function:
    """Scales (or zero points, or biases) of one panel to a vector for each segment.

    Numbers are stored in `bits` bits. `source` holds their words16 from block `origin` on, or with
    `panels` the panel's own panels16. Those `further` on are asked for. With an integer offset they
    become int32, the offset added.
    """
    f = module.function(
        name,
        {"source": "ptr", "out": "ptr"}
        | dict.fromkeys(("origin", "first", "last", "block", "further"), "i64"),
        "apart",
    )
    source, out, origin, first, last, block, further = f.parameters
    each = 32 // bits
    with f.loop(first, last) as loop:
        index = f.op("udiv", loop.index, block)
        if panels:
            narrow = f"<16 x i{bits}>"
            size = bits // 8
            at = f.at(source, f.mul(index, LANES * size))
            f.prefetch(f.at(at, further))
            lanes = f.load(narrow, at, size)
            word = f.cast("zext", lanes, INT)
        else:
            within = f.op("sub", index, origin)
            place = f.op("udiv", within, each) if each > 1 else within
            word = f.load(INT, f.at(source, f.mul(place, VECTOR)), 4)
            if each > 1:
                shift = f.mul(f.op("urem", within, each), bits)
                word = f.op("lshr", word, f.splat(f.cast("trunc", shift, "i32")))
        number = decode.emit(f, word, 0)
        if integer_offset is not None:
            number = f.add(f.cast("fptosi", number, INT), integer_offset)
        f.store(number, f.at(out, f.mul(f.op("sub", loop.index, first), VECTOR * GROUP)), 64)
    return f

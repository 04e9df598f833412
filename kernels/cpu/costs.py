"""What a compiled product costs: a sum over the stations of its numbers.

    seconds = calls + arrange x + finish
              + side by side(bytes / bandwidth, repack + decode + multiply + scale)

Every term is an amount of work over a rate of the machine (`machine.Rates`). Amounts follow from
the method, the way in which the generated code goes through its operands; rates are nominal until
`lowbit bench --tune` has measured them. By one method the price never falls where m, n or k grows.
"""

from __future__ import annotations

from lowbit.formats import Format
from lowbit.formats.declare import Element
from lowbit.kernels.cpu import machine
from lowbit.kernels.cpu.decode import consecutive
from lowbit.kernels.cpu.operands import FEW
from lowbit.kernels.declare import Problem
from lowbit.kernels.layouts import GROUP, PANEL, WIDTHS

_BLOCK = 16  # rows of x that a tile register holds: fewer cost as much
_TALL = 256  # rows of x that a code is decoded for at most, where it is not for a few
_ALONE = 1 << 16  # numbers of x that one thread arranges by itself
# Python's own passes over x, in passes of generated code: zero points taken off, and the sums that
# block biases meet.
_VALUED, _SUMMED = 8, 4
_SIZES = {"fma": 4, "bf16": 2, "dot": 1}  # bytes of an operand
_CURVED = 6  # passes over a result that an activation with an exponential counts as


def seconds(p: Problem, inner: str, method: str, segment: int, *, folded: bool = False) -> float:
    """The price of a product.

    Parameters
    ----------
    p : Problem
    inner, method : str
        As a `Spec` has them: what is multiplied, and how often codes are decoded for it.
    segment : int
        Columns between any two changes of a scale.
    folded : bool
        Codes are multiplied by their scales while they are decoded.
    """
    known = machine.known(p.device, p.threads)
    rates = known.rates
    columns = -(-p.n // PANEL) * PANEL
    decoded = _decoded(rates, inner, p.w.element, folded)

    def column(m: int) -> float:
        return _column(p, rates, inner, method, segment, decoded, m)

    # One thread works on at least a tile: columns of `GROUP` panels, rows up to `_TALL`.
    tile = min(columns, GROUP * PANEL) * column(min(p.m, _TALL))
    working = max(columns / p.threads * column(p.m), tile)
    if p.threads > 1:
        working /= rates.together
    working = _beside(p.bytes / known.read(p.threads), working)
    return _arranging(p, rates, inner) + working + _finishing(p, rates)


def _column(
    p: Problem,
    rates: machine.Rates,
    inner: str,
    method: str,
    segment: int,
    decoded: float,
    m: int,
) -> float:
    """Seconds of a thread for one row of w and `m` rows of x."""
    tiled = method in ("tiles", "single")
    each = p.k / getattr(rates, f"{inner}_tiles" if tiled else inner)
    if segment < p.k or isinstance(p.x, Format):
        each += -(-p.k // segment) / rates.scale
    multiplying = each * (-(-m // _BLOCK) * _BLOCK if tiled else m)
    passes = -(-m // (FEW if method == "direct" else _TALL))
    decoding = passes * p.k / decoded
    # Vectors decode while the tile registers multiply what was decoded before: for a single tile
    # of rows step by step, for more of them one after the other.
    work = _beside(multiplying, decoding) if method == "single" else multiplying + decoding
    if p.layout == "rows":
        work += -(-m // _TALL) * p.k * _repacked(rates, p.w.element.bits)
    return work


def _beside(one: float, other: float) -> float:
    """Seconds of two kinds of work side by side: the longer one's, and a fifth more for equals."""
    return float((one**4 + other**4) ** 0.25)


def _decoded(rates: machine.Rates, inner: str, element: Element, folded: bool) -> float:
    """Codes that become operands, a second; bytes are operands already.

    A look-up and a multiplication are as long as the look-up in a longer table.
    """
    if inner == "dot":
        return rates.byte_narrow if element.bits < 8 else float("inf")
    if element.bits <= 4 and not folded:
        kind = "narrow"
    else:
        kind = "table" if folded or consecutive(element) is None else "integer"
    rate: float = getattr(rates, f"{'float' if inner == 'fma' else 'bfloat'}_{kind}")
    return rate


def _repacked(rates: machine.Rates, bits: int) -> float:
    """Seconds for a code of canonical rows."""
    return bits / 8 / rates.repack if bits in WIDTHS else 1 / rates.widen


def _arranging(p: Problem, rates: machine.Rates, inner: str) -> float:
    """All calls, and x on its way into operands; float32 is read where it lies."""
    if inner == "fma" and p.x == "float32":
        return rates.call
    numbers, passes, calls = p.m * p.k, 1, 2
    if isinstance(p.x, Format):
        calls += 1  # its scales are spread over rows
        passes += _VALUED * (p.x.zero is not None)
    passes += _SUMMED * p.w.bias
    longest = max(min(numbers, _ALONE), numbers / min(p.threads, p.m))
    return calls * rates.call + passes * longest * _SIZES[inner] / rates.arrange


def _finishing(p: Problem, rates: machine.Rates) -> float:
    passes = 1 if p.activation in (None, "relu") else _CURVED
    return passes * p.m * p.n / p.threads / rates.finish

"""What `bench/gpu.py` measures, section by section, beside the bars for it.

Bars are those of one NVIDIA H200, as far as possible as shares of what the same run measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from harness.records import OURS, Beside, Entrant, Faster, Group, Rate, Reaches, Target, Within
from harness.work import Work

Shapes = tuple[tuple[int, int], ...]
Size = Literal["quick", "usual", "all"]

# Both sides of every edge between tiles, then powers of two.
ROWS = (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 256, 512, 1024, 4096)
SHAPES: Shapes = ((4096, 4096), (8192, 8192), (11008, 4096), (28672, 8192))
"""(n, k) of attention and MLP layers of 7 to 70 billion parameters."""
UGLY: Shapes = (
    *((n, 4096) for n in (10944, 4304, 7392, 2112, 112, 97)),
    *((4096, k) for k in (10944, 4100, 4112)),
)
"""What no tile divides; 4100 columns of 4 bits are rows that lie at no multiple of 4 bytes."""

INTEGERS = (
    *(f"int1_{block}_asym" for block in ("g128", "g32", "row")),  # -1 and 0 alone have no sign
    *(f"int{bits}_{block}" for bits in range(2, 9) for block in ("g128", "g32", "row")),
)
CODEBOOKS = tuple(f"{name}_{block}" for name in ("nf4", "fp4") for block in ("g128", "g32", "row"))
FLOATS = ("mxfp4", "mxfp8", "nvfp4", "fp8_g128", "fp8_g32", "fp8_row")
FORMATS = (*INTEGERS, *CODEBOOKS, *FLOATS)
FEW_FORMATS = (
    "int1_g128_asym",
    *(f"int{bits}_g128" for bits in range(2, 9)),
    *("int4_g32", "int4_row", "int8_row", "nf4_g128", "fp4_g128"),
    *("mxfp4", "mxfp8", "nvfp4", "fp8_row"),
)
BASE = "int4_g128"

DENSE = ("torch.dense", "cupy.dense")
"""cuBLAS on weights that are not quantized, by two roads."""
LARGE = 100e6
"""Bytes of a matrix from which on its reading is not shorter than a kernel's own start and end."""


@dataclass(frozen=True)
class Choice:
    """How much of everything is measured."""

    size: Size = "usual"

    def of(self, quick: tuple, usual: tuple, whole: tuple) -> tuple:  # type: ignore[type-arg]
        """What this choice takes of a section's shapes, rows or formats."""
        return {"quick": quick, "usual": usual, "all": whole}[self.size]


def weights(choice: Choice) -> list[Group]:
    """Weights of 1 to 8 bits, x in 16 bits: every format beside int4, int4 beside everybody."""
    shapes: Shapes = choice.of((SHAPES[0], SHAPES[3]), SHAPES, SHAPES)
    dtypes: tuple[str, ...] = choice.of(("bfloat16",), *[("bfloat16", "float16")] * 2)
    formats: tuple[str, ...] = choice.of(FEW_FORMATS, FEW_FORMATS, FORMATS)
    rows: tuple[int, ...] = choice.of((1, 16, 256), (1, 16, 64, 256, 4096), ROWS)
    return [_weights(n, k, x, formats, rows) for x in dtypes for n, k in shapes]


def _weights(n: int, k: int, x: str, formats: Iterable[str], rows: tuple[int, ...]) -> Group:
    base = Entrant(OURS, Work(n, k, BASE, x))
    others = [Entrant(OURS, Work(n, k, name, x)) for name in formats if name != BASE]
    peers = [Entrant(name, _dense(n, k, x)) for name in DENSE]
    peers.append(Entrant("torch.tinygemm", base.work))
    # GemLite tunes itself anew for many numbers of rows, which takes it a while.
    some = (*others, Entrant("gemlite", base.work))
    turns = [(base, *peers, *(some if m in rows else ())) for m in ROWS]
    targets = [*_int4_bars(base, n, k), *_other_bars(base, others, rows)]
    return Group(
        "weights",
        tuple(tuple((e, m) for e in turn) for turn, m in zip(turns, ROWS, strict=True)),
        tuple(targets),
    )


def _int4_bars(base: Entrant, n: int, k: int) -> list[Target]:
    """W4A16 in groups of 128, beside the dense product of x's dtype."""
    bars: list[Target] = []
    if min(n, k) >= 8192:
        for first, last, factor in (
            (1, 16, 3.2),
            (17, 32, 2.6),
            (33, 64, 1.8),
            (65, 128, 1.2),
            (129, 1 << 30, 0.97),
        ):
            bars += [Faster(peer, factor, first, last, of=base.work) for peer in DENSE]
        if n * k // 2 >= LARGE:
            bars.append(Reaches("read", 0.9, last=16, of=base.work))
    if (n, k) == (4096, 4096):
        bars.append(Within(7e-6, last=1, of=base.work))
        bars += [Faster(peer, 1.5, last=64, of=base.work) for peer in DENSE]
    return bars


def _other_bars(base: Entrant, others: list[Entrant], rows: tuple[int, ...]) -> list[Target]:
    """Every other width: 8 bits beside the dense product, fewer beside int4 by their bytes."""
    bars: list[Target] = []
    for other in others:
        few = [m for m in rows if m <= 16]
        if other.work.weight.startswith(("int8", "fp8", "mxfp8")):
            bars += [Faster(peer, 1.8, last=16, of=other.work) for peer in DENSE]
        else:
            bars += [Beside(other, base, "byte", 1 / 1.1, m, m) for m in few]
    return bars


def ugly(choice: Choice) -> list[Group]:
    """Shapes of real models that no tile divides, beside the same padded to 128."""
    shapes: Shapes = choice.of(((4304, 4096), (97, 4096), (4096, 4100)), UGLY, UGLY)
    rows: tuple[int, ...] = choice.of((1, 128), (1, 16, 17, 128, 512), ROWS)
    names: tuple[str, ...] = choice.of((BASE,), (BASE,), (BASE, "int3_g128", "fp8_row"))
    groups = []
    for n, k in shapes:
        for name in names:
            odd = Entrant(OURS, Work(n, k, name, "bfloat16"))
            even = Entrant(OURS, Work(_padded(n), _padded(k), name, "bfloat16"))
            turns = tuple(((odd, m), (even, m)) for m in rows)
            bars = tuple(Beside(odd, even, "call", 1 / 1.1, m, m) for m in rows)
            groups.append(Group("ugly", turns, bars))
    return groups


def _padded(size: int) -> int:
    return -(-size // 128) * 128


def both(choice: Choice) -> list[Group]:
    """Both sides quantized: int8 and fp8 by themselves, then int4 weights by int8 and fp8."""
    shapes: Shapes = choice.of(((8192, 8192),), ((4096, 4096), (8192, 8192)), SHAPES)
    rows: tuple[int, ...] = choice.of(
        (16, 1024, 8192), (1, 16, 32, 128, 512, 1024, 4096, 8192), (*ROWS, 8192)
    )
    return [_both(n, k, rows) for n, k in shapes] + [_blocks(4096, 7168, 16384)]


def _both(n: int, k: int, rows: tuple[int, ...]) -> Group:
    whole = Entrant(OURS, Work(n, k, "int8_row", "int8_row"))
    row = Entrant(OURS, Work(n, k, "fp8_row", "fp8_row"))
    tensor = Entrant(OURS, Work(n, k, "fp8_tensor", "fp8_tensor"))
    narrow = [
        Entrant(OURS, Work(n, k, w, x)) for x in ("int8_row", "fp8_row") for w in ("int4_row", BASE)
    ]
    peers = [
        Entrant("torch.int_mm", whole.work),
        Entrant("torch.scaled_mm", row.work),
        Entrant("torch.scaled_mm", tensor.work),
        Entrant("torch.dense", _dense(n, k, "bfloat16")),
    ]
    bars: list[Target] = [Rate(1350e12, first=1024, of=whole.work)]
    if (n, k) == (8192, 8192):
        for each in (row, tensor):
            bars.append(Faster("torch.scaled_mm", 1.0, 8192, 8192, of=each.work))
        bars += [Beside(row, tensor, "call", 0.97, m, m) for m in rows if m == 8192]
    for other in narrow:
        bars += [Beside(other, row, "call", 1.7, m, m) for m in rows if m <= 32]
        bars += [Beside(other, row, "call", 0.9, m, m) for m in rows if m >= 512]
    entrants = [whole, row, tensor, *narrow, *peers]
    return Group("both", tuple(tuple((e, m) for e in entrants) for m in rows), tuple(bars))


def _blocks(m: int, n: int, k: int) -> Group:
    """fp8, a scale for 1 x 128 of x and for 128 x 128 of w."""
    ours = Entrant(OURS, Work(n, k, "fp8_128x128", "fp8_g128"))
    peers = [Entrant(name, _dense(n, k, "bfloat16")) for name in DENSE]
    bars: list[Target] = [Rate(1400e12, of=ours.work)]
    bars += [Faster(peer, 1.0, of=ours.work) for peer in DENSE]
    return Group("both", (tuple((e, m) for e in (ours, *peers)),), tuple(bars))


def conversions(choice: Choice) -> list[Group]:
    """quantize and dequantize beside a copy of as many bytes."""
    shapes: Shapes = choice.of(((8192, 8192),), ((4096, 4096), (8192, 8192)), SHAPES)
    names: tuple[str, ...] = choice.of(
        ("int4_g128", "int8_row", "fp8_row", "fp8_tensor", "fp8_g128", "fp8_128x128", "mxfp4"),
        (*FEW_FORMATS, "fp8_tensor", "fp8_g128", "fp8_128x128", "int8_tensor"),
        (*FORMATS, "fp8_tensor", "fp8_128x128", "int8_tensor", "int8_128x128"),
    )
    bars = (Reaches("copy", 0.92),)
    return [
        Group(
            "conversions",
            (
                tuple(
                    (Entrant(f"{OURS}.{step}", Work(n, k, name, "bfloat16")), n) for name in names
                ),
            ),
            bars,
        )
        for n, k in shapes
        for step in ("quantize", "dequantize")
    ]


def fused(choice: Choice) -> list[Group]:
    """silu(gate) * up and rmsnorm, quantized on the way out, beside a copy of as many bytes."""
    shapes: Shapes = choice.of(((4096, 8192),), ((4096, 4096), (4096, 8192)), SHAPES)
    names = ("int8_row", "fp8_row", "fp8_g128")
    return [
        Group(
            "fused",
            (
                tuple(
                    (Entrant(f"{OURS}.{step}", Work(n, k, name, "bfloat16")), n) for name in names
                ),
            ),
            (Reaches("copy", 1 / 1.1),),
        )
        for n, k in shapes
        for step in ("silu_mul", "rmsnorm")
    ]


def dispatch(choice: Choice) -> list[Group]:
    """Time of the host from the call to the launch, on arrays of the GPU."""
    groups = []
    for name, seconds in (("matmul", 8e-6), ("plan", 3e-6)):
        entrants = [
            Entrant(f"{OURS}.{name}", Work(4096, 4096, weight, x))
            for weight, x in ((BASE, "bfloat16"), ("int8_row", "int8_row"))
        ]
        turn = tuple((e, 1) for e in entrants)
        groups.append(Group("dispatch", (turn,), (Within(seconds),)))
    return groups


def _dense(n: int, k: int, x: str) -> Work:
    return Work(n, k, x, x)


SECTIONS: dict[str, Callable[[Choice], list[Group]]] = {
    "weights": weights,
    "both": both,
    "conversions": conversions,
    "fused": fused,
    "dispatch": dispatch,
    "ugly": ugly,
}
"""By name, the most wanted first; the first line of a function's documentation is the title."""

"""What is measured, section by section, beside the targets for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.records import OURS, Beside, Entrant, Faster, Group, Reaches, Target
from harness.work import Work

Shapes = tuple[tuple[int, int], ...]

GGML = {
    kind: tuple(f"ggml.{kind}.{b}" for b in ("plain", "repack", "amx"))
    for kind in ("q4_0", "q4_k", "q8_0")
}
SQUARE: Shapes = ((4096, 4096),)
TALL: Shapes = (*SQUARE, (11008, 4096), (4096, 11008))
GRID: Shapes = tuple((n, k) for n in (2048, 4096, 11008) for k in (2048, 4096, 11008))
FEW_ROWS = (1, 4, 16)
SOME_ROWS = (*FEW_ROWS, 64, 128, 512)
QUICK_ROWS = (1, 16, 128)


@dataclass(frozen=True)
class Choice:
    """What of everything is measured; empty is each section's own."""

    shapes: Shapes = ()
    """(n, k) each."""
    rows: tuple[int, ...] = ()
    quick: bool = False

    def grid(self, shapes: Shapes) -> Shapes:
        """The shapes to measure, of those that the section has."""
        return self.shapes or (SQUARE if self.quick else shapes)

    def heights(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers of rows to measure."""
        return self.rows or (QUICK_ROWS if self.quick else rows)


def int4_by_int8(choice: Choice) -> list[Group]:
    """int4 weights; x quantized to int8 on the way in."""
    # ggml has no groups of 128. Q4_K is its usual format at these bytes, Q4_0 the one of 32.
    peers = {128: ("onnxruntime.acc4", *GGML["q4_k"]), 32: ("onnxruntime.acc4", *GGML["q4_0"])}
    enough = 0.85
    wanted = {
        128: (
            Faster("onnxruntime.acc4", 3, bandwidth=enough),
            Faster("ggml.q4_k.plain", 1.5, last=1, bandwidth=enough),
            Faster("ggml.q4_k.plain", 2, first=2, bandwidth=enough),
        ),
        32: (
            Faster("onnxruntime.acc4", 2, bandwidth=enough),
            Faster("ggml.q4_0.repack", 1.5, bandwidth=enough),
        ),
    }
    return [
        _beat(
            "int4xint8",
            Work(n, k, f"int4_g{g}", inner=f"int8_g{g}"),
            peers[g],
            choice.heights(SOME_ROWS),
            (*targets, Reaches("int8_dot", 0.75, first=512)),
            enough,
        )
        for g, targets in wanted.items()
        for n, k in choice.grid(GRID)
    ]


def int8_by_int8(choice: Choice) -> list[Group]:
    """int8 weights; x int8 already, or quantized on the way in."""
    rows = choice.heights(SOME_ROWS)
    int_mm = (Faster("torch.int_mm", 1.5, last=127), Faster("torch.int_mm", 1, first=128))
    peak = Reaches("int8_dot", 0.75, first=512)
    groups = []
    for n, k in choice.grid(TALL):
        both = Work(n, k, "int8_row", x="int8_row")
        groups.append(_beat("int8xint8", both, ("torch.int_mm",), rows, (*int_mm, peak)))
        inside = Work(n, k, "int8_row", inner="int8_row")
        groups.append(_beat("int8xint8", inside, ("torchao.int8dyn",), rows, (peak,)))
        grouped = Work(n, k, "int8_g32", inner="int8_g32")
        groups.append(_beat("int8xint8", grouped, ("onnxruntime.acc4", *GGML["q8_0"]), rows, ()))
    return groups


def any_by_bfloat16(choice: Choice) -> list[Group]:
    """x stays bfloat16."""
    rows = choice.heights((*SOME_ROWS, 2048, 4096))
    everyone = ("torch.bfloat16", "openblas.float32")
    peers = {
        "int4_g128": ("torch.int4pack", "torchao.int4", "onnxruntime.acc0", "mlx"),
        "int8_g128": ("onnxruntime.acc0", "mlx"),
        "int8_row": ("torch.int8pack", "torchao.int8"),
        "fp8_row": (),
        "nf4_g64": (),
    }
    targets = (
        Reaches("read", 0.85, last=1),
        Faster("torch.int4pack", 1.5, last=16),
        Faster("onnxruntime.acc0", 2, last=16),
        Faster("torch.bfloat16", 0.97, first=64),
    )
    return [
        _beat("bfloat16", Work(n, k, weight, x="bfloat16"), (*everyone, *others), rows, targets)
        for n, k in choice.grid(TALL)
        for weight, others in peers.items()
    ]


def formats(choice: Choice) -> list[Group]:
    """Every other width and kind of block beside our own int4 and int8."""
    narrow = ("int1_g128_asym", "int2_g128", "int3_g128", "mxfp4", "nvfp4", "int4_128x128")
    wide = ("int5_g128", "int6_g128", "int7_g128", "mxfp6", "mxfp8", "int8_128x128", "fp8_128x128")
    integers = {
        base: tuple(name for name in others if name.startswith("int"))
        for base, others in (("int4_g128", narrow), ("int8_g128", wide))
    }
    groups = []
    for n, k in choice.grid(SQUARE):
        for base, others in (("int4_g128", narrow), ("int8_g128", wide)):
            works = [Work(n, k, name, "bfloat16") for name in (base, *others)]
            groups.append(_family(works, choice.heights((1, 512))))
            works = [Work(n, k, name, inner="int8_g128") for name in (base, *integers[base])]
            groups.append(_family(works, choice.heights((1, 512))))
    return groups


def _family(works: list[Work], rows: Iterable[int]) -> Group:
    first, *others = (Entrant(OURS, work) for work in works)
    targets = [
        Beside(other, first, "byte" if m == 1 else "call", 1 / 1.15, m, m)
        for m in rows
        for other in others
    ]
    return Group(
        "formats", tuple(tuple((e, m) for e in (first, *others)) for m in rows), tuple(targets)
    )


def ragged(choice: Choice) -> list[Group]:
    """Shapes of real models that no tile divides, beside the same padded to 128."""
    shapes = [(n, 4096) for n in (10944, 4304, 7392, 2112, 112, 97)]
    shapes += [(4096, 10944), (4096, 4100)]
    if choice.quick:
        shapes = [(4304, 4096), (97, 4096), (4096, 4100)]
    groups = []
    for n, k in choice.shapes or shapes:
        for x, inner in (("bfloat16", None), ("float32", "int8_g128")):
            odd = Entrant(OURS, Work(n, k, "int4_g128", x, inner))
            even = Entrant(OURS, Work(_padded(n), _padded(k), "int4_g128", x, inner))
            rows = choice.heights((1, 16, 128, 512))
            groups.append(
                Group(
                    "ragged",
                    tuple(((odd, m), (even, m)) for m in rows),
                    tuple(Beside(odd, even, "call", 1 / 1.10, m, m) for m in rows),
                )
            )
    return groups


def _padded(size: int) -> int:
    return -(-size // 128) * 128


def conversions(choice: Choice) -> list[Group]:
    """quantize, prepare and dequantize beside a copy."""
    names = (
        ("int4_g128",)
        if choice.quick
        else ("int4_g128", "int8_row", "fp8_row", "nf4_g64", "mxfp4", "nvfp4", "int3_g128")
    )
    groups = []
    for n, k in choice.grid(SQUARE):
        for name in names:
            entrants = [
                Entrant(f"{OURS}.{step}", Work(n, k, name))
                for step in ("quantize", "prepare", "dequantize")
            ]
            groups.append(
                Group("conversions", (tuple((e, 1) for e in entrants),), (Reaches("copy", 0.7),))
            )
    return groups


def growth(choice: Choice) -> list[Group]:
    """Cubes from 1024 to 8192, and one thread beside all."""
    sizes = (1024, 2048) if choice.quick else (1024, 2048, 4096, 8192)
    groups = []
    for weight, x, inner in (
        ("int4_g128", "float32", "int8_g128"),
        ("int8_row", "int8_row", None),
        ("int4_g128", "bfloat16", None),
    ):
        cubes = [(Entrant(OURS, Work(size, size, weight, x, inner)), size) for size in sizes]
        # The fastest rate is not known beforehand: every size beside every other one.
        targets: list[Target] = [
            Beside(entrant, other, "operation", 1 / 1.15, m, other_m)
            for entrant, m in cubes
            for other, other_m in cubes
            if m != other_m
        ]
        groups.append(Group("growth", (tuple(cubes),), tuple(targets)))
        work = Work(2048, 2048, weight, x, inner)
        one, two = Entrant(OURS, work, threads=1), Entrant(OURS, work, threads=2)
        groups.append(
            Group(
                "growth", (((one, 512), (two, 512)),), (Beside(two, one, "call", 1.85, 512, 512),)
            )
        )
    return groups


def _beat(
    section: str,
    work: Work,
    peers: Iterable[str],
    rows: Iterable[int],
    targets: tuple[Target, ...],
    bandwidth: float | None = None,
) -> Group:
    """Everyone in turn. Peers without a target of their own are to be slower than lowbit."""
    peers = tuple(peers)
    targets = tuple(t for t in targets if not isinstance(t, Faster) or t.peer in peers)
    named = {t.peer for t in targets if isinstance(t, Faster)}
    rest = tuple(Faster(peer, 1, bandwidth=bandwidth) for peer in peers if peer not in named)
    entrants = [Entrant(name, work) for name in (OURS, *peers)]
    turns = tuple(tuple((entrant, m) for entrant in entrants) for m in rows)
    return Group(section, turns, (*targets, *rest))


SECTIONS: dict[str, Callable[[Choice], list[Group]]] = {
    "int4xint8": int4_by_int8,
    "int8xint8": int8_by_int8,
    "bfloat16": any_by_bfloat16,
    "formats": formats,
    "ragged": ragged,
    "conversions": conversions,
    "growth": growth,
}
"""By name; the first line of a function's documentation is the section's title."""

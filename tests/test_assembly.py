"""The machine code of every instruction set has the instructions that it was designed around.

Loops are found in the control flow of the assembler text; those with the instruction that
multiplies are the hot ones. Each is audited for what it must and must not contain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from lowbit.formats.codebook import NF4
from lowbit.formats.declare import Element, codebook, floating, integer
from lowbit.kernels.cpu import native, program
from lowbit.kernels.cpu.isa import RECORDS
from lowbit.kernels.cpu.spec import METHODS, Spec

ISAS = {isa.name: isa for isa in RECORDS}
# What the generic record is on the machines that most people have.
ISAS["generic"] = replace(ISAS["generic"], triple="x86_64-unknown-linux-gnu")

# Control flow.


@dataclass
class Block:
    """Instructions that are executed one after the other, and the labels where it goes on."""

    labels: list[str]
    lines: list[str]
    targets: list[str]
    falls: bool = True
    """It may go on with the block below."""


_JUMP = re.compile(r"(?P<name>j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s+(?:.*,\s*)?(?P<target>\.L\w+)$")
_END = re.compile(r"(?:ret\w*|ud2|brk|jmp\w*|br?)(?:\s|$)")


def functions(assembly: str) -> dict[str, list[Block]]:
    """Basic blocks of each function, in the order of the text."""
    found: dict[str, list[Block]] = {}
    for name, body in re.findall(r"^(\w+):[^\n]*\n(.*?)^\.Lfunc_end", assembly, re.M | re.S):
        blocks = [Block([], [], [])]
        for text in body.splitlines():
            # A comment begins with # on x86, where $ marks numbers, and with // on aarch64.
            line = re.sub(r"\s+", " ", re.sub(r"(?:\s|^)#.*|//.*", "", text)).strip()
            label = re.fullmatch(r"(\.L\w+):", line)
            if label:
                if blocks[-1].lines:
                    blocks.append(Block([], [], []))
                blocks[-1].labels.append(label[1])
            elif line and not line.startswith("."):
                blocks[-1].lines.append(line)
                jump = _JUMP.fullmatch(line)
                if jump or _END.match(line):
                    blocks[-1].targets = [jump["target"]] if jump else []
                    blocks[-1].falls = not _END.match(line)
                    blocks.append(Block([], [], []))
        found[name] = blocks
    return found


class Loop(NamedTuple):
    """Instructions of a loop: those of loops inside are apart."""

    own: list[str]
    inside: list[str]


def loops(blocks: Sequence[Block]) -> list[Loop]:
    """All loops, in any order."""
    place = {label: i for i, block in enumerate(blocks) for label in block.labels}
    after = [
        {place[target] for target in block.targets if target in place}
        | ({i + 1} if block.falls and i + 1 < len(blocks) else set())
        for i, block in enumerate(blocks)
    ]
    before: list[set[int]] = [set() for _ in blocks]
    for i, following in enumerate(after):
        for j in following:
            before[j].add(i)
    dominators = _dominators(before)
    bodies: dict[int, set[int]] = {}
    for end, following in enumerate(after):
        for head in following & dominators[end]:
            body, left = bodies.setdefault(head, {head}), [end]
            while left:
                i = left.pop()
                if i not in body:
                    body.add(i)
                    left += before[i]

    def lines(part: set[int]) -> list[str]:
        return [line for i in sorted(part) for line in blocks[i].lines]

    found = []
    for body in bodies.values():
        inside = set().union(*(other for other in bodies.values() if other < body))
        found.append(Loop(lines(body - inside), lines(inside)))
    return found


def _dominators(before: Sequence[set[int]]) -> list[set[int]]:
    """For each block those that every way to it passes through; empty where no way leads."""
    everything = set(range(len(before)))
    found = [{0}, *(set(everything) for _ in before[1:])]
    changed = True
    while changed:
        changed = False
        for i in range(1, len(before)):
            ways = [found[j] for j in before[i]]
            now = {i} | set.intersection(*ways) if ways else set()
            changed |= now != found[i]
            found[i] = now
    return found


# What is wanted: patterns, each matched anywhere in a line.

# Vectors on the stack. %rbp is a register like others.
STACK = r"%[xyz]mm\d+.*\(%rsp\b|\(%rsp\b.*%[xyz]mm|\b[qdv]\d+\b.*\[sp\b"
CALL = r"^(?:call\w*|blr?) "
GATHER = r"^v?p?gather\w* "
LANE_LOAD = r"^v?(?:pinsr|insertps)\w* .*\(|^ld1 \{ v\d+\.\w \}\["  # one table entry at a time
NEVER = (STACK, CALL, GATHER)


@dataclass(frozen=True)
class Audit:
    """What the hot loops of a program look like."""

    product: str
    """The instruction that makes a loop hot, at the beginning of a line."""
    wanted: tuple[str, ...] = ()
    """In every hot loop."""
    unwanted: tuple[str, ...] = ()
    """In none."""
    function: str = "rows"
    """How the names of the functions begin."""
    never: tuple[str, ...] = NEVER

    def complaints(self, assembly: str) -> list[str]:
        """What is wrong."""
        found = []
        hot = list(self._hot(assembly))
        if not hot:
            found.append(f"no loop with {self.product}")
        for name, loop in hot:
            text = "\n".join(loop)
            for each in self.wanted:
                if not re.search(each, text, re.M):
                    found.append(f"{name}: no {each}")
            for line in loop:
                if any(re.search(each, line) for each in (*self.never, *self.unwanted)):
                    found.append(f"{name}: {line}")
        return found

    def _hot(self, assembly: str) -> Iterator[tuple[str, list[str]]]:
        for name, blocks in functions(assembly).items():
            if name.startswith(self.function):
                for loop in loops(blocks):
                    here, deeper = (
                        any(re.match(self.product, line) for line in lines) for lines in loop
                    )
                    if here and not deeper:
                        yield name, loop.own


@dataclass(frozen=True)
class Rule:
    """Audits that the programs of some records, methods and elements pass."""

    records: tuple[str, ...]
    inner: str
    methods: tuple[str, ...]
    elements: tuple[Element, ...]
    audits: tuple[Audit, ...]


def bits(first: int, *others: int, signed: bool = True) -> tuple[Element, ...]:
    """Integers of these widths."""
    return tuple(integer(each, signed=signed) for each in (first, *others))


E2M1, E4M3 = floating(2, 1, specials="none"), floating(4, 3, specials="fn")
ODD5 = codebook("odd5", (np.arange(32) - 7.25) ** 3)
ODD = ODD5, codebook("odd6", np.sqrt(np.arange(64)) - 2)
PAIRS = ("amx", "avx512bf16")
WIDE, NARROW = (*PAIRS, "avx512vnni"), ("avxvnni", "avx2")
ARM = ("neoni8mm", "neon")
DIRECT, DECODED, VECTORS = ("direct",), ("decoded",), ("direct", "decoded")
Z, Y = r"%zmm\d+$", r"%ymm\d+$"

# Loops over operands that were decoded before: nothing is decoded there.
DECODING = (r"^vp?s[rl]l", r"^vpand", r"^vpermi?t?[0-9]?[pdw]", r"^vcvt", r"^[us]cvtf", r"^[us]shr")
VNNI = Audit("vpdpbusd ", (rf"^vpdpbusd .*{Z}", r"^v\w*broadcast\w+ |1to16"), (r"%[xy]mm",))
FMA512 = Audit(
    "vfmadd", (rf"^vfmadd\d+ps .*{Z}", r"^v\w*broadcast\w+ |1to16"), (r"%[xy]mm", LANE_LOAD)
)
BF16 = Audit(
    "vdpbf16ps ", (rf"^vdpbf16ps .*{Z}", r"^v\w*broadcast\w+ |1to16"), (r"%[xy]mm", LANE_LOAD)
)
FMA256 = Audit("vfmadd", (rf"^vfmadd\d+ps .*{Y}",), (r"%[xz]mm", LANE_LOAD))
TILES, SINGLE = ("tiles",), ("single",)
FMLA = Audit("fmla ", unwanted=(LANE_LOAD,))
SDOT, SMMLA = (Audit(f"{name} ", (rf"^{name} .*\.16b",)) for name in ("sdot", "smmla"))


def also(audit: Audit, *wanted: str, unwanted: tuple[str, ...] = ()) -> Audit:
    """The same and more."""
    return replace(audit, wanted=audit.wanted + wanted, unwanted=audit.unwanted + unwanted)


def unrolled(*wanted: str) -> Audit:
    """The loop that decodes once for all rows: it ends in stores of whole vectors."""
    return Audit(r"vmov\w+ %[yz]mm\d+, .*\(|st[pr] q", wanted, (LANE_LOAD,), "unroll")


def tile(product: str, *wanted: str, unwanted: str = r"%[xyz]mm") -> Audit:
    """A loop of tiles, which come from memory and stay in their registers."""
    outside = ("^tilestored", "^tilezero", "^ldtilecfg", unwanted, LANE_LOAD)
    return Audit(f"{product} ", ("^tileloadd ", *wanted), outside)


def decoding(product: str, *wanted: str) -> Audit:
    """A loop of tiles that decodes the next one beside."""
    return tile(product, *wanted, r"^vmov\w+ %zmm\d+, .*\(", unwanted=r"%[xy]mm")


RULES = (
    Rule(WIDE, "dot", DIRECT, (*bits(1, 2, 4, 8), *bits(4, signed=False)), (VNNI,)),
    Rule(WIDE, "dot", DECODED, bits(3, 4, 5), (also(VNNI, unwanted=DECODING), unrolled("^vpand"))),
    Rule(WIDE, "fma", DIRECT, (NF4, E2M1, integer(4)), (also(FMA512, rf"^vperm(ps|d) .*{Z}"),)),
    Rule(WIDE, "fma", DIRECT, ODD, (also(FMA512, rf"^vperm[it]2(ps|d) .*{Z}"),)),
    Rule(WIDE, "fma", DIRECT, (integer(8), E4M3), (FMA512,)),
    Rule(
        WIDE, "fma", DECODED, (NF4,),
        (also(FMA512, unwanted=DECODING), unrolled("^vperm(ps|d) ")),
    ),
    Rule(PAIRS, "bf16", DIRECT, (NF4, E2M1, integer(4), ODD5), (also(BF16, rf"^vpermw .*{Z}"),)),
    Rule(PAIRS, "bf16", DIRECT, (integer(8), E4M3), (BF16,)),
    Rule(PAIRS, "bf16", DECODED, (NF4,), (also(BF16, unwanted=DECODING), unrolled("^vpermw "))),
    Rule(("amx",), "dot", TILES, bits(4, 8), (tile("tdpbssd"),)),
    Rule(("amx",), "dot", TILES, bits(3, 8, signed=False), (tile("tdpbsud"),)),
    Rule(("amx",), "bf16", TILES, (NF4, E4M3), (tile("tdpbf16ps"), unrolled())),
    Rule(("amx",), "dot", SINGLE, bits(4), (decoding("tdpbssd", "^vpand"),)),
    Rule(("amx",), "dot", SINGLE, bits(3, 4, signed=False), (decoding("tdpbsud", "^vpand"),)),
    Rule(("amx",), "bf16", SINGLE, (NF4, E2M1), (decoding("tdpbf16ps", "^vpermw "),)),
    Rule(
        ("avxvnni",), "dot", VECTORS, bits(2, 4, 8),
        (Audit(r"\{vex\} vpdpbusd ", (rf"^\{{vex\}} vpdpbusd .*{Y}",), (r"%[xz]mm",)),),
    ),
    Rule(
        ("avx2",), "dot", VECTORS, bits(2, 4),
        (Audit("vpmaddwd ", (rf"^vpmaddubsw .*{Y}", rf"^vpmaddwd .*{Y}"), (r"%[xz]mm",)),),
    ),
    # Bytes saturate there, so they are widened.
    Rule(
        ("avx2",), "dot", VECTORS, bits(8),
        (Audit("vpmaddwd ", (rf"^vpmaddwd .*{Y}",), ("^vpmaddubsw",)),),
    ),
    Rule(NARROW, "fma", DIRECT, (NF4,), (also(FMA256, rf"^vperm(ps|d) .*{Y}"),)),
    Rule(NARROW, "fma", DIRECT, (integer(4), integer(8), E2M1, E4M3), (FMA256,)),
    Rule(
        NARROW, "fma", DECODED, (NF4,),
        (also(FMA256, unwanted=DECODING), unrolled("^vperm(ps|d) ")),
    ),
    Rule(("neon",), "dot", VECTORS, bits(2, 4, 8), (SDOT,)),
    Rule(("neoni8mm",), "dot", VECTORS, bits(2, 4, 8), (SDOT, SMMLA)),
    Rule(ARM, "fma", DIRECT, (NF4, integer(4), integer(8), E2M1, E4M3), (FMLA,)),
    Rule(ARM, "fma", DECODED, (NF4,), (also(FMLA, unwanted=DECODING), unrolled())),
    # Nothing but what every x86-64 has; it need not be fast.
    Rule(
        ("generic",), "dot", VECTORS, bits(4, 8),
        (Audit("pmuludq ", unwanted=("^v", "^pmulld "), never=(CALL,)),),
    ),
    Rule(("generic",), "fma", VECTORS, (NF4,), (Audit("mulpd ", unwanted=("^v",), never=(CALL,)),)),
)  # fmt: skip
CASES = {
    f"{record}: {rule.inner} {method} {element.name}": (record, rule, method, element)
    for rule in RULES
    for record in rule.records
    for method in rule.methods
    for element in rule.elements
}


# What is known to be wrong, all of it vectors that travel over the stack, or tables that are read
# entry by entry. A case that is right again has to leave this list.
FAULTS = {
    r"(amx|avx512\w+): fma direct float8_e4m3fn": "LLVM decodes four panels side by side",
    r"avx2: dot direct int[248]": "constants and temporaries of three rows want a 17th register",
    r"(avxvnni|avx2|neon\w*): fma direct (nf4|float\w+)": "LLVM decodes several steps ahead",
    r"neoni8mm: dot (direct|decoded) int[248]": "LLVM interleaves several steps ahead",
    r"neon\w*: fma decoded nf4": "entries of a table are loaded one by one",
}


@cache
def assembly(record: str, inner: str, method: str, element: Element) -> str:
    spec = Spec(
        inner,
        element,
        method=method,
        tile=16 if method == "single" else 0,
        layout="words16",
        scale_layout="panels16",
        x_scale=True,
    )
    return native.assembly(program.text(spec, ISAS[record]), ISAS[record])


@pytest.mark.parametrize("case", CASES)
def test_hot_loops(case: str) -> None:
    record, rule, method, element = CASES[case]
    text = assembly(record, rule.inner, method, element)
    found = [each for audit in rule.audits for each in audit.complaints(text)]
    if any(re.fullmatch(pattern, case) for pattern in FAULTS):
        assert found, "this is right now: take it off the list"
        known = f"{STACK}|{LANE_LOAD.replace('^', ': ')}"
        found = [each for each in found if not re.search(known, each)]
    assert found == []


def test_every_record_is_audited() -> None:
    for isa in RECORDS:
        audited = {(rule.inner, m) for r, rule, m, _ in CASES.values() if r == isa.name}
        wanted = set(product(("fma", "dot", *["bf16"] * isa.bf16), VECTORS))
        wanted |= set(product(("dot", "bf16"), set(METHODS).difference(VECTORS) if isa.amx else ()))
        assert audited == wanted, isa.name


LISTING = """
f:                                      # @f
# %bb.0:
	testq	%rdi, %rdi
	jle	.LBB0_5
.LBB0_1:                                # outer
	xorl	%eax, %eax
.LBB0_2:                                # inner
	incq	%rax
	cmpq	%rsi, %rax
	je	.LBB0_4
# %bb.3:
	vpaddd	8(%rdx), %zmm0, %zmm0       # the inner loop has two blocks
	jmp	.LBB0_2
.LBB0_4:
	decq	%rdi
	jne	.LBB0_1
.LBB0_5:
	retq
.Lfunc_end0:
g:                                      // @g
	mov	x8, xzr
.LBB1_1:
	add	x8, x8, #1
	tbz	w8, #3, .LBB1_1
	cbz	x0, .LBB1_3
	b.lt	.LBB1_4
.LBB1_3:
	b	.LBB1_1
.LBB1_4:
	ret
.Lfunc_end1:
"""


def test_loops_are_found() -> None:
    found = {name: loops(blocks) for name, blocks in functions(LISTING).items()}
    inner = ["incq %rax", "cmpq %rsi, %rax", "je .LBB0_4", "vpaddd 8(%rdx), %zmm0, %zmm0"]
    outer = ["xorl %eax, %eax", "decq %rdi", "jne .LBB0_1"]
    inner.append("jmp .LBB0_2")
    assert sorted(found["f"]) == sorted([Loop(inner, []), Loop(outer, inner)])
    # Two ways back to one head are one loop.
    assert [loop.own[-1] for loop in found["g"]] == ["b .LBB1_1"]
    assert functions("h:\n\tretq\n.Lfunc_end2:")["h"][0].lines == ["retq"]


DOT, TABLE = "avx512vnni: dot direct int4", "avx512vnni: fma direct nf4"
ONCE, QUADS = "avx512vnni: fma decoded nf4", "neon: dot decoded int8"


@pytest.mark.parametrize(
    ("case", "line", "mutant", "complaint"),
    [
        (DOT, r"vpdpbusd.*", r"\g<0>\n callq f", "callq f"),
        (DOT, r"vpdpbusd.*", r"\g<0>\n vmovups %zmm1, 8(%rsp)", "%zmm1, 8(%rsp)"),
        (DOT, r"vpdpbusd.*", r"\g<0>\n vpaddd -64(%rsp), %zmm1, %zmm1", "vpaddd -64(%rsp)"),
        (DOT, r"vpdpbusd", "vpmaddwd", "no loop with vpdpbusd"),
        (DOT, r"(vpdpbusd.*)zmm(\d+)", r"\1ymm\2", "%ymm"),
        (TABLE, r"vperm(ps|d)\b", "vpermilps", "no ^vperm(ps|d)"),
        (TABLE, r"vperm(ps|d)\b", "vgatherdps", ": vgatherdps"),
        (ONCE, r"vfmadd.*", r"\g<0>\n vpermps %zmm1, %zmm2, %zmm3", "vpermps"),
        ("avx2: dot decoded int8", r"vpmaddwd", r"vpmaddubsw %ymm0, %ymm0, %ymm0\n \g<0>", "ubsw"),
        ("amx: dot tiles int8", r"tdpbssd.*", r"\g<0>\n tilestored %tmm0, (%rax)", "tilestored"),
        (QUADS, r"sdot.*", r"\g<0>\n stp q3, q4, [sp, #16]", "stp q3"),
        (QUADS, r"sdot.*", r"\g<0>\n bl f", "bl f"),
        ("neon: fma direct int8", r"fmla.*", r"\g<0>\n ld1 { v0.s }[1], [x0]", "ld1 { v0.s }"),
    ],
)  # fmt: skip
def test_the_audit_notices(case: str, line: str, mutant: str, complaint: str) -> None:
    record, rule, method, element = CASES[case]
    text = assembly(record, rule.inner, method, element)
    changed = re.sub(line, mutant, text)
    before, after = ([c for a in rule.audits for c in a.complaints(t)] for t in (text, changed))
    assert not any(complaint in each for each in before)
    assert any(complaint in each for each in after)

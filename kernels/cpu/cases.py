"""Random products for the generated kernels, and what the oracle makes of them.

A case takes no way but the generator's: it packs, orders x and calls what `gemm.build` compiled,
with memory around every operand that must not matter or change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lowbit.formats import codes as bitstream
from lowbit.formats.declare import Element
from lowbit.kernels import layouts
from lowbit.kernels.cpu import gemm, oracle
from lowbit.kernels.cpu.gemm import Units
from lowbit.kernels.cpu.isa import Isa, runnable
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.cpu.steps import Steps, narrowed

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def address(a: Array) -> int:
    """Of the first element."""
    pointer: int = a.__array_interface__["data"][0]
    return pointer


def guarded(rows: int, columns: int, dtype: Any, spare: int = 5) -> tuple[Array, Array]:
    """A view with `spare` columns behind each row, and the whole; both full of a pattern."""
    whole = np.zeros((rows + 2, columns + spare), dtype)
    whole.view(np.uint8)[...] = 0xA5
    return whole[1 : rows + 1, :columns], whole


def spaced(a: Array) -> Array:
    """A copy whose rows lie apart."""
    view, _ = guarded(len(a), a.shape[1], a.dtype, 2)
    view[...] = a
    return view


def padded(a: Array, rows: int) -> Array:
    """A copy with rows of a pattern that nothing may depend on: NaN, where they are numbers."""
    whole = np.empty((rows, a.shape[1]), a.dtype)
    whole.view(np.uint8)[...] = 0xFF
    whole[: len(a)] = a
    return whole


def arranged(x: Array, steps: Steps, units: Units, segment: int, rows: int) -> Array:
    """Operands of `rows` rows as bytes, those behind the rows of x full of a pattern.

    Each segment begins with a unit, each granule is in the order of the steps; of a matrix for
    tiles, sixteen rows lie together, 64 bytes of each at a time.
    """
    granules = units.total * units.each
    each = units.each * steps.codes
    whole = padded(np.zeros((len(x), units.total * each), x.dtype), rows)
    for s, first in enumerate(range(0, x.shape[1], segment)):
        part = x[:, first : first + segment]
        start = s * units.segment * each
        whole[: len(x), start : start + part.shape[1]] = part
    ordered = whole.reshape(rows, granules, steps.codes)[:, :, list(steps.order)]
    operands = (
        np.ascontiguousarray(ordered).astype(steps.x_type).reshape(rows, granules * steps.codes)
    )
    octets = np.ascontiguousarray(operands).view(np.uint8)
    if not steps.spec.tiled:
        return octets
    tiles = octets.reshape(rows // 16, 16, units.total, 4 * units.each * steps.count).swapaxes(1, 2)
    chunks = np.full((*tiles.shape[:3], 64), 0xFF, np.uint8)  # a narrower tile reads less
    chunks[..., : tiles.shape[3]] = tiles
    return chunks.reshape(rows, 64 * units.total)


@dataclass
class Case:
    """One product: random operands, what the oracle makes of them, and how to call a kernel."""

    spec: Spec
    m: int
    n: int
    k: int
    segment: int
    seed: int = 0
    every: int = 1  # segments of a scale of w
    x_every: int = 1
    block_rows: int = 1
    alpha: float = 1.0
    bias: bool = False
    exact: bool = False
    """Operands whose every partial sum is representable."""
    wild: bool = False
    """x has infinities, NaN, subnormal and huge numbers."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        spec, element, m, n, k = self.spec, self.spec.element, self.m, self.n, self.k
        self.segments = -(-k // self.segment)
        # Scales that are folded into w's numbers change on their own.
        self.width = spec.folded * gemm.granule(spec) if spec.folded else self.segment
        self.groups = -(-k // self.width)
        self.blocks = -(-self.groups // self.every)
        finite = [c for c, v in enumerate(element.values) if np.isfinite(v)]
        self.codes = rng.choice(np.array(finite, np.uint8), (n, k))
        grid = (-(-n // self.block_rows), self.blocks)
        self.scales = self._stored(rng, self.spec.scale, grid)
        self.zeros = self._zeros(rng, grid)
        self.biases = self._stored(rng, self.spec.scale, grid) if self.spec.biases else None
        self.x_scales = self._x_scales(rng)
        if self.spec.inner == "dot":
            self.x = rng.integers(-128, 128, (m, k)).astype(np.int8)
            if self.exact:
                self.x = (self.x % 9 - 4).astype(np.int8)
        elif self.exact:
            self.x = rng.integers(-4, 5, (m, k)).astype(np.float32)
            self.x[:, rng.random(k) < 0.2] = 0
        else:
            self.x = (rng.standard_normal((m, k)) * 2.0 ** rng.integers(-9, 9, k)).astype("f4")
            if self.spec.inner == "bf16":
                self.x = self.x.astype(BFLOAT16).astype(np.float32)
        if self.wild:
            strange = np.array([np.inf, -np.inf, np.nan, 1e-40, -3e38, -0.0, 2.0**-149], np.float32)
            place = rng.random((m, k)) < 0.1
            self.x = np.where(place, rng.choice(strange, (m, k)), self.x).astype(np.float32)
        self.addend = rng.standard_normal(n).astype(np.float32) if self.bias else None
        self.residual: Array | None = None
        if self.spec.residual is not None:
            self.residual = rng.standard_normal((m, n)).astype(self.spec.residual)
        self.x_sums = np.zeros((m, self.segments), np.float32)
        if k and self.spec.biases:
            starts = np.arange(0, k, self.segment)
            with np.errstate(invalid="ignore", over="ignore"):
                self.x_sums = np.add.reduceat(self.x, starts, axis=1)

    def _stored(self, rng: np.random.Generator, kind: Element | str, grid: Any) -> Array:
        if isinstance(kind, Element):
            finite = [c for c, v in enumerate(kind.values) if 2.0**-30 < abs(v) < 2.0**30]
            return np.asarray(rng.choice(np.array(finite, np.uint8), grid))
        if self.exact:
            return np.asarray(2.0 ** rng.integers(-2, 3, grid), kind)
        return np.asarray(rng.standard_normal(grid) * 2.0 ** rng.integers(-6, 6, grid), kind)

    def _zeros(self, rng: np.random.Generator, grid: Any) -> Array | None:
        if self.spec.zero is None:
            return None
        if self.spec.zero in ("int8", "uint8"):
            low = -8 if self.spec.zero == "int8" else 0
            return np.asarray(rng.integers(low, low + 16, grid), self.spec.zero)
        return np.asarray(rng.standard_normal(grid) * 3, self.spec.zero)

    def _x_scales(self, rng: np.random.Generator) -> Array | None:
        if not self.spec.x_scale:
            return None
        grid = (self.m, -(-self.segments // self.x_every))
        return self._stored(rng, "float32", grid)

    def spread(self, blocks: Array, kind: Element | str) -> Array:
        """float32 [n, groups]."""
        if isinstance(kind, Element):
            blocks = np.array(kind.values, np.float32)[blocks]
        rows, columns = np.arange(self.n) // self.block_rows, np.arange(self.groups) // self.every
        return np.asarray(blocks, np.float32)[rows][:, columns]

    def values(self) -> Array:
        """float32 [n, k], as the kernel multiplies them."""
        element = self.spec.element
        if self.spec.inner == "bf16":
            element = narrowed(element)
        values = np.array(element.values, np.float32)[self.codes]
        if self.zeros is not None:
            wide = self.spread(self.zeros, self.spec.zero or "").repeat(self.width, 1)
            values = values - wide[:, : self.k]
        return np.asarray(values)

    def sums(self) -> Array:
        """float32 [m, n] before the epilogue; of bfloat16 pairs, as vdpbf16ps adds them up."""
        scales = self.spread(self.scales, self.spec.scale)
        x_scales = None
        if self.x_scales is not None:
            x_scales = self.x_scales[:, np.arange(self.segments) // self.x_every]
        if self.spec.inner == "dot":
            return oracle.integer_products(
                self.x, self.values(), scales, self.segment, x_scales=x_scales
            )
        biases = None if self.biases is None else self.spread(self.biases, self.spec.scale)
        x, values, segment = self.x, self.values(), self.segment
        if self.spec.inner == "bf16":
            x, values, segment = self._paired(x), self._paired(values), self._paired_segment()
        return oracle.products(
            x, values, scales, segment, x_scales=x_scales, biases=biases, x_sums=self.x_sums
        )

    def _paired(self, a: Array) -> Array:
        """Columns in the order in which pairs are added: steps ascending, the second part first."""
        steps = Steps(self.spec, runnable()[0])
        wide = np.zeros((len(a), -(-self.k // steps.codes) * steps.codes), np.float32)
        wide[:, : self.k] = a
        order = np.array(steps.order).reshape(-1, 2)[:, ::-1].ravel()
        return wide.reshape(len(a), wide.shape[1] // steps.codes, steps.codes)[:, :, order].reshape(
            wide.shape
        )

    def _paired_segment(self) -> int:
        each = gemm.granule(self.spec)
        return -(-self.segment // each) * each

    def expected(self) -> Array:
        """The result, for specs without activation."""
        v = oracle.finish(self.sums(), self.alpha, self.addend)
        if self.residual is not None:
            v = v + self.residual.astype(np.float32)
        with np.errstate(over="ignore"):
            return v.astype(self.spec.out)

    def exactly(self) -> tuple[Array, Array, int]:
        """float64 sums, those of all magnitudes, and how many roundings a term meets."""
        w = self.values().astype(float)
        w *= self.spread(self.scales, self.spec.scale).repeat(self.width, 1)[:, : self.k]
        x = self.x.astype(float)
        if self.x_scales is not None:
            each = self.segment * min(self.x_every, self.segments)
            x *= self.x_scales.repeat(each, 1)[:, : self.k]
        # A product enters its group's sum by one of at most `segment` fma, in tiles by two more;
        # the group enters the result by one of `segments` fma after the product of two scales.
        count = min(self.segment, self.k) + 2 + self.segments + 2
        return x @ w.T, np.abs(x) @ np.abs(w).T, count

    def run(self, isa: Isa, threads: int | None = None) -> Array:
        """The kernel's result; everything around it must stay as it was."""
        spec, element, rows = self.fitting(isa), self.spec.element, self.m
        compiled = gemm.build(spec, isa)
        steps = compiled.steps
        if spec.tiled:
            rows = -(-rows // 16) * 16
        packed, _ = guarded(self.n, -(-self.k * element.bits // 8), np.uint8, 3)
        packed[...] = bitstream.pack(self.codes, element.bits)
        blocks = {"scales": self.scales, "zeros": self.zeros, "biases": self.biases}
        held = {name: a for name, a in blocks.items() if a is not None}
        codes, stride = packed, self.blocks + 2
        if spec.layout == "words16":
            codes = layouts.words16(packed, element.bits, self.k)
        if spec.scale_layout == "panels16":
            held = {name: layouts.panels16(a) for name, a in held.items()}
        else:
            held = {name: spaced(a) for name, a in held.items()}
        extra: dict[str, Any] = {name: address(a) for name, a in held.items()}
        x = arranged(self.x, steps, Units.of(spec, steps, self.segment, self.k), self.segment, rows)
        sums = self.x_sums
        if spec.inner == "dot":
            starts = np.arange(0, self.k, self.segment)
            sums = np.add.reduceat(self.x.astype(np.int32), starts, axis=1) if self.k else sums
            sums = (sums * (steps.offset if spec.zero is None else 1)).astype(np.int32)
        given = {"x_sums": padded(sums, rows)}
        if self.x_scales is not None:
            given["x_scales"] = padded(self.x_scales, rows)
            extra["x_block_segments"] = self.x_every
        for name, a in given.items():
            extra |= {name: address(a), f"{name}_stride": a.shape[1]}
        if self.addend is not None:
            extra["bias"] = address(self.addend)
        if self.residual is not None:
            extra |= {"residual": address(self.residual), "residual_stride": self.n}
        out, whole = guarded(self.m, self.n, spec.out)
        compiled(
            m=self.m,
            n=self.n,
            k=self.k,
            segment=self.segment,
            x=address(x),
            x_stride=x.strides[0],
            codes=address(codes),
            codes_stride=packed.strides[0],
            scales_stride=stride,
            block_rows=self.block_rows,
            block_segments=self.every,
            out=address(out),
            out_stride=out.strides[0] // out.itemsize,
            alpha=self.alpha,
            threads=threads,
            **extra,
        )
        result = out.copy()
        out.view(np.uint8)[...] = 0xA5
        assert (whole.view(np.uint8) == 0xA5).all(), "written outside of the result"
        return result

    def fitting(self, isa: Isa) -> Spec:
        """The spec; of tiles, the one with as many steps as the segment takes."""
        if self.spec.method != "single":
            return self.spec
        steps = Steps(self.spec, isa)
        units = Units.of(self.spec, steps, self.segment, self.k)
        assert self.m <= 16, "one tile has sixteen rows"
        assert not units.padded, "and takes whole tiles of columns"
        return replace(self.spec, tile=units.each * steps.count)

    def padded(self) -> bool:
        """Tiles of this case are not full, which "single" does not take."""
        return Units.of(self.spec, Steps(self.spec, runnable()[0]), self.segment, self.k).padded

    def check(self, isas: list[Isa] | None = None) -> None:
        """Bit for bit, where the order of the sum is known; else within its bound."""
        if self.spec.inner == "bf16" and self.spec.tiled:
            self.check_bound()
            return
        expected = self.expected()
        for isa in isas or records(self.spec):
            same_bits(self.run(isa), expected, isa.name)

    def check_bound(self) -> None:
        """|C - exact| <= gamma(n) sum |x| |w|, Higham (2nd ed.) 3.1 to 3.5."""
        plain = replace(self, spec=replace(self.spec, out="float32", residual=None), bias=False)
        plain.alpha = 1.0
        exact, size, count = plain.exactly()
        gamma = count * 2.0**-24 / (1 - count * 2.0**-24)
        # The reference has its own error, and each rounding may meet a subnormal number.
        bound = (gamma + 2 * self.k * 2.0**-53) * size + count * (self.k + 1) * 2.0**-149
        if self.spec.inner == "bf16":
            bound += 2.0**-126 * (self.k + 1) * 2.0**12  # taken for zero, then scaled
        if self.biases is not None:
            addends = self.spread(self.biases, self.spec.scale).astype(float)
            exact, size = (
                a + change(self.x_sums.astype(float)) @ change(addends).T
                for a, change in ((exact, np.asarray), (size, np.abs))
            )
            bound += gamma * size
        for isa in records(self.spec, every=False):
            assert (np.abs(plain.run(isa) - exact) <= bound).all(), isa.name


def records(spec: Spec, every: bool = True) -> list[Isa]:
    """Those that run here and have the instructions; or only the first of each kind of code."""
    found, kinds = [], set()
    for isa in runnable():
        if (spec.inner == "bf16" and not isa.bf16) or (spec.tiled and not isa.amx):
            continue
        kind = (isa.lanes, isa.dot if spec.inner == "dot" else isa.permute)
        if every or kind not in kinds:
            found.append(isa)
        kinds.add(kind)
    return found


def same_bits(got: Array, expected: Array, note: str = "") -> None:
    """Raise AssertionError unless all bits are equal; one NaN is as good as another."""
    __tracebackhide__ = True
    kind = f"u{got.itemsize}"
    same = (got.view(kind) == expected.view(kind)) | (np.isnan(got) & np.isnan(expected))
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        count = int((~same).sum())
        raise AssertionError(f"{note}: {count} differ, first {at}: {got[at]} for {expected[at]}")

"""Launches of kernels on CUTLASS, computed in NumPy from nothing but the arguments' bytes.

Of a stack's launch, one matrix: `batch` says which.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import host
import ml_dtypes
import numpy as np
from computed import DTYPES, finished, sums

from lowbit.kernels.cutlass import ampere, blocks, dense, mixed
from lowbit.kernels.cutlass.mixed import BITS

Array = Any
NUMBERS: dict[str, Any] = {
    "cutlass::bfloat16_t": ml_dtypes.bfloat16, "cutlass::half_t": np.float16, "float": np.float32,
    "int8_t": np.int8, "cutlass::float_e4m3_t": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


@dataclass
class Launched:
    """One launch."""

    spec: Any
    argument: bytes
    batch: int = 0

    family: ClassVar[Any]
    """Module of the kernel."""

    def member(self, path: str) -> Any:
        at, code = self.family.layout(self.spec).members[path]
        return struct.unpack_from("<" + code, self.argument, at)[0]

    def matrix(self, name: str, dtype: Any) -> Array:
        return host.read(self.member(f"{name}.descriptor"), dtype, self.batch)

    def vector(self, name: str, count: int, dtype: Any = np.float32) -> Array:
        thread, paths = "epilogue.thread.", self.family.finish(self.spec).operands
        address = self.member(thread + paths[name])
        if not address:
            return np.full(count, self.member(thread + paths[f"{name}.default"]), np.float32)
        step, batch = (self.member(thread + paths[f"{name}.{of}"]) for of in ("step", "batch"))
        size = np.dtype(dtype).itemsize
        return host.memory(address + self.batch * batch * size, (count,), (size * step,), dtype)

    def number(self, name: str) -> np.float32:
        path = self.family.finish(self.spec).operands[name]
        return np.float32(self.member("epilogue.thread." + path))


class OfDense(Launched):
    """Of dense.py."""

    family: ClassVar[Any] = dense

    def compute(self, x_fmt: str, w_fmt: str) -> None:
        """Write the result where the kernel would."""
        first, second = (self.matrix(f"mainloop.{n}", np.uint8) for n in ("first", "second"))
        x, w = (second, first) if self.spec.turned else (first, second)
        added, total = self.spec.residual, sums(x_fmt, w_fmt, x, w)
        if self.spec.x_zero is not None:
            zero = self.vector("x_zero", len(x), self.spec.x_zero).astype(np.int64)
            total = total - zero[:, None] * self.vector("w_sum", len(w), np.int32)
        result = finished(
            total,
            self.vector("x_scale", len(x)),
            self.vector("w_scale", len(w)),
            self.number("alpha"),
            self.vector("bias", len(w)),
            self.spec.activation,
            None if added is None else self.matrix("epilogue.c", DTYPES[added]),
        )
        out = self.matrix("epilogue.d", DTYPES[self.spec.out])
        out[...] = result.astype(out.dtype)


class OfMixed(Launched):
    """Of mixed.py."""

    family: ClassVar[Any] = mixed

    def codes(self, kind: str, name: str) -> Array:
        if BITS[kind] == 4:
            found = self.matrix(name, np.uint8)
            low_first = np.stack([found & 15, found >> 4], -1).reshape(len(found), -1)
            signed = (low_first ^ 8).astype(np.int8) - 8
            return signed if kind == "cutlass::int4b_t" else low_first
        return self.matrix(name, NUMBERS[kind])

    def weights(self) -> Array:
        """Numbers that tensor cores multiply."""
        spec, narrow = self.spec, NUMBERS[self.spec.x]
        codes = self.codes(spec.w, "mainloop.first").astype(np.float64)
        if spec.scale is None:
            assert (codes.astype(narrow).astype(np.float64) == codes).all()
            return codes
        group = np.arange(codes.shape[1]) // spec.tile[2] // self.member("mainloop.reload")
        if spec.scale == mixed.TABLE:
            table = self.matrix("mainloop.scales", np.uint64).T.copy().view(narrow)
            table = table.reshape(len(codes), -1, 8).astype(np.float64)
            signed = codes.astype(np.int64)
            entry = np.take_along_axis(
                table[:, group], (signed & 7)[..., None], 2
            )[..., 0]  # fmt: skip
            return np.where(signed == 0, 0.0, np.where(signed < 0, entry, -entry))
        scales = self.matrix("mainloop.scales", NUMBERS[spec.scale])[group].T.astype(np.float64)
        zeros = np.zeros(1)
        if spec.zero:
            zeros = self.matrix("mainloop.zeros", NUMBERS[spec.scale])[group].T.astype(np.float64)
            found = (codes * scales + zeros).astype(NUMBERS[spec.scale])
            return found.astype(narrow).astype(np.float64)
        return (codes * scales).astype(NUMBERS[spec.scale]).astype(narrow).astype(np.float64)

    def compute(self) -> None:
        """Write the result where the kernel would."""
        spec = self.spec
        x, w = self.codes(spec.x, "mainloop.second").astype(np.float64), self.weights()
        total = (x @ w.T).astype(np.float32)
        scaled = self.vector("x_scale", len(x))[:, None].astype(np.float64) * (
            self.vector("w_scale", len(w)) * total
        )
        alpha, bias = self.number("alpha"), self.vector("bias", len(w))
        result = (np.float64(alpha) * scaled.astype(np.float32) + bias).astype(np.float32)
        result = np.maximum(result, 0) if spec.activation else result
        if spec.residual is not None:
            result = result + self.matrix("epilogue.c", DTYPES[spec.residual]).astype(np.float32)
        out = self.matrix("epilogue.d", DTYPES[spec.out])
        out[...] = result.astype(out.dtype)


class OfBlocks(Launched):
    """Of blocks.py."""

    family: ClassVar[Any] = blocks

    def scales(self, side: str, rows: int, each: int) -> Any:
        """Those of every row, one for 128 columns."""
        name = f"mainloop.shape_{side}"
        shape = self.member(f"{name}.rows"), self.member(f"{name}.columns")
        pitch = 4 * self.member(f"{name}.pitch")
        batch = 4 * self.member(f"{name}.batch")
        address = self.member(f"mainloop.scales_{side}") + self.batch * batch
        return host.memory(address, shape, (pitch, 4), np.float32).repeat(each, 0)[:rows]

    def compute(self, x_fmt: str, w_fmt: str) -> None:
        """Write the result where the kernel would."""
        spec = self.spec
        order = ("second", "first") if spec.turned else ("first", "second")
        x, w = (self.matrix(f"mainloop.{s}", np.uint8) for s in order)
        x_scales = self.scales(order[0], len(x), spec.x_rows)
        w_scales = self.scales(order[1], len(w), spec.w_rows)
        alpha, bias = self.number("alpha"), self.vector("bias", len(w))
        residual = None
        if spec.residual is not None:
            residual = self.matrix("epilogue.c", DTYPES[spec.residual])
        out = self.matrix("epilogue.d", DTYPES[spec.out])
        result = block_sums(x_fmt, w_fmt, x, w, x_scales, w_scales, alpha, bias, residual)
        out[...] = result.astype(out.dtype)


def block_sums(
    x_fmt: str, w_fmt: str, x: Any, w: Any, x_scales: Any, w_scales: Any, alpha: Any, bias: Any,
    residual: Any,
) -> Any:  # fmt: skip
    """Sums of 128 columns, exact, meet the product of both scales by fma."""
    total = np.zeros((len(x), len(w)))
    for i in range(x_scales.shape[1]):
        columns = slice(128 * i, 128 * i + 128)
        part = sums(x_fmt, w_fmt, x[:, columns], w[:, columns]).astype(np.float32)
        scale = x_scales[:, i, None] * w_scales[None, :, i]
        total = (total + part * scale.astype(np.float64)).astype(np.float32)
    result = (np.float64(alpha) * total + bias).astype(np.float32)
    return result if residual is None else result + residual.astype(np.float32)


class OfAmpere(Launched):
    """Of ampere.py."""

    family: ClassVar[Any] = ampere

    def operand(self, name: str) -> Any:
        return self.member("finish." + ampere.finish(self.spec).operands[name])

    def codes(self, name: str, rows: int, steps: str, kind: str) -> Array:
        bits, k = ampere.bits(kind), self.member("shape.k")
        pitch = self.member(f"{steps}.pitch") * bits // 8
        address = self.member(name) + self.batch * self.member(f"{name}_batch")
        held = host.memory(address, (rows, k * bits // 8), (pitch, 1), np.uint8)
        return held if bits == 8 else np.stack([held & 15, held >> 4], -1).reshape(rows, k)

    def rows(self, name: str, dtype: str) -> Array:
        size = np.dtype(DTYPES[dtype]).itemsize
        shape = self.member("extents.m"), self.member("extents.n")
        row = self.operand(f"{name}.row") * size
        address = self.operand(name) + self.batch * self.operand(f"{name}.batch") * size
        return host.memory(address, shape, (row, size), DTYPES[dtype])

    def numbers(self, name: str, count: int, step: int = 1) -> Array:
        address = self.operand(name)
        if not address:
            return np.full(count, self.operand(f"{name}.default"), np.float32)
        address += 4 * self.batch * self.operand(f"{name}.batch")
        return host.memory(address, (count,), (4 * step,), np.float32)

    def compute(self, x_fmt: str, w_fmt: str) -> None:
        """Write the result where the kernel would."""
        m, n = self.member("shape.m"), self.member("shape.n")
        added, out = self.spec.residual, self.rows("out", self.spec.out)
        assert self.operand("bias") % 16 == self.operand("w_scale") % 16 == 0
        result = finished(
            sums(
                x_fmt, w_fmt, self.codes("x", m, "first", self.spec.x),
                self.codes("w", n, "second", self.spec.w),
            ),
            self.numbers("x_scale", m, self.operand("x_scale.step")),
            self.numbers("w_scale", n),
            np.float32(self.operand("alpha")),
            self.numbers("bias", n),
            self.spec.activation,
            None if added is None else self.rows("residual", added),
        )  # fmt: skip
        out[...] = result.astype(out.dtype)

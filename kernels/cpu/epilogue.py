"""From sums to the result: out = round(activation(alpha * sum + bias) + residual).

Conversions are integer arithmetic on bit patterns, to nearest even and with NaN kept, so that
they need no instruction that one target has and another has not.
"""

from __future__ import annotations

from lowbit.kernels.cpu.activation import activate
from lowbit.kernels.cpu.decode import decoder
from lowbit.kernels.cpu.ir import FLOAT, INT, LANES, Function, Module, Value, constant
from lowbit.kernels.cpu.spec import Spec
from lowbit.kernels.layouts import GROUP

_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BIAS = 4 * LANES * GROUP  # bytes of the copy of a tile's bias
EDGE = _BIAS + 2 * 4 * LANES  # and of one vector of residual and of result


def narrow(f: Function, x: Value, dtype: str) -> Value:
    """Float32 lanes to the bit patterns of a float dtype."""
    bits = f.bits(x, INT)
    if dtype == "float32":
        return bits
    convert = {"bfloat16": _to_bfloat16, "float16": _to_float16}[dtype]
    return f.cast("trunc", convert(f, bits), f"<{LANES} x i16>")


def _to_bfloat16(f: Function, bits: Value) -> Value:
    odd = f.op("and", f.op("lshr", bits, 16), 1)
    rounded = f.op("lshr", f.add(f.add(bits, 0x7FFF), odd), 16)
    nan = f.compare("ugt", f.op("and", bits, 0x7FFFFFFF), 0x7F800000)
    return f.select(nan, f.op("or", f.op("lshr", bits, 16), 0x40), rounded)


def _to_float16(f: Function, bits: Value) -> Value:
    size = f.op("and", bits, 0x7FFFFFFF)
    odd = f.op("and", f.op("lshr", size, 13), 1)
    normal = f.op("lshr", f.add(f.add(size, odd), 0xFFF - (112 << 23)), 13)
    # Next to 0.5 float32 has the spacing of float16's subnormal numbers: the addition rounds.
    shifted = f.op("fadd", f.bits(size, FLOAT), 0.5)
    small = f.op("sub", f.bits(shifted, INT), 0x3F000000)
    result = f.select(f.compare("ult", size, 0x38800000), small, normal)
    infinite = f.compare("ugt", size, 0x477FFFFF)
    result = f.select(infinite, constant(INT, 0x7C00), result)
    nan = f.op("or", f.op("lshr", size, 13), 0x7E00)
    result = f.select(f.compare("ugt", size, 0x7F800000), nan, result)
    return f.op("or", result, f.op("and", f.op("lshr", bits, 16), 0x8000))


def writer(spec: Spec, module: Module) -> Function:
    """Finish the sums of a tile: `rows` of them, `columns` of each.

    Every pointer stands at the tile's first output; strides are in elements. `edge` is scratch:
    vectors that the last columns only fill in part are read and written there.
    """
    f = module.function(
        "finish",
        dict.fromkeys(("sums", "bias", "residual", "out", "edge"), "ptr")
        | dict.fromkeys(("residual_stride", "out_stride", "rows", "columns"), "i64")
        | {"alpha": "float"},
        "apart",
    )
    sums, bias, residual, out, edge, residual_stride, out_stride, rows, columns, alpha = (
        f.parameters
    )
    factor = f.splat(alpha)
    _bias(f, bias, edge, columns)
    with f.loop(0, rows) as row, f.loop(0, columns, LANES) as column:
        left = f.op("sub", columns, column.index)
        whole = f.compare("sge", left, LANES)
        place = f.mul(column.index, 4)
        total = f.load(FLOAT, f.at(f.at(sums, f.mul(row.index, _BIAS)), place), 64)
        v = f.fma(factor, total, f.load(FLOAT, f.at(edge, place), 64))
        v = activate(f, spec.activation, v)
        if spec.residual is not None:
            at = _output(f, residual, residual_stride, row.index, column.index, spec.residual)
            v = f.op("fadd", v, _residual(f, at, f.at(edge, _BIAS), whole, left, spec.residual))
        at = _output(f, out, out_stride, row.index, column.index, spec.out)
        size = _SIZES[spec.out]
        result, aside = narrow(f, v, spec.out), f.at(edge, _BIAS + 4 * LANES)
        with f.when(whole):
            f.store(result, at, size)
        with f.when(f.compare("slt", left, LANES)):
            f.store(result, aside, 64)
            _copy(f, aside, at, left, size)
    return f


def _bias(f: Function, bias: Value, edge: Value, columns: Value) -> None:
    """A copy of the bias as whole vectors; without one, of the number that adds nothing."""
    for panel in range(GROUP):
        f.store(constant(FLOAT, -0.0), f.at(edge, 4 * LANES * panel), 64)
    with f.when(f.compare("ne", bias, Value("ptr", "null"))):
        _copy(f, bias, edge, columns, 4)


def _output(
    f: Function, base: Value, stride: Value, row: Value, column: Value, dtype: str
) -> Value:
    return f.at(base, f.mul(f.add(f.mul(row, stride), column), _SIZES[dtype]))


def _residual(f: Function, at: Value, aside: Value, whole: Value, left: Value, dtype: str) -> Value:
    size = _SIZES[dtype]

    def copied() -> list[Value]:
        _copy(f, at, aside, left, size)
        return [aside]

    (source,) = f.either(whole, lambda: [at], copied)
    bits = f.load(f"<{LANES} x i{8 * size}>", source, size)
    return decoder(dtype, f.module).emit(f, f.cast("zext", bits, INT), 0)


def _copy(f: Function, source: Value, target: Value, count: Value, size: int) -> None:
    """`count` numbers of `size` bytes, not one byte more."""
    with f.loop(0, count) as loop:
        offset = f.mul(loop.index, size)
        number = f.load(f"i{8 * size}", f.at(source, offset), size)
        f.store(number, f.at(target, offset), size)

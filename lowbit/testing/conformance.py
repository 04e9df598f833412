"""What every kernel has to pass: each check computes with one kernel, and raises AssertionError.

A kernel that refuses a problem passes its check by saying why; `refusal` tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import checks, interop
from lowbit.array import QArray
from lowbit.explaining import explain
from lowbit.formats import Element, Format, codes, reference, scaling
from lowbit.products import matmul
from lowbit.quantizing import from_parts
from lowbit.testing.bounds import assert_within_bound
from lowbit.testing.exactness import exact_operands
from lowbit.testing.operands import random_qarray

Array = npt.NDArray[Any]

# A vector and one more, a row of tiles and one more, short last blocks and whole ones, more rows
# than a tile has.
SHAPES = ((1, 17, 65), (5, 33, 192), (37, 66, 130))


def refusal(kernel: str, x: Any, w: QArray, **options: Any) -> str | None:
    """Say why a kernel refuses x @ w.T, or None.

    Parameters
    ----------
    kernel : str
    x : array or QArray, (M, K)
    w : QArray, (N, K)
    **options
        Those of `lowbit.explain`.

    Returns
    -------
    str or None
    """
    verdicts = explain(x, w.T, **options).verdicts
    return next(v.refusal for v in verdicts if v.kernel.name == kernel)


def rounds_values(kernel: str, x: Any, w: QArray) -> bool:
    """Say whether a kernel rounds w's values to a narrower type before it multiplies.

    Parameters
    ----------
    kernel : str
    x : array or QArray, (M, K)
    w : QArray, (N, K)

    Returns
    -------
    bool
    """
    explanation = explain(x, w.T)
    chosen = next(v.kernel for v in explanation.verdicts if v.kernel.name == kernel)
    return chosen.roundings(chosen.asked(explanation.problem)).weight > 0


def dense_or_quantized(x: Format | str, m: int, k: int, seed: int = 0) -> Any:
    """Make an x: normal numbers of a dtype, or arbitrary parts of a format.

    Parameters
    ----------
    x : Format or str
        A format, or a dtype.
    m, k : int
    seed : int

    Returns
    -------
    ndarray or QArray
    """
    if isinstance(x, Format) or x not in ("float32", "float16", "bfloat16", "float64"):
        return random_qarray(x, m, k, seed=seed + 1)
    numbers = np.random.default_rng(seed).standard_normal((m, k))
    return numbers.astype(checks.float_dtype(x, "x"))


def exact_products(kernel: str, w_format: Format | str, x: Format | str = "float32") -> None:
    """Bit for bit, where every order of summation is exact; see `exact_operands`.

    A kernel that rounds w's values first is exact for those that it need not round.
    """
    for seed, (m, n, k) in enumerate(SHAPES):
        for single in (False, True):
            case = exact_operands(
                m, n, k, w_format, x, alpha=-0.5, bias=True, single=single, seed=seed
            )
            if refusal(kernel, case.x, case.w, bias=case.options["bias"]) is not None:
                continue
            result = matmul(case.x, case.w.T, kernel=kernel, **case.options)
            if single and rounds_values(kernel, case.x, case.w):
                assert_within_bound(result, case.x, case.w.T, kernel=kernel, **case.options)
            else:
                case.check(result)


def bounded_products(
    kernel: str, w_format: Format | str, x: Format | str = "float32", **options: Any
) -> float:
    """Any data, within the bound; gives the largest share of it that was used."""
    worst = 0.0
    for seed, (m, n, k) in enumerate(SHAPES):
        left = dense_or_quantized(x, m, k, seed)
        w = random_qarray(w_format, n, k, seed=seed)
        if refusal(kernel, left, w, **options) is None:
            result = matmul(left, w.T, kernel=kernel, **options)
            share = assert_within_bound(result, left, w.T, kernel=kernel, **options)
            worst = max(worst, share)
    return worst


def long_rows(kernel: str, w_format: Format | str, x: Format | str = "float32") -> None:
    """More columns than a kernel works on at a time: what it carries over is not lost."""
    for k in (2049, 5000):
        case = exact_operands(3, 17, k, w_format, x, seed=k)
        for w in (case.w, case.w.prepare()):
            if refusal(kernel, case.x, w) is None:
                case.check(matmul(case.x, w.T, kernel=kernel))


def rounded_once(kernel: str, w_format: Format | str, out_dtype: str) -> None:
    """Exact sums become a narrow dtype to nearest, ties to even, overflow to infinity."""
    for seed in range(6):
        case = exact_operands(7, 40, 70, w_format, bias=True, residual=out_dtype, seed=seed)
        options = {**case.options, "out_dtype": out_dtype}
        if refusal(kernel, case.x, case.w, out_dtype=out_dtype) is None:
            case.check(matmul(case.x, case.w.T, kernel=kernel, **options))


def finished_products(
    kernel: str, w_format: Format | str, activation: str | None, out_dtype: str = "float32"
) -> None:
    """Alpha, bias, activation and residual in this order, over large and tiny sums."""
    rng = np.random.default_rng(0)
    w = random_qarray(w_format, 66, 70)
    for size in (1.0, 1e3, 1e-30):
        options: dict[str, Any] = {
            "alpha": 1 / 3,
            "bias": rng.standard_normal(66),
            "activation": activation,
            "residual": rng.integers(-100, 100, (13, 66)).astype(checks.float_dtype(out_dtype, "")),
            "out_dtype": out_dtype,
        }
        x = (rng.standard_normal((13, 70)) * size).astype(np.float32)
        if refusal(kernel, x, w, activation=activation, out_dtype=out_dtype) is not None:
            continue
        result = matmul(x, w.T, kernel=kernel, **options)
        assert_within_bound(result, x, w.T, kernel=kernel, **options)


def same_when_prepared(kernel: str, w_format: Format | str, x: Format | str = "float32") -> None:
    """The weight's arrangement in memory does not change a bit of the result."""
    for seed, (m, n, k) in enumerate(SHAPES):
        left = dense_or_quantized(x, m, k, seed)
        w = random_qarray(w_format, n, k, seed=seed)
        prepared = w.prepare()
        if all(refusal(kernel, left, each) is None for each in (w, prepared)):
            same_bits(*(matmul(left, each.T, kernel=kernel) for each in (w, prepared)))


def independent_rows(kernel: str, w_format: Format | str, x: Format | str = "float32") -> None:
    """A row of the result does not depend on how many rows there are."""
    left, w = dense_or_quantized(x, 37, 130), random_qarray(w_format, 33, 130)
    if refusal(kernel, left, w) is not None:
        return
    whole = matmul(left, w.T, kernel=kernel)
    for row in (0, 1, 12, 36):
        same_bits(matmul(left[row : row + 1], w.T, kernel=kernel), whole[row : row + 1])


def long_sums(kernel: str, w_format: Format | str = "int8_row", k: int = 300_001) -> None:
    """Integer sums beyond int32, all products of one sign: exact before they meet a scale."""
    fmt = checks.as_format(w_format, "w_format")
    lowest = codes.encode(fmt.element, np.full((3, k), fmt.element.min))
    grid = fmt.grid((3, k))
    zeros = None
    if isinstance(fmt.zero, Element):
        zeros = np.full(grid, fmt.zero.max).astype(reference.zero_dtype(fmt))
    packed = codes.pack(lowest, fmt.element.bits)
    w = from_parts(fmt, packed, np.ones(grid, np.float32), zeros=zeros, shape=(3, k))
    x = from_parts("int8_row", np.full((2, k), -128, np.int8), np.ones((2, 1), np.float32))
    if refusal(kernel, x, w) is None:
        result = matmul(x, w.T, kernel=kernel)
        assert_within_bound(result, x, w.T, kernel=kernel)
        if not (result > 0).all():
            raise AssertionError(f"sums of positive products came out as {result.min()}")


def extreme_integers(kernel: str, w_format: Format | str = "int8_row") -> None:
    """Products of the largest magnitudes side by side: nothing on the way may saturate."""
    fmt = checks.as_format(w_format, "w_format")
    ends = np.array([fmt.element.min, fmt.element.max])
    n, k = 17, 130
    picked = np.random.default_rng(0).integers(0, 2, (n, k))
    packed = codes.pack(codes.encode(fmt.element, ends[picked]), fmt.element.bits)
    w = from_parts(fmt, packed, np.ones(fmt.grid((n, k)), np.float32), shape=(n, k))
    for value in (-128, 127):
        x = from_parts("int8_row", np.full((4, k), value, np.int8), np.ones((4, 1), np.float32))
        if refusal(kernel, x, w) is None:
            wanted = value * ends[picked].sum(axis=1)
            result = matmul(x, w.T, kernel=kernel)
            if not (result == wanted.astype(np.float32)).all():
                raise AssertionError(f"want {wanted}, got {result}")


def documented_order(kernel: str, w_format: Format | str, x: Format | str = "int8_g32") -> None:
    """Integer sums meet the scales in the order that the design names, bit for bit.

    sum = fma(x_scale, w_scale * float(s), sum), blocks ascending, s exact; computed here in
    fractions that are rounded once a step.
    """
    m, n, k = 3, 5, 100
    left, w = random_qarray(x, m, k, seed=1), random_qarray(w_format, n, k)
    if refusal(kernel, left, w) is not None:
        return
    result = matmul(left, w.T, kernel=kernel)
    wanted = np.empty((m, n), np.float32)
    for i, j in np.ndindex(m, n):
        total = Fraction(0)
        for inner, x_scale, w_scale in _blocks(left, w, i, j):
            scaled = single(Fraction(w_scale) * single(Fraction(inner)))
            total = single(Fraction(x_scale) * scaled + total)
        wanted[i, j] = float(single(_second_level(left, w) * total))
    same_bits(result + np.float32(0), wanted + np.float32(0))


def _blocks(x: QArray, w: QArray, i: int, j: int) -> Iterator[tuple[int, float, float]]:
    """(integer sum, x's scale, w's scale) of each run of columns that shares both."""
    k = x.shape[1]
    widths = [min(q.format.scale.block[1] or k, k) for q in (x, w)]
    step = math.gcd(*(width for width in widths if width < k)) or k
    numbers = [_integers(q, row) for q, row in ((x, i), (w, j))]
    scales = [scaling.decode_scales(q.format, q._rows().scales) for q in (x, w)]
    height = w.format.scale.block[0] or w.shape[0]
    for start in range(0, k, step):
        stop = min(start + step, k)
        inner = sum(a * b for a, b in zip(*(v[start:stop] for v in numbers), strict=True))
        x_scale = scales[0][i, start // widths[0]]
        w_scale = scales[1][j // height, start // widths[1]]
        yield inner, float(x_scale), float(w_scale)


def _second_level(*operands: QArray) -> Fraction:
    """Product of the tensor scales as one float32."""
    found = [q.tensor_scale for q in operands if q.tensor_scale is not None]
    return single(Fraction(math.prod(float(each) for each in found)))


def _integers(q: QArray, row: int) -> list[int]:
    return [int(v) for v in reference.centred(q._rows())[row]]


def single(exact: Fraction) -> Fraction:
    """Round to the nearest float32, ties to the even one.

    Parameters
    ----------
    exact : Fraction

    Returns
    -------
    Fraction
    """
    near = np.float32(float(exact))  # rounded twice: at most one float32 away
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]

    def rank(each: Any) -> tuple[Fraction, int]:
        return abs(Fraction(float(each)) - exact), int(each.view(np.uint32)) & 1

    return Fraction(float(min(around, key=rank)))


def same_bits(got: Any, wanted: Any) -> None:
    """Raise AssertionError unless two arrays are equal in shape, dtype and every bit.

    Parameters
    ----------
    got, wanted : array
    """
    pair = [interop.to_numpy(each, "array")[0] for each in (got, wanted)]
    kinds = [(each.shape, each.dtype) for each in pair]
    if kinds[0] != kinds[1]:
        raise AssertionError(f"want {kinds[1]}, got {kinds[0]}")
    first, second = (np.ascontiguousarray(each).view(np.uint8) for each in pair)
    if not np.array_equal(first, second):
        where = np.argwhere(pair[0] != pair[1])
        raise AssertionError(f"{len(where)} of {pair[0].size} numbers differ, first at {where[:1]}")

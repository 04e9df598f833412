"""Products of a mixture of experts: groups of rows of x, each with its own weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit import binding, checks, cuda_interop, interop, products, stacks
from lowbit import device as places
from lowbit.array import QArray
from lowbit.dispatch import Options, flattens, promoted, rearranged, residual_dtype, state
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue
from lowbit.quantizing import quantize, quantize_on_the_way

Array = npt.NDArray[Any]
Index = tuple[slice] | tuple[int, slice]

_REMEMBERED = 2048  # bound products of a whole stack, at least 8 of each expert


def grouped_matmul(
    x: Any,
    w: QArray,
    offsets: Any = None,
    *,
    counts: Any = None,
    alpha: float = 1.0,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    x_format: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    batch_invariant: bool = False,
    kernel: str | None = None,
) -> Any:
    """Multiply groups of rows, each by a weight of its own: x[group e] @ w[e].T.

    Parameters
    ----------
    x : array_like or QArray, (T, K) or (E, R, K)
        Rows sorted by group, as a mixture of experts sorts its tokens; or, with counts, room for R
        rows of each group.
    w : QArray, (E, N, K)
        The stack of weights, each stored as (N, K).
    offsets : array_like of int, (E,) or (E + 1,), optional
        Where each group ends: group e has the rows from ``offsets[e - 1]``, or 0, up to
        ``offsets[e]``, as ``offs`` of torch's grouped products; the last one ends at T. A leading
        0 may stand before them. Groups may be empty. Offsets on a GPU are read back, which waits,
        unless one launch serves all groups: see Notes.
    counts : array_like of int, (E,), optional
        In place of offsets: of the R rows that group e has room for, the first ``counts[e]`` are
        filled. What the others hold is never used; they are zero in a fresh result and stay as
        they are in `out`. Counts on a GPU are read back where offsets are.
    alpha : float
    bias : array_like of shape (E, N), optional
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
    residual : array_like, optional
        Broadcasts to the result.
    x_format : Format or str, optional
        Quantize x on the way in. Where rows share scales, those of one group do.
    out : array of the result's shape, optional
        Where to write the result; returned.
    out_dtype, batch_invariant, kernel
        As for `matmul`.

    Returns
    -------
    array, (T, N) or (E, R, N)
        In the framework, and on the device, of x. The bits are those of `matmul`, group by group;
        of float8 in one launch they are within its bound.

    Raises
    ------
    TypeError
        w is not a QArray, x is not floating-point, or offsets or counts are not integers.
    ValueError
        Shapes do not fit, offsets decrease or do not end at T, counts are not within 0 and R, or
        both of them are given, or neither.

    Notes
    -----
    What is bound to an expert's weight is remembered with the stack, so the next call with as many
    rows for it costs a few microseconds besides the arithmetic.

    int8 and float8 rows of one scale each, times such weights on Hopper, take one launch, without
    a residual or a kernel's name. int32 or int64 offsets and counts on the GPU are then read there
    alone, and nothing waits, so that a graph of CUDA may capture the call. Wrong offsets give wrong
    rows, and no error; counts below 0 or above R are taken as 0 and R.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> experts = lb.quantize(np.stack([np.eye(2, 32), 2 * np.eye(2, 32)]), "int8_row")
    >>> x = np.arange(96, dtype=np.float32).reshape(3, 32)
    >>> lb.grouped_matmul(x, experts, [1, 3], out_dtype="float32")
    array([[  0.,   1.],
           [ 64.,  66.],
           [128., 130.]], dtype=float32)

    Room for three rows of each expert, of which one and two are filled:

    >>> room = np.ones((2, 3, 32), np.float32)
    >>> lb.grouped_matmul(room, experts, counts=[1, 2], out_dtype="float32")[..., 0]
    array([[1., 0., 0.],
           [2., 2., 0.]], dtype=float32)
    """
    if (offsets is None) == (counts is None):
        raise ValueError(
            "grouped_matmul: want either offsets, where groups of sorted rows end, or counts, how "
            f"many rows of each are filled; got {'neither' if counts is None else 'both'}"
        )
    if not isinstance(w, QArray) or w.ndim != 3:
        got = f"a QArray {w.shape}" if isinstance(w, QArray) else type(w).__name__
        raise TypeError(f"w: want a QArray of shape (experts, N, K), got {got}")
    left, _, origin = products.operands_of(x, w)
    experts, n, k = w.shape
    lead = () if counts is None else (experts,)
    if left.ndim != len(lead) + 2 or (*left.shape[:-2], left.shape[-1]) != (*lead, k):
        wanted = f"(rows, {k})" if counts is None else f"({experts}, rows, {k}) with counts"
        raise ValueError(f"grouped_matmul: x has shape {left.shape}, want {wanted} for w {w.shape}")
    shape = (*left.shape[:-1], n)
    groups = _Groups(experts, left.shape[-2], offsets, counts)
    target = None if out is None else products.writable(out)
    if target is not None and target.shape != shape:
        raise ValueError(f"out: want shape {shape}, got {target.shape}")
    added = None if bias is None else products.numbers(bias, "bias")
    rest = None if residual is None else products.numbers(residual, "residual")
    options = products.options_of(
        left, added, activation, rest, x_format, None, target, out_dtype, batch_invariant, kernel
    )
    dtype = options.out_dtype or promoted(left.dtype, w.dtype)
    options = options._replace(out_dtype=dtype)
    for argument, array in (("bias", added), ("residual", rest), ("out", target)):
        if array is not None:
            places.on(w._place, array, argument)
    with interop.stream(origin, w._place):
        at_once = _at_once(left, w, groups, options)
        where = None if at_once is not None else groups.where()
        after = _epilogue(
            checks.finite_scalar(alpha, "alpha"), added, activation, rest, dtype, shape, w
        )
        answer = None
        if target is not None and binding.apart(w._place, target, left, after):
            result = target
        elif target is None and origin.framework == "torch" and origin.device != "cpu":
            answer, result = cuda_interop.torch_result(shape, dtype, origin.device)
        else:
            empty = interop.empty if w._place is places.HOST else w._place.xp.empty
            result = empty(shape, dtype)
        if counts is not None and result is not target:
            # Nobody writes the rows beyond a group's count.
            if target is None:
                _bits(result)[...] = 0
            else:
                result[...] = target
        if at_once is None or not at_once(left, after, result):
            _each(left, w, groups.where() if where is None else where, after, options, result)
        if target is None:
            return interop.from_numpy(result, origin) if answer is None else answer
        if result is not target:
            target[...] = result
    interop.written(out)
    return out


class _Groups(NamedTuple):
    """Which rows of x each expert has."""

    experts: int
    rows: int
    """Of x; with counts, that every expert has room for."""
    offsets: Any
    counts: Any

    @property
    def given(self) -> tuple[Any, str]:
        """What says it, and the argument that this came as."""
        return (self.offsets, "offsets") if self.counts is None else (self.counts, "counts")

    def read(self) -> list[int]:
        """Where each group ends, or how many rows it has: on the host, checked."""
        given, argument = self.given
        array, _ = interop.to_numpy(given, argument)
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"{argument}: want integers, got {array.dtype.name}")
        numbers: list[int] = array.tolist() if array.ndim == 1 else []
        if self.counts is None and len(numbers) == self.experts + 1 and numbers[0] == 0:
            numbers = numbers[1:]
        if array.ndim != 1 or len(numbers) != self.experts:
            wanted, more = "number of filled rows", ""
            if self.counts is None:
                wanted, more = "end", ", with or without a 0 before the first"
            raise ValueError(
                f"{argument}: want the {wanted} of each of {self.experts} groups{more}; got shape "
                f"{array.shape}"
            )
        start = 0
        for group, number in enumerate(numbers):
            if self.counts is not None:
                if not 0 <= number <= self.rows:
                    raise ValueError(
                        f"counts: group {group} has {number} filled rows, want 0 to {self.rows}, "
                        "for which x has room"
                    )
            elif number < start:
                raise ValueError(
                    f"offsets: group {group} ends at {number}, before its start at {start}"
                )
            start = number
        if self.counts is None and start != self.rows:
            raise ValueError(f"offsets: the last group ends at {start}, x has {self.rows} rows")
        return numbers

    def where(self) -> list[Index]:
        """The rows of every group, as an index of x and of the result."""
        numbers = self.read()
        if self.counts is None:
            return [(slice(*each),) for each in itertools.pairwise([0, *numbers])]
        return [(group, slice(0, count)) for group, count in enumerate(numbers)]

    def there(self, place: places.Gpu, dtypes: tuple[str, ...]) -> Array | None:
        """The numbers of `read` on the GPU, where nobody checks them; None: it has to be here."""
        given, argument = self.given
        found, _ = interop.read(given, argument)
        if isinstance(found, np.ndarray):
            return place.put(np.array(self.read(), np.int64))
        sizes = (self.experts, self.experts + (self.counts is None))
        if found.dtype.name not in dtypes or found.ndim != 1 or found.shape[0] not in sizes:
            return None
        places.on(place, found, argument)
        numbers: Array = place.xp.ascontiguousarray(found[-self.experts :])
        return numbers


def _at_once(
    x: Array | QArray, w: QArray, groups: _Groups, options: Options
) -> Callable[[Array | QArray, Epilogue, Array], bool] | None:
    """One launch for all groups, where there is one for such operands."""
    place, fmt, experts = w._place, options.x_format, groups.experts
    if not isinstance(place, places.Gpu) or options.kernel is not None:
        return None
    if not experts or w._transposed or rearranged(w) or (fmt is not None and not flattens(fmt)):
        return None
    stated, parts = state(x, _experts(w)[0], options), w._parts
    if stated.exact or not stated.flat or not isinstance(parts, Packed):
        return None
    if not binding.readable(parts, "rows"):
        return None
    from lowbit.kernels.cutlass import experts as launches

    p, room = stated.problem, 0 if groups.counts is None else groups.rows
    if launches.refuse(p, experts) is not None:
        return None
    numbers = groups.there(place, launches.COUNTS)
    if numbers is None:
        return None
    # Of every number of rows, or each would stay with the stack.
    spec = launches.spec_of(p, experts)
    plans, key = w._content.plans, ("experts at once", replace(p, m=1), spec)
    run = plans.get(key)
    if run is None:
        run = plans[key] = launches.bind(p, spec, experts)(parts)

    def execute(x: Array | QArray, after: Epilogue, out: Array) -> bool:
        left: Any = x
        if fmt is not None:
            dense = products.dense(x)
            left = quantize_on_the_way(_filled(dense, numbers) if room else dense, fmt, None)
        if room:
            left, out = left.reshape(p.m, p.k), out.reshape(p.m, p.n)
        parts = left._parts
        return binding.readable(parts, "rows") and bool(run(parts, numbers, room, after, out))

    return execute


def _filled(x: Array, counts: Array) -> Array:
    """x with zeros beyond the counts, where it may hold NaN, which would be refused."""
    within = places.of(x).xp.arange(x.shape[1])[:, None] < counts[:, None, None]
    filled: Array = _bits(x) * within
    return filled.view(x.dtype)


def _bits(array: Array) -> Array:
    """The same memory as integers, which CuPy computes with whatever the dtype is."""
    return array.view(f"u{array.itemsize}")


def _epilogue(
    alpha: float,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    w: QArray,
) -> Epilogue:
    """As `products.epilogue`, with a row of bias for each expert."""
    experts, n, _ = w.shape
    if bias is not None:
        if bias.shape != (experts, n):
            raise ValueError(f"bias: want shape {(experts, n)}, got {bias.shape}")
        bias = w._place.xp.ascontiguousarray(
            bias, np.float64 if dtype == np.float64 else np.float32
        )
    if residual is not None:
        try:
            spread: Array = w._place.xp.broadcast_to(residual, shape)
        except ValueError:
            raise ValueError(
                f"residual: {residual.shape} does not broadcast to the result, {shape}"
            ) from None
        residual = spread.astype(residual_dtype(spread.dtype, dtype.name), copy=False)
    return Epilogue(alpha, bias, activation, residual)


def _each(
    x: Array | QArray,
    w: QArray,
    where: list[Index],
    after: Epilogue,
    options: Options,
    out: Array,
) -> None:
    """One product after the other, each on all threads."""
    fmt = options.x_format
    most = max(8, _REMEMBERED // max(1, len(where)))
    whole: QArray | None = None
    for expert, (weight, rows) in enumerate(zip(_experts(w), where, strict=True)):
        if rows[-1].start == rows[-1].stop:
            continue
        part = x[rows]
        product = binding.find(part, weight, options, most)
        whole_rows = x.ndim == 2 and not product.inside and not rearranged(w)
        if fmt is not None and flattens(fmt) and whole_rows:
            # Scales are those of single rows: quantizing all of them takes one call.
            whole = quantize_on_the_way(products.dense(x), fmt, None) if whole is None else whole
            part = whole[rows]
            product = binding.find(part, weight, options._replace(x_format=None), most)
        one = after
        if after.bias is not None or after.residual is not None:
            one = Epilogue(
                after.alpha,
                None if after.bias is None else after.bias[expert],
                after.activation,
                None if after.residual is None else after.residual[rows],
            )
        try:
            product.execute(part, one, out[rows])
        except ValueError:
            if fmt is not None and whole is None:
                dense = products.dense(x)
                if x.ndim == 3:
                    counts = w._place.put(np.array([each[-1].stop for each in where]))
                    dense = _filled(dense, counts)
                quantize(dense, fmt)  # says where, counted from the first row of all
            raise


def _experts(w: QArray) -> list[QArray]:
    """Each weight of the stack as the right operand; remembered, so each remembers its products."""
    plans, key = w._content.plans, ("experts", w._transposed)
    found: list[QArray] | None = plans.get(key)
    if found is None:
        found = [
            QArray._of(
                stacks.matrix_of(w._parts, (expert,)),
                w._dtype,
                transposed=not w._transposed,
                columns=w._columns,
                divisor=w._divisor,
            )
            for expert in range(w.shape[0])
        ]
        plans[key] = found
    return found

"""Products of a mixture of experts: consecutive rows of x, each run of them with its own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import binding, checks, cuda_interop, interop, products
from lowbit import device as places
from lowbit.array import QArray
from lowbit.dispatch import Options, flattens, promoted, rearranged, residual_dtype, state
from lowbit.formats.reference import Packed
from lowbit.kernels import Epilogue
from lowbit.quantizing import quantize, quantize_on_the_way

Array = npt.NDArray[Any]

_REMEMBERED = 2048  # bound products of a whole stack, at least 8 of each expert


def grouped_matmul(
    x: Any,
    w: QArray,
    offsets: Any,
    *,
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
    x : array_like or QArray, (T, K)
        Rows sorted by group, as a mixture of experts sorts its tokens.
    w : QArray, (E, N, K)
        The stack of weights, each stored as (N, K).
    offsets : array_like of int, (E,) or (E + 1,)
        Where each group ends: group e has the rows from ``offsets[e - 1]``, or 0, up to
        ``offsets[e]``, as ``offs`` of torch's grouped products; the last one ends at T. A leading
        0 may stand before them. Groups may be empty. Offsets on a GPU are read back, which waits,
        unless one launch serves all groups: see Notes.
    alpha : float
    bias : array_like of shape (E, N), optional
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
    residual : array_like, optional
        Broadcasts to the result.
    x_format : Format or str, optional
        Quantize x on the way in. Where rows share scales, those of one group do.
    out : array of shape (T, N), optional
        Where to write the result; returned.
    out_dtype, batch_invariant, kernel
        As for `matmul`.

    Returns
    -------
    array, (T, N)
        In the framework, and on the device, of x. The bits are those of `matmul`, group by group;
        of float8 in one launch they are within its bound.

    Raises
    ------
    TypeError
        w is not a QArray, x is not floating-point, or offsets are not integers.
    ValueError
        Shapes do not fit, or offsets decrease or do not end at T.

    Notes
    -----
    What is bound to an expert's weight is remembered with the stack, so the next call with as many
    rows for it costs a few microseconds besides the arithmetic.

    int8 and float8 rows of one scale each, times such weights on Hopper, take one launch. Offsets
    on the GPU are then read there alone: wrong ones give wrong rows, and no error.

    Examples
    --------
    >>> import numpy as np, lowbit as lb
    >>> experts = lb.quantize(np.stack([np.eye(2, 32), 2 * np.eye(2, 32)]), "int8_row")
    >>> x = np.arange(96, dtype=np.float32).reshape(3, 32)
    >>> lb.grouped_matmul(x, experts, [1, 3], out_dtype="float32")
    array([[  0.,   1.],
           [ 64.,  66.],
           [128., 130.]], dtype=float32)
    """
    if not isinstance(w, QArray) or w.ndim != 3:
        got = f"a QArray {w.shape}" if isinstance(w, QArray) else type(w).__name__
        raise TypeError(f"w: want a QArray of shape (experts, N, K), got {got}")
    left, _, origin = products.operands_of(x, w)
    experts, n, k = w.shape
    if left.ndim != 2 or left.shape[1] != k:
        raise ValueError(
            f"grouped_matmul: x has shape {left.shape}, want (rows, {k}) for w {w.shape}"
        )
    rows = left.shape[0]
    target = None if out is None else products.writable(out)
    if target is not None and target.shape != (rows, n):
        raise ValueError(f"out: want shape {(rows, n)}, got {target.shape}")
    added = None if bias is None else products.numbers(bias, "bias")
    rest = None if residual is None else products.numbers(residual, "residual")
    options = products.options_of(
        left, added, activation, rest, x_format, None, target, out_dtype, batch_invariant, kernel
    )
    dtype = options.out_dtype or promoted(left.dtype, w.dtype)
    options = options._replace(out_dtype=dtype)
    at_once = _at_once(left, w, offsets, options, rest)
    ends = [] if at_once is not None else _ends(offsets, experts, rows)
    for argument, array in (("bias", added), ("residual", rest), ("out", target)):
        if array is not None:
            places.on(w._place, array, argument)
    with interop.stream(origin, w._place):
        after = _epilogue(
            checks.finite_scalar(alpha, "alpha"), added, activation, rest, dtype, rows, w
        )
        answer = None
        if target is not None and binding.apart(w._place, target, left, after):
            result = target
        elif target is None and origin.framework == "torch" and origin.device != "cpu":
            answer, result = cuda_interop.torch_result((rows, n), dtype, origin.device)
        else:
            empty = interop.empty if w._place is places.HOST else w._place.xp.empty
            result = empty((rows, n), dtype)
        if at_once is None or not at_once(left, after, result):
            _groups(left, w, ends or _ends(offsets, experts, rows), after, options, result)
        if target is None:
            return interop.from_numpy(result, origin) if answer is None else answer
        if result is not target:
            target[...] = result
    interop.written(out)
    return out


def _at_once(
    x: Array | QArray, w: QArray, offsets: Any, options: Options, residual: Array | None
) -> Callable[[Array | QArray, Epilogue, Array], bool] | None:
    """One launch for all groups, where there is one for such operands."""
    place, fmt, experts = w._place, options.x_format, w.shape[0]
    if place is places.HOST or options.kernel is not None or residual is not None:
        return None
    if w._transposed or rearranged(w) or (fmt is not None and not flattens(fmt)):
        return None
    stated, parts = state(x, _experts(w)[0], options), w._parts
    if stated.exact or not stated.flat or not isinstance(parts, Packed):
        return None
    if not binding.readable(parts, "rows"):
        return None
    from lowbit.kernels.cutlass import experts as launches

    if launches.refuse(stated.problem, experts) is not None:
        return None
    ends, _ = interop.read(offsets, "offsets")
    if isinstance(ends, np.ndarray):
        ends = place.put(np.array(_ends(offsets, experts, x.shape[0]), np.int64))
    elif ends.dtype.name not in launches.COUNTS or ends.shape not in ((experts,), (experts + 1,)):
        return None
    places.on(place, ends, "offsets")
    plans, key = w._content.plans, ("experts at once", stated.problem)
    run = plans.get(key)
    if run is None:
        run = plans[key] = launches.bind(stated.problem, experts)(parts)

    def execute(x: Array | QArray, after: Epilogue, out: Array) -> bool:
        left: Any = x if fmt is None else quantize_on_the_way(products.dense(x), fmt, None)
        if not binding.readable(left._parts, "rows"):
            return False
        counts = place.xp.ascontiguousarray(ends[-experts:])
        return bool(run(left._parts, counts, after, out))

    return execute


def _ends(offsets: Any, experts: int, rows: int) -> list[int]:
    """Where each group ends, checked."""
    array, _ = interop.to_numpy(offsets, "offsets")
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"offsets: want integers, got {array.dtype.name}")
    ends: list[int] = array.tolist() if array.ndim == 1 else []
    if len(ends) == experts + 1 and ends[0] == 0:
        ends = ends[1:]
    if array.ndim != 1 or len(ends) != experts:
        raise ValueError(
            f"offsets: want the end of each of {experts} groups, with or without a 0 before the "
            f"first; got shape {array.shape}"
        )
    start = 0
    for group, end in enumerate(ends):
        if end < start:
            raise ValueError(f"offsets: group {group} ends at {end}, before its start at {start}")
        start = end
    if start != rows:
        raise ValueError(f"offsets: the last group ends at {start}, x has {rows} rows")
    return ends


def _epilogue(
    alpha: float,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    dtype: np.dtype[Any],
    rows: int,
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
            spread: Array = w._place.xp.broadcast_to(residual, (rows, n))
        except ValueError:
            raise ValueError(
                f"residual: {residual.shape} does not broadcast to the result, {(rows, n)}"
            ) from None
        residual = spread.astype(residual_dtype(spread.dtype, dtype.name), copy=False)
    return Epilogue(alpha, bias, activation, residual)


def _groups(
    x: Array | QArray, w: QArray, ends: list[int], after: Epilogue, options: Options, out: Array
) -> None:
    """One product after the other, each on all threads."""
    fmt = options.x_format
    most = max(8, _REMEMBERED // max(1, len(ends)))
    whole: QArray | None = None
    start = 0
    for expert, weight in enumerate(_experts(w)):
        rows, start = slice(start, ends[expert]), ends[expert]
        if rows.start == rows.stop:
            continue
        part = x[rows]
        product = binding.find(part, weight, options, most)
        if fmt is not None and not product.inside and flattens(fmt) and not rearranged(w):
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
                quantize(x, fmt)  # says where, counted from the first row of all
            raise


def _experts(w: QArray) -> list[QArray]:
    """Each weight of the stack as the right operand; remembered, so each remembers its products."""
    plans, key = w._content.plans, ("experts", w._transposed)
    found: list[QArray] | None = plans.get(key)
    if found is None:
        found = [
            QArray._of(
                binding.matrix_of(w._parts, (expert,)),
                w._dtype,
                transposed=not w._transposed,
                columns=w._columns,
                divisor=w._divisor,
            )
            for expert in range(w.shape[0])
        ]
        plans[key] = found
    return found

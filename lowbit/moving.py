"""An array's parts from one device to another."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lowbit import device as places
from lowbit.array import QArray
from lowbit.formats.reference import Array


def to_device(w: QArray, device: Any, stream: Any = None) -> QArray:
    """See `QArray.to_device`."""
    target, source = places.named(device), w._place
    gpu = target if isinstance(target, places.Gpu) else source
    if stream is not None and not isinstance(gpu, places.Gpu):
        raise ValueError(f"to_device: 'cpu' has no streams, got stream={stream!r}")
    if target is source:
        return w

    def move(part: Array) -> Array:
        if source is places.HOST or target is places.HOST:
            return target.put(source.get(part))
        return target.put(part)  # from one GPU to another, by CuPy

    context: Any = nullcontext()
    if stream is not None and isinstance(gpu, places.Gpu):
        context = places.stream_context(gpu, stream)
    with gpu.current(), context:
        columns, divisor = (None if p is None else move(p) for p in (w._columns, w._divisor))
        return w._with(places.changed(w._rows(), move), columns=columns, divisor=divisor)

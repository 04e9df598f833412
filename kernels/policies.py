"""What compiled quantizers of every backend leave to the reference."""

from __future__ import annotations

from lowbit.formats import Format


def refuse_policies(fmt: Format, *, method: str, rounding: str, overflow: str) -> str | None:
    """Why a way to quantize is left to the reference, in words; None if it is not."""
    if rounding != "even":
        return f"rounding={rounding!r} draws a random number for each code"
    if overflow != "saturate":
        return f"overflow={overflow!r} looks at each number once more"
    if method == "mse":
        return "method='mse' tries many scales"
    if fmt.tensor_scale and (fmt.zero is not None or fmt.bias):
        return "a tensor scale over zero points or biases needs the extremes of every block at once"
    return None

"""What is compiled into a CPU kernel; sizes, strides and block shapes are run-time arguments."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.formats.declare import FLOATS, Element
from lowbit.kernels.layouts import WIDTHS

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
LAYOUTS = ("rows", "words16")
SCALE_LAYOUTS = ("rows", "panels16")
INTEGERS = ("int8", "uint8")


@dataclass(frozen=True)
class Spec:
    """One class of products: out = epilogue(sum over k of x[m, k] * w[n, k])."""

    inner: str
    """"fma": x is float32. "dot": x is int8 and w an element of whole numbers."""
    element: Element
    """Of w."""
    layout: str = "rows"
    """Of w's codes."""
    scale: Element | str = "float32"
    """How w's scales are stored: codes (uint8) of an element, or a float dtype."""
    scale_layout: str = "rows"
    """Of scales, zero points and biases; "panels16" has a scale for every row of w."""
    zero: str | None = None
    """dtype of the zero points: int8, uint8 or a float dtype."""
    biases: bool = False
    """w has an addend for each block, stored as the scales are."""
    x_scale: bool = False
    activation: str | None = None
    out: str = "float32"
    residual: str | None = None
    """dtype of the residual, if there is one."""

    def __post_init__(self) -> None:
        legal = {
            "inner": ("fma", "dot"),
            "layout": LAYOUTS,
            "scale_layout": SCALE_LAYOUTS,
            "zero": (None, *INTEGERS, *FLOATS),
            "activation": (None, *ACTIVATIONS),
            "out": FLOATS,
            "residual": (None, *FLOATS),
        }
        for name, names in legal.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {names}")
        if isinstance(self.scale, str) and self.scale not in FLOATS:
            raise ValueError(f"scale: {self.scale!r} is neither an element nor one of {FLOATS}")
        if self.layout == "words16" and self.element.bits not in WIDTHS:
            raise ValueError(f"layout: words16 has codes of {WIDTHS} bits, not {self.element.bits}")

"""What is compiled into a CPU kernel; sizes, strides and block shapes are run-time arguments."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.formats.declare import FLOATS, Element
from lowbit.kernels.declare import ACTIVATIONS

LAYOUTS = ("rows", "words16")
SCALE_LAYOUTS = ("rows", "panels16")
INTEGERS = ("int8", "uint8")
INNERS = ("fma", "bf16", "dot")
METHODS = ("direct", "decoded", "tiles", "single")


@dataclass(frozen=True)
class Spec:
    """One class of products: out = epilogue(sum over k of x[m, k] * w[n, k])."""

    inner: str
    """"fma": x is float32. "bf16": x is bfloat16. "dot": x is int8, w has whole numbers."""
    element: Element
    """Of w."""
    method: str = "direct"
    """How often a code is decoded: "direct" for every few rows of x, in registers; "decoded"
    once for all rows, into scratch; "tiles" likewise, for the matrix registers of AMX, and
    "single" for as few rows as one of them has, just before it is multiplied."""
    tile: int = 0
    """Steps of a tile, where they are unrolled ("single")."""
    folded: int = 0
    """Granules that share a scale which is multiplied into w's bfloat16 numbers; 0: none is."""
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
            "inner": INNERS,
            "method": METHODS,
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
        if self.tiled and self.inner == "fma":
            raise ValueError("method: tiles multiply int8 and bfloat16, not float32")

    @property
    def tiled(self) -> bool:
        """It multiplies in AMX's tiles."""
        return self.method in ("tiles", "single")

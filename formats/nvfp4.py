"""NVFP4: 16 elements share an E4M3 scale, and the tensor shares a float32 one."""

from lowbit.formats.declare import Format, Named, Scale
from lowbit.formats.fp8 import E4M3
from lowbit.formats.mx import E2M1

FORMATS = (
    Named(
        "nvfp4",
        Format(E2M1, Scale(E4M3, (1, 16)), tensor_scale=True),
        "E2M1 elements, one E4M3 scale per 16, one float32 scale per tensor",
    ),
)

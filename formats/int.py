"""Integers of 1 to 8 bits, two's complement or unsigned."""

from lowbit.formats.declare import WHOLE, Format, Named, Scale, integer

GROUP, ROW = Scale("float32", (1, 128)), Scale("float32", (1, WHOLE))

FORMATS = (
    *(
        Named(f"int{bits}", Format(integer(bits), ROW if bits == 8 else GROUP), "two's complement")
        for bits in range(1, 9)
    ),
    *(
        Named(
            f"uint{bits}",
            Format(integer(bits, signed=False), ROW if bits == 8 else GROUP),
            "unsigned; add _asym for a zero point",
        )
        for bits in range(1, 9)
    ),
)

"""Published 4-bit codebooks: NormalFloat4 and FP4, as bitsandbytes stores them (QLoRA)."""

from lowbit.formats.declare import Format, Named, Scale, codebook

# fmt: off
NF4 = codebook("nf4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))
# fmt: on
_FP4 = tuple(twelfths / 12 for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))
FP4 = codebook("fp4", (*_FP4, *(0.0 - v for v in _FP4)))

GROUP = Scale("float32", (1, 64))

FORMATS = (
    Named("nf4", Format(NF4, GROUP), "sixteen quantiles of a normal distribution"),
    Named("fp4", Format(FP4, GROUP), "bitsandbytes' FP4: {0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}"),
)

"""OCP microscaling (MX v1.0): 32 elements share one power of two."""

from lowbit.formats.declare import Element, Format, Named, Scale, floating, integer, power_of_two
from lowbit.formats.fp8 import E4M3, E5M2

E8M0 = power_of_two()
E3M2, E2M3 = floating(3, 2, specials="none"), floating(2, 3, specials="none")
E2M1 = floating(2, 1, specials="none")
# OCP's MX INT8: a sign bit, one integer and six fraction bits.
FIXED8 = Element("fixed8", 8, tuple(v / 64 for v in integer(8).values), "int8")

SHARED = Scale(E8M0, (1, 32))
GROUP = Scale("float32", (1, 32))

FORMATS = (
    Named("float6_e3m2fn", Format(E3M2, GROUP), "OCP E3M2: largest 28"),
    Named("float6_e2m3fn", Format(E2M3, GROUP), "OCP E2M3: largest 7.5"),
    Named("float4_e2m1fn", Format(E2M1, GROUP), "OCP E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and signs"),
    Named("fixed8", Format(FIXED8, GROUP), "int8 / 64, the element of MXINT8"),
    Named("mxfp8", Format(E4M3, SHARED), "E4M3 elements, one E8M0 scale per 32"),
    Named("mxfp8_e5m2", Format(E5M2, SHARED), "E5M2 elements, one E8M0 scale per 32"),
    Named("mxfp6", Format(E2M3, SHARED), "E2M3 elements, one E8M0 scale per 32"),
    Named("mxfp6_e3m2", Format(E3M2, SHARED), "E3M2 elements, one E8M0 scale per 32"),
    Named("mxfp4", Format(E2M1, SHARED), "E2M1 elements, one E8M0 scale per 32"),
    Named("mxint8", Format(FIXED8, SHARED), "int8 / 64 elements, one E8M0 scale per 32"),
)

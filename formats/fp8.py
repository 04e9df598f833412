"""8-bit floats: OCP E4M3 and E5M2, and the fnuz pair of AMD's CDNA 3."""

from lowbit.formats.declare import WHOLE, Format, Named, Scale, floating

E4M3, E5M2 = floating(4, 3, specials="fn"), floating(5, 2, specials="ieee")
E4M3FNUZ, E5M2FNUZ = floating(4, 3, specials="fnuz"), floating(5, 2, specials="fnuz")
ROW = Scale("float32", (1, WHOLE))

FORMATS = (
    Named("float8_e4m3fn", Format(E4M3, ROW), "OCP E4M3: largest 448, NaN, no infinity"),
    Named("float8_e5m2", Format(E5M2, ROW), "OCP E5M2: largest 57344, infinities and NaN"),
    Named("float8_e4m3fnuz", Format(E4M3FNUZ, ROW), "E4M3 of CDNA 3: bias 8, largest 240"),
    Named("float8_e5m2fnuz", Format(E5M2FNUZ, ROW), "E5M2 of CDNA 3: bias 16, largest 57344"),
    Named("fp8", Format(E4M3, ROW), "short for float8_e4m3fn", short=True),
    Named("fp8_e5m2", Format(E5M2, ROW), "short for float8_e5m2", short=True),
)

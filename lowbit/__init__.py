"""Low-precision arrays and their matrix products, NumPy style."""

__version__ = "0.1.0"

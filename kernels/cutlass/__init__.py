"""Products on CUTLASS: C++ written from lowbit's declarations, launched through CuPy."""

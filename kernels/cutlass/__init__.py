"""Products on CUTLASS's collectives: C++ written from lowbit's declarations, launched through CuPy."""

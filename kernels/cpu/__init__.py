"""CPU kernels: LLVM IR from Python, compiled on first use, run by a native pool."""

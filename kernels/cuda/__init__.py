"""CUDA kernels: C++ from the format's declaration, compiled by NVRTC, launched through CuPy."""

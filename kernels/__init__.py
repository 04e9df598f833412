"""Every kernel, and the choice between them."""

if __name__ != "lowbit.kernels":
    raise ImportError("this folder is lowbit.kernels; run Python with -P, or from another folder")

"""What the bytes mean: every format, by name."""

if __name__ != "lowbit.formats":
    raise ImportError("this folder is lowbit.formats; run Python with -P, or from another folder")

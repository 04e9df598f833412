"""Text of `lb::wgmma` for each number of columns: too many operands to write by hand."""

from __future__ import annotations

TYPES = {"f16": "__half", "bf16": "__nv_bfloat16"}


def declare(columns: int, element: str) -> str:
    """C++ that makes ``lb::wgmma<columns, T>`` known, to stand after sm90.cuh; T as in `TYPES`."""
    if columns % 8 or not 8 <= columns <= 256:
        raise ValueError(f"columns: want a multiple of 8 in 8..256, got {columns}")
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    op = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{element}.{element}"
    return f"""\
#ifndef LOWBIT_EMU
namespace lb {{
template <> struct Wgmma<{columns}, {TYPES[element]}> {{
    static LB_DEV void multiply(float (&d)[{count}], u64 a, u64 b) {{
        asm volatile("{op} {{{sums}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"
                     : {outputs} : "l"(a), "l"(b));
    }}
    static LB_DEV void multiply(float (&d)[{count}], const u32 (&a)[4], u64 b) {{
        asm volatile("{op} {{{sums}}}, {{{left}}}, %{count + 4}, 1, 1, 1, 0;"
                     : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }}
}};
}}  // namespace lb
#endif
"""

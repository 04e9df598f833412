"""ELF files of NVRTC: short names, the size of arguments, clusters."""

from __future__ import annotations

import pytest
import sass

from lowbit.kernels.cuda import compile, elf
from lowbit.kernels.cuda.launch import Source

TEXT = """
struct Many { char held[%d]; };
__device__ int a_variable_with_a_rather_long_name[4] = {1, 2, 3, 4};
namespace of { __device__ const float another_variable_of_some_length = 0.5f; }
extern "C" __global__ void __cluster_dims__(2, 1, 1) named(const Many many, int* out) {
    *out = many.held[threadIdx.x] + a_variable_with_a_rather_long_name[threadIdx.x & 3];
}
extern "C" __global__ void other(int x) {}
"""


def made(size: int) -> tuple[bytes, bytes]:
    """As NVRTC made it, and cut short."""
    source = Source(TEXT % size, "named", 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elf, "shortened", lambda code: code)
        whole = compile.nvrtc(source, "sm_90a").code
    return whole, compile.nvrtc(source, "sm_90a").code


def test_names_are_cut_short(nvrtc: None) -> None:
    whole, short = made(100)
    assert b"a_variable_with_a_rather_long_name" in whole
    assert b"a_variable_with_a_rather_long_name" not in short
    assert b"another_variable" not in short
    assert len(short) == len(whole)
    cubins = [compile.Cubin(code, "named") for code in (whole, short)]
    if sass.missing() is None:
        assert sass.disassembled(cubins[0]) == sass.disassembled(cubins[1])
        assert sass.usage(cubins[0], "sm_90a") == sass.usage(cubins[1], "sm_90a")
    assert elf.shortened(short) == short


@pytest.mark.parametrize("size", [1, 100, 4000])
def test_what_a_kernel_says_of_itself(nvrtc: None, size: int) -> None:
    _, code = made(size)
    assert elf.argument_bytes(code, "named") == [size, 8]
    assert elf.argument_bytes(code, "other") == [4]
    assert elf.cluster(code, "named") == (2, 1, 1)
    assert elf.cluster(code, "other") == (1, 1, 1)
    with pytest.raises(ValueError, match="missing: no kernel"):
        elf.cluster(code, "missing")


def test_what_is_no_elf_file_is_refused() -> None:
    with pytest.raises(ValueError, match="not a 64-bit ELF file"):
        elf.shortened(b"\x7fELF\x01" + bytes(100))

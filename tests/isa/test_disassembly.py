"""The code of knl's own kernels, and of what the knl stack dispatches by itself: no instruction
that a KNL lacks."""

from __future__ import annotations

import subprocess

import pytest

from knl import native

from . import instructions

try:
    from numpy._core import _multiarray_umath as numpy_core
except ImportError:  # before numpy 2
    from numpy.core import _multiarray_umath as numpy_core

PARTS = ("libknl_kernels.so", "libknl_onednn.so", "libknl_ccl.so", "libknl_gomp.so")

# Of each extension that a compiler or oneDNN could take by mistake, what is easily overlooked.
LACKING = {
    "BW": """
        vpaddb %zmm1, %zmm2, %zmm3
        vpmaddwd %zmm1, %zmm2, %zmm3
        vmovdqu8 (%rax), %zmm1
        vmovdqu16 %zmm1, (%rax)
        vpbroadcastb %eax, %zmm1
        vpshufb %zmm1, %zmm2, %zmm3
        vpcmpeqb %zmm1, %zmm2, %k1
        vpmovm2w %k1, %zmm2
        kmovd %k1, %eax
        kmovq %k1, (%rax)
        kunpckdq %k1, %k2, %k3
        kortestq %k1, %k2""",
    "DQ": """
        vandps %zmm1, %zmm2, %zmm3
        vandnpd %zmm1, %zmm2, %zmm3
        vorps %zmm1, %zmm2, %zmm3
        vxorps %zmm1, %zmm1, %zmm1
        vextractf32x8 $1, %zmm1, %ymm2
        vextractf64x2 $1, %zmm1, %xmm2
        vinserti32x8 $1, %ymm1, %zmm2, %zmm3
        vbroadcastf32x2 %xmm1, %zmm2
        vcvtqq2ps %zmm1, %ymm2
        vcvttpd2uqq %zmm1, %zmm2
        vpmullq %zmm1, %zmm2, %zmm3
        vpmovm2d %k1, %zmm2
        vrangeps $1, %zmm1, %zmm2, %zmm3
        vfpclassps $1, %zmm1, %k1
        kmovb %k1, %eax
        kaddw %k1, %k2, %k3
        ktestw %k1, %k2""",
    "VL": """
        {evex} vaddps %ymm1, %ymm2, %ymm3
        {evex} vmovups (%rax), %xmm1
        vaddps %ymm16, %ymm2, %ymm3
        vmovaps %xmm17, %xmm1
        vmulps %ymm1, %ymm2, %ymm3{%k1}
        vaddpd (%rax){1to4}, %ymm2, %ymm3
        vpternlogd $1, %xmm1, %xmm2, %xmm3
        vpcmpd $1, %ymm1, %ymm2, %k1
        vcvtpd2udq %ymm1, %xmm2
        vpmovqd %ymm1, %xmm2
        vpermt2ps %ymm1, %ymm2, %ymm3""",
    "ER": """
        vrcp28ps %zmm1, %zmm2
        vrcp28ss %xmm1, %xmm2, %xmm3
        vrsqrt28pd %zmm1, %zmm2
        vexp2ps %zmm1, %zmm2""",
    "PF": """
        vgatherpf0dps (%rax,%zmm1,4){%k1}
        vgatherpf1qpd (%rax,%zmm1,4){%k1}
        vscatterpf0dps (%rax,%zmm1,4){%k1}
        vscatterpf1qpd (%rax,%zmm1,4){%k1}
        prefetchwt1 (%rax)""",
    "later": """
        vpmadd52luq %zmm1, %zmm2, %zmm3
        vpermb %zmm1, %zmm2, %zmm3
        vpcompressb %zmm1, %zmm2
        vpopcntd %zmm1, %zmm2
        vpdpbusd %zmm1, %zmm2, %zmm3
        {vex} vpdpbusd %ymm1, %ymm2, %ymm3
        v4fmaddps (%rax), %zmm4, %zmm1
        vdpbf16ps %zmm1, %zmm2, %zmm3
        vaddph %zmm1, %zmm2, %zmm3
        vaesenc %zmm1, %zmm2, %zmm3
        vgf2p8mulb %xmm1, %xmm2, %xmm3
        tdpbf16ps %tmm1, %tmm2, %tmm3
        sha1msg1 %xmm1, %xmm2
        clflushopt (%rax)""",
}
PRESENT = """
    vaddps %zmm1, %zmm2, %zmm3
    vaddps (%rax){1to16}, %zmm2, %zmm3{%k1}{z}
    vaddss %xmm16, %xmm2, %xmm3
    vfmadd231ps {rn-sae}, %zmm1, %zmm2, %zmm3
    vpxord %zmm1, %zmm2, %zmm3
    vpternlogd $1, %zmm1, %zmm2, %zmm3
    vextractf64x4 $1, %zmm1, %ymm2
    vextracti32x4 $1, %zmm1, %xmm2
    vpermt2ps %zmm1, %zmm2, %zmm3
    vscatterqps %ymm1, (%rax,%zmm2,4){%k1}
    vcvtps2ph $1, %zmm1, (%rax)
    vpconflictd %zmm1, %zmm2
    vplzcntq %zmm1, %zmm2
    kmovw %k1, %eax
    kortestw %k1, %k2
    vfmadd231ps %ymm1, %ymm2, %ymm3
    vpmovmskb %ymm1, %eax
    vxorps %ymm1, %ymm1, %ymm1
    pdep %rax, %rcx, %rdx
    lzcnt %eax, %ecx
    prefetchw (%rax)
    lock cmpxchg16b (%rax)
    notrack jmp *%rax"""

# numpy's names for groups of extensions.
NUMPY_OF_A_KNL = {
    "SSE", "SSE2", "SSE3", "SSSE3", "SSE41", "POPCNT", "SSE42", "AVX", "F16C", "FMA3", "AVX2",
    "AVX512F", "AVX512CD", "AVX512_KNL", "X86_V2", "X86_V3",
}  # fmt: skip
NUMPY_OF_OTHERS = {
    "XOP", "FMA4", "AVX512_KNM", "AVX512_SKX", "AVX512_CLX", "AVX512_CNL", "AVX512_ICL",
    "AVX512_SPR", "X86_V4",
}  # fmt: skip


def assembled(text, folder):
    """The instructions of a piece of assembly, as read back from its machine code."""
    path = folder / "piece.o"
    subprocess.run(["as", "-o", path, "-"], input=text + "\n", text=True, check=True)
    return instructions.disassembled(path)


@pytest.mark.parametrize("extension", LACKING)
def test_an_instruction_that_a_knl_lacks_is_found(extension, tmp_path):
    found = assembled(LACKING[extension], tmp_path)
    assert len(found) == len(LACKING[extension].strip().splitlines())
    assert len(instructions.foreign(found)) == len(found)


def test_an_instruction_that_a_knl_has_is_not(tmp_path):
    found = assembled(PRESENT, tmp_path)
    assert len(found) == len(PRESENT.strip().splitlines())
    assert instructions.foreign(found) == []


@pytest.mark.parametrize("name", PARTS)
def test_no_instruction_of_a_compiled_part_is_one_that_a_knl_lacks(name):
    """All of the part: a stripped library names no clones, and those for AVX-512F are the only ones
    beyond AVX2."""
    found = instructions.disassembled(native.compiled(name))
    assert instructions.foreign(found) == []
    if name == "libknl_kernels.so":
        assert sum("%zmm" in text for _, text in found) > 1000


def test_what_numpy_chooses_on_a_knl_has_no_instruction_that_a_knl_lacks():
    known = NUMPY_OF_A_KNL | NUMPY_OF_OTHERS
    assert set(numpy_core.__cpu_baseline__) <= NUMPY_OF_A_KNL
    assert set(numpy_core.__cpu_dispatch__) <= known, "which of these has a KNL?"
    chosen = [name for name in numpy_core.__cpu_dispatch__ if name in NUMPY_OF_A_KNL]
    # numpy appends the group to the names of the functions that it compiled for it.
    found = instructions.disassembled(numpy_core.__file__, rf"_({'|'.join(chosen)})(\.|$)")
    assert len(found) > 1000
    assert instructions.foreign(found) == []

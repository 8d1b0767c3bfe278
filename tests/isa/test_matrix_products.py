"""Matrix products of fully connected layers on a KNL: MKL, in torch, has kernels for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from . import instructions

SGEMM = """
import ctypes
import numpy as np
library = ctypes.CDLL(str(onednn.library_path()))
size, real, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
library.dnnl_sgemm.argtypes = [
    ctypes.c_char, ctypes.c_char, size, size, size, real, pointer, size, pointer, size, real,
    pointer, size,
]
generator = np.random.default_rng(7)
errors = []
for m, n, k in [(64, 1000, 2048), (1, 37, 129), (300, 200, 5)]:
    a = generator.standard_normal((m, k), dtype=np.float32)
    b = generator.standard_normal((k, n), dtype=np.float32)
    c = np.empty((m, n), np.float32)
    address = [matrix.ctypes.data for matrix in (a, b, c)]
    assert library.dnnl_sgemm(b"N", b"N", m, n, k, 1.0, address[0], k, address[1], n, 0.0,
                              address[2], n) == 0
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    errors.append(float(np.linalg.norm(c - wanted) / np.linalg.norm(wanted)))
answer(errors)
"""


def test_onednns_matrix_product_runs_on_what_a_knl_has(as_knl, tmp_path):
    """As AVX2, so knl leaves fully connected layers to torch: nothing in it needs AVX-512F."""
    errors = as_knl.run(SGEMM, tmp_path, DNNL_JIT_DUMP="1")
    assert max(errors) < 1e-6
    kernels = list(tmp_path.glob("*gem[mv]*.bin"))
    assert kernels and not any("avx512" in kernel.name for kernel in kernels)
    assert instructions.foreign(instructions.generated(*tmp_path.glob("*.bin"))) == []


@pytest.mark.parametrize("precision", ["s", "d"])
def test_torch_of_the_knl_stack_has_mkls_matrix_products_for_a_knl(precision):
    """torch 2.13 has them no more."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    names = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    is_knl_stack = torch.__version__.startswith("1.11.")
    assert (f" mkl_blas_avx512_mic_x{precision}gemm\n" in names) == is_knl_stack

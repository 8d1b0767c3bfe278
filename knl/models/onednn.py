"""oneDNN's convolutions, pooling and response normalisation, called without torch in between.

torch converts activations to oneDNN's own layout and back at every convolution, or stays in
channels-last, for which oneDNN has no AVX-512 kernels on a KNL. Here they stay in the blocked
layout, [samples, channels / block, height, width, block], dense tensors that any kernel can read.
The library is oneDNN 2.5 from PyPI, the last line with kernels for KNL.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from knl import native
from knl.errors import FailedError, InputError
from knl.packages import ONEDNN

# What an operation computes, in the order of onednn.cpp's Pass.
INFERENCE, FORWARD, BACKWARD_DATA, BACKWARD_WEIGHTS = range(4)

# The release line whose AVX-512 kernels run on a KNL: from 2.6 on they are gone.
_RELEASE = (2, 5)
_CURE = "pip install onednn-cpu-gomp==2022.0.2 (a part of both stacks), or set train.layout"
# Instruction sets as dnnl_cpu_isa_t numbers them. Those with AVX-512 have a KNL's bit or that of
# later processors (avx512_core).
_ISAS = {
    0x1: "sse41", 0x3: "avx", 0x7: "avx2", 0x407: "avx2_vnni", 0xF: "avx512_mic",
    0x1F: "avx512_mic_4ops",
}  # fmt: skip
_AVX512_BITS = 0x8 | 0x20


class Shape(NamedTuple):
    """A window operation on activations; the fields of onednn.cpp's Shape, in its order.

    `in_block`, `out_block`: channels of a block, 1 for plain [samples, channels, height, width].
    """

    samples: int
    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_height: int = 1
    kernel_width: int = 1
    stride_height: int = 1
    stride_width: int = 1
    pad_height: int = 0
    pad_width: int = 0
    dilation_height: int = 1
    dilation_width: int = 1
    groups: int = 1
    in_block: int = 1
    out_block: int = 1
    bias: int = 0
    relu: int = 0


class Operation:
    """One primitive of oneDNN, ready to run."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @property
    def implementation(self) -> str:
        """The name of oneDNN's kernel, such as jit:avx512_common."""
        return str(_library().knl_onednn_implementation(self._handle).decode())

    def bytes_of(self, place: int) -> int:
        """Bytes of the argument at `place` of a call, counted from 0."""
        return int(_library().knl_onednn_bytes(self._handle, place))

    def run(self, *tensors: torch.Tensor | None) -> None:
        """Compute on dense tensors in the order that onednn.cpp gives its slots."""
        pointers = [t.data_ptr() for t in tensors if t is not None]
        _check(
            _library().knl_onednn_run(self._handle, (ctypes.c_void_p * len(pointers))(*pointers))
        )


@cache
def convolution(shape: Shape, what: int) -> Operation:
    """Arguments: source, weights, bias, output (forward); gradient, weights, gradient of the source
    (backward data); source, gradient, gradients of weights and bias (backward weights)."""
    return _made("convolution", shape, what)


@cache
def max_pooling(shape: Shape, what: int) -> Operation:
    """Arguments: source, output, places of the maxima (forward); gradient, places, gradient of the
    source (backward)."""
    return _made("max_pooling", shape, what)


@cache
def response_norm(
    shape: Shape, what: int, size: int, alpha: float, beta: float, k: float
) -> Operation:
    """Arguments: source, output, workspace (forward); source, gradient, workspace, gradient of the
    source (backward)."""
    return _made("response_norm", shape, what, size, alpha, beta, k)


@cache
def block() -> int:
    """Channels of a block that this CPU's kernels want: 16 with AVX-512, else 8."""
    return 16 if _library().knl_onednn_isa() & _AVX512_BITS else 8


@cache
def version() -> str:
    """The release of the library that is loaded."""
    return ".".join(map(str, _version(_library())))


def isa() -> str:
    """The instruction set for which oneDNN chooses its kernels here."""
    found = int(_library().knl_onednn_isa())
    return _ISAS.get(found, "avx512_core" if found & _AVX512_BITS else "unknown")


def library_path() -> Path:
    """Where pip has put oneDNN; where it should be, below the environment, if it has not."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(ONEDNN) or ():
            if file.name == "libdnnl.so.2":
                return Path(str(file.locate())).resolve()
    return Path(sys.prefix) / "lib" / "libdnnl.so.2"


def _made(kind: str, shape: Shape, what: int, *more: float) -> Operation:
    handle = ctypes.c_void_p()
    fields = (ctypes.c_int64 * len(shape))(*shape)
    make = getattr(_library(), f"knl_onednn_{kind}")
    _check(make(fields, what, *more, ctypes.byref(handle)))
    assert handle.value is not None  # set where there was no error
    operation = Operation(handle.value)
    if re.search(r"(^|_)ref\b", operation.implementation):
        raise InputError(
            f"train.layout = 'blocked': oneDNN has no fast kernel for the network's {kind} "
            f"{shape._asdict()}; use train.layout = 'channels_last'"
        )
    return operation


def _check(error: bytes | None) -> None:
    if error is not None:
        raise FailedError(f"oneDNN {version()}: {error.decode(errors='replace')}")


@cache
def _library() -> ctypes.CDLL:
    """The binding over the one oneDNN of this environment, on torch's OpenMP runtime.

    Raises InputError where the library is missing, or of a release without KNL's kernels.
    """
    path = library_path()
    native.load_kernels()  # torch's OpenMP runtime comes first, and oneDNN finds it
    if not any(re.search(r"/libgomp\.so\.1$", loaded) for loaded in native.loaded_libraries()):
        # torch's has another name, so the loader would bring the system's as a second runtime.
        ctypes.CDLL(str(native.compiled("libknl_gomp.so")), mode=ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(str(path))  # known by its name to the binding, which needs it
    except OSError as error:
        raise InputError(f"train.layout = 'blocked': no oneDNN ({error}); {_CURE}") from None
    library = ctypes.CDLL(str(native.compiled("libknl_onednn.so")))
    found = _version(library)
    if found[:2] != _RELEASE:
        raise InputError(
            f"train.layout = 'blocked': {path} is oneDNN {'.'.join(map(str, found))}, knl needs "
            f"2.5 (2.6 lost the AVX-512 kernels for KNL); {_CURE}"
        )
    return _declared(library)


def _version(library: ctypes.CDLL) -> tuple[int, ...]:
    numbers = (ctypes.c_int * 3)()
    library.knl_onednn_version(numbers)
    return tuple(numbers)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.knl_onednn_convolution.argtypes = [pointer, ctypes.c_int, pointer]
    library.knl_onednn_max_pooling.argtypes = [pointer, ctypes.c_int, pointer]
    library.knl_onednn_response_norm.argtypes = [
        pointer, ctypes.c_int, integer, real, real, real, pointer,
    ]  # fmt: skip
    library.knl_onednn_run.argtypes = [pointer, pointer]
    library.knl_onednn_implementation.argtypes = [pointer]
    library.knl_onednn_bytes.argtypes = [pointer, ctypes.c_int]
    library.knl_onednn_bytes.restype = integer
    for name in ("convolution", "max_pooling", "response_norm", "run", "implementation"):
        getattr(library, f"knl_onednn_{name}").restype = ctypes.c_char_p
    return library

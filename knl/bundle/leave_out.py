"""What a job on a node never opens."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath

BYTE_CODE = "byte code of others"
TESTS = "tests"
HEADERS = "headers"
STATIC = "static libraries, debug symbols"
DOCUMENTS = "documentation"
GPU = "GPU libraries"
TOOLS = "development tools"
ELSEWHERE = "links to elsewhere"
COPIES = "copies of a library under other names"

# Kept where a job loads them all the same: torch's CUDA builds link theirs.
_GPU = re.compile(
    r"(^|/)(nvidia|triton|cpu_gpu_dpcpp)/"
    r"|/lib(omptarget|ur_|pi_level|sycl|cu|nv|nccl|c10_cuda|torch_cuda|caffe2_nv)[^/]*\.so"
)
_STATIC = re.compile(r"\.(a|o|la|dbg)$")
_HEADERS = re.compile(r"\.(h|hpp|cuh|pxd|pyx)$|^include/|/pkgconfig/|/cmake/")
_DOCUMENTS = re.compile(r"^(share|etc/conda|conda-meta|man)/|\.jar$")
# torch.compile writes C++ and compiles it.
_TORCH_HEADERS = re.compile(r"/torch/include/")
# A wheel has no links: oneDNN's has the library three times, of which libdnnl.so.2 is loaded.
_COPIES = re.compile(r"^lib/libdnnl\.so(\.2\.5)?$")
_STDLIB_TESTS = ("test", "idlelib", "turtledemo", "tkinter", "ensurepip", "lib2to3/tests")
_DEVELOPMENT = ("pip", "mypy", "ruff", "pytest", "hypothesis")


def tools(packages: Path) -> frozenset[Path]:
    """Files of installed packages that develop other packages."""
    found: set[Path] = set()
    for distribution in metadata.distributions(path=[str(packages)]):
        if (distribution.metadata["Name"] or "").lower() in _DEVELOPMENT:
            files = distribution.files or []
            found.update(Path(os.path.normpath(packages / str(file))) for file in files)
    return frozenset(found)


def reason(path: PurePosixPath, *, compiles: bool, loaded: bool) -> str:
    """Why a file of the bundle stays out; "" for one that goes in. `path`: in the bundle;
    `compiles`: whether this torch has torch.compile; `loaded`: whether a job loads it."""
    text, parents = str(path), path.parts[:-1]
    if "__pycache__" in parents and not text.endswith(f".{sys.implementation.cache_tag}.pyc"):
        return BYTE_CODE
    if _is_test(path):
        return TESTS
    if _GPU.search(text) and not loaded:
        return GPU
    if _STATIC.search(text):
        return STATIC
    if _COPIES.search(text):
        return COPIES
    if _DOCUMENTS.search(text):
        return DOCUMENTS
    if _HEADERS.search(text):
        is_python_s = parents[:2] == ("include", f"python{_VERSION}")
        return "" if compiles and (is_python_s or _TORCH_HEADERS.search(text)) else HEADERS
    return ""


_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def _is_test(path: PurePosixPath) -> bool:
    parents = path.parts[:-1]
    if parents[-2:] == ("torch", "bin"):
        return path.name != "torch_shm_manager"
    if {"tests", "test"} & set(parents):
        return True
    below = "/".join(parents[2:])  # behind lib/python3.9
    return path.parts[0].startswith("lib") and below.startswith(_STDLIB_TESTS)

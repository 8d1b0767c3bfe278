"""Loads the compiled parts: the LARS kernel and the binding to oneCCL, both behind a C ABI."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from knl.errors import FailedError

_OPENMP = re.compile(r"/lib(?:gomp|iomp5|omp)[^/]*\.so")


def loaded_libraries() -> list[str]:
    """Paths of the shared libraries in this process, as /proc/self/maps has them."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/") and ".so" in line}
    return sorted(paths)


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process. More than one means two thread pools."""
    return [path for path in loaded_libraries() if _OPENMP.search(path)]


@cache
def load_lars() -> ctypes.CDLL:
    """The LARS kernel, tied to the OpenMP runtime that torch uses.

    Raises FailedError when the package was installed without its compiled part.
    """
    import torch  # noqa: F401  brings the OpenMP runtime

    # The kernel names no runtime of its own; it takes the symbols of the one that is here.
    for path in openmp_runtimes():
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(compiled("libknl_lars.so")))


def load_ccl(libccl: Path) -> ctypes.CDLL:
    """The oneCCL binding, over the given libccl.so.1.

    Raises OSError with the loader's words when libccl or what it needs (libmpi) does not load.
    """
    with _stderr_without("CCL_LOG_LEVEL"):
        ctypes.CDLL(str(libccl), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(compiled("libknl_ccl.so")))


@contextmanager
def _stderr_without(word: str) -> Iterator[None]:
    """Hold back what C code writes to stderr, then let it go but for the lines with `word`.

    As it is loaded, libccl warns that CCL_LOG_LEVEL is not the default; knl.launch sets it so that
    there are fewer warnings.
    """
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if word.encode() not in line:
                    os.write(2, line)


def compiled(name: str) -> Path:
    """Path of a compiled part. An editable install keeps it apart from the Python files."""
    for folder in __path__:
        if (path := Path(folder) / name).exists():
            return path
    raise FailedError(f"{name} is missing from {list(__path__)}: reinstall with 'pip install .'")

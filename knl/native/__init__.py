"""Loads the compiled parts: the kernels and the binding to oneCCL, both behind a C ABI."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from knl.errors import FailedError

_OPENMP = re.compile(r"/lib(?:gomp|iomp5|omp)(?:-[^/]*)?\.so")


def loaded_libraries() -> list[str]:
    """Paths of the shared libraries in this process, as /proc/self/maps has them."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/") and ".so" in line}
    return sorted(paths)


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process. More than one means two thread pools."""
    return [path for path in loaded_libraries() if _OPENMP.search(path)]


@cache
def load_kernels() -> ctypes.CDLL:
    """The kernels, tied to the OpenMP runtime that torch uses.

    Raises FailedError when the package was installed without its compiled part.
    """
    import torch  # brings the OpenMP runtime

    # They name no runtime of their own: they take the symbols of torch's, or of a preloaded
    # libiomp5, which come first wherever symbols are looked up.
    home = str(Path(torch.__file__).parent)
    for path in openmp_runtimes():
        if path.startswith(home):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(compiled("libknl_kernels.so")))


def load_ccl(libccl: Path) -> ctypes.CDLL:
    """The oneCCL binding, over the given libccl.so.1.

    Raises OSError with the loader's words when libccl or what it needs (libmpi) does not load.
    """
    ctypes.CDLL(str(libccl), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(compiled("libknl_ccl.so")))


@contextmanager
def stdout_to(file: int) -> Iterator[int]:
    """Send what Python and C code write to stdout to another file; yields the real stdout."""
    flush_stdout()
    stdout = os.dup(1)
    os.dup2(file, 1)
    try:
        yield stdout
    finally:
        flush_stdout()
        os.dup2(stdout, 1)
        os.close(stdout)


def flush_stdout() -> None:
    """Empty Python's and C's buffers: libraries write through the latter."""
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)


@contextmanager
def stdout_without(word: str) -> Iterator[None]:
    """Hold back what is written to stdout, then let it go but for the lines with `word`."""
    with tempfile.TemporaryFile() as held:
        with stdout_to(held.fileno()):
            yield
        held.seek(0)
        for line in held:
            if word.encode() not in line:
                os.write(1, line)


def compiled(name: str) -> Path:
    """Path of a compiled part. An editable install keeps it apart from the Python files."""
    for folder in __path__:
        if (path := Path(folder) / name).exists():
            return path
    raise FailedError(f"{name} is missing from {list(__path__)}: reinstall with 'pip install .'")

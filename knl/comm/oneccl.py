"""The oneccl provider: our binding to oneCCL's C++ API (knl/native/ccl.cpp)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from knl import native
from knl.comm.bootstrap import Bootstrap
from knl.comm.collectives import ProviderUnavailable
from knl.comm.world import World
from knl.errors import CollectiveTimeoutError, FailedError, KnlError

# The numbers of ccl::datatype (oneapi/ccl/types.hpp).
_DATATYPES = {
    torch.int32: 4, torch.int64: 6, torch.float32: 9, torch.float64: 10, torch.bfloat16: 11,
}  # fmt: skip
_ADDRESS_BYTES = 256


def load(world: World, bootstrap: Bootstrap, timeout: float) -> Callable[[], OneCcl]:
    """Load libccl.so.1 and the binding. Raises ProviderUnavailable with the reason."""
    if world.launcher != "mpi":
        raise ProviderUnavailable(f"needs an Intel MPI or MPICH launch, this is {world.launcher}")
    libccl = find_libccl()
    try:
        library = _declare(native.load_ccl(libccl))
    except (OSError, KnlError) as error:
        raise ProviderUnavailable(str(error)) from None
    return lambda: OneCcl(library, world, bootstrap, timeout)


def find_libccl() -> Path:
    """The stack's libccl.so.1, or a site's where a module sets CCL_ROOT."""
    roots = [Path(sys.prefix)]
    if "CCL_ROOT" in os.environ:
        roots.insert(0, Path(os.environ["CCL_ROOT"]))
    for root in roots:
        for folder in ("lib/cpu", "lib"):  # 2021.8 keeps the CPU-only library apart
            if (path := root / folder / "libccl.so.1").exists():
                return path
    places = " or ".join(str(root / "lib") for root in roots)
    raise ProviderUnavailable(f"no libccl.so.1 in {places}; install a stack")


class _Event:
    """A collective under way in oneCCL; keeps its tensor alive until it is done."""

    def __init__(
        self, library: ctypes.CDLL, event: int | None, tensor: torch.Tensor | None
    ) -> None:
        if not event:
            raise FailedError(f"oneCCL: {library.knl_ccl_error().decode()}")
        self._library, self._tensor = library, tensor
        self._event: int | None = event

    def test(self) -> bool:
        return self._event is None or self._finish(self._library.knl_ccl_test(self._event))

    def wait(self, timeout: float) -> None:
        if self._event is None:
            return
        if not self._finish(self._library.knl_ccl_wait(self._event, timeout)):
            raise CollectiveTimeoutError(f"oneCCL: not done after {timeout:g} s")

    def _finish(self, state: int) -> bool:
        if state < 0:
            raise FailedError(f"oneCCL: {self._library.knl_ccl_error().decode()}")
        if state == 1:
            self._library.knl_ccl_release(self._event)
            self._event, self._tensor = None, None
        return state == 1


class OneCcl:
    """A oneCCL communicator over all ranks, or over each of several groups of them."""

    name = "oneccl"
    no_bf16 = ""  # for CPUs that have the instructions: knl.config.require_cpu_fits

    def __init__(
        self,
        library: ctypes.CDLL,
        world: World,
        bootstrap: Bootstrap,
        timeout: float,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._library, self._world, self._bootstrap = library, world, bootstrap
        self._timeout = timeout
        text = ctypes.create_string_buffer(128)
        # oneCCL would warn that CCL_LOG_LEVEL, by which knl.launch has fewer warnings, is set.
        with native.stdout_without("CCL_LOG_LEVEL"):
            self._check(library.knl_ccl_version(text, len(text)) == 0)
        self.version = text.value.decode().split(" ")[0].replace("Gold-", "")
        group = next(g for g in groups or [range(world.size)] if world.rank in g)
        address = ctypes.create_string_buffer(_ADDRESS_BYTES)
        if world.rank == group[0]:
            self._check(library.knl_ccl_address(address, _ADDRESS_BYTES) == 0)
        addresses = bootstrap.gather(address.raw.hex())
        address.raw = bytes.fromhex(addresses[group[0]])
        self._comm = library.knl_ccl_open(len(group), group.index(world.rank), address)
        self._check(bool(self._comm))

    def split(self, groups: Sequence[Sequence[int]]) -> OneCcl:
        """Collectives within each of these groups of ranks, which share all ranks out."""
        return OneCcl(self._library, self._world, self._bootstrap, self._timeout, groups)

    def allreduce(self, tensor: torch.Tensor, priority: int = 0) -> _Event:
        """Of several under way the one of the highest `priority` goes first, where
        CCL_PRIORITY=direct; every rank gives the same."""
        event = self._library.knl_ccl_allreduce(
            self._comm, tensor.data_ptr(), tensor.numel(), _DATATYPES[tensor.dtype], priority
        )
        return _Event(self._library, event, tensor)

    def bare_seconds(self, tensor: torch.Tensor) -> float:
        """Seconds of one allreduce of `tensor` in place, called and awaited in C++."""
        seconds = self._library.knl_ccl_time_allreduce(
            self._comm, tensor.data_ptr(), tensor.numel(), _DATATYPES[tensor.dtype]
        )
        self._check(seconds >= 0)
        return float(seconds)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        event = self._library.knl_ccl_broadcast(
            self._comm, tensor.data_ptr(), tensor.numel(), _DATATYPES[tensor.dtype], root
        )
        _Event(self._library, event, tensor).wait(self._timeout)

    def barrier(self) -> None:
        _Event(self._library, self._library.knl_ccl_barrier(self._comm), None).wait(self._timeout)

    def close(self) -> None:
        if self._comm:
            self._library.knl_ccl_close(self._comm)
            self._comm = None

    def _check(self, succeeded: bool) -> None:
        if not succeeded:
            raise FailedError(f"oneCCL: {self._library.knl_ccl_error().decode()}")


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the binding's signatures: pointers are not ints of 32 bits."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures = {
        "error": (ctypes.c_char_p, []),
        "version": (number, [ctypes.c_char_p, size]),
        "address": (number, [ctypes.c_char_p, size]),
        "open": (pointer, [number, number, ctypes.c_char_p]),
        "close": (None, [pointer]),
        "allreduce": (pointer, [pointer, pointer, size, number, size]),
        "time_allreduce": (ctypes.c_double, [pointer, pointer, size, number]),
        "broadcast": (pointer, [pointer, pointer, size, number, number]),
        "barrier": (pointer, [pointer]),
        "test": (number, [pointer]),
        "wait": (number, [pointer, ctypes.c_double]),
        "release": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"knl_ccl_{name}")
        function.restype, function.argtypes = result, arguments
    return library

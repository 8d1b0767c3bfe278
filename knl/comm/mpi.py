"""The mpi provider: MPI's own collectives through mpi4py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from knl.comm.bootstrap import Bootstrap, MpiBootstrap, mpi_version
from knl.comm.collectives import ProviderUnavailable
from knl.errors import CollectiveTimeoutError


def load(bootstrap: Bootstrap, timeout: float) -> Callable[[], Mpi]:
    """Raises ProviderUnavailable where MPI did not launch the ranks."""
    if not isinstance(bootstrap, MpiBootstrap):
        raise ProviderUnavailable("needs an MPI launch, this is torchrun")
    return lambda: Mpi(bootstrap.comm, timeout)


class _Request:
    def __init__(self, request: Any) -> None:
        self._request = request

    def test(self) -> bool:
        return bool(self._request.Test())

    def wait(self, timeout: float) -> None:
        start = time.monotonic()
        while not self._request.Test():
            waited = time.monotonic() - start
            if waited > timeout:
                raise CollectiveTimeoutError(f"MPI: not done after {timeout:g} s")
            if waited > 1e-3:
                time.sleep(0)  # ranks may have to share a core


class Mpi:
    """COMM_WORLD's collectives on the memory of tensors."""

    name = "mpi"
    no_bf16 = "MPI has no such type"

    def __init__(self, comm: Any, timeout: float) -> None:
        from mpi4py import MPI

        # A communicator of our own, so that nothing else on COMM_WORLD can meet our messages.
        self._comm, self._in_place = comm.Dup(), MPI.IN_PLACE
        self._timeout = timeout
        self.version = mpi_version()

    def split(self, groups: Sequence[Sequence[int]]) -> Mpi:
        """Collectives within each of these groups of ranks, which share all ranks out."""
        number = next(n for n, group in enumerate(groups) if self._comm.rank in group)
        part = self._comm.Split(number, groups[number].index(self._comm.rank))
        try:
            return Mpi(part, self._timeout)
        finally:
            part.Free()

    def allreduce(self, tensor: torch.Tensor, priority: int = 0) -> _Request:
        return _Request(self._comm.Iallreduce(self._in_place, tensor.numpy()))

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        _Request(self._comm.Ibcast(tensor.numpy(), root)).wait(self._timeout)

    def barrier(self) -> None:
        _Request(self._comm.Ibarrier()).wait(self._timeout)

    def close(self) -> None:
        self._comm.Free()

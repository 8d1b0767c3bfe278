"""A narrow channel between ranks before there are collectives: agree, and carry an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar

from knl.comm.world import World
from knl.errors import FailedError, InputError, KnlError

_TIMEOUT_S = 300.0
_Result = TypeVar("_Result")


class Bootstrap(Protocol):
    """What providers need in order to open."""

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks, on every rank."""


class SingleBootstrap:
    """A world of one agrees with itself."""

    def broadcast(self, data: bytes) -> bytes:
        return data

    def gather(self, text: str) -> list[str]:
        return [text]


class MpiBootstrap:
    """Over mpi4py, which initialises MPI with thread support for oneCCL's workers."""

    def __init__(self, world: World) -> None:
        if world.launcher == "openmpi":  # else mpi4py would take the stack's Intel MPI
            os.environ.setdefault("MPI4PY_MPIABI", "openmpi")
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise FailedError(
                f"MPI cannot be loaded ({_first_line(error)}): install a stack "
                "(pip install '.[modern]' in knl's folder) or load your site's MPI module"
            ) from None
        self.comm = MPI.COMM_WORLD
        if (self.comm.rank, self.comm.size) != (world.rank, world.size):
            library = mpi_version()
            raise InputError(
                f"the launcher says rank {world.rank} of {world.size}, but {library} says "
                f"rank {self.comm.rank} of {self.comm.size}: start the job with that MPI's own "
                "mpiexec (or srun --mpi=pmi2 and I_MPI_PMI_LIBRARY=<path of libpmi2.so>)"
            )

    def broadcast(self, data: bytes) -> bytes:
        return self.comm.bcast(data, root=0)  # type: ignore[no-any-return]

    def gather(self, text: str) -> list[str]:
        return self.comm.allgather(text)  # type: ignore[no-any-return]


class StoreBootstrap:
    """Over the key-value store that torchrun serves at MASTER_ADDR:MASTER_PORT."""

    def __init__(self, world: World) -> None:
        from torch.distributed import TCPStore

        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError):
            raise InputError(
                "RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not: "
                "start with torchrun, or unset RANK"
            ) from None
        # torchrun keeps the store itself; a launcher that only sets variables leaves it to rank 0.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.world = world
        self.store = TCPStore(
            host, port, world.size, world.rank == 0 and not served, timedelta(seconds=_TIMEOUT_S)
        )
        self.turn = 0

    def broadcast(self, data: bytes) -> bytes:
        self.turn += 1
        key = f"knl/{self.turn}"
        if self.world.rank == 0:
            self.store.set(key, data)
        return self.store.get(key)  # type: ignore[no-any-return]

    def gather(self, text: str) -> list[str]:
        self.turn += 1
        self.store.set(f"knl/{self.turn}/{self.world.rank}", text)
        keys = (f"knl/{self.turn}/{rank}" for rank in range(self.world.size))
        return [self.store.get(key).decode() for key in keys]


def open_bootstrap(world: World) -> Bootstrap:
    """The channel that fits the launcher. Raises KnlError when it does not open."""
    if world.size == 1:
        return SingleBootstrap()
    return MpiBootstrap(world) if world.uses_mpi else StoreBootstrap(world)


def together(bootstrap: Bootstrap, action: Callable[[], _Result]) -> _Result:
    """Do `action` on every rank; when it raises KnlError on any, raise on all: nobody goes on to
    wait for a rank that has given up, and the user reads one line and not one from each rank."""
    result, error = None, None
    try:
        result = action()
    except KnlError as caught:
        error = caught
    problems = bootstrap.gather("" if error is None else f"{error.exit_code} {error}")
    failed = [(rank, problem) for rank, problem in enumerate(problems) if problem]
    if not failed:
        return result  # type: ignore[return-value]
    rank, (code, _, message) = failed[0][0], failed[0][1].partition(" ")
    kind = InputError if int(code) == InputError.exit_code else FailedError
    where = "" if len(failed) == len(problems) else f"rank {rank}: "
    raise kind(where + message, shared=True)


def mpi_version() -> str:
    """Name and version of the MPI in this process."""
    from mpi4py import MPI

    first = MPI.Get_library_version().splitlines()[0]
    return first.split(",")[0].replace(" for Linux* OS", "").strip("\0 ")  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""A narrow channel between ranks before there are collectives: agree, and carry an address."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from knl.comm.roll_call import (
    MpiReports,
    Place,
    RollCall,
    StoreReports,
    own_place,
    siblings_missing,
)
from knl.comm.watchdog import START_LIMIT, limit, start_timeout
from knl.comm.world import SINGLE, World
from knl.errors import CollectiveTimeoutError, FailedError, InputError, KnlError
from knl.native import loaded_libraries

_Result = TypeVar("_Result")


class Bootstrap(Protocol):
    """What providers need in order to open. Whoever waits longer than KNL_START_TIMEOUT_S for the
    other ranks ends the job."""

    roll_call: RollCall

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks, on every rank."""


class SingleBootstrap:
    """A world of one agrees with itself."""

    def __init__(self) -> None:
        self.roll_call = RollCall(SINGLE, [own_place()], None)

    def broadcast(self, data: bytes) -> bytes:
        return data

    def gather(self, text: str) -> list[str]:
        return [text]


class MpiBootstrap:
    """Over mpi4py, which initialises MPI with thread support for oneCCL's workers."""

    def __init__(self, world: World) -> None:
        if world.launcher == "openmpi":  # else mpi4py would take the stack's Intel MPI
            os.environ.setdefault("MPI4PY_MPIABI", "openmpi")
        self._rank, self._timeout = world.rank, start_timeout()
        try:
            with limit("start of MPI", self._timeout, world.rank, self._before_mpi(world)):
                MPI = _start_mpi()
        except (ImportError, RuntimeError) as error:
            raise FailedError(
                f"MPI cannot be loaded ({first_line(error)}): install a stack "
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
        with limit("start of MPI", self._timeout, world.rank, self._before_mpi(world)):
            here = own_place()
            places = [Place(*place) for place in self.comm.allgather((here.host, here.pid))]
            self.roll_call = RollCall(world, places, MpiReports(self.comm))

    def broadcast(self, data: bytes) -> bytes:
        with limit("start of the ranks", self._timeout, self._rank, self.roll_call.tell):
            return self.comm.bcast(data, root=0)  # type: ignore[no-any-return]

    def gather(self, text: str) -> list[str]:
        with limit("start of the ranks", self._timeout, self._rank, self.roll_call.tell):
            return self.comm.allgather(text)  # type: ignore[no-any-return]

    @staticmethod
    def _before_mpi(world: World) -> Callable[[str], str | None]:
        def tell(problem: str) -> str | None:
            missing, lowest = siblings_missing(world)
            return f"{problem}: {missing}" if lowest else None

        return tell


class StoreBootstrap:
    """Over the key-value store that torchrun serves at MASTER_ADDR:MASTER_PORT."""

    def __init__(self, world: World) -> None:
        from torch.distributed import PrefixStore, TCPStore

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
        self.turn = 0
        try:
            store = TCPStore(
                host,
                port,
                world.size,
                world.rank == 0 and not served,
                timedelta(seconds=start_timeout()),
            )
        except RuntimeError as error:
            raise FailedError(
                f"{host}:{port}, the store of the ranks: {first_line(error)}"
            ) from None
        # An agent's store outlives an attempt of torchrun, and so would its keys.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"knl-{attempt}", store)
        here = own_place()
        texts = [text.rpartition(" ") for text in self.gather(f"{here.host} {here.pid}")]
        places = [Place(name, int(pid)) for name, _, pid in texts]
        self.roll_call = RollCall(world, places, StoreReports(self.store, world.rank))

    def broadcast(self, data: bytes) -> bytes:
        self.turn += 1
        key = f"knl/{self.turn}"
        if self.world.rank == 0:
            self.store.set(key, data)
        return self._get(key, 0)

    def gather(self, text: str) -> list[str]:
        self.turn += 1
        self.store.set(f"knl/{self.turn}/{self.world.rank}", text)
        return [
            self._get(f"knl/{self.turn}/{rank}", rank).decode() for rank in range(self.world.size)
        ]

    def _get(self, key: str, rank: int) -> bytes:
        try:
            return self.store.get(key)  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise FailedError(
                f"start of the ranks: nothing from rank {rank} ({first_line(error)}): look at its "
                f"host, then start the job again {START_LIMIT}"
            ) from None


def _start_mpi() -> Any:
    """mpi4py's MPI, initialised for several threads. Its own initialisation waits for the other
    ranks without letting go of the interpreter, so that no limit could end it."""
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    if not MPI.Is_initialized():
        libraries = [p for p in loaded_libraries() if re.search(r"/libmpi(ch)?\.so[^/]*$", p)]
        if not libraries:
            raise RuntimeError("its library is not among the loaded ones")
        provided = ctypes.c_int()
        code = ctypes.CDLL(libraries[0]).MPI_Init_thread(
            None, None, MPI.THREAD_MULTIPLE, ctypes.byref(provided)
        )
        if code != MPI.SUCCESS or provided.value < MPI.THREAD_SERIALIZED:
            raise RuntimeError(f"MPI_Init_thread: error {code}, thread level {provided.value}")
    return MPI


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
    except CollectiveTimeoutError:
        raise  # a rank is missing: there is nobody to agree with
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


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]

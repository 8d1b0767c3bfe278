"""Which ranks are missing when the others have waited in vain, told by one rank alone."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from knl.comm.world import World

_COLLECT_S = 2.0  # for ranks whose limit ends a little later
_ANSWER_S = _COLLECT_S + 2.0
_BOUND_S = 2 * _ANSWER_S + 2.0  # what asks may hang itself
_SILENCE_S = 10.0  # in which the rank that tells takes this one down
_STAGGER_S = 0.5
# By which launchers number their processes.
_RANKS = (b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK=", b"SLURM_PROCID=")


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    pid: int


def own_place() -> Place:
    """This process's."""
    return Place(platform.node(), os.getpid())


def state_of(pid: int) -> str:
    """What a process of this host does: "gone", "stopped" or "running"."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "running")


class Reports(Protocol):
    """How ranks that have given up find each other."""

    def exchange(self, expected: set[int]) -> set[int] | None:
        """Report this rank. Returns those of `expected` from which no report came, on the one rank
        that is to tell; None on the others. Raises when nobody answers."""


class RollCall:
    """The places of all ranks, in the order of ranks, and a way to ask who waits as well."""

    def __init__(self, world: World, places: Sequence[Place], reports: Reports | None) -> None:
        self._world, self._places, self._reports = world, places, reports
        # Ranks in containers of their own may share a host's name and not see each other.
        here = own_place().host
        self._seen_here = [
            rank
            for rank, place in enumerate(places)
            if place.host == here and rank != world.rank and state_of(place.pid) != "gone"
        ]

    @property
    def hosts(self) -> tuple[str, ...]:
        """By rank."""
        return tuple(place.host for place in self._places)

    def tell(self, problem: str) -> str:
        """`problem` and which ranks are missing. Only the rank that is to tell the user returns
        soon; the others are silent until it has ended the job, or go on after a while."""
        here = {rank: state_of(self._places[rank].pid) for rank in self._seen_here}
        lost = {rank: state for rank, state in here.items() if state != "running"}
        others = set(range(self._world.size)) - {self._world.rank}
        reports = self._reports
        if reports is not None:
            answered, silent = _within(_BOUND_S, lambda: reports.exchange(others - set(lost)))
            if answered and silent is None:
                time.sleep(_SILENCE_S)
            elif answered:
                lost.update(dict.fromkeys(silent or (), ""))
            else:
                if 0 not in lost and self._world.rank != 0:
                    lost[0] = ""
                time.sleep(min(_STAGGER_S * max(0, self._world.rank - 1), _SILENCE_S))
        return f"{problem}: {self._describe(lost)}"

    def _describe(self, lost: dict[int, str]) -> str:
        if not lost:
            return "no rank is known to be missing"
        texts = [self._describe_one(rank, lost[rank]) for rank in sorted(lost)[:4]]
        more = f" and {len(lost) - 4} more ranks" if len(lost) > 4 else ""
        return ", ".join(texts) + more

    def _describe_one(self, rank: int, state: str) -> str:
        place = self._places[rank]
        what = f"is {state}" if state else "does not answer, it hangs or is late"
        return f"rank {rank} on host {place.host} {what} (pid {place.pid})"


class MpiReports:
    """Over a communicator that nothing else uses: rank 0 hears the reports and answers them."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()

    def exchange(self, expected: set[int]) -> set[int] | None:
        if self._comm.rank == 0:
            return self._hear(expected)
        self._report(expected)
        return None

    def _hear(self, expected: set[int]) -> set[int]:
        missing, waiting = set(expected), []
        deadline = time.monotonic() + _COLLECT_S
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                if self._comm.Iprobe(source=rank):
                    self._comm.Recv(bytearray(1), source=rank)
                    # Not waited for: a rank that has reported may be killed before it reads.
                    waiting.append(self._comm.Isend(bytearray(1), dest=rank))
                    missing.discard(rank)
            time.sleep(0.01)
        return missing

    def _report(self, expected: set[int]) -> None:
        if 0 not in expected:
            raise RuntimeError("rank 0 is lost")
        self._comm.Isend(bytearray(1), dest=0)
        deadline = time.monotonic() + _ANSWER_S
        while not self._comm.Iprobe(source=0):
            if time.monotonic() > deadline:
                raise TimeoutError("no answer from rank 0")
            time.sleep(0.01)


class StoreReports:
    """Over torchrun's store: the first rank to report tells."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank

    def exchange(self, expected: set[int]) -> set[int] | None:
        self._store.add(f"knl/roll/{self._rank}", 1)
        if self._store.add("knl/roll", 1) != 1:
            return None
        missing = set(expected)
        deadline = time.monotonic() + _COLLECT_S
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not self._store.add(f"knl/roll/{rank}", 0)}
            time.sleep(0.05)
        return missing


def siblings_missing(world: World) -> tuple[str, bool]:
    """Before the ranks have met: which of those that this rank's launcher started on this host are
    stopped, and whether this rank is the lowest of those that run."""
    stopped, running = {}, [world.rank]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        numbers = [v.partition(b"=")[2] for v in variables if v.startswith(_RANKS)]
        if parent != os.getppid() or not numbers:
            continue
        rank, pid = int(numbers[0]), int(process.name)
        if state_of(pid) == "stopped":
            stopped[rank] = pid
        elif state_of(pid) == "running":
            running.append(rank)
    texts = [f"rank {rank} is stopped (pid {pid})" for rank, pid in sorted(stopped.items())]
    if not texts:
        absent = world.local_size - len(set(running))
        texts = [
            f"{absent} of {world.local_size} ranks on this host are gone"
            if absent
            else "no rank on this host is missing"
        ]
    return ", ".join(texts), world.rank == min(running)


def _within(seconds: float, action: Callable[[], set[int] | None]) -> tuple[bool, set[int] | None]:
    """Whether `action` came back in time and without an error, and what with."""
    outcome: list[set[int] | None] = []

    def run() -> None:
        try:
            outcome.append(action())
        except Exception:
            return  # nobody answers: that is the caller's news

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(outcome), outcome[0] if outcome else None

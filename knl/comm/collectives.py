"""Collectives over all ranks, behind one small interface with four providers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch

from knl.comm.bootstrap import Bootstrap
from knl.comm.watchdog import limit, start_timeout
from knl.comm.world import Provider, World
from knl.errors import CollectiveTimeoutError, FailedError

PROVIDERS = tuple(name for name in get_args(Provider) if name != "auto")


class ProviderUnavailable(Exception):
    """Why a provider cannot be used here."""


class Handle(Protocol):
    """A collective under way."""

    def test(self) -> bool:
        """Whether it is done; lets it go on."""

    def wait(self, timeout: float) -> None:
        """Return when done. Raises CollectiveTimeoutError after `timeout` seconds."""


class Collectives(Protocol):
    """One provider, open over all ranks. Tensors are dense: float32, float64, int32, int64, and
    for `allreduce` bfloat16, but for `no_bf16`: why the provider cannot add that up, "" where it
    can."""

    name: str
    version: str
    no_bf16: str

    def allreduce(self, tensor: torch.Tensor, priority: int = 0) -> Handle:
        """Start summing `tensor` over the ranks, in place. Every rank calls in the same order.
        `priority`: a higher one may go first, where the provider knows such a thing."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Overwrite `tensor` with rank `root`'s."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def close(self) -> None:
        """Free what the provider holds. Call before MPI ends."""


@dataclass(frozen=True)
class Ranks:
    """The open world: who am I, the collectives, and why the providers before it were not taken.
    `hosts`: by rank."""

    world: World
    collectives: Collectives
    passed_over: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    @property
    def provider(self) -> str:
        return self.collectives.name

    def describe(self) -> str:
        """One line for the log: the provider, its version, and why not those before it."""
        line = f"{self.world.size} rank(s) over {self.provider} {self.collectives.version}".rstrip()
        return "; ".join([line, *(f"not {reason}" for reason in self.passed_over)])


class Alone:
    """A world of one: everything is done at once."""

    name = "single"
    version = ""
    no_bf16 = ""

    def allreduce(self, tensor: torch.Tensor, priority: int = 0) -> Handle:
        return self

    def test(self) -> bool:
        return True

    def wait(self, timeout: float) -> None:
        return

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        return

    def barrier(self) -> None:
        return

    def close(self) -> None:
        return


class NarrowSum:
    """A sum of float32 under way as bfloat16: rounded to nearest on its way out, widened into its
    place when it is there."""

    def __init__(self, collectives: Collectives, tensor: torch.Tensor, priority: int) -> None:
        self._tensor, self._narrow = tensor, tensor.to(torch.bfloat16)
        self._handle: Handle | None = collectives.allreduce(self._narrow, priority)

    def test(self) -> bool:
        return self._handle is None or (self._handle.test() and self._arrived())

    def wait(self, timeout: float) -> None:
        if self._handle is not None:
            self._handle.wait(timeout)
            self._arrived()

    def _arrived(self) -> bool:
        self._tensor.copy_(self._narrow)
        self._handle, self._narrow = None, torch.empty(0)
        return True


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """A CollectiveTimeoutError from in here begins with `what` was waited for."""
    try:
        yield
    except CollectiveTimeoutError as error:
        raise CollectiveTimeoutError(f"{what}: {error}") from None


def open_ranks(
    world: World, bootstrap: Bootstrap, provider: str, timeout: float, *, shared: bool = True
) -> Ranks:
    """Open `provider`, or with "auto" the first of PROVIDERS that works on every rank.

    `timeout`: seconds after which a provider gives up a collective that has no limit of its own;
    `shared`: whether ranks of a node sum in memory that they share (knl.comm.node), where they
    can.
    Raises FailedError when the provider asked for, or every provider, is unavailable.
    """
    from knl.comm.node import share_node

    hosts = bootstrap.roll_call.hosts
    if world.size == 1:
        return Ranks(world, Alone(), hosts=hosts)
    reasons: list[str] = []
    for name in PROVIDERS if provider == "auto" else (provider,):
        try:
            collectives = _open_on_all(name, world, bootstrap, timeout)
        except ProviderUnavailable as reason:
            reasons.append(f"{name}: {reason}")
        else:
            if not shared:
                return Ranks(world, collectives, tuple(reasons), hosts)
            with limit("sharing memory", start_timeout(), world.rank, bootstrap.roll_call.tell):
                collectives, why_not = share_node(world, bootstrap, collectives)
            if why_not:
                reasons.append(f"in shared memory within the node: {why_not}")
            return Ranks(world, collectives, tuple(reasons), hosts)
    raise FailedError(f"no provider works; {'; '.join(reasons)}", shared=True)


def _open_on_all(name: str, world: World, bootstrap: Bootstrap, timeout: float) -> Collectives:
    """Load on every rank, agree that it loaded on all, then open: nobody waits for a rank that
    cannot come. Raises ProviderUnavailable, on every rank alike."""
    opener, problem = None, ""
    try:
        opener = _load(name, world, bootstrap, timeout)
    except ProviderUnavailable as reason:
        problem = str(reason)
    problems = bootstrap.gather(problem)
    for rank, text in enumerate(problems):
        if text:
            raise ProviderUnavailable(text if all(problems) else f"rank {rank}: {text}")
    assert opener is not None  # it loaded here, or there was a problem
    waiting = limit(f"opening {name}", start_timeout(), world.rank, bootstrap.roll_call.tell)
    with waiting, waiting_for(f"opening {name}"):
        return opener()


def _load(
    name: str, world: World, bootstrap: Bootstrap, timeout: float
) -> Callable[[], Collectives]:
    """Import the provider's libraries; return what opens it."""
    if name == "oneccl":
        from knl.comm import oneccl

        return oneccl.load(world, bootstrap, timeout)
    if name == "mpi":
        from knl.comm import mpi

        return mpi.load(bootstrap, timeout)
    from knl.comm import torch_dist

    return torch_dist.load(name, world, bootstrap, timeout)


def allreduce_numbers(
    collectives: Collectives, numbers: Sequence[float], timeout: float, what: str
) -> list[float]:
    """The sums over ranks of a few numbers, in double precision. Raises CollectiveTimeoutError
    that begins with `what`."""
    tensor = torch.tensor(list(numbers), dtype=torch.float64)
    with waiting_for(what):
        collectives.allreduce(tensor).wait(timeout)
    return tensor.tolist()  # type: ignore[no-any-return]

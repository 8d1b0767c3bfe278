"""The ranks of `knl bench allreduce`: rivals in turn at each size, every sum checked.

`python -m knl.bench.allreduce_ranks WANTED`, as one of several MPI ranks. WANTED is JSON:
{"bytes": sizes, "rounds": samples of each rival, "rivals": names, of RIVALS and the providers}.
Rank 0 tells {"rows": [{"bytes", "rival", "seconds": [of one call, a sample a round]}],
"missing": {rival: why it is not there}, "provider_versions": {rival: version}}.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from knl.bench.ranks import as_rank
from knl.comm.bootstrap import MpiBootstrap, open_bootstrap
from knl.comm.collectives import Collectives, open_ranks
from knl.comm.node import SharedNode
from knl.comm.shared_memory import NodeUnavailable
from knl.comm.world import World, world_from
from knl.errors import FailedError

# The sum within the node (knl.comm.node), which training takes; oneCCL's alone is "oneccl".
SHARED = "shared"
_LIMIT_S = 60.0
_FLOAT = 4
# So many bytes are summed in a sample at least, in calls one after the other: a clock is not read
# for less than a few microseconds.
_SAMPLE_BYTES = 1 << 20
_WARMUP = 2

# Sums a tensor over the ranks in place, and returns the seconds that it took.
Rival = Callable[[torch.Tensor], float]


def timed(action: Callable[[torch.Tensor], object]) -> Rival:
    """An action that does not tell its seconds itself."""

    def rival(tensor: torch.Tensor) -> float:
        began = time.perf_counter()
        action(tensor)
        return time.perf_counter() - began

    return rival


def _measure(wanted: dict[str, Any]) -> dict[str, Any] | None:
    world = world_from(os.environ)
    bootstrap = open_bootstrap(world)
    assert isinstance(bootstrap, MpiBootstrap)  # knl bench starts MPI ranks
    open_ones: dict[str, Collectives] = {}
    rivals: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    for name in wanted["rivals"]:
        kind = name.partition("-")[0]
        provider = "oneccl" if kind == SHARED else kind
        try:
            if kind not in open_ones:
                ranks = open_ranks(world, bootstrap, provider, _LIMIT_S, shared=kind == SHARED)
                open_ones[kind] = ranks.collectives
        except FailedError as error:
            missing[name] = str(error)
            continue
        if kind == SHARED and not isinstance(open_ones[kind], SharedNode):
            missing[name] = ranks.describe()
            continue
        rivals[name] = _rival(name, open_ones[kind])
    rows = []
    for size in wanted["bytes"]:
        node = open_ones.get(SHARED) if SHARED in rivals else None
        seconds = _in_turn(rivals, node, size, wanted["rounds"], world, bootstrap.comm)
        rows += [{"bytes": size, "rival": name, "seconds": s} for name, s in seconds.items()]
    versions = {name: one.version for name, one in open_ones.items()}
    for one in open_ones.values():
        one.close()
    if world.rank != 0:
        return None
    return {"rows": rows, "missing": missing, "provider_versions": versions}


def _rival(name: str, collectives: Collectives) -> Rival:
    if name == "oneccl-bare":
        return collectives.bare_seconds  # type: ignore[attr-defined, no-any-return]
    return timed(lambda tensor: collectives.allreduce(tensor).wait(_LIMIT_S))


def _in_turn(
    rivals: dict[str, Rival],
    node: Any,
    size: int,
    rounds: int,
    world: World,
    comm: Any,
) -> dict[str, list[float]]:
    """Seconds of one call of each rival, and of a copy of as much memory, the slowest rank's.
    `node`: whose memory is SHARED's."""
    elements = max(1, size // _FLOAT)
    ramp = (torch.arange(elements, dtype=torch.int32) % 1000).to(torch.float32)
    usual, other = torch.empty(elements), torch.empty(elements)
    tensors = dict.fromkeys([*rivals, "copy"], usual)
    if node is not None:
        try:
            (tensors[SHARED],) = node.buffers([elements])
        except NodeUnavailable:  # on every rank alike; there is no row then
            rivals = {name: rival for name, rival in rivals.items() if name != SHARED}
            del tensors[SHARED]
    for name, rival in rivals.items():
        tensor = tensors[name]
        tensor.copy_(ramp).add_(world.rank)
        rival(tensor)
        expected = other.copy_(ramp).mul_(world.size).add_(world.size * (world.size - 1) / 2)
        if not torch.equal(tensor, expected):
            raise FailedError(f"{name}: wrong sums of {size} bytes on rank {world.rank}")
    contestants = {**rivals, "copy": timed(other.copy_)}
    for tensor in tensors.values():
        tensor.zero_()  # its sums stay zeros however often they are added
    repeats = max(1, _SAMPLE_BYTES // size)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    generator = random.Random(size)  # the same order on every rank
    for number in range(_WARMUP + rounds):
        # Each follows each other one in some round: what it leaves in the cache helps all alike.
        order = list(contestants)
        generator.shuffle(order)
        for name in order:
            comm.Barrier()
            taken = sum(contestants[name](tensors[name]) for _ in range(repeats)) / repeats
            if number >= _WARMUP:
                seconds[name].append(max(comm.allgather(taken)))
    return seconds


if __name__ == "__main__":
    as_rank(_measure)

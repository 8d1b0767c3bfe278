"""Sums within a node, in memory that its ranks share; a provider's collectives between nodes.

Each rank keeps its buffers in a segment that the others of its node map. A sum takes a round:

1. A rank notes that its buffer is filled.
2. When all have, each rank adds its own slice of all buffers up, with all of its threads.
3. Between nodes, the ranks of one place each (a rail) allreduce their slice by the provider.
4. Each rank writes its slice's sum into all buffers, and notes that. When all have, the round ends.

So within a node nothing is copied into a library's buffers and back: memory is read once and
written once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections import deque
from collections.abc import Sequence

import torch

from knl import native
from knl.comm.bootstrap import Bootstrap
from knl.comm.collectives import Collectives, Handle
from knl.comm.shared_memory import PAGE, NodeUnavailable, Segments
from knl.comm.world import World
from knl.errors import CollectiveTimeoutError

_SLICE = PAGE // 4  # floats: slices end on pages
# A wait comes back to Python so often, where signals are handled.
_POLL_S = 0.1


def node_of_each_rank(bootstrap: Bootstrap) -> list[str]:
    """A name for the node of each rank. Slurm can have several nodes on one host."""
    return bootstrap.gather(f"{platform.node()} {os.environ.get('SLURM_NODEID', '')}")


def share_node(
    world: World, bootstrap: Bootstrap, collectives: Collectives
) -> tuple[Collectives, str]:
    """The collectives with sums within the node in shared memory, and "" or why not. Every rank
    gets the same answer."""
    nodes = node_of_each_rank(bootstrap)
    groups = [[r for r, node in enumerate(nodes) if node == name] for name in dict.fromkeys(nodes)]
    places = len(groups[0])
    if places == 1 and all(len(group) == 1 for group in groups):
        return collectives, ""
    if any(len(group) != places for group in groups):
        return collectives, "nodes have unlike numbers of ranks"
    rails = [[group[place] for group in groups] for place in range(places)]
    between = None
    if len(groups) > 1:
        if not hasattr(collectives, "split"):
            return collectives, f"{collectives.name} has no collectives between some of the ranks"
        between = collectives.split(rails)
    node = SharedNode(world, bootstrap, collectives, groups, between)
    try:
        node.buffers([_SLICE])
    except NodeUnavailable as reason:
        if between is not None:
            between.close()
        return collectives, str(reason)
    return node, ""


class SharedNode:
    """A provider's collectives, with the sums of `buffers` made within the node first.

    `groups`: the ranks of each node; `between`: collectives over the ranks of this rank's place,
    None where there is one node.
    """

    def __init__(
        self,
        world: World,
        bootstrap: Bootstrap,
        collectives: Collectives,
        groups: Sequence[Sequence[int]],
        between: Collectives | None,
    ) -> None:
        self.name = collectives.name
        self.version = f"{collectives.version}, within the node in shared memory"
        self.inner, self.between, self._bootstrap = collectives, between, bootstrap
        self._rank = world.rank
        self.ranks = next(list(group) for group in groups if world.rank in group)
        self.place = self.ranks.index(world.rank)
        self._kernels = _declare(native.load_kernels())
        self._slots: dict[int, tuple[Segments, int]] = {}
        self._filled: deque[_Round] = deque()  # rounds whose sums this rank has yet to make

    def buffers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Float32 zeros of these sizes, in memory of the node; the former ones are given up. Every
        rank calls with the same sizes. Raises NodeUnavailable, on every rank alike."""
        self._slots = {}
        segment = Segments(self._bootstrap, self.ranks, self._rank, sizes)
        self._slots = {t.data_ptr(): (segment, n) for n, t in enumerate(segment.tensors)}
        return segment.tensors

    def allreduce(self, tensor: torch.Tensor, priority: int = 0) -> Handle:
        found = self._slots.get(tensor.data_ptr())
        if found is None or found[0].sizes[found[1]] != tensor.numel():
            return self.inner.allreduce(tensor, priority)
        started = _Round(self, *found, priority)
        self._filled.append(started)
        return started

    def advance(self, seconds: float = 0.0) -> None:
        """Make this rank's part of the sums that all ranks of the node have come to; wait so long
        for the first of them. In the order of allreduce: between nodes it must be the same for
        all."""
        while self._filled and self._filled[0].reached("filled", seconds):
            self._filled.popleft().make_sum()
            seconds = 0.0

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self.inner.broadcast(tensor, root)

    def barrier(self) -> None:
        self.inner.barrier()

    def close(self) -> None:
        self._slots = {}
        if self.between is not None:
            self.between.close()
        self.inner.close()


class _Round:
    """One sum under way. Goes on when it is asked whether it is done."""

    def __init__(self, node: SharedNode, segment: Segments, slot: int, priority: int) -> None:
        self._node, self._segment, self._slot = node, segment, slot
        self._kernels, self._priority = node._kernels, priority
        segment.rounds[slot] += 1
        self._round = segment.rounds[slot]
        size, ranks = segment.sizes[slot], len(node.ranks)
        ends = [size * n // ranks // _SLICE * _SLICE for n in range(ranks)] + [size]
        self._begin, self._end = ends[node.place], ends[node.place + 1]
        self._state = "filled"
        self._between: Handle | None = None
        self._note("filled")

    def test(self) -> bool:
        return self._advance(0.0)

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._advance(min(_POLL_S, timeout)):
            if time.monotonic() >= deadline:
                raise CollectiveTimeoutError(self._late(timeout))

    def _advance(self, seconds: float) -> bool:
        """Go as far as can be within so many seconds; whether the round is over."""
        if self._state == "filled":
            self._node.advance(seconds)
        if self._state == "between" and self._between_done(seconds):
            self._spread()
        if self._state == "spread" and self.reached("spread", seconds):
            self._state = "done"
        return self._state == "done"

    def reached(self, what: str, seconds: float) -> bool:
        """Whether all ranks have "filled" or "spread" theirs, within so many seconds."""
        slots = self._segment.slots[self._slot]
        spread = what == "spread"
        return bool(
            self._kernels.knl_node_wait(slots.ctypes.data, len(slots), spread, self._round, seconds)
        )

    def make_sum(self) -> None:
        """Add this rank's slice up, and hand it on."""
        ranks, place, between = len(self._node.ranks), self._node.place, self._node.between
        first, last = (0, ranks) if between is None else (place, place + 1)
        self._kernels.knl_node_sum(
            self._segment.buffers[self._slot].ctypes.data, ranks, first, last,
            self._begin, self._end,
        )  # fmt: skip
        if between is None:
            self._note("spread")
        elif self._begin < self._end:
            mine = self._segment.tensors[self._slot][self._begin : self._end]
            self._between, self._state = between.allreduce(mine, self._priority), "between"
        else:  # a slice of nothing, on every node
            self._note("spread")

    def _between_done(self, seconds: float) -> bool:
        assert self._between is not None  # set with this state
        if seconds == 0.0:
            return self._between.test()
        try:
            self._between.wait(seconds)
        except CollectiveTimeoutError:
            return False
        return True

    def _spread(self) -> None:
        self._kernels.knl_node_spread(
            self._segment.buffers[self._slot].ctypes.data, len(self._node.ranks),
            self._node.place, self._begin, self._end,
        )  # fmt: skip
        self._note("spread")

    def _note(self, what: str) -> None:
        own = int(self._segment.slots[self._slot][self._node.place])
        self._kernels.knl_node_note(own, what == "spread", self._round)
        self._state = what

    def _late(self, timeout: float) -> str:
        late = [self._node.ranks[place] for place in self._segment.missing(self._slot)]
        if not late:
            return f"not done after {timeout:g} s"
        listed = ", ".join(map(str, late[:8])) + (" ..." if len(late) > 8 else "")
        return f"not done after {timeout:g} s, rank(s) {listed} of this node did not come"


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    kernels.knl_node_note.argtypes = [pointer, number, ctypes.c_uint64]
    kernels.knl_node_wait.argtypes = [pointer, number, number, ctypes.c_uint64, ctypes.c_double]
    kernels.knl_node_sum.argtypes = [pointer, number, number, number, size, size]
    kernels.knl_node_spread.argtypes = [pointer, number, number, size, size]
    return kernels

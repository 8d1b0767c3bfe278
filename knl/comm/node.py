"""Sums within a node, in memory that its ranks share; a provider's collectives between nodes.

Each rank keeps its buffers in a segment that the others of its node map. A sum takes a round:

1. A rank notes that its buffer is filled.
2. When all have, each rank adds its own slice of all buffers up, with all of its threads.
3. Between nodes, the ranks of one place each (a rail) allreduce their slice by the provider.
4. Each rank writes its slice's sum into all buffers, and notes that. When all have, the round ends.

So within a node nothing is copied into a library's buffers and back: memory is read once and
written once. Whoever writes a sum leaves its squares as well, for LARS.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from knl import native
from knl.comm.bootstrap import Bootstrap
from knl.comm.collectives import Collectives, Handle, NarrowSum
from knl.comm.shared_memory import NodeUnavailable, Segments
from knl.comm.world import World
from knl.errors import CollectiveTimeoutError

_LINE = 16  # floats
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
        node.buffers([_LINE])
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
        self.no_bf16 = collectives.no_bf16
        self.inner, self.between, self._bootstrap = collectives, between, bootstrap
        self._rank = world.rank
        self.ranks = next(list(group) for group in groups if world.rank in group)
        self.place = self.ranks.index(world.rank)
        self._kernels = _declare(native.load_kernels())
        self._slots: dict[int, _Buffer] = {}  # by address
        self._filled: deque[_Round] = deque()  # rounds whose sums this rank has yet to make

    def buffers(
        self, sizes: Sequence[int], runs: Sequence[Sequence[int]] = ()
    ) -> list[torch.Tensor]:
        """Float32 zeros of these sizes, in memory of the node; the former ones are given up.
        `runs`: the lengths of the tensors that each begins with, whose `squares` are wanted. Every
        rank calls with the same. Raises NodeUnavailable, on every rank alike."""
        runs = runs or [()] * len(sizes)
        self._slots = {}
        piece = int(self._kernels.knl_piece())
        ends = [_ends(run, size, piece) for run, size in zip(runs, sizes)]
        # Behind each buffer lie the squares of its pieces, as doubles.
        starts = [-(-size // _LINE) * _LINE for size in sizes]
        rooms = [start + 2 * len(each) for start, each in zip(starts, ends)]
        segment = Segments(self._bootstrap, self.ranks, self._rank, rooms)
        for slot, memory in enumerate(segment.tensors):
            wanted = int(np.searchsorted(ends[slot], sum(runs[slot]), side="right"))
            self._slots[memory.data_ptr()] = _Buffer(
                segment,
                slot,
                memory[: sizes[slot]],
                ends[slot],
                segment.buffers[slot] + np.uint64(4 * starts[slot]),
                memory[starts[slot] :].numpy().view(np.float64)[:wanted],
            )
        return [buffer.tensor for buffer in self._slots.values()]

    def squares(self, tensor: torch.Tensor) -> NDArray[np.float64] | None:
        """The sums of squares of the `runs` in a buffer's last sum, a number a piece of each
        (native/squares.h), until its next; None for a tensor that the provider sums."""
        buffer = self._find(tensor)
        return buffer.squares if buffer else None

    def allreduce(self, tensor: torch.Tensor, priority: int = 0, narrow: bool = False) -> Handle:
        """`narrow`: of a buffer's sums, send those between nodes as bfloat16."""
        buffer = self._find(tensor)
        if buffer is None:
            return self.inner.allreduce(tensor, priority)
        started = _Round(self, buffer, priority, narrow)
        self._filled.append(started)
        return started

    def _find(self, tensor: torch.Tensor) -> _Buffer | None:
        buffer = self._slots.get(tensor.data_ptr())
        return buffer if buffer and buffer.tensor.numel() == tensor.numel() else None

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


@dataclass
class _Buffer:
    """One of each rank of the node. `tensor`, `squares`: this rank's, the latter of what is wanted;
    `ends`: of its pieces; `squares_at`: where each rank keeps those of all pieces."""

    segment: Segments
    slot: int
    tensor: torch.Tensor
    ends: NDArray[np.int64]
    squares_at: NDArray[np.uint64]
    squares: NDArray[np.float64]

    def slice_of(self, place: int, places: int) -> tuple[int, int]:
        """The first piece of one of so many ranks, and the first of the next one's."""
        size = self.tensor.numel()
        bounds = [size * place // places, size * (place + 1) // places]
        first, last = np.searchsorted(self.ends, bounds, side="right")
        return int(first), int(last)


class _Round:
    """One sum under way. Goes on when it is asked whether it is done."""

    def __init__(self, node: SharedNode, buffer: _Buffer, priority: int, narrow: bool) -> None:
        self._node, self._buffer, self._narrow = node, buffer, narrow
        self._segment, self._slot = buffer.segment, buffer.slot
        self._kernels, self._priority = node._kernels, priority
        self._segment.rounds[self._slot] += 1
        self._round = self._segment.rounds[self._slot]
        self._first, self._last = buffer.slice_of(node.place, len(node.ranks))
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
            self._segment.buffers[self._slot].ctypes.data, ranks, first, last, *self._pieces()
        )
        if between is None or self._first == self._last:  # or a slice of nothing, on every node
            self._note("spread")
            return
        ends = self._buffer.ends
        begin = ends[self._first - 1] if self._first else 0
        mine = self._buffer.tensor[begin : ends[self._last - 1]]
        start = partial(NarrowSum, between) if self._narrow else between.allreduce
        self._between, self._state = start(mine, self._priority), "between"

    def _pieces(self) -> tuple[int, int, int, int]:
        """This rank's slice, as the kernels take it."""
        buffer = self._buffer
        return buffer.ends.ctypes.data, self._first, self._last, buffer.squares_at.ctypes.data

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
            self._node.place, *self._pieces(),
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


def _ends(run: Sequence[int], size: int, piece: int) -> NDArray[np.int64]:
    """Where the pieces of a buffer end: those of its tensors, and of what comes after them."""
    ends: list[int] = []
    at = 0
    for length in (*run, size - sum(run)):
        ends += range(at + piece, at + length, piece)
        at += length
        ends += [at] if length else []
    return np.array(ends, dtype=np.int64)


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    kernels.knl_node_note.argtypes = [pointer, number, ctypes.c_uint64]
    kernels.knl_node_wait.argtypes = [pointer, number, number, ctypes.c_uint64, ctypes.c_double]
    kernels.knl_piece.restype = size
    kernels.knl_node_sum.argtypes = [
        pointer, number, number, number, pointer, size, size, pointer
    ]  # fmt: skip
    kernels.knl_node_spread.argtypes = [pointer, number, number, pointer, size, size, pointer]
    return kernels

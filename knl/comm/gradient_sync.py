"""Gradients summed over all ranks while backward still runs.

Gradients live in a few flat buckets, in the order in which backward produces them; `p.grad` is a
view of its bucket, so nothing is copied. A bucket's allreduce starts when its last gradient is
there, and whoever updates the weights gets the buckets as their sums arrive. Hooks sit on the
AccumulateGrad nodes, which every torch has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from knl.comm.agreement import Named, flat, require_same, require_same_layout
from knl.comm.collectives import Handle, NarrowSum, Ranks, waiting_for
from knl.comm.node import SharedNode
from knl.comm.shared_memory import NodeUnavailable
from knl.errors import InputError, say

Arrival = tuple[Sequence[int], Sequence[Optional[torch.Tensor]]]


@dataclass
class Bucket:
    """Gradients of neighbouring parameters in one flat buffer. `members`: their numbers;
    `gradients`: their parts of the buffer, in the parameters' shapes."""

    members: list[int]
    buffer: torch.Tensor
    gradients: list[torch.Tensor]
    missing: int = 0  # gradients still to come in this backward
    handle: Handle | None = field(default=None, repr=False)


class GradientSync:
    """Owns the gradients of `named` parameters and sums them over the ranks.

    A step is: `zero()`; backward of all local lanes but the last; `arm()`; backward of the last
    lane; `arrivals()`, or `finish()` where nothing is to be done as buckets arrive. In a world of
    one nothing is hooked and no bucket is made. `carried`: numbers that are summed along with the
    first bucket; set them before `arm`, read the sums when that bucket is there. `waited`: seconds
    that the last step waited for sums after backward. `order`: the parameters' numbers as the
    buckets hold them, known after the first step.

    `carry`: how many numbers; `bucket_bytes`: size at which a bucket is closed;
    `first_bucket_bytes`: of the first one, small so that communication starts early. `timeout`:
    seconds to wait for a bucket. `narrow`: gradients are bfloat16 on the wire between nodes; the
    buckets, sums within a node in shared memory and what is carried, which then travels on its
    own, stay float32.
    Raises FailedError when the ranks' models or sizes of buckets differ, InputError when the
    provider adds no bfloat16 up.
    """

    def __init__(
        self,
        named: Named,
        ranks: Ranks,
        *,
        bucket_bytes: int,
        first_bucket_bytes: int,
        timeout: float,
        carry: int = 1,
        narrow: bool = False,
    ) -> None:
        self.parameters = [parameter for _, parameter in named]
        self.names = [name for name, _ in named]
        self.ranks, self.timeout = ranks, timeout
        self.bucket_bytes, self.first_bucket_bytes = bucket_bytes, first_bucket_bytes
        self.buckets: list[Bucket] = []
        self.waited = 0.0
        self.carried = torch.zeros(carry)
        self._narrow = narrow
        self._carrying: Handle | None = None  # the carried numbers' sum, where it is one of its own
        self._arrived: list[int] | None = []  # order of the first backward; None once it is known
        self._armed = self._stepped = False
        self._next = 0  # buckets start in order, the same on every rank
        # Ranks of a node do the sums themselves: in backward where the others have come as far.
        self._node = ranks.collectives if isinstance(ranks.collectives, SharedNode) else None
        for parameter in self.parameters:
            make_dense(parameter)
        if ranks.world.size == 1:
            return
        if narrow:
            self._require_bf16()
        require_same_layout(ranks, named, timeout)
        sizes = {"comm.bucket_mb": bucket_bytes, "comm.first_bucket_mb": first_bucket_bytes}
        sizes["comm.dtype"] = int(narrow)
        require_same(ranks, list(sizes), list(sizes.values()), "the buckets", timeout)
        for name, parameter in named:
            with waiting_for(f"rank 0's first {name}"):
                ranks.collectives.broadcast(flat(parameter), root=0)
        # Until the first backward has shown the order, take the reverse of the definition.
        self._lay_out(range(len(self.parameters) - 1, -1, -1))
        self._nodes = [self._hook(number) for number in range(len(self.parameters))]

    def zero(self) -> None:
        """Clear the gradients for a new step."""
        if not self.buckets:
            for parameter in self.parameters:
                parameter.grad = None
        elif self._stepped and self._arrived is not None:
            self._adopt_order(self._arrived)
            self._arrived = None
        for bucket in self.buckets:
            bucket.buffer.zero_()

    def arm(self) -> None:
        """The next backward is the step's last: its gradients are complete as they come."""
        if not self.buckets:
            return
        self._armed, self._next = True, 0
        for bucket in self.buckets:
            bucket.missing, bucket.handle = len(bucket.members), None

    def arrivals(self) -> Iterator[Arrival]:
        """Parameters' numbers and the sums of their gradients, bucket by bucket, each when it is
        there; in a world of one all at once.

        Parameters that backward did not reach count as zeros (or the earlier lanes' sum).
        Raises CollectiveTimeoutError naming the bucket.
        """
        self._armed, self._stepped, self.waited = False, True, 0.0
        if not self.buckets:
            yield range(len(self.parameters)), [parameter.grad for parameter in self.parameters]
        began = time.perf_counter()
        self._start_buckets(complete=True)
        for number, bucket in enumerate(self.buckets):
            self._wait(number, bucket)
            self.waited += time.perf_counter() - began
            yield bucket.members, bucket.gradients
            began = time.perf_counter()

    def squares(self, members: Sequence[int]) -> NDArray[np.float64] | None:
        """The sums of squares of the gradients that came with these `members`, as Lars.update takes
        them, until the next step; None where those who summed the gradients have not made them."""
        if not self.buckets or self._node is None:
            return None
        return self._node.squares(self._bucket_of[members[0]].buffer)

    def finish(self) -> None:
        """Wait until every bucket is summed; raises as `arrivals` does."""
        for _ in self.arrivals():
            pass

    @property
    def order(self) -> list[int]:
        """Empty before the first step has ended, and in a world of one."""
        if not self.buckets or (self._arrived is not None and not self._stepped):
            return []
        return self._order_of_arrival(self._arrived) if self._arrived is not None else self._laid

    def restore(self, order: Sequence[int]) -> None:
        """Lay the buckets out as they were, so that sums are rounded alike. Every rank calls with
        the same `order`; an empty one leaves the first step to show it."""
        if self.buckets and sorted(order) == list(range(len(self.parameters))):
            self._lay_out(order)
            self._arrived = None

    def _wait(self, number: int, bucket: Bucket) -> None:
        assert bucket.handle is not None  # started by arrivals
        first = self.names[bucket.members[0]]
        with waiting_for(f"gradient bucket {number + 1} of {len(self.buckets)} (from {first})"):
            bucket.handle.wait(self.timeout)
            if number == 0 and self._carrying is not None:
                self._carrying.wait(self.timeout)

    def _require_bf16(self) -> None:
        provider = self.ranks.collectives
        if provider.no_bf16:
            raise InputError(
                f"comm.dtype = 'bf16': provider {provider.name}: {provider.no_bf16}; use "
                "comm.dtype = 'fp32', or --provider oneccl"
            )
        if self._node is not None and self._node.between is None and self.ranks.world.rank == 0:
            say(
                "comm.dtype = 'bf16' has no effect on one node: its ranks add float32 up in "
                "shared memory"
            )

    def _hook(self, number: int) -> Any:
        # The node exists as long as somebody holds it, so it is returned to be kept.
        parameter = self.parameters[number]
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        node.register_hook(lambda *_: self._gradient_ready(number))
        return node

    def _gradient_ready(self, number: int) -> None:
        if not self._armed:
            return
        if self._arrived is not None:
            self._arrived.append(number)
        self._bucket_of[number].missing -= 1
        self._start_buckets(complete=False)
        if self._node is not None:
            self._node.advance()

    def _start_buckets(self, complete: bool) -> None:
        """Start the next buckets in order, as far as they are full; all when `complete`."""
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if bucket.missing > 0 and not complete:
                return
            if self._next == 0 and self._narrow:
                self._carrying = self.ranks.collectives.allreduce(self.carried)
            # Later buckets hold the layers that the next forward needs first.
            bucket.handle = self._sum(bucket.buffer, self._next)
            self._next += 1

    def _sum(self, buffer: torch.Tensor, priority: int) -> Handle:
        if not self._narrow or buffer.dtype != torch.float32:
            return self.ranks.collectives.allreduce(buffer, priority)
        if self._node is not None:
            return self._node.allreduce(buffer, priority, narrow=True)
        return NarrowSum(self.ranks.collectives, buffer, priority)

    def _lay_out(self, order: Sequence[int]) -> None:
        """Make buckets for the parameters in this order and point p.grad into them."""
        groups = self.group(order)
        self._laid = list(order)
        # The former memory is given up first: there may not be room for both.
        self.buckets, self.carried = [], torch.zeros(self.carried.numel())
        self._bucket_of: dict[int, Bucket] = {}
        for parameter in self.parameters:
            parameter.grad = None
        buffers = self._buffers(groups)
        for members, buffer in zip(groups, buffers):
            gradients, offset = [], 0
            for number in members:
                parameter = self.parameters[number]
                gradients.append(buffer.as_strided(parameter.size(), parameter.stride(), offset))
                offset += parameter.numel()
            bucket = Bucket(members, buffer, gradients)
            self.buckets.append(bucket)
            for number, gradient in zip(members, gradients):
                self.parameters[number].grad = gradient
                self._bucket_of[number] = bucket

        self.carried = buffers[-1 if self._narrow else 0][-self.carried.numel() :]

    def _buffers(self, groups: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Zeros for each group, in memory of the node where its ranks sum there; in the first with
        room for what is carried, or with narrow gradients in one more."""
        runs = [[self.parameters[n].numel() for n in members] for members in groups]
        sizes = [sum(run) for run in runs]
        dtypes = [self.parameters[members[0]].dtype for members in groups]
        if self._narrow:
            sizes, dtypes = [*sizes, self.carried.numel()], [*dtypes, torch.float32]
            runs.append([])
        else:
            sizes[0] += self.carried.numel()
        if self._node is not None and set(dtypes) == {torch.float32}:
            try:
                return self._node.buffers(sizes, runs)
            except NodeUnavailable as reason:
                self._node = None
                if self.ranks.world.rank == 0:
                    say(f"gradients are summed by {self.ranks.provider} alone: {reason}")
        return [torch.zeros(size, dtype=dtype) for size, dtype in zip(sizes, dtypes)]

    def group(self, order: Sequence[int]) -> list[list[int]]:
        """The parameters' numbers in buckets: neighbours in `order`, of one type, up to the size of
        a bucket."""
        groups: list[list[int]] = []
        size, dtype = 0, None
        for number in order:
            parameter = self.parameters[number]
            limit = self.first_bucket_bytes if len(groups) == 1 else self.bucket_bytes
            if not groups or size >= limit or parameter.dtype != dtype:
                groups.append([])
                size, dtype = 0, parameter.dtype
            groups[-1].append(number)
            size += parameter.numel() * parameter.element_size()
        return groups

    def _adopt_order(self, arrived: Sequence[int]) -> None:
        """Lay the buckets out anew in rank 0's order of arrival."""
        numbers = torch.tensor(self._order_of_arrival(arrived), dtype=torch.int64)
        with waiting_for("the order of gradients"):
            self.ranks.collectives.broadcast(numbers, root=0)
        self._lay_out(numbers.tolist())

    def _order_of_arrival(self, arrived: Sequence[int]) -> list[int]:
        """Those that did not come at the end."""
        seen = set(arrived)
        return [*arrived, *(n for n in range(len(self.parameters)) if n not in seen)]


def make_dense(parameter: torch.Tensor) -> None:
    """Give a parameter that has holes or overlaps in its memory a dense copy, once."""
    expected = 1
    for size, stride in sorted(
        zip(parameter.shape, parameter.stride()), key=lambda d: (d[1], d[0])
    ):
        if size > 1 and stride != expected:
            parameter.data = parameter.data.contiguous()
            return
        expected *= size

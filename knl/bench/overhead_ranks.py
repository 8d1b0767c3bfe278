"""The ranks of `knl bench overhead`: steps of many tiny tensors, so that what is left is our own.

`python -m knl.bench.overhead_ranks WANTED`, as one of several MPI ranks. WANTED is JSON:
{"tensors": counts, "rounds"}. Rank 0 tells {"rows": [{"tensors", "seconds"}]}: CPU seconds of the
main thread, which runs all of it (several ranks may share a core, whose time is not the step's).
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from knl.bench.ranks import as_rank
from knl.comm.bootstrap import open_bootstrap
from knl.comm.collectives import Handle, Ranks, open_ranks
from knl.comm.gradient_sync import GradientSync
from knl.comm.world import world_from
from knl.optim.lars import Lars

_LIMIT_S = 60.0
_ELEMENTS = 8  # of a tensor, whose sums and update then cost nothing
_BUCKET_BYTES = 32 * _ELEMENTS * 4
_WARMUP = 3


class _Timed:
    """A provider whose own seconds are taken off: what is under it is communication."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def allreduce(self, tensor: torch.Tensor, priority: int = 0) -> Handle:
        began = time.thread_time()
        handle = self._inner.allreduce(tensor, priority)
        handle.wait(_LIMIT_S)  # alone, so that what follows finds nothing under way
        self.seconds += time.thread_time() - began
        return _Done()


class _Done:
    def test(self) -> bool:
        return True

    def wait(self, timeout: float) -> None:
        return


def _measure(wanted: dict[str, Any]) -> dict[str, Any] | None:
    world = world_from(os.environ)
    ranks = open_ranks(world, open_bootstrap(world), "auto", _LIMIT_S, shared=False)
    timed = _Timed(ranks.collectives)
    rows = [
        {
            "tensors": count,
            "seconds": _seconds(count, wanted["rounds"], Ranks(world, timed), timed),
        }
        for count in wanted["tensors"]
    ]
    ranks.collectives.close()
    return {"rows": rows} if world.rank == 0 else None


class _Fan(torch.autograd.Function):
    """A network of which nothing but the ends is left: each tensor gets a gradient, at once."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.count = len(tensors)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (gradients[0].expand(_ELEMENTS),) * ctx.count


def _seconds(count: int, rounds: int, ranks: Ranks, timed: _Timed) -> float:
    """Of a step of `count` tensors, less those of the same backward without us and of the
    collectives. The least of all rounds: what is above it is other programs' doing."""
    named = [(f"t{n}", torch.nn.Parameter(torch.ones(_ELEMENTS))) for n in range(count)]
    bare = [torch.nn.Parameter(torch.ones(_ELEMENTS)) for _ in range(count)]
    for parameter in bare:
        parameter.grad = torch.zeros(_ELEMENTS)  # added to in place, as in a bucket
    sync = GradientSync(
        named,
        ranks,
        bucket_bytes=_BUCKET_BYTES,
        first_bucket_bytes=_BUCKET_BYTES,
        timeout=_LIMIT_S,
    )
    lars = Lars(
        named, form="paper", momentum=0.9, weight_decay=1e-4, eta=0.001, skip=("bias", "norm")
    )
    ours = [parameter for _, parameter in named]
    steps, backwards = [], []
    for number in range(_WARMUP + rounds):
        backward_s = _backward(bare)
        timed.seconds = 0.0
        began = time.thread_time()
        sync.zero()
        sync.arm()
        _backward(ours)
        for members, gradients in sync.arrivals():
            lars.update(members, gradients, 1e-6, 1.0)
        lars.report()
        taken = time.thread_time() - began - timed.seconds
        if number >= _WARMUP:
            steps.append(taken)
            backwards.append(backward_s)
    return min(steps) - min(backwards)


def _backward(parameters: list[torch.nn.Parameter]) -> float:
    began = time.thread_time()
    _Fan.apply(*parameters).backward()
    return time.thread_time() - began


if __name__ == "__main__":
    as_rank(_measure)

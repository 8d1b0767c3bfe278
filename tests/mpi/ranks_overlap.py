"""Two ranks whose backward sleeps: what oneCCL has done meanwhile. ranks_overlap.py FOLDER, whose
name says whether there are workers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from ranks_common import LIMIT_S, Checks
from torch import nn

from knl.comm.collectives import Ranks, open_ranks
from knl.comm.gradient_sync import GradientSync

ELEMENTS = 1 << 16
LAYERS = 3
LONG_S = 10.0  # by when a worker must have summed a few hundred kilobytes
SHORT_S = 0.5


class Wait(torch.autograd.Function):
    """Its backward does `action`, and leaves the weight's gradient as it lies in its bucket."""

    @staticmethod
    def forward(ctx, x, weight, action):
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.action()
        return gradient, None, None


def sums_seen_in_the_last_sleep(ranks: Ranks, limit_s: float) -> list[float]:
    """What the memory of the other layers' gradients holds when the last layer has slept until they
    are summed, or so many seconds; nobody calls oneCCL meanwhile."""
    weights = [nn.Parameter(torch.ones(ELEMENTS)) for _ in range(LAYERS)]
    size = ELEMENTS * 4
    sync = GradientSync(
        [(f"w{number}", weight) for number, weight in enumerate(weights)],
        ranks,
        bucket_bytes=size,
        first_bucket_bytes=size,
        timeout=LIMIT_S,
    )
    seen: list[float] = []

    def sleep() -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            time.sleep(0.01)
            seen[:] = [float(weight.grad[-1]) for weight in weights[1:]]
            if seen == [ranks.world.size] * (LAYERS - 1):
                return

    for action in (lambda: None, sleep):  # the first backward shows the order alone
        for weight in weights:
            weight.grad.fill_(1.0)
        x = torch.zeros((), requires_grad=True)
        for number, weight in enumerate(weights):
            x = Wait.apply(x, weight, action if number == 0 else lambda: None)
        sync.arm()
        x.backward()
        sync.finish()
        for weight in weights:
            assert torch.equal(weight.grad, torch.full_like(weight, ranks.world.size))
    return seen


def main(folder: Path) -> None:
    workers = folder.name == "workers"
    os.environ.update(CCL_WORKER_COUNT="1", CCL_WORKER_OFFLOAD=str(int(workers)))
    checks = Checks(folder)
    ranks = open_ranks(checks.world, checks.bootstrap, "oneccl", LIMIT_S, shared=False)
    with checks.check("the memory in the last sleep"):
        seen = sums_seen_in_the_last_sleep(ranks, LONG_S if workers else SHORT_S)
        summed = [value == ranks.world.size for value in seen]
        assert len(seen) == LAYERS - 1
        assert all(summed) if workers else not any(summed), seen
    ranks.collectives.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

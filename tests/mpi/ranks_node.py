"""Four ranks that sum within nodes made up of them: ranks_node.py FOLDER."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks_common import LIMIT_S, Checks

from knl.comm import shared_memory
from knl.comm.bootstrap import Bootstrap
from knl.comm.collectives import Ranks, open_ranks
from knl.comm.gradient_sync import GradientSync
from knl.comm.node import SharedNode
from knl.errors import CollectiveTimeoutError

# The node of each rank.
LAYOUTS = {
    "one node": (0, 0, 0, 0),
    "two nodes": (0, 0, 1, 1),
    "two nodes by turns": (0, 1, 0, 1),
}
APART = (0, 1, 2, 3)
UNLIKE = (0, 0, 0, 1)
SIZES = (1, 5000, 1_000_003, 4096)


def opened(checks: Checks, provider: str, layout: tuple[int, ...], *, shared: bool = True) -> Ranks:
    os.environ["SLURM_NODEID"] = str(layout[checks.world.rank])
    return open_ranks(checks.world, checks.bootstrap, provider, LIMIT_S, shared=shared)


def values(size: int, rank: int, turn: int) -> np.ndarray:
    return np.random.default_rng([rank, turn, size]).normal(size=size).astype(np.float32)


def sums_like_numpy(ranks: Ranks) -> None:
    """Several rounds of several buffers, started in one order and waited for in the same."""
    node, rank, size = ranks.collectives, ranks.world.rank, ranks.world.size
    assert isinstance(node, SharedNode)
    buffers = node.buffers(SIZES)
    for turn in range(4):
        for n, buffer in zip(SIZES, buffers):
            buffer.copy_(torch.from_numpy(values(n, rank, turn)))
        handles = [node.allreduce(buffer, priority=k) for k, buffer in enumerate(buffers)]
        if turn % 2:
            time.sleep(0.002 * rank)
            any(handle.test() for handle in handles)
        for handle in handles:
            handle.wait(LIMIT_S)
        for n, buffer in zip(SIZES, buffers):
            wanted = sum(values(n, r, turn).astype(np.float64) for r in range(size))
            np.testing.assert_allclose(buffer.numpy(), wanted, rtol=1e-5, atol=1e-6)


def same_bits(ranks: Ranks, bootstrap: Bootstrap) -> None:
    (buffer,) = ranks.collectives.buffers([1_000_003])
    buffer.copy_(torch.from_numpy(values(buffer.numel(), ranks.world.rank, 9)))
    ranks.collectives.allreduce(buffer).wait(LIMIT_S)
    sums = bootstrap.gather(str(buffer.view(torch.int32).to(torch.int64).sum().item()))
    assert len(set(sums)) == 1


def squares_like_numpy(ranks: Ranks, bootstrap: Bootstrap) -> None:
    """Those of the tensors at the beginning of a buffer, a number for each 4096 elements, the same
    to the bit on every rank and with any number of threads; LARS would make the same itself."""
    node, rank = ranks.collectives, ranks.world.rank
    runs = [[7, 9000, 4096, 1, 40_000], [3], []]
    buffers = node.buffers([sum(run) + rest for run, rest in zip(runs, (5000, 0, 10))], runs)
    told = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for buffer in buffers:
            buffer.copy_(torch.from_numpy(values(buffer.numel(), rank, 3)))
        for handle in [node.allreduce(buffer) for buffer in buffers]:
            handle.wait(LIMIT_S)
        for run, buffer in zip(runs, buffers):
            tensors = np.split(buffer.numpy().astype(np.float64), np.cumsum(run, dtype=int))[:-1]
            pieces = [t[at : at + 4096] for t in tensors for at in range(0, t.size, 4096)]
            exact = [np.square(piece).sum() for piece in pieces]
            np.testing.assert_allclose(node.squares(buffer), exact, rtol=1e-12)
        told += bootstrap.gather(b"".join(node.squares(b).tobytes() for b in buffers).hex())
    torch.set_num_threads(1)
    assert len(set(told)) == 1
    assert node.squares(torch.ones(3)) is None and node.squares(buffers[0][:7]) is None


def other_tensors_go_by_the_provider(ranks: Ranks) -> None:
    node = ranks.collectives
    (buffer,) = node.buffers([4096])
    for tensor in (torch.ones(4096), torch.ones(7, dtype=torch.float64), buffer[:100]):
        tensor.fill_(1.0)
        node.allreduce(tensor).wait(LIMIT_S)
        assert tensor.eq(float(ranks.world.size)).all()
    assert not buffer[100:].any()


def same_order_between_nodes(ranks: Ranks) -> None:
    """Whichever sum is asked for, nodes meet over the first that was started: else ranks of a rail
    would wait for each other in different ones."""
    node = ranks.collectives
    order = []

    class Noted:
        def allreduce(self, tensor: torch.Tensor, priority: int) -> object:
            order.append(priority)
            return between.allreduce(tensor, priority)

    between, node.between = node.between, Noted()
    handles = [node.allreduce(b, priority=k) for k, b in enumerate(node.buffers([70_000] * 3))]
    while not handles[2].test():
        time.sleep(0.001)
    for handle in handles:
        handle.wait(LIMIT_S)
    node.between = between
    assert order == [0, 1, 2]


def no_room_for_the_next_layout(ranks: Ranks) -> None:
    """Gradients go by the provider from then on, with the same sums."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    named = list(model.named_parameters())
    sync = GradientSync(named, ranks, bucket_bytes=8, first_bucket_bytes=8, timeout=LIMIT_S)
    usage = shared_memory.shutil.disk_usage
    for step in range(3):
        if step == 1 and ranks.world.rank == 2:
            shared_memory.shutil.disk_usage = lambda _: usage("/")._replace(free=100)
        sync.zero()
        sync.arm()
        model(torch.ones(1, 3)).sum().backward()
        sync.finish()
        shared_memory.shutil.disk_usage = usage
        assert model[1].bias.grad.eq(float(ranks.world.size)).all()
        shared = sync.buckets[0].buffer.data_ptr() in ranks.collectives._slots
        assert shared == (step == 0)


def late_rank(ranks: Ranks) -> None:
    """Who waits is told which rank of its node did not come; the round can still be ended."""
    (buffer,) = ranks.collectives.buffers([100])
    buffer.fill_(1.0)
    if ranks.world.rank == 2:
        time.sleep(1.0)
        ranks.collectives.allreduce(buffer).wait(LIMIT_S)
    else:
        handle = ranks.collectives.allreduce(buffer)
        with pytest.raises(CollectiveTimeoutError, match=r"after 0\.2 s, rank\(s\) 2 of this node"):
            handle.wait(0.2)
        handle.wait(LIMIT_S)
    assert buffer.eq(4.0).all()


def no_room(checks: Checks) -> None:
    usage = shared_memory.shutil.disk_usage
    if checks.world.rank == 3:
        shared_memory.shutil.disk_usage = lambda _: usage("/")._replace(free=100)
    try:
        ranks = opened(checks, "oneccl", LAYOUTS["one node"])
    finally:
        shared_memory.shutil.disk_usage = usage
    assert not isinstance(ranks.collectives, SharedNode)
    (why,) = ranks.passed_over
    assert "/dev/shm: 0 MiB free" in why, ranks.describe()
    assert "not in shared memory within the node" in (ranks.describe())
    ranks.collectives.close()


def main(folder: Path) -> None:
    checks = Checks(folder)
    for provider in ("oneccl", "mpi", "gloo"):
        for name, layout in LAYOUTS.items():
            if provider == "gloo" and max(layout) > 0:
                continue
            ranks = opened(checks, provider, layout)
            with checks.check(f"{provider}, {name}: sums"):
                sums_like_numpy(ranks)
            with checks.check(f"{provider}, {name}: same bits"):
                same_bits(ranks, checks.bootstrap)
            with checks.check(f"{provider}, {name}: squares"):
                squares_like_numpy(ranks, checks.bootstrap)
            with checks.check(f"{provider}, {name}: others"):
                other_tensors_go_by_the_provider(ranks)
            if name == "one node":
                with checks.check(f"{provider}: late rank"):
                    late_rank(ranks)
            elif name == "two nodes":
                with checks.check(f"{provider}: same order between nodes"):
                    same_order_between_nodes(ranks)
                with checks.check(f"{provider}: no room for the next layout"):
                    no_room_for_the_next_layout(ranks)
            ranks.collectives.close()
    with checks.check("apart"):
        ranks = opened(checks, "oneccl", APART)
        assert not isinstance(ranks.collectives, SharedNode) and not ranks.passed_over
        ranks.collectives.close()
    with checks.check("unlike"):
        ranks = opened(checks, "oneccl", UNLIKE)
        assert "unlike numbers of ranks" in ranks.describe()
        ranks.collectives.close()
    with checks.check("gloo between nodes"):
        ranks = opened(checks, "gloo", LAYOUTS["two nodes"])
        assert "gloo has no collectives between some" in ranks.describe()
        ranks.collectives.close()
    with checks.check("no room"):
        no_room(checks)
    with checks.check("not shared"):
        ranks = opened(checks, "oneccl", LAYOUTS["one node"], shared=False)
        assert not isinstance(ranks.collectives, SharedNode) and not ranks.passed_over
        ranks.collectives.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

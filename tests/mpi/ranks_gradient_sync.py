"""Two ranks that put the gradient sync through its contracts: ranks_gradient_sync.py FOLDER."""

from __future__ import annotations

import copy
import platform
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks_common import LIMIT_S, Checks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from knl.comm.agreement import require_same_weights
from knl.comm.collectives import Ranks, open_ranks
from knl.comm.gradient_sync import GradientSync
from knl.errors import CollectiveTimeoutError, FailedError
from knl.models.resnet import resnet50
from knl.optim.lars import Lars

MB = 1024 * 1024


class Branches(nn.Module):
    """Defined in another order than backward goes; not every branch is used by every rank."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.last = nn.Linear(6, 3)
        self.never = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.first = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, detour: bool) -> torch.Tensor:
        x = self.frozen(self.first(x).relu()).relu()
        return self.last(self.sometimes(x) if detour else x).square().mean()


def named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def synced(
    model: nn.Module, ranks: Ranks, bucket: int = MB, timeout: float = LIMIT_S
) -> GradientSync:
    return GradientSync(
        named(model), ranks, bucket_bytes=bucket, first_bucket_bytes=bucket // 4, timeout=timeout
    )


def require_in_buckets(sync: GradientSync) -> None:
    """Every gradient lies in the memory of the one bucket that has it as a member."""
    assert sorted(n for bucket in sync.buckets for n in bucket.members) == list(
        range(len(sync.parameters))
    )
    for bucket in sync.buckets:
        start = bucket.buffer.data_ptr()
        for number in bucket.members:
            parameter = sync.parameters[number]
            assert parameter.grad.data_ptr() == start
            assert parameter.grad.stride() == parameter.stride()
            start += parameter.numel() * parameter.element_size()
        end = bucket.buffer.data_ptr() + bucket.buffer.numel() * 4
        assert start + (4 if bucket is sync.buckets[0] else 0) == end  # the number that is carried


def like_ddp(ranks: Ranks, layout: torch.memory_format) -> None:
    """ResNet-50, each rank with its own pictures: one lane, then two lanes a step."""
    rank, size = ranks.world.rank, ranks.world.size
    torch.manual_seed(rank)  # DDP and our sync must both spread rank 0's weights
    model = resnet50(3, 50, zero_init_gamma=False).to(memory_format=layout)
    ddp = DistributedDataParallel(copy.deepcopy(model))
    sync = synced(model, ranks, bucket=8 * MB)
    assert len(sync.buckets) > 5
    loss = nn.CrossEntropyLoss()
    for lanes in (1, 2):
        sync.zero()
        ddp.zero_grad()
        for lane in range(lanes):
            images = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
            labels = torch.randint(0, 50, (2,))
            if lane == lanes - 1:
                sync.arm()
                loss(ddp(images), labels).backward()
            else:
                with ddp.no_sync():
                    loss(ddp(images), labels).backward()
            loss(model(images), labels).backward()
        require_in_buckets(sync)
        sync.finish()
        assert sync.waited >= 0.0
        require_in_buckets(sync)
        for name, ours, theirs in zip(sync.names, sync.parameters, ddp.parameters()):
            difference = (ours.grad / size - theirs.grad).norm() / theirs.grad.norm()
            assert difference <= 1e-5, f"{name} with {lanes} lane(s): {difference}"


def some_unused(ranks: Ranks, user: int) -> None:
    """One branch nobody uses, one that rank `user` alone uses, a frozen layer."""
    size = ranks.world.size
    model = Branches()
    sync = synced(model, ranks, bucket=200)
    for step in range(3):
        inputs = [[torch.randn(5, 4) for _ in range(2)] for _ in range(size)]
        parts = [copy.deepcopy(model) for _ in range(size)]  # what each rank should do, done here
        for rank, part in enumerate(parts):
            part.zero_grad()
            for x in inputs[rank]:
                part(x, detour=rank == user).backward()
        sync.zero()
        model(inputs[ranks.world.rank][0], detour=ranks.world.rank == user).backward()
        sync.arm()
        model(inputs[ranks.world.rank][1], detour=ranks.world.rank == user).backward()
        require_in_buckets(sync)
        sync.finish()
        gradients = [dict(part.named_parameters()) for part in parts]
        for name, parameter in named(model):
            wanted = torch.zeros_like(parameter)
            for gradient in gradients:
                wanted += 0 if gradient[name].grad is None else gradient[name].grad
            assert torch.allclose(parameter.grad, wanted, rtol=1e-5, atol=1e-7), f"{step}: {name}"
        assert model.frozen.weight.grad is None
        assert model.sometimes.weight.grad.any() and not model.never.weight.grad.any()


def carried_number(ranks: Ranks) -> None:
    """What is set before the last backward is summed with the first bucket to arrive."""
    model = Branches()
    sync = synced(model, ranks, bucket=200)
    for step in range(3):  # the buckets are laid out anew after the first
        sync.zero()
        sync.carried.fill_(ranks.world.rank + 0.5 + step)
        sync.arm()
        model(torch.randn(5, 4), detour=True).backward()
        numbers = []
        for arrived, (members, gradients) in enumerate(sync.arrivals()):
            assert arrived or sync.carried.item() == sum(
                rank + 0.5 + step for rank in range(ranks.world.size)
            )
            for number, gradient in zip(members, gradients):
                assert gradient.data_ptr() == sync.parameters[number].grad.data_ptr()
            numbers += members
        assert sorted(numbers) == list(range(len(sync.parameters)))


def carried_numbers(ranks: Ranks) -> None:
    """A vector is carried as well; and buckets are laid out as an earlier run had them."""
    model = Branches()
    sync = GradientSync(
        named(model), ranks, bucket_bytes=200, first_bucket_bytes=50, timeout=LIMIT_S, carry=7
    )
    assert sync.order == []
    for step in range(4):
        if step == 2:
            again = GradientSync(
                named(model), ranks, bucket_bytes=200, first_bucket_bytes=50, timeout=LIMIT_S,
                carry=7,
            )  # fmt: skip
            again.restore(sync.order)
            assert again.order == sync.order
            assert [b.members for b in again.buckets] == [b.members for b in sync.buckets]
            sync = again
        sync.zero()
        sync.carried.copy_(torch.arange(7.0) + step)
        sync.arm()
        model(torch.randn(5, 4), detour=True).backward()
        next(iter(sync.arrivals()))
        assert sync.carried.tolist() == [ranks.world.size * (n + step) for n in range(7)]
        sync.finish()
        assert sorted(sync.order) == list(range(len(sync.parameters)))


def squares_for_lars(ranks: Ranks) -> None:
    """Updates with the squares that came with the sums move weights as without them, to the bit."""
    torch.manual_seed(ranks.world.rank)
    first = resnet50(3, 50, zero_init_gamma=False)
    results = []
    for given in (False, True):
        model = copy.deepcopy(first)
        sync = synced(model, ranks)
        options = dict(form="paper", momentum=0.9, weight_decay=1e-4, eta=0.01, skip=("bias",))
        lars = Lars(named(model), **options)
        for step in range(3):  # the buckets are laid out anew after the first
            torch.manual_seed(10 * step + ranks.world.rank)
            sync.zero()
            sync.arm()
            model(torch.randn(2, 3, 64, 64)).square().mean().backward()
            for members, gradients in sync.arrivals():
                squares = sync.squares(members)
                assert squares is not None
                lars.update(members, gradients, 0.1, 0.5, squares if given else None)
        results.append([*(p.detach() for p in lars.parameters), torch.from_numpy(lars.trust)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert lars.trust.std() > 0


def order_of_arrival(ranks: Ranks) -> None:
    """Buckets take rank 0's order; here it passes a branch that the others leave out."""
    model, order = Branches(), []
    sync = synced(model, ranks, bucket=200)
    for number, (_, parameter) in enumerate(named(model)):
        parameter.register_hook(lambda _, n=number: order.append(n))
    sync.arm()
    model(torch.randn(5, 4), detour=ranks.world.rank == 0).backward()
    sync.finish()
    sync.zero()
    first = torch.tensor(order + [-1] * (len(sync.parameters) - len(order)))
    ranks.collectives.broadcast(first, root=0)
    arrived = [number for number in first.tolist() if number >= 0]
    adopted = [number for bucket in sync.buckets for number in bucket.members]
    assert len(arrived) == 6 and len(sync.buckets) > 1
    assert adopted[:6] == arrived, (sync.names, adopted, arrived)
    assert [sync.names[number] for number in adopted[6:]] == ["never.weight", "never.bias"]


def weights_of_rank_0(ranks: Ranks) -> None:
    model, first = Branches(seed=ranks.world.rank), Branches(seed=0)
    synced(model, ranks)
    for (name, ours), (_, theirs) in zip(named(model), named(first)):
        assert ours.equal(theirs), name


def different_models(ranks: Ranks) -> None:
    odd = ranks.world.rank == ranks.world.size - 1

    def other(change: str) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(3, 3))
        if odd and change == "shape":
            model[1] = nn.Conv2d(4, 4, 5)
        if odd and change == "layout":
            model[1].to(memory_format=torch.channels_last)
        if odd and change == "type":
            model[1].weight.data = model[1].weight.data.double()
        if odd and change == "name":
            model = nn.Sequential(model[0], nn.Sequential(model[1]), model[2])
        if odd and change == "number":
            model[1] = nn.Conv2d(4, 4, 3, bias=False)
        return model

    told = {}
    for change in ("shape", "layout", "type", "name", "number"):
        with pytest.raises(FailedError, match="the models differ between rank 0 and") as caught:
            synced(other(change), ranks)
        told[change] = str(caught.value).split(": ")[0]
        assert caught.value.shared
    what = f"the models differ between rank 0 and rank(s) {ranks.world.size - 1}, first in "
    assert told == {
        "shape": what + "1.weight",
        "layout": what + "1.weight",
        "type": what + "1.weight",
        "name": what + ("1.0.weight" if odd else "1.weight"),
        "number": what + "the number of tensors",
    }


def different_buckets(ranks: Ranks) -> None:
    """A rank with another recipe or plan would wait for sums that nobody makes."""
    last = ranks.world.size - 1
    with pytest.raises(FailedError) as told:
        synced(Branches(), ranks, bucket=200 if ranks.world.rank == last else 400)
    line = f"the buckets differ between rank 0 and rank(s) {last}, first in comm.bucket_mb: "
    assert str(told.value).startswith(line) and told.value.shared


def changed_weight(ranks: Ranks) -> None:
    last = ranks.world.size - 1
    model = Branches()
    before = require_same_weights(ranks, named(model), "at first", LIMIT_S)
    assert before == require_same_weights(ranks, named(model), "at first", LIMIT_S)
    with torch.no_grad():
        model.sometimes.bias[3] += 1e-6 if ranks.world.rank == last else 0.0
        model.first.weight[0, 0] += 1.0 if ranks.world.rank == last else 0.0
    with pytest.raises(FailedError) as told:
        require_same_weights(ranks, named(model), "after step 7", LIMIT_S)
    line = f"the weights after step 7 differ on rank {last} (host {platform.node()}) from rank 0's"
    unsure = " (no majority has the same, so it may be another)"
    start = f"{line}{unsure}, first in sometimes.bias: "
    assert str(told.value).startswith(start) and told.value.shared, told.value
    with torch.no_grad():  # the same change everywhere is no drift
        model.load_state_dict(Branches(seed=5).state_dict())
    assert before != require_same_weights(ranks, named(model), "at last", LIMIT_S)


def late_rank(ranks: Ranks) -> None:
    """The last rank comes late to the last backward: the others name the bucket."""
    model = Branches()
    sync = synced(model, ranks, bucket=200, timeout=0.3)
    sync.arm()
    late = ranks.world.rank == ranks.world.size - 1
    if late:
        time.sleep(1.0)
        sync.timeout = LIMIT_S
    model(torch.randn(5, 4), detour=True).backward()
    if not late:
        named_bucket = rf"gradient bucket 1 of {len(sync.buckets)} \(from first.bias\): "
        with pytest.raises(CollectiveTimeoutError, match=named_bucket):
            sync.finish()
        sync.timeout = LIMIT_S
    sync.finish()


def main(folder: Path) -> None:
    checks = Checks(folder)
    world = checks.world
    ranks = open_ranks(world, checks.bootstrap, "oneccl", LIMIT_S)
    meeting = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=meeting, rank=world.rank, world_size=world.size)
    with checks.check("like DDP, contiguous"):
        like_ddp(ranks, torch.contiguous_format)
    with checks.check("like DDP, channels_last"):
        like_ddp(ranks, torch.channels_last)
    for user in range(world.size):
        with checks.check(f"rank {user} alone uses a branch"):
            some_unused(ranks, user)
    for check in (
        squares_for_lars, order_of_arrival, carried_number, carried_numbers, weights_of_rank_0,
        different_models, different_buckets, changed_weight, late_rank,
    ):  # fmt: skip
        with checks.check(check.__name__):
            check(ranks)
    dist.destroy_process_group()
    ranks.collectives.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

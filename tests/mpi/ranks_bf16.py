"""Ranks whose gradients are bfloat16 on the wire: ranks_bf16.py FOLDER. Four of them add up within
nodes that are made up, two train."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import pytest
import torch
from ranks_common import LIMIT_S, Checks
from torch import nn

from knl.comm.agreement import flat
from knl.comm.collectives import Alone, Ranks, open_ranks
from knl.comm.gradient_sync import GradientSync
from knl.comm.node import SharedNode
from knl.comm.world import SINGLE
from knl.config import load_recipe
from knl.data.dataset import open_dataset
from knl.errors import FailedError, InputError
from knl.train.trainer import Trainer

STEPS = 8
# No bfloat16 has so many digits.
CARRIED = [1.0 + 2.0**-20, 12345.0]


def opened(checks: Checks, provider: str, nodes: tuple[int, ...]) -> Ranks:
    """`nodes`: the node of each rank; none for a plain provider."""
    if nodes:
        os.environ["SLURM_NODEID"] = str(nodes[checks.world.rank])
    return open_ranks(checks.world, checks.bootstrap, provider, LIMIT_S, shared=bool(nodes))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 80), nn.ReLU(), nn.Linear(80, 70), nn.Linear(70, 9))


def synced(model: nn.Module, ranks: Ranks, narrow: bool) -> GradientSync:
    return GradientSync(
        list(model.named_parameters()), ranks, bucket_bytes=8192, first_bucket_bytes=2048,
        timeout=LIMIT_S, carry=len(CARRIED), narrow=narrow,
    )  # fmt: skip


def sums(checks: Checks, ranks: Ranks) -> None:
    """Those of float32 but for the rounding, the same to the bit on all ranks."""
    size = ranks.world.size
    on_wire = not isinstance(ranks.collectives, SharedNode) or ranks.collectives.between is not None
    summed = {}
    for narrow in (False, True):
        model = network()
        sync = synced(model, ranks, narrow)
        for step in range(3):
            torch.manual_seed(10 * step + ranks.world.rank)
            sync.zero()
            sync.carried.copy_(torch.tensor(CARRIED))
            sync.arm()
            model(torch.randn(20, 50)).square().mean().backward()
            for number, (members, gradients) in enumerate(sync.arrivals()):
                if (squares := sync.squares(members)) is not None:  # of what came, not of what went
                    exact = sum(g.double().square().sum().item() for g in gradients)
                    assert squares.sum() == pytest.approx(exact, rel=1e-12)
                assert {gradient.dtype for gradient in gradients} == {torch.float32}
                if number == 0:
                    assert sync.carried.tolist() == [size * value for value in CARRIED]
        assert len(sync.buckets) > 2
        assert sorted(n for b in sync.buckets for n in b.members) == list(range(6))
        summed[narrow] = torch.cat([flat(p.grad) for p in sync.parameters])
    exact, found = summed[False], summed[True]
    if on_wire:  # to the wire and back
        assert found.equal(found.bfloat16().float())
        assert not found.equal(exact)
        assert (found - exact).norm() <= 2**-7 * exact.norm()
    else:
        assert found.equal(exact)
    crc = zlib.crc32(memoryview(found.numpy()).cast("B"))
    assert len(set(checks.bootstrap.gather(str(crc)))) == 1


def refused(checks: Checks, ranks: Ranks) -> None:
    with pytest.raises(InputError) as refusal:
        synced(network(), ranks, narrow=True)
    line = f"comm.dtype = 'bf16': provider {ranks.provider}: "
    assert str(refusal.value).startswith(line)
    assert "use comm.dtype = 'fp32', or --provider oneccl" in str(refusal.value)


def different_recipes(checks: Checks, ranks: Ranks) -> None:
    with pytest.raises(FailedError, match=r"the buckets differ .*, first in comm\.dtype"):
        synced(network(), ranks, narrow=ranks.world.rank == 1)


def trained(ranks: Ranks, *settings: str) -> tuple[torch.Tensor, list[float]]:
    """The weights, which are the same to the bit on all ranks, and the losses."""
    overrides = [f"train.{key}" for key in ("lanes=2", "lane_batch=32", f"steps={STEPS}")]
    overrides += ["train.layout=channels_last", "comm.bucket_mb=0.1", *settings]
    recipe = load_recipe("digits", overrides)
    trainer = Trainer(recipe, open_dataset(recipe.data, recipe.train.seed), ranks)
    losses = [trainer.step(step).loss for step in range(STEPS)]
    trainer.check_weights("at last")
    trainer.close()
    return torch.cat([flat(p) for p in trainer.optimiser.parameters]), losses


def near(a: torch.Tensor, b: torch.Tensor, share: float) -> None:
    assert 0 < (a - b).norm() <= share * b.norm(), (a - b).norm() / b.norm()


def training(checks: Checks, ranks: Ranks) -> None:
    exact, exact_losses = trained(ranks)
    found, losses = trained(ranks, "comm.dtype=bf16")
    near(found, exact, 1e-2)
    assert losses[0] == exact_losses[0]  # it travels in float32
    assert losses == pytest.approx(exact_losses, rel=1e-2)


def one_and_two_ranks(checks: Checks, ranks: Ranks) -> None:
    alone, losses_alone = trained(Ranks(SINGLE, Alone()), "train.dtype=bf16")
    found, losses = trained(ranks, "train.dtype=bf16")
    assert found.equal(alone)  # two numbers have one sum
    assert losses == losses_alone
    found, losses = trained(ranks, "train.dtype=bf16", "comm.dtype=bf16")
    near(found, alone, 1e-2)
    assert losses == pytest.approx(losses_alone, rel=1e-2)


def main(folder: Path) -> None:
    checks = Checks(folder)
    torch.set_num_threads(1)
    four = {
        "two nodes": ("oneccl", (0, 0, 1, 1), sums),
        "one node": ("oneccl", (0, 0, 0, 0), sums),
        "oneccl": ("oneccl", (), sums),
        "gloo": ("gloo", (), refused if torch.__version__.startswith("1.") else sums),
        "mpi": ("mpi", (), refused),
        "mpi within nodes": ("mpi", (0, 0, 1, 1), refused),
        "different recipes": ("oneccl", (), different_recipes),
    }
    two = {
        "training": ("oneccl", (), training),
        "one and two ranks": ("oneccl", (), one_and_two_ranks),
    }
    for name, (provider, nodes, check) in (four if checks.world.size == 4 else two).items():
        ranks = opened(checks, provider, nodes)
        assert isinstance(ranks.collectives, SharedNode) == bool(nodes), ranks.describe()
        with checks.check(name):
            check(checks, ranks)
        ranks.collectives.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

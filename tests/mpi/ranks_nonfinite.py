"""Three ranks whose samples, gradients or memory go wrong: ranks_nonfinite.py FOLDER."""

from __future__ import annotations

import math
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks_common import Checks

from knl.comm.agreement import checksums
from knl.comm.collectives import Ranks, open_ranks
from knl.config import load_recipe
from knl.data.dataset import open_dataset
from knl.errors import FailedError, NonFiniteError
from knl.train.trainer import Trainer

SETTINGS = ("train.layout=channels_last", "comm.bucket_mb=0.1", "train.on_nonfinite=skip")


def trainer(ranks: Ranks, *settings: str) -> Trainer:
    recipe = load_recipe("digits", [*SETTINGS, *settings])
    return Trainer(recipe, open_dataset(recipe.data, 0), ranks)


def everything(found: Trainer) -> list[int]:
    named = [*found.named, *((str(n), b) for n, b in enumerate(found.statistics.buffers))]
    momenta = [
        (name, m) for name, m in zip(found.optimiser.names, found.optimiser.momentum_buffers)
    ]
    return checksums([*named, *momenta])


def poison(found: Trainer, *steps: int) -> None:
    """The samples of a lane of the last rank are no numbers in these steps of the first epoch."""
    if found.ranks.world.rank == found.ranks.world.size - 1:
        real = found.dataset.train_batch
        bad = {tuple(found.lanes.batch(0, step, found.my_lanes[-1])) for step in steps}

        def train_batch(samples, epoch):
            images, labels = real(samples, epoch)
            return (np.full_like(images, math.inf) if tuple(samples) in bad else images), labels

        found.dataset.train_batch = train_batch


def loss(ranks: Ranks) -> None:
    """A lane's loss is no number: nothing moves, training goes on, orders arrive all the same."""
    found = trainer(ranks)
    poison(found, 1)
    found.step(0)
    before = everything(found)
    metrics = found.step(1, ["SIGTERM"] if ranks.world.rank == 1 else [])
    assert math.isnan(metrics.loss) and found.skipped == 1
    assert found.agreed["SIGTERM"] == 1.0
    assert everything(found) == before
    assert math.isfinite(found.step(2).loss)
    found.check_weights("after a step that was left out")


def gradient(ranks: Ranks) -> None:
    """One rank's gradient is no number though its loss is."""
    found = trainer(ranks)
    found.step(0)
    before = everything(found)
    if ranks.world.rank == 1:
        parameter = found.named[3][1]
        hook = parameter.register_hook(lambda g: g * math.nan)
    found.step(1)
    assert found.skipped == 1
    assert everything(found) == before
    if ranks.world.rank == 1:
        hook.remove()
    assert math.isfinite(found.step(2).loss)


def cap(ranks: Ranks) -> None:
    found = trainer(ranks, "train.max_skipped=2")
    poison(found, 0, 1, 2)
    for step in range(2):
        found.step(step)
    with pytest.raises(
        NonFiniteError, match=r"step 3: .*, after 2 steps left out; lr was "
    ) as told:
        found.step(2)
    last = ranks.world.size - 1
    assert list(told.value.detail["samples_of_lanes"]) == [str(last)] and told.value.shared


def drifted(ranks: Ranks, who: int, statistics: bool) -> None:
    found = trainer(ranks)
    found.step(0)
    victim = found.statistics.buffers[2] if statistics else found.named[4][1]
    if ranks.world.rank == who:
        with torch.no_grad():
            victim.detach().numpy().reshape(-1).view(np.uint8)[2] ^= 1 if statistics else 16
    what = "running statistics 2" if statistics else found.named[4][0]
    root = 1 if who == 0 else 0
    line = (
        f"the weights after step 1 differ on rank {who} (host {platform.node()}) from rank {root}'s"
        f", first in {what}: "
    )
    with pytest.raises(FailedError) as told:
        found.check_weights("after step 1")
    assert str(told.value).startswith(line), told.value


def main(folder: Path) -> None:
    checks = Checks(folder)
    ranks = open_ranks(checks.world, checks.bootstrap, "auto", 20.0)
    for check in (loss, gradient, cap):
        with checks.check(check.__name__):
            check(ranks)
    for name, who, statistics in (
        ("drifted weights", 2, False), ("drifted statistics", 1, True),
        ("drifted rank 0", 0, False),
    ):  # fmt: skip
        with checks.check(name):
            drifted(ranks, who, statistics)
    ranks.collectives.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

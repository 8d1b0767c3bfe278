"""Accuracy on samples never trained on, shared out over the ranks, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from knl.comm.collectives import Ranks, allreduce_numbers
from knl.config import Train
from knl.data.dataset import Dataset
from knl.data.loader import Loader
from knl.errors import FailedError
from knl.train.forward import forward


@dataclass(frozen=True)
class Evaluation:
    """Shares of right answers among the first one and five guesses (0 to 1), and the mean loss."""

    top1: float
    top5: float
    loss: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    loader: Loader,
    train: Train,
    ranks: Ranks,
    timeout: float,
) -> Evaluation:
    """Rank r of R takes the samples r, r + R, ...; the sums are exact whatever R is. Damaged
    samples do not count. Raises FailedError, on every rank, where all are."""
    model.eval()
    mine = np.arange(ranks.world.rank, dataset.test_samples, ranks.world.size)
    first, five, counted, loss = 0, 0, 0, 0.0
    makers = (
        partial(dataset.test_batch, mine[start : start + train.lane_batch])
        for start in range(0, len(mine), train.lane_batch)
    )
    for images, labels in loader.run(makers):
        if not len(labels):
            continue
        counted += len(labels)
        scores = forward(model, images, train.dtype).float()
        loss += nn.functional.cross_entropy(scores, labels, reduction="sum").item()
        guesses = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
        first += int(guesses[:, 0].sum())
        five += int(guesses.sum())
    model.train()
    numbers = [first, five, loss, counted]
    *sums, samples = allreduce_numbers(ranks.collectives, numbers, timeout, "evaluation")
    if not samples:
        raise FailedError("no test sample can be read: run knl data verify", shared=True)
    return Evaluation(*(total / samples for total in sums))

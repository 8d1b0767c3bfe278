"""The sampler: which samples a lane sees, a function of (seed, epoch, step, lane) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knl.data.hashing import mix
from knl.errors import InputError


@dataclass(frozen=True)
class Lanes:
    """`lanes` streams of `lane_batch` samples a step, over a set of `samples` records.

    Every epoch the set is shuffled in chunks of `chunk` neighbouring records. Each lane gets a run
    of that order as long as the epoch, so it reads neighbouring records one after another. What is
    left over after the last whole step is not seen in that epoch.
    """

    samples: int
    lanes: int
    lane_batch: int
    seed: int
    chunk: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise InputError(
                f"global batch = {self.lanes} lanes x {self.lane_batch} = {self.global_batch}: "
                f"more than the {self.samples} samples of the set; lower train.lanes or "
                "train.lane_batch"
            )

    @property
    def global_batch(self) -> int:
        return self.lanes * self.lane_batch

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def batch(self, epoch: int, step: int, lane: int) -> NDArray[Any]:
        """Numbers of the `lane_batch` samples, for a step counted within the epoch."""
        return self.run(epoch, lane, step, step + 1)

    def run(self, epoch: int, lane: int, first: int, last: int) -> NDArray[Any]:
        """Numbers of a lane's samples from step `first` of an epoch on, up to step `last`."""
        start = lane * self.steps_per_epoch
        order = _order(self.samples, self.chunk, self.seed, epoch)
        return order[(start + first) * self.lane_batch : (start + last) * self.lane_batch]


def lanes_of(rank: int, size: int, lanes: int) -> range:
    """The lanes that a rank computes, one after another."""
    return range(rank, lanes, size)


@lru_cache(maxsize=2)
def _order(samples: int, chunk: int, seed: int, epoch: int) -> NDArray[Any]:
    """All sample numbers, in chunks, in the order of this epoch."""
    chunks = -(-samples // chunk)
    shuffled = np.argsort(mix(seed, epoch, np.arange(chunks)), kind="stable")
    order = (shuffled[:, None] * chunk + np.arange(chunk)).ravel()
    order = order[order < samples]  # the last chunk may be short
    order.flags.writeable = False
    return order

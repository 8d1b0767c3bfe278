"""BatchNorm with one group a lane, and running statistics that do not depend on the ranks.

The running statistics after a step are those of the mean over all lanes: old (1 - m) + m mean. An
exponential average is linear, so it is that of the ranks' own, weighted by their lanes. It travels
with the step's first gradients (53,120 numbers of ResNet-50, 0.2 % of them): so every rank has the
same statistics after every step, and no bit of them depends on when a checkpoint was taken.
"""

from __future__ import annotations

import torch
from torch import nn


class RunningStatistics:
    """The BatchNorm layers of a model, of which this rank computes `local` of `lanes` lanes."""

    def __init__(self, model: nn.Module, local: int, lanes: int) -> None:
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self.norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
        self.momenta = [float(m.momentum or 0.0) for m in self.norms]
        self.local, self.lanes = local, lanes
        kept = [(m.running_mean, m.running_var) for m in self.norms]
        self.buffers = [buffer for pair in kept for buffer in pair if buffer is not None]
        self._sizes = [buffer.numel() for buffer in self.buffers]

    @property
    def size(self) -> int:
        """Of the vector that holds them all."""
        return sum(self._sizes)

    def begin_lane(self, number: int) -> None:
        """Weigh the forward of the step's lane `number` (from 0) so that all local lanes count
        alike: with a_k = (m/n) / (1 - m (n-1-k) / n), one after another gives m/n to each."""
        n = self.local
        for norm, m in zip(self.norms, self.momenta):
            norm.momentum = (m / n) / (1.0 - m * (n - 1 - number) / n)

    def give(self, carried: torch.Tensor) -> None:
        """This rank's share of the statistics of all lanes, into a vector of `size` numbers that is
        summed over the ranks."""
        if self.buffers:
            torch.cat(self.buffers, out=carried)
            carried.mul_(self.local / self.lanes)

    def take(self, summed: torch.Tensor) -> None:
        """The statistics of all lanes, from the sum of what all ranks have given."""
        for buffer, part in zip(self.buffers, summed.split(self._sizes)):
            buffer.copy_(part)

    def copy(self) -> torch.Tensor:
        """All of them, for `take` to put back."""
        return torch.cat(self.buffers) if self.buffers else torch.zeros(0)

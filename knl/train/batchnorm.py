"""BatchNorm with one group a lane, and running statistics that do not depend on the ranks.

The running statistics after a step are those of the mean over all lanes: old (1 - m) + m mean. An
exponential average is linear, so each rank keeps its own lanes' and ranks are averaged, weighted
by their lanes, when the statistics are needed.
"""

from __future__ import annotations

import torch
from torch import nn

from knl.comm.agreement import flat
from knl.comm.collectives import Ranks, waiting_for


class RunningStatistics:
    """The BatchNorm layers of a model, of which this rank computes `local` of `lanes` lanes."""

    def __init__(self, model: nn.Module, local: int, lanes: int) -> None:
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self.norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
        self.momenta = [float(m.momentum or 0.0) for m in self.norms]
        self.local, self.lanes = local, lanes

    def begin_lane(self, number: int) -> None:
        """Weigh the forward of the step's lane `number` (from 0) so that all local lanes count
        alike: with a_k = (m/n) / (1 - m (n-1-k) / n), one after another gives m/n to each."""
        n = self.local
        for norm, m in zip(self.norms, self.momenta):
            norm.momentum = (m / n) / (1.0 - m * (n - 1 - number) / n)

    def average(self, ranks: Ranks, timeout: float) -> None:
        """Give every rank the statistics of all lanes."""
        if ranks.world.size == 1 or not self.norms:
            return
        buffers: list[torch.Tensor] = []
        for norm in self.norms:
            assert norm.running_mean is not None and norm.running_var is not None
            buffers += [norm.running_mean, norm.running_var]
        joined = torch.cat([flat(buffer) for buffer in buffers]) * (self.local / self.lanes)
        with waiting_for("running statistics for an evaluation"):
            ranks.collectives.allreduce(joined).wait(timeout)
        parts = joined.split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts):
            buffer.copy_(part)

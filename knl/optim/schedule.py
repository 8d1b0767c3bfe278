"""The learning rate as a function of the epoch, which may be a fraction."""

from __future__ import annotations

from knl.config import Schedule


def lr_at(schedule: Schedule, epoch: float, epochs: float) -> float:
    """The rate at `epoch` of a run of `epochs`.

    Warm-up is linear from `warmup_lr` to `lr` over `warmup_epochs` (Goyal et al. 2017, 2.2). Then
    poly:       lr (1 - t)^power, t the share of the epochs after warm-up (LARS paper, power 2);
    multi-step: lr gamma^k after the k-th of `milestones` (Goyal et al.: 30, 60, 80; 0.1);
    constant:   lr.
    """
    s = schedule
    if epoch < s.warmup_epochs:
        return s.warmup_lr + (s.lr - s.warmup_lr) * epoch / s.warmup_epochs
    if s.decay == "poly" and epochs > s.warmup_epochs:
        done = (epoch - s.warmup_epochs) / (epochs - s.warmup_epochs)
        return s.lr * max(0.0, 1.0 - done) ** s.power
    if s.decay == "multi-step":
        return s.lr * s.gamma ** sum(epoch >= milestone for milestone in s.milestones)
    return s.lr

"""Where the time of a step goes, on every rank: computed from what each rank has timed itself.

All ranks leave a barrier before each step, outside of the time that counts, so that seconds since
the step's begin mean the same on all of them, though their clocks differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

# In the order in which a step goes through them.
PARTS = ("data", "compute", "straggler", "exposed_sync", "lars", "other")
MEANING = {
    "data": "waiting for images",
    "compute": "forward and backward, with the sums that go on behind them",
    "straggler": "waiting, after one's own backward, for the last rank to end its backward",
    "exposed_sync": "waiting for sums of gradients once all ranks have ended their backward",
    "lars": "the update of the weights",
    "other": "the rest, until the slowest rank has ended the step",
}


@dataclass(frozen=True)
class Timed:
    """One step on one rank, in seconds. `waited`: for sums, after backward; `whole`: from the
    barrier to the end."""

    data: float
    compute: float
    waited: float
    lars: float
    whole: float


def step_seconds(ranks: Sequence[Sequence[Timed]]) -> list[float]:
    """Of each step, until the slowest rank was done. `ranks`: the steps of each rank."""
    return [max(rank.whole for rank in step) for step in zip(*ranks)]


def parts_of(ranks: Sequence[Sequence[Timed]]) -> list[list[dict[str, float]]]:
    """For each rank the PARTS of each step; those of a rank add up to the step's seconds.

    A rank that ends backward early waits first for the last one, which no faster network would
    mend, then for the sums: `straggler` and `exposed_sync`.
    """
    found: list[list[dict[str, float]]] = [[] for _ in ranks]
    for step in zip(*ranks):
        last = max(rank.data + rank.compute for rank in step)
        whole = max(rank.whole for rank in step)
        for number, rank in enumerate(step):
            straggler = min(rank.waited, last - (rank.data + rank.compute))
            parts = {
                "data": rank.data,
                "compute": rank.compute,
                "straggler": straggler,
                "exposed_sync": rank.waited - straggler,
                "lars": rank.lars,
            }
            parts["other"] = max(0.0, whole - sum(parts.values()))
            found[number].append(parts)
    return found


def summary(ranks: Sequence[Sequence[Timed]], hosts: Sequence[str]) -> dict[str, Any]:
    """The keys `step_s`, `breakdown` and `per_rank` of a point. The breakdown is, of each part, the
    median over steps of the mean over ranks; a rank's is the median over steps."""
    parts = parts_of(ranks)
    seconds = step_seconds(ranks)
    steps = range(len(seconds))
    return {
        "step_s": {
            "median": median(seconds),
            "p05": quantile(seconds, 0.05),
            "p95": quantile(seconds, 0.95),
            "all": seconds,
        },
        "breakdown": {
            part: median(fmean(rank[step][part] for rank in parts) for step in steps)
            for part in PARTS
        },
        "per_rank": [
            {
                "rank": number,
                "host": host,
                **{part: median(step[part] for step in rank) for part in PARTS if part != "other"},
            }
            for number, (rank, host) in enumerate(zip(parts, hosts))
        ],
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them is, by straight lines between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

"""What the slowest of many nodes costs: the expected greatest of so many draws from measured step
times (order statistics), with a tail where the sample ends."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist, fmean, median

import numpy as np
from numpy.typing import NDArray

# Beyond this share of a sample its excesses are taken to fall off exponentially, as those of light
# tails do (Pickands; Balkema, de Haan): more nodes then cost a constant a doubling.
_TAIL_FROM = 0.9
_GRID = 512


def expected_excess(sample: Sequence[float], draws: float) -> float:
    """Seconds by which the greatest of `draws` is above the median of the sample, on average; at
    least 0. `sample`: seconds of steps, at least one; `draws`: at least 1."""
    ordered = np.sort(np.asarray(sample, dtype=np.float64))
    # The greatest is below Q(u) with probability u^draws: the mean of Q over equal probabilities.
    shares = ((np.arange(_GRID) + 0.5) / _GRID) ** (1.0 / draws)
    middle = float(median(sample))
    above: float = _quantiles(ordered, shares).mean() - middle
    # One draw alone is no straggler, though a skewed sample's mean is above its median.
    one: float = _quantiles(ordered, (np.arange(_GRID) + 0.5) / _GRID).mean() - middle
    return max(0.0, above - one)


def interval(sample: Sequence[float], draws: float, seed: int = 0) -> tuple[float, float]:
    """Bounds of 90 % of the expected excess, by resampling the steps 200 times."""
    values = np.asarray(sample, dtype=np.float64)
    rng = np.random.default_rng(seed)
    found = [expected_excess(rng.choice(values, values.size).tolist(), draws) for _ in range(200)]
    low, high = np.quantile(found, [0.05, 0.95])
    return float(low), float(high)


def assumed_sample(mean: float, deviation: float) -> list[float]:
    """Where nothing was measured: a normal distribution's quantiles. `deviation`: of the mean."""
    curve = NormalDist(mean, mean * deviation)
    return [curve.inv_cdf((number + 0.5) / 200) for number in range(200)]


def _quantiles(ordered: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.quantile(ordered, np.minimum(shares, _TAIL_FROM))
    start = float(np.quantile(ordered, _TAIL_FROM))
    beyond = ordered[ordered > start]
    scale = fmean(beyond - start) if beyond.size else 0.0
    tail = np.maximum(shares, _TAIL_FROM)
    result: NDArray[np.float64] = inside + scale * np.log((1 - _TAIL_FROM) / (1 - tail))
    return result

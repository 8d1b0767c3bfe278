"""The network's parameters from a study, by least squares, with what is not sure about them.

Three numbers are fitted to the exposed sync of each point: factors on the network's latency and
bandwidth, and contention, a share that each doubling of nodes adds. A fourth, by what share sums
slow the rest of a step down, is the mean over the points. A few points cannot fix three numbers, so
the site's own values weigh in as a measurement of low precision: what the points do not say stays
as the site has it, with its whole uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from knl.errors import InputError
from knl.scaling.known import Known
from knl.scaling.model import Setting, Step, Sync, step_of
from knl.scaling.study import Point

NAMES = ("latency", "bandwidth", "contention", "slowdown")
_FITTED = 3
# The site's values are right within these: factors e^+-1 on latency and bandwidth (one standard
# deviation), contention 10 % a doubling. Ranks of one machine have no network: e^+-2 there.
_SITE, _NO_SITE = np.array([1.0, 1.0, 0.1]), np.array([2.0, 2.0, 0.1])
# A measured time is right within 5 % of itself and 0.5 % of its step.
_RELATIVE, _OF_STEP = 0.05, 0.005
_DRAWS = 100


@dataclass(frozen=True)
class Fit:
    """`values`, `covariance`: of ln latency factor, ln bandwidth factor, contention,
    slowdown; `residual`: root mean square of the misfit, in units of what a time is right within;
    `points`: fitted."""

    values: NDArray[np.float64]
    covariance: NDArray[np.float64]
    residual: float
    points: int

    @property
    def sync(self) -> Sync:
        return _sync(self.values)

    def interval(self, name: str) -> tuple[float, float, float]:
        """Value and bounds of 90 % of one of NAMES, as factors and a share."""
        place = NAMES.index(name)
        middle, off = self.values[place], 1.645 * math.sqrt(self.covariance[place, place])
        if place >= 2:
            return float(middle), max(0.0, float(middle - off)), float(middle + off)
        return tuple(math.exp(value) for value in (middle, middle - off, middle + off))  # type: ignore[return-value]

    def draws(self) -> list[Sync]:
        """Syncs that fit as well: a sample of the parameters, the same each time."""
        rng = np.random.default_rng(0)
        return [_sync(row) for row in rng.multivariate_normal(self.values, self.covariance, _DRAWS)]


def fit_sync(known: Known, setting: Setting, points: Sequence[Point], has_site: bool) -> Fit:
    """Fit to the points of more nodes than the baseline. Raises InputError where there are none."""
    from scipy.optimize import least_squares

    several = [p for p in points if p.nodes > known.sample_nodes and p.breakdown]
    if not several:
        raise InputError("the study has no point of more nodes than the fewest; measure one")
    measured = np.array([(point.breakdown or {})["exposed_sync"] for point in several])
    whole = np.array([point.step_s.median if point.step_s else 0.0 for point in several])
    sigma = np.hypot(_RELATIVE * measured, _OF_STEP * whole)
    spread = _SITE if has_site else _NO_SITE
    slowdown, slowdown_error = _slowdown(known, several)

    def misfit(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sync = _sync([*values, slowdown])
        modelled = {
            n: step_of(known, setting, sync, n).exposed_s for n in {p.nodes for p in several}
        }
        times = np.array([modelled[point.nodes] for point in several])
        return np.concatenate([(times - measured) / sigma, values / spread])

    begin = _start(misfit)
    found = least_squares(
        misfit, begin, bounds=([-9.0, -9.0, 0.0], [9.0, 9.0, 2.0]), diff_step=1e-4, x_scale=spread
    )
    data = found.fun[: len(several)]
    # Points that scatter more than they should make the parameters less sure by as much.
    worse = max(1.0, float(data @ data) / max(1, len(several) - 1))
    slopes = found.jac[: len(several)]
    covariance = np.zeros((len(NAMES), len(NAMES)))
    covariance[:_FITTED, :_FITTED] = np.linalg.inv(slopes.T @ slopes / worse + np.diag(spread**-2))
    covariance[_FITTED, _FITTED] = slowdown_error**2
    return Fit(
        np.append(found.x, slowdown), covariance, float(np.sqrt(np.mean(data**2))), len(several)
    )


def spread_of(known: Known, setting: Setting, fit: Fit, nodes: int) -> tuple[Step, Step]:
    """Steps at the bounds of 90 % of what the fit leaves open, shortest first; half and one and a
    half of the stragglers, as the sample's tail is all that is known of them."""
    steps = [step_of(known, setting, sync, nodes) for sync in fit.draws()]
    steps.sort(key=lambda step: step.step_s)
    low, high = steps[int(0.05 * len(steps))], steps[int(0.95 * len(steps))]
    return _stretched(low, 0.5), _stretched(high, 1.5)


def _stretched(step: Step, factor: float) -> Step:
    return replace(step, straggler_s=step.straggler_s * factor)


def _start(misfit: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
    """The best of a coarse grid: where all sums are hidden the misfit has no slope to follow."""
    grid = [
        np.array([latency, bandwidth, 0.01])
        for latency in (-2.0, 0.0, 2.0)
        for bandwidth in np.linspace(-6.0, 3.0, 13)
    ]
    return min(grid, key=lambda values: float(np.sum(misfit(values) ** 2)))


def _slowdown(known: Known, points: Sequence[Point]) -> tuple[float, float]:
    """Mean over the points of what the step's other parts are longer than the baseline's, as a
    share and at least 0, with its standard error: 1 % at least."""
    shares = []
    for point in points:
        parts, images = point.breakdown or {}, point.global_batch / point.nodes
        own = known.image_s * images + known.fixed_s
        shares.append(sum(parts[name] for name in ("compute", "lars", "data", "other")) / own - 1)
    error = float(np.std(shares)) / math.sqrt(len(shares))
    return max(0.0, float(np.mean(shares))), max(0.01, error)


def _sync(values: Iterable[float]) -> Sync:
    latency, bandwidth, contention, slowdown = (float(value) for value in values)
    return Sync(math.exp(latency), math.exp(bandwidth), max(0.0, contention), max(0.0, slowdown))

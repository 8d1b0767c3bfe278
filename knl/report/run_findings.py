"""What matters most about a run, computed from its rows, each with a number and a cure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from knl.report.page import Finding
from knl.report.run_data import RunData, number
from knl.report.run_plots import parts_of
from knl.scaling.breakdown import quantile

_CURES = {
    "images": "Pack the set as raw records, or give the loader more cores (knl data pack, knl "
    "tune).",
    "exposed sync": "knl bench allreduce finds a faster algorithm, knl tune the size of buckets; "
    "a larger lane batch hides more of it.",
    "LARS": "It moves weights, gradients and momentum once: fewer ranks a node share the memory "
    "better (knl tune).",
}


def step_parts(run: RunData) -> dict[str, float]:
    """Median seconds of each part, without the step that warms up."""
    found = {}
    for part, seconds in parts_of(run).items():
        good = [s for s in seconds[1:] or seconds if math.isfinite(s)]
        found[part] = median(good) if good else math.nan
    return found


def run_findings(run: RunData) -> list[Finding]:
    """In no order; see Finding.weight."""
    found = [_lost(run), _time(step_parts(run)), _spread(run), _accuracy(run), _trust(run)]
    return [finding for finding in found if finding]


def _lost(run: RunData) -> Finding | None:
    bad = [row for row in run.steps if not math.isfinite(number(row, "loss"))]
    if not bad:
        return None
    return Finding(
        1.0 + len(bad) / len(run.steps),
        f"{len(bad)} of {len(run.steps)} steps had a loss that is no number, the first at step "
        f"{bad[0]['step']}.",
        "Lower schedule.lr or lengthen schedule.warmup_epochs.",
    )


def _time(parts: Mapping[str, float]) -> Finding | None:
    total = sum(parts.values())
    if not math.isfinite(total) or total <= 0:
        return None
    compute = (parts["forward"] + parts["backward"]) / total
    part = max(_CURES, key=lambda name: parts[name])
    share = parts[part] / total
    if share < 0.02:
        return Finding(
            0.02,
            f"{compute:.0%} of a step of {_ms(total)} is forward and backward on rank 0.",
            "Only faster kernels would help: knl tune measures layouts, threads and ranks a node.",
        )
    return Finding(
        share,
        f"{share:.0%} of a step of {_ms(total)} is {part} ({_ms(parts[part])}); forward and "
        f"backward are {compute:.0%}.",
        _CURES[part],
    )


def _spread(run: RunData) -> Finding | None:
    speeds = [s for s in run.column("images_per_s")[1:] if s > 0]
    if len(speeds) < 20:
        return None
    slow, middle = quantile(speeds, 0.05), median(speeds)
    loss = 1 - slow / middle
    if loss < 0.1:
        return None
    return Finding(
        loss * 0.5,  # most steps are not hit
        f"One step in twenty runs at {slow / middle:.0%} of the median speed or less "
        f"({slow:,.0f} against {middle:,.0f} images/s).",
        "Something else uses the node, or its network: knl doctor looks, knl scale run says which "
        "rank is late.",
    )


def _accuracy(run: RunData) -> Finding | None:
    tops = [(number(row, "epoch"), number(row, "top1")) for row in run.evaluations]
    tops = [top for top in tops if math.isfinite(top[1])]
    if len(tops) < 2:
        return None
    (_, before), (_, last) = tops[-2:]
    epoch, best = max(tops, key=lambda top: top[1])
    if best - last > 0.005:
        return Finding(
            best - last + 0.05,
            f"Top-1 was best at epoch {epoch:.4g}, {best:.1%}, and ended at {last:.1%}.",
            "checkpoints/ keeps the best one; a faster decay of the rate may hold it.",
        )
    change = last - before
    if change > 0.005:
        return Finding(
            change + 0.05,
            f"Top-1 still rose by {100 * change:.1f} points between the last two evaluations, to "
            f"{last:.1%}.",
            "More epochs may bring more.",
        )
    return Finding(
        0.03,
        f"Top-1 settled at {last:.1%}: the last two evaluations differ by "
        f"{100 * abs(change):.1f} points.",
        "More epochs of this schedule will bring little; the rate or the batch may.",
    )


def _trust(run: RunData) -> Finding | None:
    rows = [row["trust"] for row in run.trust]
    names = [*rows[-1]] if rows else []
    medians = {name: _median([number(row, name) for row in rows]) for name in names}
    medians = {name: ratio for name, ratio in medians.items() if ratio > 0}
    if len(medians) < 2:
        return None
    low, high = min(medians, key=lambda n: medians[n]), max(medians, key=lambda n: medians[n])
    span = medians[high] / medians[low]
    return Finding(
        0.04 if span < 1000 else 0.15,
        f"Trust ratios span a factor of {span:,.0f}: {low} has {medians[low]:.3g}, {high} "
        f"{medians[high]:.3g} (medians of the run).",
        "LARS is at work: one global rate would be too large for the first or too small for the "
        "last." if span >= 3 else "Layers hardly differ: plain SGD might do as well here.",
    )  # fmt: skip


def _median(values: Sequence[float]) -> float:
    good = [value for value in values if math.isfinite(value)]
    return median(good) if good else math.nan


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

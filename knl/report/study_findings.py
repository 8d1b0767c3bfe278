"""What matters most about a study, computed from its points, each with a number and a cure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from knl.report.page import Finding
from knl.report.train_time import Training, hours_of
from knl.scaling.study import Row, Study, point_of

_CURES = {
    "exposed_sync": "A larger lane batch hides more sums behind backward; knl bench allreduce "
    "finds a faster algorithm.",
    "straggler": "Ranks end backward at different times: look for what else runs on the late "
    "ones' nodes, and at knl doctor there.",
    "compute": "A node computes slower beside others: they share memory, caches or power.",
    "data": "The file system does not keep up: stage the set to the nodes (knl train --stage), or "
    "pack raw records.",
    "lars": "The update slows down: ranks share the memory's bandwidth.",
    "other": "Ranks wait for the slowest to end its step, outside of what they time themselves.",
}
_WORDS = {"exposed_sync": "exposed sync", "straggler": "waiting for the last rank",
          "data": "waiting for images", "lars": "the update"}  # fmt: skip


def study_findings(study: Study, rows: Sequence[Row], training: Training) -> list[Finding]:
    """In no order; see Finding.weight. `rows`: at least one."""
    found = [_loss(rows), _bucket(study), _late_rank(study, rows), _spread(rows), _failed(study)]
    found.append(_price(rows, training))
    if len(rows) == 1:
        found.append(
            Finding(
                1.0,
                f"Only {rows[0].nodes} node(s) were measured, so there is nothing to compare with.",
                "Measure at least two numbers of nodes with the same --out.",
            )
        )
    return [finding for finding in found if finding]


def _loss(rows: Sequence[Row]) -> Finding | None:
    """What the efficiency at the most nodes is lost to."""
    first, last = rows[0], rows[-1]
    if len(rows) < 2:
        return None
    # In weak scaling an ideal step takes as long as the baseline's; in strong scaling its part.
    ideal = first.global_batch / first.images_per_s
    ideal *= last.global_batch / first.global_batch / last.ideal
    longer = last.step_s - ideal
    if longer <= 0.02 * last.step_s:
        return Finding(
            0.3,
            f"At {last.nodes} nodes the efficiency is {last.efficiency:.0%}: "
            f"{last.images_per_s:,.4g} images/s.",
            "Nothing is lost yet: measure more nodes.",
        )
    share = last.step_s and first.step_s and ideal / first.step_s
    more = {part: last.breakdown[part] - share * first.breakdown[part] for part in last.breakdown}
    part = max(more, key=lambda name: more[name])
    return Finding(
        1 - last.efficiency + 0.05,
        f"At {last.nodes} nodes the efficiency is {last.efficiency:.0%}: a step takes "
        f"{_time(longer)} longer than ideal, most of it {_WORDS.get(part, part)} "
        f"({_time(max(0.0, more[part]))}, {max(0.0, more[part]) / last.step_s:.0%} of the step).",
        _CURES[part],
    )


def _price(rows: Sequence[Row], training: Training) -> Finding | None:
    """What the last step up has brought."""
    if len(rows) < 2:
        return None
    before, last = (hours_of(row, training) for row in rows[-2:])
    fewer, most = rows[-2].nodes, rows[-1].nodes
    more = most * last / (fewer * before) - 1
    return Finding(
        0.08,
        f"{most} nodes instead of {fewer} bring {training.what} from {_hours(before)} to "
        f"{_hours(last)}, for {more:+.0%} of node-hours.",
        "More nodes still pay." if last < 0.7 * before else "More nodes hardly pay any longer.",
    )


def _bucket(study: Study) -> Finding | None:
    """The gradients that come too late to be hidden."""
    total = sum(bucket.bytes for bucket in study.buckets)
    if not total or study.backward_s <= 0:
        return None
    late = [b for b in study.buckets if b.ready_s > 0.9 * study.backward_s]
    amount = sum(bucket.bytes for bucket in late)
    largest = max(study.tensors, key=lambda tensor: tensor.bytes)
    named = f"the largest tensor is {largest.name} ({largest.bytes / 1e6:.3g} MB)"
    if amount < 0.02 * total:
        return None
    return Finding(
        0.2 * amount / total,
        f"{amount / total:.0%} of the gradients ({amount / 1e6:.3g} of {total / 1e6:.3g} MB) are "
        f"ready only in the last tenth of backward; {named}.",
        "Their sums have nothing to hide behind: smaller buckets (comm.bucket_mb) start sooner."
        if len(study.buckets) < 4
        else "What their sums take shows in full; the rest can be hidden.",
    )


def _late_rank(study: Study, rows: Sequence[Row]) -> Finding | None:
    point = point_of(study, rows[-1])
    if len(point.per_rank) < 2:
        return None
    usual = median(rank.compute for rank in point.per_rank)
    late = max(point.per_rank, key=lambda rank: rank.compute)
    excess = late.compute / usual - 1
    if excess < 0.03:
        return None
    return Finding(
        0.5 * excess,
        f"Rank {late.rank} on {late.host} computes {excess:.0%} longer than the median rank at "
        f"{point.nodes} nodes, and all wait for it.",
        "Look what else that node does (knl doctor there), or leave it out.",
    )


def _spread(rows: Sequence[Row]) -> Finding | None:
    worst = max(rows, key=lambda row: row.images_per_s_high / row.images_per_s_low)
    spread = worst.images_per_s_high / worst.images_per_s_low - 1
    if worst.repetitions < 2 or spread < 0.1:
        return None
    return Finding(
        0.5 * min(1.0, spread),
        f"Repetitions at {worst.nodes} node(s) differ by {spread:.0%}: "
        f"{worst.images_per_s_low:,.4g} to {worst.images_per_s_high:,.4g} images/s.",
        "Something else used the machine: measure again with more repetitions before you "
        "conclude anything finer than that.",
    )


def _failed(study: Study) -> Finding | None:
    failed = [point for point in study.points if point.failed]
    if not failed:
        return None
    return Finding(
        0.6,
        f"{len(failed)} of {len(study.points)} points failed, the first at {failed[0].nodes} "
        f"node(s): {failed[0].failed}",
        "The same command with the same --out measures them again.",
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.3g} min"
    return f"{hours:.3g} h" if hours < 1000 else f"{hours:,.0f} h"

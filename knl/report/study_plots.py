"""The plots of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from knl.report.plots import (
    BLUE,
    GREEN,
    GREY,
    HATCHES,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Plot,
    draw,
    legend_below,
    node_axis,
)
from knl.report.train_time import Training, hours_of
from knl.scaling.breakdown import PARTS
from knl.scaling.study import Point, Row, Study, point_of

_COLORS = dict(zip(PARTS, (ORANGE, BLUE, PURPLE, RED, GREEN, GREY)))
_WORDS = {"exposed_sync": "exposed sync", "lars": "LARS", "data": "images"}
_MB = 1e6
_RANKS_SHOWN = 64


def study_plots(study: Study, rows: Sequence[Row], training: Training) -> list[Plot]:
    """`rows`: at least one."""
    nodes = "ranks, which stand for nodes" if study.cores_per_rank is not None else "nodes"
    plots = [
        _speed_up(rows, nodes),
        _efficiency(rows, nodes),
        _breakdown(rows, nodes),
        _steps(study, nodes),
        _hours(rows, nodes, training),
        _cost(rows, nodes, training),
    ]
    last = point_of(study, rows[-1])
    if len(last.per_rank) > 1:
        plots.append(_ranks(last))
    if study.buckets:
        plots.append(_buckets(study))
    return plots


def _speed_up(rows: Sequence[Row], nodes: str) -> Plot:
    def paint(axes: Any) -> None:
        counts = [row.nodes for row in rows]
        speeds = [row.speed_up for row in rows]
        scale = [row.speed_up / row.images_per_s for row in rows]
        low = [max(0.0, s - row.images_per_s_low * k) for s, row, k in zip(speeds, rows, scale)]
        high = [max(0.0, row.images_per_s_high * k - s) for s, row, k in zip(speeds, rows, scale)]
        ideal = [row.ideal for row in rows]
        axes.plot(counts, ideal, color=GREY, linestyle="--", label="ideal")
        axes.errorbar(counts, speeds, yerr=[low, high], color=BLUE, marker="o", capsize=4,
                      label="measured, least to greatest")  # fmt: skip
        node_axis(axes, counts, nodes)
        axes.set_yscale("log", base=2)
        axes.set_yticks(ideal)
        axes.set_yticklabels([f"{value:g}" for value in ideal])
        axes.minorticks_off()
        axes.set_ylabel("speed-up (times the baseline)")
        axes.legend(loc="upper left")

    return draw("speed-up", "Speed-up", "Images/s over those of the baseline.", paint)


def _efficiency(rows: Sequence[Row], nodes: str) -> Plot:
    def paint(axes: Any) -> None:
        counts = [row.nodes for row in rows]
        values = [100 * row.efficiency for row in rows]
        axes.axhline(100, color=GREY, linestyle="--", linewidth=1.5)
        axes.plot(counts, values, color=GREEN, marker="o")
        for x, y in zip(counts, values):
            axes.annotate(f"{y:.0f} %", (x, y), xytext=(0, -15), textcoords="offset points",
                          ha="center", fontsize=9, fontweight="bold")  # fmt: skip
        node_axis(axes, counts, nodes)
        axes.margins(x=0.1)
        axes.set_ylim(0, max(115, *(v + 10 for v in values)))
        axes.set_ylabel("efficiency (%)")

    caption = "Speed-up over ideal: 100 % where a node does as much as one of the baseline."
    return draw("efficiency", "Efficiency", caption, paint)


def _breakdown(rows: Sequence[Row], nodes: str) -> Plot:
    def paint(axes: Any) -> None:
        _stack(axes, [row.breakdown for row in rows])
        axes.set_xticks(range(len(rows)))
        axes.set_xticklabels([str(row.nodes) for row in rows])
        axes.set_xlabel(nodes)
        legend_below(axes, 3)

    caption = "Where the time of a step goes: means over ranks, medians over steps."
    return draw("breakdown", "Time of a step", caption, paint, inches=(5.4, 3.9))


def _stack(axes: Any, bars: Sequence[Any]) -> None:
    bottom = [0.0] * len(bars)
    unit, name = (1.0, "s") if max(sum(bar.values()) for bar in bars) >= 1 else (1e3, "ms")
    for (part, color), hatch in zip(_COLORS.items(), HATCHES):
        heights = [unit * bar.get(part, 0.0) for bar in bars]
        axes.bar(range(len(bars)), heights, 0.62, bottom, color=color, hatch=hatch, linewidth=0,
                 label=_WORDS.get(part, part))  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, heights)]
    axes.set_ylabel(f"{name} of a step")
    axes.grid(axis="x", visible=False)
    if len(bars) == 1:
        axes.set_xlim(-1.5, 1.5)


def _steps(study: Study, nodes: str) -> Plot:
    def paint(axes: Any) -> None:
        counts = sorted({point.nodes for point in study.points if point.step_s})
        for point in study.points:
            if point.step_s:
                place = counts.index(point.nodes) + 0.16 * (point.repetition % 5 - 1)
                axes.plot([place] * len(point.step_s.all), point.step_s.all, "o", color=BLUE,
                          alpha=0.35, markersize=5, markeredgewidth=0)  # fmt: skip
                axes.plot([place], [point.step_s.median], "_", color=RED, markersize=9,
                          markeredgewidth=2.5)  # fmt: skip
        axes.set_xticks(range(len(counts)))
        axes.set_xticklabels([str(count) for count in counts])
        axes.set_xlim(-0.6, len(counts) - 0.4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(nodes)
        axes.set_ylabel("seconds of a step")

    caption = "Every measured step, a column a repetition; the bar is its median."
    return draw("steps", "Spread of steps", caption, paint, inches=(5.4, 3.9))


def _hours(rows: Sequence[Row], nodes: str, training: Training) -> Plot:
    def paint(axes: Any) -> None:
        counts = [row.nodes for row in rows]
        hours = [hours_of(row, training) for row in rows]
        axes.plot(counts, [hours[0] / row.ideal for row in rows], color=GREY, linestyle="--",
                  label="ideal")  # fmt: skip
        axes.plot(counts, hours, color=BLUE, marker="o", label="at the measured speed")
        node_axis(axes, counts, nodes)
        axes.set_yscale("log", base=2)
        axes.set_yticks(hours)
        axes.set_yticklabels(
            [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in hours]
        )
        axes.minorticks_off()
        axes.set_ylabel("hours to train")
        axes.legend(loc="best")

    return draw("time-to-train", "Time to train", f"Hours of steps for {training.what}.", paint)


def _cost(rows: Sequence[Row], nodes: str, training: Training) -> Plot:
    def paint(axes: Any) -> None:
        counts = [row.nodes for row in rows]
        cost = [row.nodes * hours_of(row, training) for row in rows]
        axes.axhline(cost[0], color=GREY, linestyle="--", label="ideal: as the baseline")
        axes.plot(counts, cost, color=RED, marker="s", label="at the measured speed")
        node_axis(axes, counts, nodes)
        axes.set_ylim(0, 1.35 * max(cost))
        axes.set_ylabel("node-hours")
        axes.legend(loc="upper left")

    return draw("cost", "Cost", f"Node-hours for {training.what}.", paint)


def _ranks(point: Point) -> Plot:
    ranks = sorted(point.per_rank, key=lambda rank: -rank.compute)[:_RANKS_SHOWN]
    ranks.sort(key=lambda rank: rank.rank)

    def paint(axes: Any) -> None:
        _stack(axes, [{part: getattr(r, part, 0.0) for part in PARTS} for r in ranks])
        every = -(-len(ranks) // 12)
        axes.set_xticks(range(0, len(ranks), every))
        axes.set_xticklabels([str(rank.rank) for rank in ranks[::every]])
        axes.set_xlabel("rank")
        legend_below(axes, 3)

    of = "" if len(ranks) == len(point.per_rank) else f", the {len(ranks)} that compute longest"
    caption = f"Each rank of {point.nodes} node(s){of}: a late one computes long and waits little."
    return draw("ranks", "Time of each rank", caption, paint, inches=(5.4, 3.9))


def _buckets(study: Study) -> Plot:
    def paint(axes: Any) -> None:
        x = [1e3 * bucket.ready_s for bucket in study.buckets]
        sizes = [bucket.bytes / _MB for bucket in study.buckets]
        axes.vlines(x, 0, sizes, color=SKY, linewidth=4)
        axes.plot(x, sizes, "o", color=BLUE, label="a bucket, when it is ready")
        axes.axvline(1e3 * study.backward_s, color=RED, linestyle="--", label="end of backward")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("ms after the begin of backward")
        axes.set_ylabel("MB to sum")
        legend_below(axes, 2)

    caption = "Gradients by bucket: what is ready early can be summed behind the rest of backward."
    return draw("buckets", "Gradients ready to sum", caption, paint, inches=(5.4, 3.9))

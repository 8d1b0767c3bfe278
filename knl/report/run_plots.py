"""The plots of a run."""

from __future__ import annotations

import math
from typing import Any

from knl.report.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HATCHES,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Plot,
    binned,
    draw,
    legend_below,
    plain,
)  # fmt: skip
from knl.report.run_data import RunData, number

# Part of a step, its colour.
PARTS = {
    "images": ORANGE,
    "forward": SKY,
    "backward": BLUE,
    "exposed sync": RED,
    "LARS": GREEN,
}


def parts_of(run: RunData) -> dict[str, list[float]]:
    """Seconds of each step, by the names of PARTS."""
    forward = run.column("t_forward")
    backward = [whole - part for whole, part in zip(run.column("t_compute"), forward)]
    columns = [run.column(key) for key in ("t_data", "t_comm_exposed", "t_optim")]
    data, sync, lars = columns
    return dict(zip(PARTS, (data, forward, backward, sync, lars)))


def run_plots(run: RunData) -> list[Plot]:
    """Those for which the run has rows."""
    plots: list[Plot | None] = [_loss(run)]
    if run.evaluations:
        plots.append(_accuracy(run))
    plots += [_rate(run), _trust(run), _times(run), _throughput(run)]
    return [plot for plot in plots if plot is not None]


def _loss(run: RunData) -> Plot:
    def paint(axes: Any) -> None:
        x, y, low, high = binned(run.column("epoch"), run.column("loss"), 250)
        axes.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(x, y, color=BLUE, label="training")
        found = [(number(row, "epoch"), number(row, "loss")) for row in run.evaluations]
        if found:
            axes.plot(*zip(*found), color=RED, marker="o", linestyle="--", label="test")
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss (nats)")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

    return draw("loss", "Loss", "Cross-entropy of each step, and on the test set.", paint)


def _accuracy(run: RunData) -> Plot:
    def paint(axes: Any) -> None:
        x = [number(row, "epoch") for row in run.evaluations]
        for key, label, color, mark, dash in (
            ("top5", "top-5", SKY, "s", "--"),
            ("top1", "top-1", BLUE, "o", "-"),
        ):
            y = [100 * number(row, key) for row in run.evaluations]
            axes.plot(x, y, color=color, marker=mark, linestyle=dash, label=label)
            if key == "top1" and math.isfinite(y[-1]):
                axes.annotate(
                    f"{y[-1]:.1f} %", (x[-1], y[-1]), xytext=(0, -16), textcoords="offset points",
                    ha="right", fontsize=9, fontweight="bold", color=BLACK,
                )  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel("right answers (%)")
        axes.margins(y=0.12)
        axes.legend(loc="lower right")

    return draw("accuracy", "Accuracy", "Right answers on the test set, by evaluation.", paint)


def _rate(run: RunData) -> Plot:
    def paint(axes: Any) -> None:
        axes.plot(run.column("epoch"), run.column("lr"), color=BLACK)
        axes.set_xlabel("epoch")
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)

    return draw("learning-rate", "Learning rate", "The global learning rate of each step.", paint)


def _trust(run: RunData) -> Plot | None:
    """By layer where the run noted that, else its bounds; None where there are none at all."""
    if run.trust:
        return _trust_by_layer(run)
    low, high = run.column("trust_min"), run.column("trust_max")
    if all(ratio == 1 for ratio in [*low, *high]):
        return None

    def paint(axes: Any) -> None:
        axes.plot(run.column("epoch"), high, color=PURPLE, label="greatest")
        axes.plot(run.column("epoch"), low, color=GREEN, linestyle="--", label="least")
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_ylabel("trust ratio")
        legend_below(axes, 2)

    caption = "The least and the greatest trust ratio of all layers."
    return draw("trust", "Trust ratios", caption, paint)


def _trust_by_layer(run: RunData) -> Plot:
    import numpy as np
    from matplotlib.colors import LogNorm

    layers = [*dict.fromkeys(name for row in run.trust for name in row["trust"])]
    epoch_of = {row["step"]: number(row, "epoch") for row in run.steps}
    rows = [row for row in run.trust if row["step"] in epoch_of] or run.trust
    epochs = [epoch_of.get(row["step"], float(row["step"])) for row in rows]
    grid = np.array([[number(row["trust"], name) for row in rows] for name in layers])
    grid = np.where(grid > 0, grid, np.nan)
    good = grid[np.isfinite(grid)]

    def paint(axes: Any) -> None:
        if good.size:
            # A few steps at the start, where weights are zero, would bleach all others.
            low, high = np.percentile(good, (2, 98))
            span = (float(low), max(float(high), float(low) * 1.01))
            half = (epochs[-1] - epochs[0]) / max(1, 2 * (len(epochs) - 1)) or 0.5
            image = axes.imshow(
                grid, aspect="auto", cmap="cividis", norm=LogNorm(*span), interpolation="nearest",
                extent=(epochs[0] - half, epochs[-1] + half, len(layers) - 0.5, -0.5),
            )  # fmt: skip
            bar = axes.figure.colorbar(image, ax=axes, pad=0.02, extend="both")
            bar.set_label("trust ratio")
        every = math.ceil(len(layers) / 14)
        axes.set_yticks(range(0, len(layers), every))
        axes.set_yticklabels([_short(name) for name in layers[::every]], fontsize=8)
        axes.grid(False)
        axes.set_xlabel("epoch")

    caption = "The ratio of each layer's step to its weights, from the first layer to the last."
    return draw("trust", "Trust ratios by layer", caption, paint)


def _short(name: str) -> str:
    name = name[: -len(".weight")] if name.endswith(".weight") else name
    return plain(name if len(name) <= 18 else f"…{name[-17:]}")


def _times(run: RunData) -> Plot:
    parts = parts_of(run)

    def paint(axes: Any) -> None:
        epochs = run.column("epoch")
        bins = {part: binned(epochs[1:] or epochs, s[1:] or s, 60) for part, s in parts.items()}
        x = bins["forward"][0]
        values = [[1e3 * value for value in bins[part][1]] for part in parts]
        if not x or any(len(each) != len(x) for each in values):
            axes.text(0.5, 0.5, "no times", ha="center", transform=axes.transAxes)
            return
        width = (x[-1] - x[0]) / max(1, len(x) - 1) or 1.0
        bottom = [0.0] * len(x)
        for (part, color), each, hatch in zip(PARTS.items(), values, HATCHES):
            axes.bar(x, each, width, bottom, color=color, hatch=hatch, linewidth=0, label=part)
            bottom = [a + b for a, b in zip(bottom, each)]
        axes.set_xlabel("epoch")
        axes.set_ylabel("ms of a step")
        axes.grid(axis="x", visible=False)
        legend_below(axes, 3)

    caption = "Where the time of a step goes on rank 0: medians of neighbouring steps."
    return draw("time", "Time of a step", caption, paint, inches=(5.4, 3.9))


def _throughput(run: RunData) -> Plot:
    def paint(axes: Any) -> None:
        epochs, speeds = run.column("epoch"), run.column("images_per_s")
        x, y, low, high = binned(epochs[1:] or epochs, speeds[1:] or speeds, 120)
        axes.fill_between(x, low, high, color=GREY, alpha=0.35, linewidth=0, label="5 to 95 %")
        axes.plot(x, y, color=GREEN, label="median")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel("images/s")
        legend_below(axes, 2)

    caption = "Images a second over all ranks, without the first step, which warms up."
    return draw("throughput", "Throughput", caption, paint, inches=(5.4, 3.9))

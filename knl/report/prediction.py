"""What a model says of more nodes than were measured, beside what others have published."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knl.config import Recipe, convert
from knl.errors import KnlError
from knl.report.page import Finding, Table, table_html
from knl.report.plots import BLACK, BLUE, GREEN, GREY, ORANGE, Plot, draw, legend_below, node_axis
from knl.report.train_time import Training
from knl.scaling.predict import prepare, to_json
from knl.scaling.published import PUBLISHED, Published
from knl.scaling.study import STUDY, Row, Study

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Predicted = Mapping[str, Any]  # a row of knl scale predict --json
_FARTHEST = 2048
_IMAGENET = 1_281_167


def efficiency_of(point: Published) -> float:
    """Images/s of a node of many over those of one alone, of which a speed was published."""
    speed = _IMAGENET * point.epochs / (60 * point.minutes)
    return speed / point.nodes / point.node_speed


def predicted_rows(study: Study, folder: Path, rows: Sequence[Row]) -> tuple[list[Predicted], str]:
    """What the model, fitted to the study, says of its numbers of nodes and of more; and why there
    is nothing, where there is nothing."""
    if len(rows) < 2:
        return [], ""
    try:
        recipe = convert(tomllib.loads(study.recipe_toml), Recipe, folder / STUDY)
        made = prepare(recipe, folder, None, None, None, None)
        most = _FARTHEST if study.cores_per_rank is None else 4 * rows[-1].nodes
        counts = {row.nodes for row in rows} | {2**n for n in range(most.bit_length())}
        found = to_json(made, tuple(sorted(counts)))["rows"]
    except (KnlError, tomllib.TOMLDecodeError) as error:
        return [], f"No prediction: {error}"
    return found, ""


def prediction_plot(
    study: Study, rows: Sequence[Row], predicted: Sequence[Predicted], model: str
) -> Plot | None:
    """Efficiency: measured, predicted with its interval, published. None where there is nothing but
    what was measured. `model`: the recipe's."""
    points = [p for p in PUBLISHED if model.startswith(p.net) and p.node_speed and p.epochs >= 90]
    # Ranks of one machine are no nodes: what others did with nodes would mislead beside them.
    points = points if study.cores_per_rank is None else []
    if not predicted and not points:
        return None
    nodes = "nodes" if study.cores_per_rank is None else "ranks, which stand for nodes"

    def paint(axes: Any) -> None:
        axes.axhline(100, color=GREY, linestyle="--", linewidth=1.5)
        base = 1.0  # the model compares with one node, the study with its baseline
        if predicted:
            base = next(row["efficiency"] for row in predicted if row["nodes"] == rows[0].nodes)
            counted = [row["nodes"] for row in predicted]
            low, middle, high = (
                [100 * row[f"efficiency{bound}"] for row in predicted]
                for bound in ("_low", "", "_high")
            )
            axes.fill_between(counted, low, high, color=ORANGE, alpha=0.3, linewidth=0,
                              label="predicted, interval")  # fmt: skip
            axes.plot(counted, middle, color=ORANGE, linestyle="-.", label="predicted")  # fmt: skip
        axes.plot([row.nodes for row in rows], [100 * base * row.efficiency for row in rows],
                  color=GREEN, marker="o", label="measured")  # fmt: skip
        sources = dict.fromkeys(p.source for p in points)
        for mark, color, source in zip("D^s", (BLUE, BLACK, GREY), sources):
            of = [(p.nodes, 100 * efficiency_of(p)) for p in points if p.source == source]
            axes.plot(*zip(*of), mark, color=color, markersize=7, label=source.split(",")[0])
        counts = {row.nodes for row in rows} | {row["nodes"] for row in predicted}
        node_axis(axes, sorted(counts | {p.nodes for p in points}), nodes)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("efficiency (%)")
        legend_below(axes, 2)

    caption = "Efficiency as measured, and as the model that is fitted to it goes on."
    caption += " Marks: as published for Xeon Phi 7250." if points else ""
    return draw("prediction", "Prediction", caption, paint, inches=(5.4, 3.9))


def prediction_table(predicted: Sequence[Predicted]) -> Table:
    """What the model says, in full."""
    titles = [*predicted[0]]
    return Table("prediction", titles, [[row.get(title) for title in titles] for row in predicted])


def prediction_numbers(predicted: Sequence[Predicted], training: Training) -> str:
    """The part of it that is for the page, for the same training as the measured rows."""
    titles = {
        "nodes": "nodes", "step_s": "s a step", "exposed_s": "exposed s",
        "straggler_s": "straggler s", "efficiency_low": "efficiency, least",
        "efficiency": "efficiency", "efficiency_high": "greatest", "hours": "hours",
        "node_hours": "node-hours", "su": "SU", "cost_usd": "USD of use",
    }  # fmt: skip
    rows = [[{**row, **_of_training(row, training)}.get(key) for key in titles]
            for row in predicted]  # fmt: skip
    return table_html(Table("prediction", [*titles.values()], rows), "As predicted.")


def _of_training(row: Predicted, training: Training) -> dict[str, float]:
    """What grows with the hours: the prediction's own are of the recipe's set."""
    hours = training.images / row["images_per_s"] / 3600.0
    keys = ("hours", "node_hours", "su", "cost_usd")
    return {key: row[key] * hours / row["hours"] for key in keys if row.get(key) is not None}


def prediction_finding(predicted: Sequence[Predicted], measured: int) -> Finding | None:
    """Where more nodes would lose. `measured`: the most that were."""
    last = predicted[-1] if predicted else None
    if last is None or last["nodes"] <= measured or not last["step_s"] > 0:
        return None
    parts = {"exposed sync": last["exposed_s"], "waiting for late ranks": last["straggler_s"]}
    part = max(parts, key=lambda name: parts[name])
    good = [row["nodes"] for row in predicted if row["efficiency"] >= 0.8]
    until = f"it stays above 80% up to {max(good)} nodes" if good else "it is below 80% everywhere"
    return Finding(
        0.25,
        f"At {last['nodes']} nodes the model expects an efficiency of {last['efficiency']:.0%} "
        f"({last['efficiency_low']:.0%} to {last['efficiency_high']:.0%}), with "
        f"{parts[part] / last['step_s']:.0%} of the step {part}; {until}.",
        "A wide interval narrows with more nodes and repetitions in the study.",
    )

"""What a model says of more nodes than were measured, beside what others have published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knl.errors import InputError
from knl.report.plots import BLACK, BLUE, GREEN, GREY, ORANGE, Plot, draw, legend_below, node_axis
from knl.report.run_data import number
from knl.scaling.study import Row, Study

# Beside study.json: what `knl scale predict --from STUDY --json` has printed.
FILE = "prediction.json"
_IMAGENET = 1_281_167


@dataclass(frozen=True)
class Published:
    """A training on many nodes that was published, and images/s of one node alone."""

    who: str
    model: str
    nodes: int
    epochs: int
    minutes: float
    alone: float

    @property
    def efficiency(self) -> float:
        """Images/s of a node of many over those of one alone."""
        return _IMAGENET * self.epochs / (60 * self.minutes) / self.nodes / self.alone


# Times: You et al., "ImageNet Training in Minutes" (arXiv 1709.05011); one node alone: Intel Caffe
# on four Xeon Phi 7250 at large batches.
PUBLISHED = (
    Published("You et al. 2017, ResNet-50", "resnet50", 512, 90, 60, 79),
    Published("You et al. 2017, ResNet-50", "resnet50", 2048, 90, 20, 79),
    Published("You et al. 2017, AlexNet", "alexnet", 512, 100, 24, 640),
)


def read_prediction(folder: Path) -> Sequence[Mapping[str, Any]]:
    """The rows of the prediction in a study's folder; empty where there is none. Raises InputError
    where the file is not what knl scale predict prints."""
    path = folder / FILE
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_bytes())["rows"]
        good = [row for row in rows if row["nodes"] >= 1 and number(row, "efficiency") > 0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a prediction ({type(error).__name__}): write it with "
            f"knl scale predict --from {folder} --json"
        ) from None
    return sorted(good, key=lambda row: row["nodes"])


def prediction_plot(
    study: Study, rows: Sequence[Row], predicted: Sequence[Mapping[str, Any]], model: str
) -> Plot | None:
    """Efficiency: measured, predicted with its interval, published. None where there is nothing but
    what was measured. `model`: the recipe's."""
    points = [p for p in PUBLISHED if model.startswith(p.model)]
    # Ranks of one machine are no nodes: what others did with nodes would mislead beside them.
    points = points if study.cores_per_rank is None else []
    if not predicted and not points:
        return None

    def paint(axes: Any) -> None:
        axes.axhline(100, color=GREY, linestyle="--", linewidth=1.5)
        if predicted:
            nodes = [row["nodes"] for row in predicted]
            low, high = zip(*(_interval(row) for row in predicted))
            axes.fill_between(nodes, low, high, color=ORANGE, alpha=0.3, linewidth=0,
                              label="predicted, interval")  # fmt: skip
            axes.plot(nodes, [100 * number(row, "efficiency") for row in predicted],
                      color=ORANGE, linestyle="-.", label="predicted")  # fmt: skip
        axes.plot([row.nodes for row in rows], [100 * row.efficiency for row in rows],
                  color=GREEN, marker="o", label="measured")  # fmt: skip
        for mark, color, name in zip(
            "D^s", (BLUE, BLACK, GREY), dict.fromkeys(p.who for p in points)
        ):
            found = [(p.nodes, 100 * p.efficiency) for p in points if p.who == name]
            axes.plot(*zip(*found), mark, color=color, markersize=7, label=name)
        counts = {row.nodes for row in rows} | {row["nodes"] for row in predicted}
        node_axis(axes, sorted(counts | {p.nodes for p in points}), "nodes")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("efficiency (%)")
        legend_below(axes, 2)

    caption = "Efficiency as measured, as the model goes on, and as published for Xeon Phi 7250."
    return draw("prediction", "Prediction", caption, paint, inches=(5.4, 3.9))


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Per cent; the bare prediction where it has no bounds."""
    middle = number(row, "efficiency")
    step, low, high = (number(row, key) for key in ("step_s", "step_s_low", "step_s_high"))
    if step > 0 and low > 0 and high > 0:
        return 100 * middle * step / high, 100 * middle * step / low
    return 100 * middle, 100 * middle

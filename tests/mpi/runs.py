"""Real `knl train digits` runs, and what they leave: the result, metrics.jsonl."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .launch import knl, run

EPOCHS, STEPS = 3, 15
ARGUMENTS = ("train", "digits", "--set", f"train.epochs={EPOCHS}", "--json")

# A network that trains in a moment, on made-up pictures.
SMALL_RECIPE = """
[model]
name = "resnet-small"
[data]
name = "synthetic"
image_size = 32
classes = 10
[train]
epochs = 1
lanes = 2
lane_batch = 16
[schedule]
lr = 0.1
"""


@dataclass(frozen=True)
class Run:
    """A run that ended well: its output, the folder it wrote."""

    done: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.done.stdout)

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "lr" in row]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]


def finished(done: subprocess.CompletedProcess[str], place: Path) -> Run:
    """The run, when it ended well; `place`: where its command stood."""
    assert done.returncode == 0, done.stderr
    return Run(done, place / json.loads(done.stdout)["run_dir"])


def train_digits(place: Path, ranks: int, *options: str) -> Run:
    """Train by `knl train digits -n` in a folder."""
    command = knl(*ARGUMENTS, "-n", str(ranks), *options)
    return finished(run(command, cwd=place, timeout=120.0, OMP_NUM_THREADS="1"), place)

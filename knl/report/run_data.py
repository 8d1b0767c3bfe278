"""What a run directory says, read with patience: a run may be under way, cut, or damaged."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knl.config import Recipe, load_recipe
from knl.errors import InputError, KnlError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunData:
    """Rows of steps, of evaluations, of trust ratios; `recipe`: None where it cannot be read;
    `broken`: lines that are none."""

    folder: Path
    recipe: Recipe | None
    environment: Mapping[str, Any]
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    trust: Sequence[Row]
    broken: int

    def column(self, key: str) -> list[float]:
        """Of each step; NaN where there is no number."""
        return [number(row, key) for row in self.steps]


def is_run(folder: Path) -> bool:
    """Whether this is a run directory."""
    return (folder / "metrics.jsonl").exists() or (folder / "recipe.toml").exists()


def read_run(folder: Path) -> RunData:
    """Raises InputError where a file is there and cannot be read."""
    rows, broken = _rows(folder / "metrics.jsonl")
    trust, broken_trust = _rows(folder / "trust.jsonl")
    recipe = None
    with contextlib.suppress(KnlError):
        recipe = load_recipe(str(folder.absolute() / "recipe.toml"))
    environment: Any = {}
    with contextlib.suppress(OSError, ValueError):
        environment = json.loads((folder / "environment.json").read_text())
    return RunData(
        folder=folder,
        recipe=recipe,
        environment=environment if isinstance(environment, dict) else {},
        steps=[row for row in rows if "lr" in row],
        evaluations=[row for row in rows if "top1" in row],
        trust=[row for row in trust if isinstance(row.get("trust"), dict)],
        broken=broken + broken_trust,
    )


def number(row: Row, key: str) -> float:
    """NaN where there is none."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in its lines, and how many lines are none."""
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append(row)
    return found, len(lines) - len(found)

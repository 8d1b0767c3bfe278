"""The folder that a run writes into: whose it is, what is there already, what is added to it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from knl.config import Recipe, load_recipe, to_toml
from knl.errors import DamagedError, InputError, KnlError, say
from knl.files import replace_file, sync_folder
from knl.train.checkpoint import Checkpoint, listed, read
from knl.train.evaluate import Evaluation
from knl.train.lock import Lock
from knl.train.metrics import Events, Rows, StepMetrics

_METRICS, _TRUST, _RECIPE = "metrics.jsonl", "trust.jsonl", "recipe.toml"
# In the order in which --fresh moves them: what is left when it is killed starts anew, too.
_OF_A_RUN = ("checkpoints", _METRICS, _TRUST, _RECIPE, "environment.json", "report.html", "plots",
             "tables", "events*", "nonfinite-*")  # fmt: skip
# What may be another when a run goes on: it leaves the trajectory as it is, up to rounding.
_FREE = (
    "name", "comm.", "data.path", "data.prefetch_mb", "data.max_damaged", "train.layout",
    "train.slow_bf16", "train.compile", "train.checkpoint_minutes", "train.keep_checkpoints",
    "train.on_nonfinite", "train.max_skipped", "train.steps", "train.eval_every",
)  # fmt: skip
ANEW = "--fresh starts anew without deleting anything"


class RunDirectory:
    """A folder that one run writes into, by rank 0, with a lock on it.

    Raises InputError when another job has it or it cannot be written.
    """

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self._rows: Rows | None = None
        self._trust: Rows | None = None
        self._events: Events | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(path, environment)
        except OSError as error:
            raise self._unwritable(error) from None

    def find(self, recipe: Recipe, fresh: bool) -> Checkpoint | None:
        """The newest whole checkpoint, None where training is to begin. Damaged ones are named and
        put aside. Raises InputError when none is whole, or when they are of another recipe."""
        if (self.path / "STOP").exists():
            raise InputError(f"{self.path / 'STOP'} is there: remove it, then start again")
        try:
            if fresh:
                self._move_aside()
                return None
            found, damaged = self._newest()
            if found is not None:
                _require_same_recipe(found.state.recipe, recipe, self.path)
                for path in damaged:  # else they would count among the last ones
                    path.rename(path.with_name(path.name + ".damaged"))
            elif (self.path / _METRICS).exists() and (self.path / _METRICS).stat().st_size:
                self._begin_anew(recipe)
            return found
        except OSError as error:
            raise self._unwritable(error) from None

    def open(self, recipe: Recipe, environment: Mapping[str, Any], step: int) -> None:
        """Begin to write behind `step`: rows of later steps were never covered by a checkpoint."""
        try:
            self.checkpoints.mkdir(exist_ok=True)
            # What a start that was killed has left.
            for name in (_METRICS, _TRUST, _RECIPE, "environment.json"):
                for path in self.path.glob(f".{name}.{'[0-9a-f]' * 32}"):
                    path.unlink()
            _replace(self.path / _RECIPE, to_toml(recipe))
            _replace(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
            _tell_missing(self.path / _METRICS, _cut_back(self.path / _METRICS, step), step)
            _cut_back(self.path / _TRUST, step)
            self._rows, self._events = Rows(self.path / _METRICS), Events(self.path, step)
            self._trust = Rows(self.path / _TRUST)
        except OSError as error:
            raise self._unwritable(error) from None

    def step(self, metrics: StepMetrics) -> None:
        assert self._rows and self._events  # open
        self._rows.add(asdict(metrics))
        keys = ("loss", "lr", "images_per_s", "trust_min", "trust_max")
        curves = {f"train/{key}": getattr(metrics, key) for key in keys}
        self._events.add(curves, metrics.step)

    def trust(self, step: int, ratios: Mapping[str, float]) -> None:
        """`ratios`: of each layer that has one; to four digits, as nobody reads more."""
        assert self._trust  # open
        if ratios:
            short = {name: float(f"{ratio:.4g}") for name, ratio in ratios.items()}
            self._trust.add({"step": step, "trust": short})

    def evaluation(self, step: int, epoch: float, result: Evaluation, checksum: str) -> None:
        """`checksum`: of all weights, equal on all ranks."""
        assert self._rows and self._events  # open
        values = asdict(result)
        self._rows.add({"step": step, "epoch": epoch, **values, "weights_crc32": checksum})
        self._events.add({f"test/{key}": value for key, value in values.items()}, step)
        self._events.flush()

    def diagnosis(self, detail: Mapping[str, Any]) -> Path:
        """Write down all that is known of a step that went wrong."""
        path = self.path / f"nonfinite-step-{detail['step']:08d}.json"
        with contextlib.suppress(OSError):
            _replace(path, json.dumps(detail, indent=1) + "\n")
        return path

    def sync(self) -> None:
        """The rows to the disk: a checkpoint must not be newer than they are. Raises OSError."""
        if self._rows and self._trust:
            self._rows.sync()
            self._trust.sync()

    def stop_wanted(self) -> bool:
        """Whether the user has made the file STOP, as far as can be seen."""
        with contextlib.suppress(OSError):
            return (self.path / "STOP").exists()
        return False

    def close(self) -> None:
        """Let go of the folder."""
        if self._rows and self._trust and self._events:
            self._rows.close()
            self._trust.close()
            self._events.close()
        self.lock.release()

    def _newest(self) -> tuple[Checkpoint | None, list[Path]]:
        """The newest whole one, and the damaged ones that are newer. Raises FailedError where one
        cannot be read, which may be better in a while."""
        damaged: list[Path] = []
        for path in listed(self.checkpoints):
            try:
                found = read(path)
            except DamagedError as error:
                say(f"{error}: passed over")
                damaged.append(path)
                continue
            return found, damaged
        if damaged:
            raise InputError(
                f"none of the {len(damaged)} checkpoint(s) in {self.checkpoints} is whole; {ANEW}"
            )
        return None, []

    def _begin_anew(self, recipe: Recipe) -> None:
        """There are rows and no checkpoint: the run was ended before its first one."""
        old = None
        with contextlib.suppress(KnlError):  # what cannot be read says nothing
            old = load_recipe(os.fspath(self.path / _RECIPE))
        if old is not None:
            _require_same_recipe(msgspec.to_builtins(old), recipe, self.path)
        aside = self._move_aside()
        say(f"{self.path} has no checkpoint: training begins anew, its rows are now in {aside}")

    def _move_aside(self) -> Path | None:
        """Into a folder of its own below."""
        parts = [part for name in _OF_A_RUN for part in sorted(self.path.glob(name))]
        if not parts:
            return None
        number = 1
        while (folder := self.path / f"old-{number:03d}").exists():
            number += 1
        folder.mkdir()
        for part in parts:
            part.rename(folder / part.name)
        sync_folder(self.path)
        return folder

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"run directory {self.path} cannot be written: {error.strerror}")


def default_run_dir(recipe_name: str) -> Path:
    """runs/<recipe>-<time>, below the folder the user stands in."""
    return Path("runs") / f"{recipe_name}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _require_same_recipe(old: Mapping[str, Any], recipe: Recipe, path: Path) -> None:
    before, now = _flat(_completed(old)), _flat(recipe)
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    ]
    if differing:
        raise InputError(
            f"{path} holds a run of another recipe: {'; '.join(differing)}: give the old values, "
            f"or another --run-dir; {ANEW}"
        )


def _completed(old: Mapping[str, Any]) -> object:
    """With the defaults of keys that are newer than the run."""
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(old, Recipe)
    return old


def _flat(value: object, place: str = "") -> dict[str, Any]:
    """{"schedule.lr": 0.1, ...}, as JSON has it."""
    value = json.loads(msgspec.json.encode(value)) if not place else value
    if not isinstance(value, dict):
        return {place: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{place}.{key}" if place else key)
    return found


def _cut_back(path: Path, step: int) -> list[dict[str, Any]] | None:
    """Leave the rows up to `step`, and return them: those behind it will be written again. None
    where there is no file."""
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [(line, row) for line in lines if (row := _row(line)) and row["step"] <= step]
    _replace(path, b"".join(line for line, _ in rows))
    return [row for _, row in rows]


def _tell_missing(path: Path, rows: list[dict[str, Any]] | None, step: int) -> None:
    """Tell where rows are missing."""
    if rows is None:
        if step:
            say(f"{path} is gone: it begins anew behind step {step}")
        return
    steps = sum("lr" in row for row in rows)
    if steps != step:
        say(f"{path} has {steps} of the {step} steps before the checkpoint")


def _row(line: bytes) -> dict[str, Any] | None:
    """None for one that was not written to its end."""
    with contextlib.suppress(ValueError, UnicodeDecodeError):
        row = json.loads(line)
        if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _replace(path: Path, content: str | bytes) -> None:
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)

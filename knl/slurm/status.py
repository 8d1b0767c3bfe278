"""`knl status`: how a run and its job are, in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knl.config import Recipe, load_recipe
from knl.errors import InputError
from knl.train.lock import is_held

_TOOL_S = 20.0
_RECENT = 50  # steps whose speed counts
# Requeued jobs are counted by Slurm, continuations by the job scripts.
_RESTARTS = ("SLURM_RESTART_COUNT", "KNL_CONTINUED")
_RUNS = {True: "running", False: "not running", None: "perhaps running, on another host"}


def status_of(run: Path) -> dict[str, Any]:
    """What is known of a run directory and the job that has it. Values are None where they are not
    known: `running` where the run's host is another one. Raises InputError where there is no run.
    """
    if not (run / "recipe.toml").exists():
        raise InputError(f"{run}: no run directory of knl train (it has no recipe.toml)")
    recipe = load_recipe(str(run / "recipe.toml"))
    environment = _json(run / "environment.json")
    rows = _rows(run / "metrics.jsonl")
    done = [row for row in rows if "lr" in row and row.get("step") and row.get("epoch")]
    marks = [row for row in rows if "top1" in row]
    last = done[-1] if done else {}
    speeds = sorted(row["images_per_s"] for row in done[-_RECENT:] if row.get("images_per_s"))
    speed = speeds[len(speeds) // 2] if speeds else None
    steps = _steps(recipe, last["step"] / last["epoch"]) if last else None
    left = None
    if speed and steps is not None:
        left = max(0, steps - last["step"]) * recipe.global_batch / speed
    variables = environment.get("variables", {})
    job = variables.get("SLURM_JOB_ID")
    state = _job_state(job)
    return {
        "run": str(run),
        "recipe": recipe.name,
        "job_id": job,
        "job_state": state,
        "running": state == "running" if state else is_held(run),
        "restarts": sum(int(variables.get(name) or 0) for name in _RESTARTS),
        "step": last.get("step"),
        "steps": steps,
        "epoch": last.get("epoch"),
        "epochs": recipe.train.epochs,
        "loss": last.get("loss"),
        "top1": marks[-1]["top1"] if marks else None,
        "images_per_s": speed,
        "seconds_left": left,
    }


def newest_run(folder: Path) -> Path:
    """The run directory below `folder` that was written last. Raises InputError where none is."""
    found = [path.parent for path in folder.glob("*/recipe.toml")]
    if not found:
        raise InputError(f"{folder}: no runs there; name a run directory: knl status RUN")
    return max(found, key=lambda run: _written(run))


def line(status: Mapping[str, Any]) -> str:
    """The status in one line."""
    state = status["job_state"] or _RUNS[status["running"]]
    if status["step"] is not None and status["step"] >= status["steps"]:
        state = "done"
    parts = [f"{status['run']}: {status['recipe']}"]
    parts.append(f"job {status['job_id']} {state}" if status["job_id"] else state)
    if status["step"] is None:
        parts.append("no step yet")
    else:
        parts.append(f"step {status['step']} of {status['steps']}, epoch {status['epoch']:.2f}")
        loss = status["loss"]
        parts.append("loss not a number" if loss is None else f"loss {loss:.4f}")
    if status["top1"] is not None:
        parts.append(f"top-1 {100 * status['top1']:.2f}%")
    if status["images_per_s"]:
        parts.append(f"{status['images_per_s']:,.1f} images/s")
    if status["seconds_left"] is not None:
        parts.append(f"{_duration(status['seconds_left'])} left")
    if status["restarts"]:
        parts.append(f"{status['restarts']} restart(s)")
    return ", ".join(parts)


def _job_state(job: str | None) -> str | None:
    """As squeue has it, "over" where it knows the job no more; None where there is no Slurm."""
    if not job or shutil.which("squeue") is None:
        return None
    command = ["squeue", "-h", "-j", job, "-o", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return None
    return done.stdout.strip().lower() or "over"


def _steps(recipe: Recipe, steps_per_epoch: float) -> int:
    """Of the whole run."""
    steps = max(1, round(recipe.train.epochs * round(steps_per_epoch)))
    return min(steps, recipe.train.steps or steps)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows alone: the last may be under way."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    found = []
    for text in lines:
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(run: Path) -> float:
    metrics = run / "metrics.jsonl"
    return (metrics if metrics.exists() else run / "recipe.toml").stat().st_mtime


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"

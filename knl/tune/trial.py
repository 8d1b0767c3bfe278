"""One trial: a plan's ranks as fresh processes, watched, and ended when they are hopeless."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Literal

import msgspec

from knl.children import child
from knl.choices import Choices
from knl.config import Data, Recipe, to_toml
from knl.launch import ranks_command
from knl.plan import make_plan
from knl.profile import SCHEMA, Gain, Profile, Trial, fingerprint, pixels_of, save_profile
from knl.topology import Topology

_MODULE = "knl.tune.steps"
_KILLED = "killed (signal 9): out of memory?"


@dataclass(frozen=True)
class Measured:
    """What came of a trial. `step_s`: seconds of each step after the one that warms up; `reason`:
    why it is not complete; `wall_s`: with start and end."""

    state: Literal["complete", "pruned", "failed"]
    step_s: tuple[float, ...]
    reason: str
    peak_bytes: int
    wall_s: float


@dataclass(frozen=True)
class Bench:
    """What all trials of a search share. `images`: of a step on the node; `steps`: of a trial after
    the one that warms up; `environment`: the user's."""

    node: Topology
    recipe: Recipe
    images: int
    steps: int
    environment: Mapping[str, str]

    def measure(
        self,
        choices: Choices | None,
        limit_s: float,
        hopeless: Callable[[float], bool] = lambda step_s: False,
    ) -> Measured:
        """Run the steps and one to warm up. `choices`: None for as-is; `limit_s`: seconds after
        which it counts as hanging; `hopeless`: judges the first step after the warm-up."""
        return measure(lambda folder: self._command(choices, folder), self.steps, limit_s, hopeless)

    def profile(
        self, choices: Choices, gain: Gain | None = None, trials: Sequence[Trial] = ()
    ) -> Profile:
        """These choices as a profile, of now."""
        return Profile(
            schema=SCHEMA,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            recipe=self.recipe.name,
            model=self.recipe.model.name,
            pixels=pixels_of(self.recipe),
            images=self.images,
            fingerprint=fingerprint(self.node),
            plan=make_plan(self.node, choices, self.environment, "profile"),
            gain=gain,
            trials=tuple(trials),
        )

    def _command(self, choices: Choices | None, folder: Path) -> tuple[list[str], dict[str, str]]:
        ranks = 1 if choices is None else choices.ranks_per_node
        recipe = folder / "recipe.toml"
        recipe.write_text(to_toml(trial_recipe(self.recipe, self.images, ranks, choices)))
        steps = ["-m", _MODULE, str(recipe), str(self.steps)]
        if choices is None:
            return [sys.executable, *steps], dict(self.environment)
        save_profile(self.profile(choices), folder / "profile.json")
        run = ["-m", "knl", "run", "--profile", str(folder / "profile.json")]
        run += ["--", sys.executable, *steps]
        if ranks == 1:
            return [sys.executable, *run], dict(self.environment)
        return ranks_command(ranks, run, self.environment, planned=True)


def measure(
    command_in: Callable[[Path], tuple[list[str], dict[str, str]]],
    steps: int,
    limit_s: float,
    hopeless: Callable[[float], bool] = lambda step_s: False,
) -> Measured:
    """Run a command that tells its steps as knl.tune.steps does. `command_in`: makes it and its
    environment, given a folder for its files."""
    with _folder() as folder:
        command, environment = command_in(folder)
        with (
            (folder / "stderr").open("wb") as stderr,
            child(command, environment, folder, stderr) as process,
        ):
            measured = _follow(process, steps, limit_s, hopeless)
        return _explained(measured, folder / "stderr")


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A trial's own; a rank that dies late may still write to it, which spoils no measurement."""
    path = Path(tempfile.mkdtemp(prefix="knl-tune-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def trial_recipe(recipe: Recipe, images: int, ranks: int, choices: Choices | None) -> Recipe:
    """The recipe's network on made-up pictures of its size: one lane a rank, which share `images`.
    `choices`: None for what a plain script of torch would do."""
    data = Data(
        name="synthetic",
        image_size=pixels_of(recipe),
        classes=recipe.data.classes,
        samples=max(images, 64) * 4,
    )
    train = msgspec.structs.replace(
        recipe.train,
        lanes=ranks,
        lane_batch=images // ranks,
        layout="contiguous" if choices is None else choices.layout,
        dtype="fp32" if choices is None else choices.dtype,
        compile=choices is not None and choices.compile,
    )
    bucket_mb = recipe.comm.bucket_mb
    if bucket_mb == "auto":
        bucket_mb = Choices(ranks_per_node=1).bucket_mb if choices is None else choices.bucket_mb
    comm = msgspec.structs.replace(recipe.comm, bucket_mb=bucket_mb)
    return msgspec.structs.replace(recipe, data=data, train=train, comm=comm)


def _follow(
    process: subprocess.Popen[bytes],
    steps: int,
    limit_s: float,
    hopeless: Callable[[float], bool],
) -> Measured:
    """Read the child's lines until it ends, hangs, or turns out hopeless."""
    began = time.monotonic()
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    assert process.stdout is not None  # opened as a pipe
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    times: list[float] = []
    peak, reason = 0, ""

    def measured(state: Literal["complete", "pruned", "failed"], why: str = "") -> Measured:
        return Measured(state, tuple(times[1:]), why, peak, time.monotonic() - began)

    try:
        while line := lines.get(timeout=max(0.0, began + limit_s - time.monotonic())):
            fact = json.loads(line)
            peak = fact.get("peak_bytes", peak)
            reason = reason or fact.get("reason", "")
            if "step_s" in fact:
                times.append(fact["step_s"])
                if len(times) == 2 and steps > 1 and hopeless(times[1]):
                    return measured("pruned", "too slow after its first step")
        status = process.wait(timeout=max(1.0, began + limit_s - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired):
        return measured("failed", f"no end after {limit_s:.0f} s: ended")
    if status == 0 and len(times) == steps + 1:
        return measured("complete")
    return measured("failed", reason or f"status {status}")


def _read(pipe: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    """Hand on lines that are whole objects, and mpiexec's word of a killed rank; then an empty
    line for the end."""
    with pipe:
        for line in pipe:
            if line.startswith(b"{") and line.endswith(b"\n"):
                lines.put(line)
            elif b"KILLED BY SIGNAL: 9" in line:
                lines.put(json.dumps({"reason": _KILLED}).encode())
    lines.put(b"")


def _explained(measured: Measured, stderr: Path) -> Measured:
    """A trial that did not say why it failed: by its last words, or by the signal that ended it."""
    if not measured.reason.startswith("status"):
        return measured
    text = stderr.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    others = [line for line in lines if not line.startswith(("knl: ", "="))]
    killed = measured.reason in ("status -9", "status 137")
    last = (others or lines or ["no message"])[-1]
    return replace(measured, reason=_KILLED if killed else f"{measured.reason}: {last}")

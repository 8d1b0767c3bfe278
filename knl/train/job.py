"""One rank of a training job: put the parts together, train, tell what came of it."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from rich.console import Console

from knl.bind import PLAN, on_loader_cpus
from knl.choices import layout_problem, rule_layout
from knl.comm.bootstrap import Bootstrap, together
from knl.comm.collectives import Ranks, open_ranks
from knl.comm.world import World
from knl.config import Recipe, load_recipe, require_cpu_fits, require_ranks_fit
from knl.data.dataset import open_dataset
from knl.data.packed import PackedDataset
from knl.errors import CollectiveTimeoutError, FailedError, InputError, KnlError, say
from knl.sysfs import read_topology
from knl.train.checkpoint import Checkpoint, State
from knl.train.loop import Keeper, Outcome, Progress, Run
from knl.train.metrics import environment_of
from knl.train.orders import Deadlines, Signals, deadlines
from knl.train.phases import Phases
from knl.train.progress import Display, open_console, tell
from knl.train.run_dir import ANEW, RunDirectory, default_run_dir
from knl.train.saver import Saver
from knl.train.staging import Staged, stage_on_nodes
from knl.train.state import places, put_back, require_fit
from knl.train.trainer import Trainer, set_interop_threads
from knl.train.where import placement_of

# Layouts that compute in float32 whatever they are told, and are not compiled.
_WITH_LIMITS = ("blocked", "ipex")


@dataclass(frozen=True)
class Request:
    """What a user asks of a job. `run_dir`: None for a new one; `stage`: node-local folder to copy
    a packed set to; `max_time_s`, `max_steps`: of this
    start, None and 0 for no limit."""

    recipe: str
    overrides: Sequence[str] = ()
    run_dir: Path | None = None
    provider: str = "auto"
    stage: Path | None = None
    fresh: bool = False
    max_time_s: float | None = None
    max_steps: int = 0


def run_job(
    world: World, bootstrap: Bootstrap, request: Request, phases: Phases
) -> dict[str, Any] | None:
    """Train the recipe as this rank. Returns the result on rank 0, None on the others.

    Raises KnlError; one marked `shared` is raised by every rank.
    """
    signals = Signals()
    signals.listen()
    set_interop_threads()
    recipe = together(bootstrap, lambda: _load(request.recipe, request.overrides, world.size))
    # From the start of the process on: imports and MPI take minutes on hundreds of nodes.
    limits = together(bootstrap, lambda: deadlines(os.environ, request.max_time_s, phases.began))
    job = _Job(world, bootstrap, request, recipe, signals, limits, phases)
    try:
        result = job.run()
    except CollectiveTimeoutError as error:
        signals.leave()
        if world.launcher == "torchrun" and "SIGTERM" in signals.heard:
            signal.raise_signal(signal.SIGTERM)  # it ends the ranks when one has said why
        raise CollectiveTimeoutError(
            f"{bootstrap.roll_call.tell(str(error))}: look there, then start the job again from "
            "its last checkpoint (comm.timeout_s sets the limit)"
        ) from None
    return None if result is None else {**result, "wall_s": time.monotonic() - phases.began}


@dataclass(frozen=True)
class _Job:
    """The parts of a job on this rank."""

    world: World
    bootstrap: Bootstrap
    request: Request
    recipe: Recipe
    signals: Signals
    limits: Deadlines
    phases: Phases

    def run(self) -> dict[str, Any] | None:
        ranks = open_ranks(
            self.world, self.bootstrap, self.request.provider, self.recipe.comm.timeout_s
        )
        self.phases.end("collectives")
        folder: RunDirectory | None = None
        trainer: Trainer | None = None
        try:
            data, seed = self.recipe.data, self.recipe.train.seed
            dataset = together(self.bootstrap, lambda: open_dataset(data, seed))
            trainer = together(self.bootstrap, lambda: Trainer(self.recipe, dataset, ranks))
            hosts = self.bootstrap.gather(platform.node())
            folder = together(self.bootstrap, self._claim)
            progress = self._resume(folder, trainer)
            staged = self._stage(trainer, hosts, progress)
            outcome = self._train(trainer, folder, hosts, progress)
        except KnlError as error:
            if error.shared:  # else ranks may be gone, and closing waits for them
                ranks.collectives.close()
            raise
        finally:
            if trainer is not None:
                trainer.close()
            if folder is not None:
                folder.close()
        ranks.collectives.close()
        if folder is None:
            return None
        result = _result(self.recipe, ranks, folder.path, outcome)
        stage = asdict(staged) if staged else None
        return {**result, "stage": stage, "start_s": self.phases.seconds}

    def _claim(self) -> RunDirectory | None:
        if self.world.rank:
            return None
        path = self.request.run_dir or default_run_dir(self.recipe.name)
        with on_loader_cpus():
            return RunDirectory(path, os.environ)

    def _resume(self, folder: RunDirectory | None, trainer: Trainer) -> Progress:
        """Rank 0 chooses and reads; the others are given what it has read."""

        def choose() -> Checkpoint | None:
            if folder is None:
                return None
            # A job that is queued again has begun anew already.
            starts = (os.environ.get(x, "") for x in ("SLURM_RESTART_COUNT", "KNL_CONTINUED"))
            again = any(count not in ("", "0") for count in starts)
            found = folder.find(self.recipe, self.request.fresh and not again)
            if found is not None:
                _require_of_this_run(found, trainer, folder.path)
            return found

        found = together(self.bootstrap, choose)
        encoded = self.bootstrap.broadcast(msgspec.json.encode(found.state) if found else b"")
        if not encoded:
            return Progress()
        state = msgspec.json.decode(encoded, type=State)
        tensors = found.tensors if found else None
        put_back(places(trainer.plain, trainer.optimiser), tensors, trainer.ranks, trainer.timeout)
        trainer.sync.restore(state.order)
        trainer.skipped = state.skipped
        checksum = trainer.check_weights("from the checkpoint")
        # The checksum is of the memory, so it is another in another layout, and IPEX's differs
        # between processors.
        same_layout = state.recipe["train"]["layout"] == self.recipe.train.layout != "ipex"
        if same_layout and checksum != state.weights_crc32:
            raise FailedError(
                f"weights {checksum} from the checkpoint of step {state.step} are not those it was "
                f"written with, {state.weights_crc32}: memory or network is at fault; start again",
                shared=True,
            )
        return Progress(state.step, state.evaluation, state.best, checksum)

    def _stage(self, trainer: Trainer, hosts: list[str], progress: Progress) -> Staged | None:
        place = self.request.stage
        if place is None:
            return None
        dataset = trainer.dataset
        if not isinstance(dataset, PackedDataset):
            raise InputError(
                f"--stage {place}: for data.name = 'packed' alone, not {self.recipe.data.name!r}",
                shared=True,
            )
        steps = range(progress.step, trainer.total_steps)
        staged = stage_on_nodes(
            self.world, self.bootstrap, hosts, dataset, trainer.lanes, steps, place
        )
        if self.world.rank == 0:
            say(staged.describe(place))
        return staged

    def _train(
        self, trainer: Trainer, folder: RunDirectory | None, hosts: list[str], progress: Progress
    ) -> Outcome:
        steps = self.request.max_steps
        placement = placement_of(self.world, self.bootstrap)
        self.phases.end("data and network")
        environment = {**environment_of(trainer.ranks, hosts), "placement": placement}
        environment["start_s"] = self.phases.seconds
        with on_loader_cpus():
            together(
                self.bootstrap,
                lambda: folder.open(self.recipe, environment, progress.step) if folder else None,
            )
        if folder is None:
            return Run(trainer, self.signals, None, progress, steps).train()
        console = open_console()
        _introduce(console, trainer, progress)
        tell(console, self.phases.describe())
        with on_loader_cpus():
            display = Display(console, trainer.total_steps)
        keep = self.recipe.train.keep_checkpoints
        saver = Saver(folder, self.recipe.train.checkpoint_minutes, keep)
        keeper = Keeper(folder, display, saver, self.limits)
        try:
            outcome = Run(trainer, self.signals, keeper, progress, steps).train()
        finally:
            saver.wait()
            display.close()
        tell(
            console,
            f"weights {outcome.weights_crc32} on all {trainer.ranks.world.size} rank(s); "
            f"median {outcome.images_per_s:,.1f} images/s; run directory {folder.path}",
        )
        return outcome


def _load(name: str, overrides: Sequence[str], size: int) -> Recipe:
    recipe = load_recipe(name, overrides)
    require_ranks_fit(recipe, size)
    if recipe.train.compile and not hasattr(torch, "compile"):
        raise InputError(
            f"train.compile = true: torch {torch.__version__} has no torch.compile, which needs 2.0"
        )
    return resolved(recipe)


def resolved(recipe: Recipe) -> Recipe:
    """With what the plan says where the recipe leaves it open. Raises InputError for a wrong
    KNL_BUCKET_MB, for a layout that the recipe's numbers or torch.compile cannot take, and for
    bfloat16 where it is slow."""
    node = read_topology(Path("/"))
    require_cpu_fits(recipe, node.isa)
    train, comm = recipe.train, recipe.comm
    why_not = layout_refusal(recipe)
    if train.dtype == "bf16" and not hasattr(torch, "compile") and not train.slow_bf16:
        raise InputError(
            f"train.dtype = 'bf16': torch {torch.__version__} has no fast convolutions for it; use "
            "train.dtype = 'fp32' or the modern stack, or --set train.slow_bf16=true to train with "
            "it all the same"
        )
    if train.layout == "auto":
        layout = os.environ.get("KNL_LAYOUT", rule_layout(node))
        if layout in _WITH_LIMITS and why_not:
            layout = "channels_last"
        train = msgspec.structs.replace(train, layout=layout)
    elif train.layout in _WITH_LIMITS and why_not:
        raise InputError(
            f"train.layout = {train.layout!r}: {why_not}; use 'auto' or 'channels_last'"
        )
    if comm.bucket_mb == "auto":
        comm = msgspec.structs.replace(comm, bucket_mb=bucket_mb_of_plan())
    return msgspec.structs.replace(recipe, train=train, comm=comm)


def layout_refusal(recipe: Recipe) -> str:
    """Why a recipe's network cannot be in the blocked layout, nor in IPEX's; "" where it can."""
    if recipe.train.dtype == "bf16":
        return "is float32 alone (train.dtype = 'bf16')"
    return "torch.compile does not take (train.compile = true)" if recipe.train.compile else ""


def bucket_mb_of_plan() -> float:
    """MiB of a gradient bucket as the plan says. Raises InputError for a wrong KNL_BUCKET_MB."""
    text = os.environ.get("KNL_BUCKET_MB", "16")
    try:
        return msgspec.convert(text, Annotated[float, msgspec.Meta(gt=0, le=1024)], strict=False)
    except msgspec.ValidationError:
        raise InputError(f"KNL_BUCKET_MB={text!r}: must be MiB, above 0 to 1024") from None


def _require_of_this_run(found: Checkpoint, trainer: Trainer, path: Path) -> None:
    """What only the training knows. Raises InputError."""
    state, total = found.state, trainer.total_steps
    if state.samples != trainer.lanes.samples:
        raise InputError(
            f"{path} was trained on a set of {state.samples} samples, this one has "
            f"{trainer.lanes.samples}: give the old set in data.path; {ANEW}"
        )
    if state.step > total:
        raise InputError(
            f"{path} has come to step {state.step}, the recipe ends after {total}: raise "
            f"train.steps; {ANEW}"
        )
    require_fit(places(trainer.plain, trainer.optimiser), found.tensors)


def _introduce(console: Console, trainer: Trainer, progress: Progress) -> None:
    recipe = trainer.recipe
    parameters = sum(parameter.numel() for parameter in trainer.optimiser.parameters)
    tell(
        console,
        f"{recipe.name}: {recipe.model.name}, {parameters:,} parameters, "
        f"{recipe.train.lanes} lanes x {recipe.train.lane_batch}, "
        f"{trainer.total_steps} steps; {trainer.ranks.describe()}",
    )
    tell(console, os.environ.get(PLAN, "no plan: not bound, as it came"))
    why_not = layout_refusal(recipe)
    if why_not and (planned := os.environ.get("KNL_LAYOUT")) in _WITH_LIMITS:
        tell(console, f"layout {recipe.train.layout} in place of the plan's: {planned} {why_not}")
    if problem := layout_problem(read_topology(Path("/")), recipe.train.layout):
        tell(console, f"{problem}; leave train.layout = 'auto'")
    if progress.step:
        tell(
            console,
            f"goes on after step {progress.step} (epoch {trainer.epoch_at(progress.step):.2f}), "
            f"from the checkpoint with weights {progress.checksum}",
        )


def _result(recipe: Recipe, ranks: Ranks, path: Path, outcome: Outcome) -> dict[str, Any]:
    """The object that `--json` prints, but for `wall_s`; its keys are a contract."""
    return {
        "run_dir": os.fspath(path),
        "recipe": recipe.name,
        "top1": outcome.evaluation.top1,
        "top5": outcome.evaluation.top5,
        "loss": outcome.evaluation.loss,
        "steps": outcome.steps,
        "epochs": outcome.epochs,
        "damaged_records": outcome.damaged,
        "images_per_s": outcome.images_per_s,
        "ranks": ranks.world.size,
        "lanes": recipe.train.lanes,
        "global_batch": recipe.global_batch,
        "provider": ranks.provider,
        "layout": recipe.train.layout,
        "plan": os.environ.get(PLAN, ""),
    }

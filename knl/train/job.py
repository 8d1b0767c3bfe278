"""One rank of a training job: put the parts together, train, tell what came of it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from knl.bind import PLAN, on_loader_cpus
from knl.comm.bootstrap import Bootstrap, together
from knl.comm.collectives import Ranks, open_ranks
from knl.comm.world import World
from knl.config import Recipe, load_recipe, require_ranks_fit
from knl.data.dataset import Dataset, open_dataset
from knl.data.packed import PackedDataset
from knl.errors import CollectiveTimeoutError, InputError, KnlError, say
from knl.train.metrics import RunDirectory, default_run_dir
from knl.train.progress import Display, open_console
from knl.train.staging import Staged, stage_on_nodes
from knl.train.trainer import Outcome, Trainer, set_interop_threads, train


def run_job(
    world: World,
    bootstrap: Bootstrap,
    name: str,
    overrides: Sequence[str],
    run_dir: Path | None,
    provider: str,
    stage: Path | None = None,
) -> dict[str, Any] | None:
    """Train the recipe as this rank. `stage`: node-local folder to copy a packed set to. Returns
    the result on rank 0, None on the others.

    Raises KnlError; one marked `shared` is raised by every rank.
    """
    began = time.perf_counter()
    set_interop_threads()
    recipe = together(bootstrap, lambda: _load(name, overrides, world.size))
    try:
        return _run(world, bootstrap, recipe, run_dir, provider, stage, began)
    except CollectiveTimeoutError as error:
        raise CollectiveTimeoutError(
            f"{bootstrap.roll_call.tell(str(error))}: look there, then start the job again from "
            "its last checkpoint (comm.timeout_s sets the limit)"
        ) from None


def _run(
    world: World,
    bootstrap: Bootstrap,
    recipe: Recipe,
    run_dir: Path | None,
    provider: str,
    stage: Path | None,
    began: float,
) -> dict[str, Any] | None:
    ranks = open_ranks(world, bootstrap, provider, recipe.comm.timeout_s)
    try:
        hosts = bootstrap.gather(platform.node())
        dataset = together(bootstrap, lambda: open_dataset(recipe.data, recipe.train.seed))
        trainer = together(bootstrap, lambda: Trainer(recipe, dataset, ranks))
        path = run_dir or default_run_dir(recipe.name)
        staged = _stage(world, bootstrap, hosts, dataset, trainer, stage)
        with on_loader_cpus():
            run = together(
                bootstrap,
                lambda: RunDirectory(path, recipe, ranks, hosts) if world.rank == 0 else None,
            )
        try:
            outcome = _train(trainer, run, ranks)
        finally:
            trainer.close()
    except KnlError as error:
        if error.shared:  # else ranks may be gone, and closing waits for them
            ranks.collectives.close()
        raise
    ranks.collectives.close()
    if run is None:
        return None
    result = _result(recipe, ranks, path, outcome, time.perf_counter() - began)
    return {**result, "stage": asdict(staged) if staged else None}


def _stage(
    world: World,
    bootstrap: Bootstrap,
    hosts: list[str],
    dataset: Dataset,
    trainer: Trainer,
    place: Path | None,
) -> Staged | None:
    if place is None:
        return None
    if not isinstance(dataset, PackedDataset):
        raise InputError(
            f"--stage {place}: for data.name = 'packed' alone, not {trainer.recipe.data.name!r}",
            shared=True,
        )
    staged = stage_on_nodes(
        world, bootstrap, hosts, dataset, trainer.lanes, trainer.total_steps, place
    )
    if world.rank == 0:
        say(staged.describe(place))
    return staged


def _load(name: str, overrides: Sequence[str], size: int) -> Recipe:
    recipe = load_recipe(name, overrides)
    require_ranks_fit(recipe, size)
    if recipe.train.compile and not hasattr(torch, "compile"):
        raise InputError(
            f"train.compile = true: torch {torch.__version__} has no torch.compile, which needs 2.0"
        )
    train, comm = recipe.train, recipe.comm
    if train.layout == "auto":
        layout = os.environ.get("KNL_LAYOUT", "channels_last")
        train = msgspec.structs.replace(train, layout=layout)
    if comm.bucket_mb == "auto":
        comm = msgspec.structs.replace(comm, bucket_mb=bucket_mb_of_plan())
    return msgspec.structs.replace(recipe, train=train, comm=comm)


def bucket_mb_of_plan() -> float:
    """MiB of a gradient bucket as the plan says. Raises InputError for a wrong KNL_BUCKET_MB."""
    text = os.environ.get("KNL_BUCKET_MB", "16")
    try:
        return msgspec.convert(text, Annotated[float, msgspec.Meta(gt=0, le=1024)], strict=False)
    except msgspec.ValidationError:
        raise InputError(f"KNL_BUCKET_MB={text!r}: must be MiB, above 0 to 1024") from None


def _train(trainer: Trainer, run: RunDirectory | None, ranks: Ranks) -> Outcome:
    if run is None:
        return train(trainer, None, None)
    console = open_console()
    parameters = sum(parameter.numel() for parameter in trainer.optimiser.parameters)
    console.print(
        f"{trainer.recipe.name}: {trainer.recipe.model.name}, {parameters:,} parameters, "
        f"{trainer.recipe.train.lanes} lanes x {trainer.recipe.train.lane_batch}, "
        f"{trainer.total_steps} steps; {ranks.describe()}",
        markup=False,
    )
    console.print(os.environ.get(PLAN, "no plan: not bound, as it came"), markup=False)
    with on_loader_cpus():
        display = Display(console, trainer.total_steps)
    try:
        outcome = train(trainer, run, display)
    finally:
        display.close()
        run.close()
    console.print(
        f"weights {outcome.weights_crc32} on all {ranks.world.size} rank(s); "
        f"median {outcome.images_per_s:,.1f} images/s; run directory {run.path}",
        markup=False,
    )
    return outcome


def _result(
    recipe: Recipe, ranks: Ranks, path: Path, outcome: Outcome, wall_s: float
) -> dict[str, Any]:
    """The object that `--json` prints; its keys are a contract."""
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
        "wall_s": wall_s,
    }

"""`knl scale run`: measures the points of a study, in a Slurm job or with ranks of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from knl.children import child, last_words, lines_of
from knl.config import Recipe, require_ranks_fit, to_toml
from knl.errors import FailedError, InputError, say
from knl.launch import mpi_environment, ranks_command
from knl.profile import pixels_of
from knl.scaling.study import (
    STUDY,
    Point,
    Study,
    load_study,
    point_file,
    read_folder,
    require_same,
    save_study,
)  # fmt: skip
from knl.sysfs import read_topology

WARMUP = 2  # the first step compiles and allocates, the second has the buckets in their order
_MODULE = "knl.scaling.ranks"
# Libraries are read by hundreds of nodes at once, and MPI starts slowly there.
_SILENCE_S = 1800.0
_TOLD_EVERY_S = 5.0


@dataclass(frozen=True)
class Wanted:
    """What a user asks of a study. `counts`: of nodes; `per_node`: ranks on each; `strong`: the
    global batch stays; `in_job`: on nodes of the Slurm job around, else ranks of this machine stand
    for nodes; `site`: its name, where it is known."""

    recipe: Recipe
    counts: tuple[int, ...]
    per_node: int
    steps: int
    repetitions: int
    strong: bool
    in_job: bool
    site: str | None = None


def measure(wanted: Wanted, folder: Path, environment: Mapping[str, str]) -> Study:
    """Measure what is not in the folder yet: all counts in turn, as often as there are repetitions.
    A point that fails is written down with its reason, and the others go on.

    Raises InputError where a count does not fit, or the folder holds another study; FailedError
    where no point could be measured.
    """
    recipes = {nodes: point_recipe(wanted, nodes) for nodes in wanted.counts}
    cores = None if wanted.in_job else cores_per_rank(max(wanted.counts))
    header = _header(wanted, cores)
    kept = _kept(folder, header, wanted)
    for repetition in range(wanted.repetitions):
        for nodes in wanted.counts:
            if any(p.nodes == nodes and p.repetition == repetition for p in kept[nodes].points):
                say(f"{nodes} node(s), repetition {repetition + 1}: kept, measured before")
                continue
            part = _measured(wanted, nodes, repetition, recipes[nodes], cores, environment, header)
            points = (*kept[nodes].points, *part.points)
            newest = part if part.tensors else kept[nodes]
            kept[nodes] = msgspec.structs.replace(newest, points=points)
            save_study(point_file(folder, nodes), kept[nodes])
            save_study(folder / STUDY, read_folder(folder))
    study = read_folder(folder)
    failed = [point.failed for point in study.points if point.failed]
    if len(failed) == len(study.points):
        raise FailedError(f"{folder}: no point was measured: {failed[0]}")
    return study


def point_recipe(wanted: Wanted, nodes: int) -> Recipe:
    """The recipe as so many nodes train it. Weak scaling: each node has one lane's batch of the
    recipe, which its ranks share; strong: the recipe's own lanes. Raises InputError when they
    cannot be shared out."""
    recipe, ranks = wanted.recipe, nodes * wanted.per_node
    if wanted.strong:
        require_ranks_fit(recipe, ranks)
    elif recipe.train.lane_batch % wanted.per_node:
        raise InputError(
            f"train.lane_batch = {recipe.train.lane_batch}: does not divide by the "
            f"{wanted.per_node} ranks of a node, which share it; --set another, or start other "
            "numbers of tasks a node"
        )
    else:
        train = msgspec.structs.replace(
            recipe.train, lanes=ranks, lane_batch=recipe.train.lane_batch // wanted.per_node
        )
        recipe = msgspec.structs.replace(recipe, train=train)
    if recipe.data.name == "synthetic":  # of any size
        samples = max(recipe.data.samples, recipe.global_batch * (WARMUP + wanted.steps))
        data = msgspec.structs.replace(recipe.data, samples=samples)
        recipe = msgspec.structs.replace(recipe, data=data)
    return recipe


def synthetic(recipe: Recipe) -> Recipe:
    """The recipe on made-up pictures of its size."""
    data = msgspec.structs.replace(
        recipe.data, name="synthetic", path="", crop=0, image_size=pixels_of(recipe),
        augment="none", colour_jitter=0.0, lighting=0.0,
    )  # fmt: skip
    return msgspec.structs.replace(recipe, data=data)


def cores_per_rank(ranks: int) -> int:
    """Cores of this machine that each of so many ranks has to itself; 0 where there are fewer cores
    than ranks."""
    return len(read_topology().allowed_cores) // ranks


def _header(wanted: Wanted, cores: int | None) -> Study:
    return Study(
        recipe=wanted.recipe.name,
        recipe_toml=to_toml(wanted.recipe),
        site=wanted.site,
        scaling="strong" if wanted.strong else "weak",
        hardware={},
        stack={},
        cores_per_rank=cores,
    )


def _kept(folder: Path, header: Study, wanted: Wanted) -> dict[int, Study]:
    """What was measured before, without what failed or was asked for otherwise."""
    kept = {}
    for nodes in wanted.counts:
        kept[nodes], path = header, point_file(folder, nodes)
        if path.exists():
            found = load_study(path)
            require_same(header, found, path)
            good = tuple(p for p in found.points if not p.failed and p.steps == wanted.steps)
            kept[nodes] = msgspec.structs.replace(found, points=good)
    return kept


def _measured(
    wanted: Wanted,
    nodes: int,
    repetition: int,
    recipe: Recipe,
    cores: int | None,
    environment: Mapping[str, str],
    header: Study,
) -> Study:
    """The study of one point."""
    ranks = nodes * wanted.per_node
    what = f"{nodes} node(s), repetition {repetition + 1} of {wanted.repetitions}"
    facts = {
        "nodes": nodes,
        "ranks_per_node": wanted.per_node,
        "ranks": ranks,
        "lanes": recipe.train.lanes,
        "lane_batch": recipe.train.lane_batch,
        "global_batch": recipe.global_batch,
        "repetition": repetition,
        "steps": wanted.steps,
        "warmup": WARMUP,
    }
    told = {"recipe": msgspec.to_builtins(recipe), "ranks": ranks}
    told |= {"steps": wanted.steps, "warmup": WARMUP}
    rank = ["-m", "knl", "run", "--", sys.executable, "-m", _MODULE, json.dumps(told)]
    if wanted.in_job:
        command, variables = job_command(nodes, wanted.per_node, rank, environment)
        cpus = None
    else:
        command, variables = ranks_command(ranks, rank, environment, planned=True)
        cpus = _cpus(nodes, cores or 0)
    try:
        with tempfile.TemporaryFile() as stderr, _allowed(cpus):
            measured = _follow(command, variables, stderr, what)
    except FailedError as error:
        say(f"{what}: failed: {error}")
        point = msgspec.convert({**facts, "failed": str(error)}, Point)
        return msgspec.structs.replace(header, points=(point,))
    images_per_s = recipe.global_batch / measured["step_s"]["median"]
    say(f"{what}: {measured['step_s']['median']:.3g} s a step, {images_per_s:,.1f} images/s")
    point = msgspec.convert({**facts, **measured, "images_per_s": images_per_s}, Point)
    of_study = {key: measured[key] for key in ("hardware", "stack", "parameters", "samples")}
    of_study |= {key: measured[key] for key in ("tensors", "buckets", "forward_s", "backward_s")}
    return msgspec.convert({**msgspec.to_builtins(header), **of_study, "points": [point]}, Study)


def _follow(
    command: Sequence[str], environment: Mapping[str, str], stderr: Any, what: str
) -> dict[str, Any]:
    """What the ranks have measured; tells how far they are. Raises FailedError saying why not."""
    measured: dict[str, Any] = {}
    shown = time.monotonic()
    with child(command, environment, None, stderr) as process:
        try:
            for line in lines_of(process, _SILENCE_S):
                if not line.startswith(b"{"):
                    continue
                fact = json.loads(line)
                measured = fact.get("measured", measured)
                if "step" in fact and time.monotonic() - shown > _TOLD_EVERY_S:
                    shown = time.monotonic()
                    say(f"{what}: step {fact['step']}, {fact['step_s']:.3g} s")
        except (TimeoutError, ValueError) as error:
            raise FailedError(str(error)) from None
        status = process.returncode
    if status != 0 or not measured:
        stderr.seek(0)
        words = last_words(stderr.read().decode(errors="replace"))
        raise FailedError(f"status {status}: {words}")
    return measured


def job_command(
    nodes: int, per_node: int, arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Starts Python with `arguments` on the first so many nodes of the Slurm job around, by the
    site's ibrun where there is one, else by srun; and its environment."""
    wanted = {**environment, **mpi_environment(environment)}
    ranks = nodes * per_node
    if ibrun := shutil.which("ibrun", path=environment.get("PATH")):
        return [ibrun, "-n", str(ranks), "-o", "0", sys.executable, *arguments], wanted
    options = [f"--nodes={nodes}", f"--ntasks={ranks}", f"--ntasks-per-node={per_node}"]
    cpus = environment.get("SLURM_CPUS_ON_NODE", "")
    if cpus.isdigit():  # from Slurm 22.05 on srun does not take over the job's
        options.append(f"--cpus-per-task={max(1, int(cpus) // per_node)}")
    options += ["--mpi=pmi2", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    return ["srun", *options, sys.executable, *arguments], wanted


def _cpus(ranks: int, cores: int) -> set[int] | None:
    """CPUs of so many ranks' share of the machine; None for all of it."""
    if not cores:
        return None
    chosen = read_topology().allowed_cores[: ranks * cores]
    return {cpu for core in chosen for cpu in core.cpus}


@contextlib.contextmanager
def _allowed(cpus: set[int] | None) -> Iterator[None]:
    """What is started in here may run on these CPUs alone."""
    before = os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

"""`knl scale run` and `knl report`: measure a study, draw a run or a study."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Optional

import typer

from knl.errors import InputError, say

_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
_OVERRIDES = typer.Option(
    [], "--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
)
_MADE_UP = typer.Option(
    False, "--synthetic", help="Made-up pictures of the recipe's size, not its data."
)
_STRONG = typer.Option(
    False, "--strong", help="Keep the recipe's global batch; else each node has one lane's."
)


def run(
    recipe: str = typer.Argument(help="Name of a recipe, or path of a TOML file."),
    ranks: Optional[str] = typer.Option(
        None, help="Numbers of ranks of this machine, which stand for nodes: 1,2,4."
    ),
    nodes: Optional[str] = typer.Option(
        None, help="Numbers of nodes of the Slurm job that this is started in: 1,2,4."
    ),
    steps: int = typer.Option(10, min=1, help="Steps to time of each point, after two to warm up."),
    repetitions: int = typer.Option(2, min=1, help="Times that all points are measured, in turn."),
    out: Optional[Path] = typer.Option(
        None, help="Folder of the study, which goes on there; studies/RECIPE-TIME if not given."
    ),
    strong: bool = _STRONG,
    made_up: bool = _MADE_UP,
    overrides: list[str] = _OVERRIDES,
    as_json: bool = _JSON,
) -> None:
    """Measure training steps of a recipe on several numbers of nodes.

    Example: knl scale run resnet50-bench --ranks 1,2 --steps 5

    Each point is a training of its own, warmed up; its ranks time their parts of every step. In a
    Slurm job give --nodes; its tasks a node are the ranks of a node. What was measured stays when
    the study is cut: the same command with the same --out goes on.
    """
    from knl.cli_node import refuse_under_plan
    from knl.config import load_recipe
    from knl.scaling.describe import describe, to_json
    from knl.scaling.run import Wanted, measure, synthetic

    refuse_under_plan("knl scale run")
    if (ranks is None) == (nodes is None):
        raise InputError(
            "which numbers? give --ranks 1,2,4 for ranks of this machine, or --nodes 1,2,4 in a "
            "Slurm job"
        )
    counts = numbers(ranks or nodes or "", "--ranks" if ranks else "--nodes")
    per_node = _tasks_per_node(max(counts)) if nodes else 1
    found = load_recipe(recipe, overrides)
    wanted = Wanted(
        synthetic(found) if made_up else found,
        counts,
        per_node,
        steps,
        repetitions,
        strong,
        nodes is not None,
        os.environ.get("KNL_SITE"),
    )
    folder = out or Path("studies") / f"{found.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    study = measure(wanted, folder, os.environ)
    print(json.dumps(to_json(study, folder)) if as_json else describe(study, folder))


def submit(
    recipe: str = typer.Argument(help="Name of a recipe, or path of a TOML file."),
    nodes: str = typer.Option(..., help="Numbers of nodes, a job each: 1,2,4,8,16."),
    site: str = typer.Option("generic", help="Name of a site, or path of a TOML file."),
    steps: int = typer.Option(20, min=1, help="Steps to time of each point, after two to warm up."),
    repetitions: int = typer.Option(3, min=1, help="Times that each point is measured."),
    out: Optional[Path] = typer.Option(
        None, help="Folder of the study, seen by all nodes; studies/RECIPE-TIME if not given."
    ),
    time: str = typer.Option("30m", help="Time limit of each job: 20m, 1h."),
    queue: str = typer.Option(
        "", help="Queue (partition); the site's first that fits if not given."
    ),
    account: str = typer.Option("", help="Account to charge; the site's if not given."),
    strong: bool = _STRONG,
    made_up: bool = _MADE_UP,
    overrides: list[str] = _OVERRIDES,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the jobs, and submit none."),
    as_json: bool = _JSON,
) -> None:
    """Submit a study to Slurm: one short job a number of nodes, one after another.

    Example: knl scale submit resnet50-32k --nodes 1,2,4,8,16 --site stampede2 --synthetic --dry-run

    Each job waits for the one before to end, so that they do not disturb each other, and writes a
    file of its own into the study's folder; knl report draws what is there at any time.
    """
    from knl.config import load_recipe
    from knl.scaling.run import Wanted, point_recipe
    from knl.scaling.submit import Asked, jobs_of, submit_all
    from knl.site import load_site
    from knl.slurm.render import cost
    from knl.slurm.submit import seconds_of

    counts, found, where = (
        numbers(nodes, "--nodes"),
        load_recipe(recipe, overrides),
        load_site(site),
    )
    per_node = where.ranks_per_node
    for count in counts:  # what the job would refuse, refused here
        point_recipe(Wanted(found, counts, per_node, steps, repetitions, strong, True), count)
    named = str(Path(recipe).absolute()) if recipe.endswith(".toml") else recipe
    arguments = [named, "--steps", str(steps), "--repetitions", str(repetitions)]
    arguments += ["--strong"] if strong else []
    arguments += ["--synthetic"] if made_up else []
    arguments += [word for override in overrides for word in ("--set", override)]
    folder = out or Path("studies") / f"{found.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    asked = Asked(found.name, arguments, counts, folder, seconds_of(time), queue, account)
    jobs = jobs_of(where, asked)
    ids = [] if dry_run else submit_all(jobs)
    if as_json:
        told = [job.to_json(number) for job, number in zip(jobs, ids or [""] * len(jobs))]
        print(json.dumps({"folder": str(folder), "jobs": told}))
        return
    if dry_run:
        print("\n".join(job.script for job in jobs), end="")
        return
    for job, number in zip(jobs, ids):
        print(f"job {number}: {cost(job.queue, job.order)}")
        if job.queue and job.queue.ticket:
            say(f"{job.queue.name} needs {job.queue.ticket}")
    print(f"knl report {folder} draws what has been measured")


def report(
    folder: Path = typer.Argument(
        metavar="DIR", help="A run directory of knl train, or a study's folder of knl scale run."
    ),
    as_json: bool = _JSON,
) -> None:
    """Draw a run or a study: report.html, plots as SVG and PNG, tables as CSV, all in its folder.

    Example: knl report runs/digits-20260131-120000

    The page is one file that needs no network. It ends with the findings that matter most.
    """
    from knl.report.command import report as write

    result = write(folder)
    if as_json:
        print(json.dumps(result))
        return
    for notice in result["notices"]:
        print(notice)
    for finding in result["findings"]:
        print(f"- {finding['finding']} {finding['cure']}")
    print(result["report"])


def numbers(text: str, option: str) -> tuple[int, ...]:
    """ "1,2,4", each once, ascending. Raises InputError naming the option."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise InputError(f"{option} {text}: must be whole numbers from 1 on, such as 1,2,4")
    return tuple(found)


def _tasks_per_node(most: int) -> int:
    """Of the Slurm job around. Raises InputError where there is none, or it has fewer nodes."""
    environment = os.environ
    have = environment.get("SLURM_JOB_NUM_NODES", "")
    if not have.isdigit():
        raise InputError(
            f"--nodes {most}: this is not in a Slurm job: start it there (knl scale submit writes "
            "one), or give --ranks for ranks of this machine"
        )
    if int(have) < most:
        raise InputError(f"--nodes {most}: this job has {have} node(s); ask Slurm for more")
    tasks = environment.get("SLURM_NTASKS_PER_NODE") or ""
    if not tasks.isdigit():
        tasks = str(int(environment.get("SLURM_NTASKS") or have) // int(have))
    return max(1, int(tasks))

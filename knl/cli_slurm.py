"""The commands around jobs of Slurm: `knl submit`, `knl status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import typer

from knl.errors import say

_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")


def submit(
    recipe: str = typer.Argument(..., help="Name of a recipe, or path of a TOML file."),
    arguments: Optional[list[str]] = typer.Argument(
        None, metavar="[-- ARGS]", help="Further arguments of knl train, after --."
    ),
    nodes: int = typer.Option(..., "--nodes", "-N", min=1, help="Nodes of the job."),
    site: str = typer.Option("generic", help="Name of a site, or path of a TOML file."),
    time: str = typer.Option("2h", help="Time limit: 90m, 12h, 2d, or HH:MM:SS."),
    queue: str = typer.Option("", help="Queue; the first that takes the job if not given."),
    account: str = typer.Option("", help="Project to charge; the site's if not given."),
    after: str = typer.Option("", metavar="JOB", help="Start when that job is over."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
    ),
    run_dir: Optional[Path] = typer.Option(
        None, help="Folder to write into; runs/RECIPE-JOB below this folder if not given."
    ),
    ranks_per_node: int = typer.Option(0, min=0, help="0 for the site's."),
    bundle: Optional[Path] = typer.Option(
        None, metavar="FILE", help="Archive of knl bundle that the nodes run from."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the script and submit nothing."),
    as_json: bool = _JSON,
) -> None:
    """Submit a training to Slurm: queue, limits and charge are seen to first.

    Example: knl submit resnet50-32k --nodes 512 --site stampede2 --time 2h -- --stage /tmp

    The job goes back into the queue before its time limit until the training is done. The script is
    slurm/train.sbatch with the site's lines; --dry-run shows it.
    """
    from knl.site import load_site
    from knl.slurm.submit import Wish, prepare, seconds_of
    from knl.slurm.submit import submit as hand_in

    given = [part for override in overrides for part in ("--set", override)]
    wish = Wish(
        recipe, [*given, *(arguments or [])], nodes, seconds_of(time), queue, account, after,
        ranks_per_node, run_dir, bundle,
    )  # fmt: skip
    job = prepare(load_site(site), wish)
    if not as_json:
        for note in job.notes():
            say(note)
    number = "" if dry_run else hand_in(job)
    if as_json:
        print(json.dumps(job.to_json(number)))
    else:
        print(job.script if dry_run else number, end="" if dry_run else "\n")


def status(
    run: Optional[Path] = typer.Argument(
        None, help="A run directory; the one in runs/ that was written last if not given."
    ),
    as_json: bool = _JSON,
) -> None:
    """Say in one line how a run and its job are.

    Example: knl status runs/resnet50-32k-4711
    """
    from knl.slurm.status import line, newest_run, status_of

    found = status_of(run or newest_run(Path("runs")))
    print(json.dumps(found) if as_json else line(found))


COMMANDS = (submit, status)

"""The commands around jobs of Slurm: `knl submit`, `knl status`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import typer

from knl.errors import InputError, say

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

    _require_train_knows(recipe, arguments or [], run_dir)
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


def _require_train_knows(recipe: str, arguments: Sequence[str], run_dir: Optional[Path]) -> None:
    """Raise InputError for arguments at which knl train would fail when the job starts at last."""
    from knl.cli import app

    command: Any = typer.main.get_command(app)
    try:
        asked = command.commands["train"].make_context("train", [recipe, *arguments]).params
    except Exception as error:  # of click's or of typer's own copy of it, as the version has it
        if not hasattr(error, "format_message"):
            raise
        said = " ".join(error.format_message().split())
        raise InputError(f"-- {shlex.join(arguments)}: knl train refuses that: {said}") from None
    if asked["ranks"] is not None:
        raise InputError(f"-n {asked['ranks']}: a job's ranks are --nodes x --ranks-per-node")
    if asked["list_recipes"] or asked["print_recipe"]:
        raise InputError("--list, --print: ask knl train itself; a job trains")
    if run_dir is not None and asked["run_dir"] is not None:
        raise InputError(f"--run-dir {run_dir}, {asked['run_dir']}: give one of the two")


COMMANDS = (submit, status)

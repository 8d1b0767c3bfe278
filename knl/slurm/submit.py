"""`knl submit`: checks an order against the site, renders the job, hands it to sbatch."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knl.config import load_recipe, require_ranks_fit
from knl.errors import FailedError, InputError
from knl.site import Queue, Site
from knl.slurm.queues import choose_queue
from knl.slurm.render import Order, cost, render

_TOOL_S = 60.0
_YEAR_S = 365 * 86400
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True)
class Wish:
    """What a user asks for. `seconds`: time limit; `ranks_per_node`: 0 for the site's; `run_dir`,
    `bundle`: None for none; `arguments`: of knl train."""

    recipe: str
    arguments: Sequence[str]
    nodes: int
    seconds: int
    queue: str = ""
    account: str = ""
    after: str = ""
    ranks_per_node: int = 0
    run_dir: Path | None = None
    bundle: Path | None = None


@dataclass(frozen=True)
class Job:
    """An order that a queue takes, and its script."""

    site: Site
    queue: Queue | None
    order: Order
    script: str

    def notes(self) -> list[str]:
        """What the user should know."""
        lines = [cost(self.queue, self.order)]
        if self.queue and self.queue.ticket:
            lines.append(f"{self.site.name} {self.queue.name} needs {self.queue.ticket}")
        if self.order.nodes >= 64 and "KNL_BUNDLE" not in self.order.settings:
            lines.append(
                f"{self.order.nodes} nodes would read Python from one file system: knl bundle "
                "packs it, --bundle FILE uses that"
            )
        return lines

    def to_json(self, number: str) -> dict[str, Any]:
        """`number`: of the job, "" for one that is not submitted."""
        hours = self.order.nodes * self.order.seconds / 3600
        return {
            "job_id": number or None,
            "site": self.site.name,
            "queue": self.queue.name if self.queue else None,
            "nodes": self.order.nodes,
            "ranks": self.order.nodes * self.order.ranks_per_node,
            "seconds": self.order.seconds,
            "node_hours": hours,
            "su": hours * self.queue.su if self.queue and self.queue.su else None,
            "notes": self.notes(),
            "script": self.script,
        }


def prepare(site: Site, wish: Wish) -> Job:
    """The job of a wish. Raises InputError for a recipe, a number or a name that would fail later,
    here or in the queue."""
    per_node = wish.ranks_per_node or site.ranks_per_node
    overrides = _overrides(wish.arguments)
    recipe = load_recipe(wish.recipe, overrides)
    require_ranks_fit(recipe, wish.nodes * per_node)
    if wish.after and not re.fullmatch(r"\d+", wish.after):
        raise InputError(f"--after {wish.after}: must be the number of a job")
    queue = choose_queue(site, wish.nodes, wish.seconds / 3600, wish.queue)
    name = Path(wish.recipe)
    settings = {"KNL_ENV": sys.prefix}
    if wish.run_dir is not None:
        settings["KNL_RUN_DIR"] = str(wish.run_dir.absolute())
    if wish.bundle is not None:
        if not wish.bundle.is_file():
            raise InputError(f"--bundle {wish.bundle}: no such file; knl bundle makes one")
        settings["KNL_BUNDLE"] = str(wish.bundle.absolute())
    order = Order(
        script="train.sbatch",
        name=f"knl-{re.sub(r'[^A-Za-z0-9_.-]', '_', recipe.name)}",
        arguments=[
            str(name.absolute()) if name.suffix == ".toml" else wish.recipe,
            *wish.arguments,
        ],
        nodes=wish.nodes,
        seconds=wish.seconds,
        ranks_per_node=per_node,
        account=wish.account,
        after=wish.after,
        settings=settings,
    )
    return Job(site, queue, order, render(site, queue, order))


def submit(job: Job) -> str:
    """Hand it to Slurm; the job's number. Raises InputError where there is no Slurm or the user has
    as many jobs there as the queue takes, FailedError with sbatch's words."""
    if shutil.which("sbatch") is None:
        raise InputError("no sbatch on PATH: submit on a login node, or see the job with --dry-run")
    if job.queue and job.queue.jobs:
        # By name, as --me is not there before Slurm 20.
        mine = ["squeue", "-h", "-u", getpass.getuser(), "-p", job.queue.name, "-o", "%i"]
        there = _slurm(mine, "").split()
        if len(there) >= job.queue.jobs:
            raise InputError(
                f"{job.site.name} {job.queue.name} takes {job.queue.jobs} job(s) of a user, and "
                f"{', '.join(there)} are there: wait, or take another --queue"
            )
    return _slurm(["sbatch", "--parsable"], job.script).split(";")[0].strip()


def seconds_of(text: str) -> int:
    """Of 90m, 12h, 2d, or HH:MM:SS and D-HH:MM:SS as Slurm has it. Raises InputError."""
    from knl.train.orders import parse_time

    if clock := _CLOCK.fullmatch(text.strip()):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        found = 86400 * days + 3600 * hours + 60 * minutes + seconds
    else:
        found = round(parse_time(text, "--time"))
    if not 60 <= found <= _YEAR_S:
        raise InputError(f"--time {text}: must be from a minute to a year")
    return found


def _overrides(arguments: Sequence[str]) -> list[str]:
    """The values of --set among arguments of knl train, in their order: the last of a key wins."""
    pairs = zip(["", *arguments], arguments)
    return [
        word if before == "--set" else word[len("--set=") :]
        for before, word in pairs
        if before == "--set" or word.startswith("--set=")
    ]


def _slurm(command: Sequence[str], given: str) -> str:
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedError(f"{command[0]} does not answer: {error}") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise FailedError(f"{command[0]} fails: {said}")
    return done.stdout

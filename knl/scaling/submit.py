"""`knl scale submit`: a study as jobs of Slurm, one a number of nodes, one after another."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from knl.errors import FailedError, InputError
from knl.files import replace_file
from knl.site import Queue, Site


@dataclass(frozen=True)
class Asked:
    """What a user asks of the jobs. `arguments`: of knl scale run, but for --nodes and --out;
    `minutes`: of each job; `queue`, `account`: "" for the site's."""

    name: str
    arguments: Sequence[str]
    counts: Sequence[int]
    folder: Path
    minutes: float
    queue: str = ""
    account: str = ""


@dataclass(frozen=True)
class Job:
    """One job: its script, and what it is charged at most, in SUs."""

    nodes: int
    queue: str
    script: str
    su: float


def jobs_of(site: Site, asked: Asked) -> list[Job]:
    """The jobs, fewest nodes first. Raises InputError, before Slurm would refuse, where a number of
    nodes or the time fits no queue."""
    found = []
    for nodes in asked.counts:
        queue = _queue(site, nodes, asked)
        rate = queue.su if queue else 1.0
        su = rate * nodes * asked.minutes / 60.0
        name = queue.name if queue else ""
        found.append(Job(nodes, name, _script(site, name, nodes, asked), su))
    return found


def _queue(site: Site, nodes: int, asked: Asked) -> Queue | None:
    """The first of the site's that takes the job; None where the site lists none."""
    hours = asked.minutes / 60.0
    queues = [q for q in site.queues if asked.queue in ("", q.name)]
    fits = [q for q in queues if nodes <= q.nodes and hours <= q.hours]
    if fits:
        return fits[0]
    if not site.queues:
        return None
    known = "; ".join(f"{q.name} {q.nodes} nodes, {q.hours:g} h" for q in site.queues)
    asked_for = f" in queue {asked.queue}" if asked.queue else ""
    raise InputError(
        f"--nodes {nodes} for {asked.minutes:g} min{asked_for}: {site.name} takes {known}"
    )


def _script(site: Site, queue: str, nodes: int, asked: Asked) -> str:
    name = re.sub(r"[^\w.-]", "-", asked.name)
    minutes = math.ceil(asked.minutes)
    options = {
        "job-name": f"scale-{name}-{nodes}",
        "nodes": str(nodes),
        "ntasks-per-node": str(site.ranks_per_node),
        "time": f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        "exclusive": "",
        "partition": queue or asked.queue,
        "account": asked.account or site.account,
    }
    wanted = [
        f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}"
        for key, value in options.items()
        if key not in site.leave_out and (value or key == "exclusive")
    ]
    run = ["-m", "knl", "scale", "run", *asked.arguments, "--nodes", str(nodes)]
    run += ["--out", str(asked.folder.absolute())]
    lines = [
        "#!/bin/bash",
        f"# One point of a scaling study: {nodes} node(s). Written by knl scale submit.",
        *wanted,
        *(f"#SBATCH {directive}" for directive in site.directives),
        "",
        *(f"module load {shlex.quote(module)}" for module in site.modules),
        *site.prologue,
        f"export KNL_SITE={shlex.quote(site.name)}",
        f"exec {shlex.join([sys.executable, *run])}",
    ]
    return "\n".join(lines) + "\n"


def submit(jobs: Sequence[Job], folder: Path) -> list[str]:
    """Hand the jobs to Slurm, each to begin when the one before has ended, well or not: they would
    disturb each other on one network. Returns their ids; scripts and logs are in `folder`/jobs.

    Raises FailedError where sbatch refuses; it says which jobs are in the queue already.
    """
    ids: list[str] = []
    place = folder.absolute() / "jobs"
    for job in jobs:
        path = place / f"{job.nodes}.sbatch"
        try:
            place.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as file:
                file.write(job.script.encode())
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        # Names of folders are safe here, as they would not be in a line of #SBATCH.
        command = ["sbatch", "--parsable", f"--output={_literal(place)}/%x-%j.out"]
        command += [f"--dependency=afterany:{ids[-1]}"] if ids else []
        try:
            done = subprocess.run(
                [*command, str(path)], capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise InputError(
                f"sbatch: {error.strerror}: is this a login node? --dry-run shows the jobs"
            ) from None
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or f"status {done.returncode}"
            before = f"; {', '.join(ids)} are in the queue" if ids else ""
            raise FailedError(f"sbatch of {job.nodes} node(s): {said}{before}")
        ids.append(done.stdout.strip().partition(";")[0])
    return ids


def _literal(path: Path) -> str:
    """Slurm replaces what begins with % in the name of a log."""
    return os.fspath(path).replace("%", "%%")

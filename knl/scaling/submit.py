"""`knl scale submit`: a study as jobs of Slurm, one a number of nodes, one after another."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from knl.errors import FailedError, KnlError
from knl.site import Site
from knl.slurm.queues import choose_queue
from knl.slurm.render import Order, render
from knl.slurm.submit import Job, submit


@dataclass(frozen=True)
class Asked:
    """What a user asks of the jobs. `arguments`: of knl scale run, but for --nodes and --out;
    `seconds`: limit of each job; `queue`, `account`: "" for the site's."""

    name: str
    arguments: Sequence[str]
    counts: Sequence[int]
    folder: Path
    seconds: int
    queue: str = ""
    account: str = ""


def jobs_of(site: Site, asked: Asked) -> list[Job]:
    """The jobs, fewest nodes first. Raises InputError, before Slurm would refuse, where a number of
    nodes or the time fits no queue."""
    jobs = []
    for nodes in asked.counts:
        queue = choose_queue(site, nodes, asked.seconds / 3600, asked.queue)
        order = Order(
            script="scaling.sbatch",
            name=f"scale-{re.sub(r'[^A-Za-z0-9_.-]', '_', asked.name)}-{nodes}",
            arguments=[
                *asked.arguments, "--nodes", str(nodes), "--out", str(asked.folder.absolute())
            ],
            nodes=nodes,
            seconds=asked.seconds,
            ranks_per_node=site.ranks_per_node,
            account=asked.account,
            settings={"KNL_ENV": sys.prefix, "KNL_SITE": site.name},
        )  # fmt: skip
        jobs.append(Job(site, queue, order, render(site, queue, order)))
    return jobs


def submit_all(jobs: Sequence[Job]) -> list[str]:
    """Hand the jobs to Slurm, each to begin when the one before has ended, well or not: they would
    disturb each other on one network. Returns their numbers.

    Raises FailedError where sbatch refuses one; it says which jobs are in the queue already.
    """
    numbers: list[str] = []
    for job in jobs:
        order = replace(job.order, after=numbers[-1] if numbers else "")
        try:
            numbers.append(
                submit(replace(job, order=order, script=render(job.site, job.queue, order)))
            )
        except KnlError as error:
            if not numbers:
                raise
            raise FailedError(
                f"the job of {order.nodes} nodes: {error}; {', '.join(numbers)} are in the queue"
            ) from None
    return numbers

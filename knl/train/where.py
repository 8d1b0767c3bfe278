"""Where the ranks of rank 0's node run, as they are bound: for the report's drawing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from knl.bind import compute_cpus, loader_cpus
from knl.choices import Choices
from knl.comm.bootstrap import Bootstrap
from knl.comm.world import World
from knl.cpulist import parse_cpulist
from knl.errors import KnlError
from knl.plan import Memory, Plan, RankPlan
from knl.show import cells
from knl.sysfs import read_topology


def placement_of(world: World, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """On rank 0: {"host", "cpu_model", "first_cpus": of each core, "rows": of knl.show.cells, one
    a rank}; None where the node cannot be read, and on the other ranks."""
    told = bootstrap.gather(json.dumps([sorted(compute_cpus()), sorted(loader_cpus())]))
    if world.rank:
        return None
    hosts = bootstrap.roll_call.hosts
    here = [json.loads(text) for text, host in zip(told, hosts) if host == hosts[0]]
    try:
        node = read_topology()
        workers = parse_cpulist(os.environ.get("CCL_WORKER_AFFINITY", "").replace("auto", ""))
    except (KnlError, ValueError):
        return None  # a drawing is no reason to stop
    each = len(workers) // len(here)
    ranks = tuple(
        RankPlan(
            local_rank=number,
            compute_cpus=tuple(compute),
            comm_cpus=tuple(workers[number * each : (number + 1) * each]),
            loader_cpus=tuple(loader),
            memory=Memory("none", ()),
        )
        for number, (compute, loader) in enumerate(here)
    )
    # What this process may not use now is the others', or nobody's: that cannot be told any more.
    node = replace(node, allowed_cpus=tuple(cpu for core in node.cores for cpu in core.cpus))
    plan = Plan(Choices(ranks_per_node=len(ranks)), ranks, (), {}, ())
    return {
        "host": hosts[0],
        "cpu_model": node.cpu_model,
        "first_cpus": [core.cpus[0] for core in node.cores],
        "rows": cells(node, plan),
    }

"""The nodes of trees.py as topologies, and what to ask of them and of plans for them."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import strategies as st

from knl.plan import plan_by_rule
from knl.sysfs import read_topology

from ..topology.trees import TREES

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@cache
def read(name: str):
    """The topology of a tree; it is thousands of small files, which a disk takes seconds for."""
    with TemporaryDirectory(dir=MEMORY) as root:
        return read_topology(TREES[name][0].write(Path(root)))


def by_rule(name, ranks, **changes):
    return plan_by_rule(replace(read(name), **changes), ranks, {})


def usable(node):
    """The allowed hardware threads of each core that has any."""
    allowed = set(node.allowed_cpus)
    found = {core: [cpu for cpu in core.cpus if cpu in allowed] for core in node.cores}
    return {core: cpus for core, cpus in found.items() if cpus}


def all_cpus(rank):
    return [*rank.compute_cpus, *rank.comm_cpus, *rank.loader_cpus]


@st.composite
def nodes(draw):
    """Any tree; of its CPUs all, or those of a run of cores, of some cores, or any."""
    node = read(draw(st.sampled_from(list(TREES))))
    cores = [core.cpus for core in node.cores]
    kind = draw(st.sampled_from(["all", "run", "cores", "cpus"]))
    if kind == "all":
        return node
    if kind == "run":
        ends = sorted(draw(st.tuples(*[st.integers(0, len(cores))] * 2)))
        chosen = cores[slice(*ends)]
    else:
        parts = cores if kind == "cores" else [(cpu,) for cpus in cores for cpu in cpus]
        mask = draw(st.integers(0, (1 << len(parts)) - 1))
        chosen = [part for n, part in enumerate(parts) if mask >> n & 1]
    allowed = {cpu for cpus in chosen for cpu in cpus} & set(node.allowed_cpus)
    return replace(node, allowed_cpus=tuple(sorted(allowed)))

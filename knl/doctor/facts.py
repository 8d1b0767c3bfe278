"""All that doctor judges by, gathered once."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knl.comm.world import world_from
from knl.cpulist import parse_cpulist
from knl.doctor.stack import Stack, run_probe
from knl.errors import InputError
from knl.launch import mpi_environment
from knl.profile import plan_for
from knl.sysfs import read_topology
from knl.topology import Topology

# The policies as /proc/PID/numa_maps names them (the kernel's mm/mempolicy.c), then their nodes.
_POLICY = re.compile(
    r"^[0-9a-f]+ (default|local|prefer \(many\)|prefer|bind|weighted interleave|interleave)"
    r"(?:=\w+)?(?::([\d,-]+))? ?",
    re.M,
)


@dataclass(frozen=True)
class MemoryPolicy:
    """Where a process's memory comes from. `mode`: as the kernel names it (default, prefer, bind,
    interleave, ...), "" where it does not say; `nodes`: those that the mode names; `allowed`: those
    that the cpuset leaves, None where the kernel does not say."""

    mode: str
    nodes: tuple[int, ...]
    allowed: tuple[int, ...] | None


@dataclass(frozen=True)
class Room:
    """A folder and the bytes free in it; None where it is not there or cannot be written."""

    path: str
    free: int | None


@dataclass(frozen=True)
class Facts:
    """The node, the stack, and the process that a training would be started from.

    `fsroot`: where the node was read; "/" is this machine. Stack and folders are always this
    machine's. `memory_limit`: of the control group, in bytes, 0 without one; `governor_driver`:
    the kernel's driver for CPU frequency; `local_ranks`: ranks that share the node, of a launch
    that this process is part of; `launch_problem`: why that launch cannot work, or ""; `layout`: of
    the plan that a training would have here, "" where there can be no plan.
    """

    fsroot: str
    node: Topology
    environment: Mapping[str, str]
    stack: Stack
    policy: MemoryPolicy
    memory_limit: int
    governor_driver: str
    tmp: Room
    shm: Room
    local_ranks: int = 1
    launch_problem: str = ""
    layout: str = ""

    @property
    def is_here(self) -> bool:
        """Whether the hardware is this machine's."""
        return self.fsroot == "/"


def gather(fsroot: Path, environment: Mapping[str, str]) -> Facts:
    """Read the node below `fsroot` and run the probe, which takes a few seconds.

    Raises InputError when there is no node below `fsroot`.
    """
    node = read_topology(fsroot)
    additions = mpi_environment(environment)
    local_ranks, launch_problem = 1, ""
    try:
        local_ranks = world_from(environment).local_size
    except InputError as error:
        launch_problem = str(error)
    return Facts(
        fsroot=str(fsroot),
        node=node,
        environment=environment,
        stack=run_probe({**environment, **additions}),
        policy=read_policy(fsroot),
        memory_limit=read_memory_limit(fsroot),
        governor_driver=_line(fsroot / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"),
        tmp=room(environment.get("TMPDIR") or tempfile.gettempdir()),
        shm=room("/dev/shm"),
        local_ranks=local_ranks,
        launch_problem=launch_problem,
        layout=_layout_of_plan(node, environment),
    )


def _layout_of_plan(node: Topology, environment: Mapping[str, str]) -> str:
    try:
        plan, _ = plan_for(node, None, None, environment)
    except InputError:
        return ""
    return plan.env["KNL_LAYOUT"].value


def read_policy(fsroot: Path) -> MemoryPolicy:
    """The policy that most mappings of a process have: its own, but for the few that libraries
    place by themselves."""
    modes = Counter(_POLICY.findall(_text(fsroot / "proc/self/numa_maps")))
    mode, nodes = modes.most_common(1)[0][0] if modes else ("", "")
    allowed = re.search(r"^Mems_allowed_list:(.*)", _text(fsroot / "proc/self/status"), re.M)
    return MemoryPolicy(mode, parse_cpulist(nodes), parse_cpulist(allowed[1]) if allowed else None)


def read_memory_limit(fsroot: Path) -> int:
    """The lowest limit in bytes of the process's control group and those above it, of either
    version; 0 where there is none."""
    limits = []
    for line in _text(fsroot / "proc/self/cgroup").splitlines() or ["0::/", "0:memory:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = "sys/fs/cgroup" + ("/memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = Path(path.lstrip("/"))
        limits += [_line(fsroot / base / part / name) for part in (group, *group.parents)]
    # Version 1 writes "no limit" as the largest multiple of a page, version 2 as "max".
    return min((int(v) for v in limits if v.isdigit() and int(v) < 1 << 60), default=0)


def room(path: str) -> Room:
    """How much can be written into a folder."""
    if not os.access(path, os.W_OK | os.X_OK):
        return Room(path, None)
    return Room(path, shutil.disk_usage(path).free)


def _text(path: Path) -> str:
    """A file's text; "" where this kernel or this tree has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _line(path: Path) -> str:
    return _text(path).strip()

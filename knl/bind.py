"""Binds this process to a rank's place in a plan; what it starts or becomes inherits that."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from knl.comm.world import World
from knl.cpulist import format_cpulist, parse_cpulist
from knl.errors import InputError
from knl.plan import Memory, Plan, RankPlan

# Set in a process that runs under a plan, and in what it starts.
PLANNED = "KNL_PLANNED"
_LOADER_CPUS = "KNL_LOADER_CPUS"
# Linux: include/uapi/linux/mempolicy.h and the x86-64 table of system calls.
_SET_MEMPOLICY = 238
_MODES = {"none": 0, "preferred": 1, "bind": 2}
_MASK_BITS = 1024


def rank_environment(plan: Plan, rank: RankPlan) -> dict[str, str]:
    """The variables of one rank: the plan's, and where its loader threads belong."""
    found = {name: setting.value for name, setting in plan.env.items()}
    found[_LOADER_CPUS] = format_cpulist(rank.loader_cpus or rank.compute_cpus)
    found[PLANNED] = str(rank.local_rank)
    return found


def loader_cpus(environment: Mapping[str, str]) -> frozenset[int]:
    """CPUs for threads that torch does not own; this process's own where no plan says. Importing
    torch under OMP_PROC_BIND leaves the main thread, and all that start from it, on one CPU."""
    planned = environment.get(_LOADER_CPUS, "")
    return frozenset(parse_cpulist(planned)) or frozenset(os.sched_getaffinity(0))


def bind(rank: RankPlan) -> str:
    """Bind this process to the rank's compute CPUs and memory. Returns what the kernel refused, ""
    where it refused nothing.

    Raises InputError where a CPU is not there for this process.
    """
    try:
        os.sched_setaffinity(0, rank.compute_cpus)
    except OSError as error:
        raise InputError(
            f"CPUs {format_cpulist(rank.compute_cpus)} of rank {rank.local_rank}: "
            f"{error.strerror}; the plan is for another node or allocation: run knl tune here"
        ) from None
    return set_memory_policy(rank.memory)


@contextmanager
def bound(rank: RankPlan) -> Iterator[str]:
    """Bind while something is started, then go back to what was before."""
    before = os.sched_getaffinity(0)
    refused = bind(rank)
    try:
        yield refused
    finally:
        os.sched_setaffinity(0, before)
        set_memory_policy(Memory("none", ()))


def set_memory_policy(memory: Memory) -> str:
    """Set this thread's NUMA policy, which children inherit. Returns why it could not be, or ""."""
    if memory.policy == "none" and not Path("/sys/devices/system/node/node1").exists():
        return ""  # nothing to choose from, and perhaps no right to
    mask = (ctypes.c_ulong * (_MASK_BITS // 64))()
    for node in memory.nodes:
        mask[node // 64] |= 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    pointer = mask if memory.nodes else None
    if libc.syscall(_SET_MEMPOLICY, _MODES[memory.policy], pointer, _MASK_BITS) == 0:
        return ""
    reason = os.strerror(ctypes.get_errno())
    return (
        f"memory {memory.policy} {format_cpulist(memory.nodes)}: the kernel refuses it ({reason}); "
        "memory comes from the nearest node"
    )


def has_own_cpus(world: World, environment: Mapping[str, str]) -> bool:
    """Whether the launcher has already given this rank CPUs apart from those of its neighbours, so
    that a plan is for these alone and not for the node."""
    if world.local_size == 1:
        return False
    kind = environment.get("SLURM_CPU_BIND_TYPE", "")
    if world.launcher == "mpi" and "SLURM_STEP_ID" in environment and "PMI_PORT" not in environment:
        masks = environment.get("SLURM_CPU_BIND_LIST", "").split(",")
        return kind.startswith(("mask_cpu", "map_cpu")) and len(set(masks)) > 1
    try:
        parent = os.sched_getaffinity(os.getppid())
    except (PermissionError, ProcessLookupError):
        return False
    return os.sched_getaffinity(0) < parent

"""Binds this process to a rank's place in a plan; what it starts or becomes inherits that."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from knl.comm.world import World
from knl.cpulist import format_cpulist, parse_cpulist
from knl.errors import InputError
from knl.plan import Memory, Plan, RankPlan

# Set in a process that runs under a plan, and in what it starts: where the plan comes from.
PLAN = "KNL_PLAN"
# Taken when this module is imported, before torch: importing torch under OMP_PROC_BIND leaves the
# main thread, and all threads that start from it, on one CPU.
_MASK = frozenset(os.sched_getaffinity(0))
_LOADER_CPUS = "KNL_LOADER_CPUS"
# Linux: include/uapi/linux/mempolicy.h and the x86-64 table of system calls.
_SET_MEMPOLICY = 238
_MODES = {"none": 0, "preferred": 1, "bind": 2}
_MASK_BITS = 1024
# By which a user tells Intel MPI where ranks should be.
_PINNING = ("I_MPI_PIN", "I_MPI_PIN_DOMAIN", "I_MPI_PIN_PROCESSOR_LIST", "I_MPI_PIN_CELL")


def rank_environment(plan: Plan, rank: RankPlan, where: str) -> dict[str, str]:
    """The variables of one rank: the plan's, where its loader threads belong, and `where` the plan
    comes from."""
    found = {name: setting.value for name, setting in plan.env.items()}
    found[_LOADER_CPUS] = format_cpulist(rank.loader_cpus or rank.compute_cpus)
    found[PLAN] = "; ".join([where, *plan.warnings])
    return found


def loader_cpus() -> frozenset[int]:
    """Where loader threads belong: by the plan or, without one, all CPUs that this process had at
    its start."""
    return frozenset(parse_cpulist(os.environ.get(_LOADER_CPUS, ""))) or _MASK


def compute_cpus() -> frozenset[int]:
    """All CPUs that this process had at its start: under a plan, those that compute."""
    return _MASK


@contextmanager
def on_loader_cpus() -> Iterator[None]:
    """Threads started here run on the loader CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, loader_cpus())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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
    # Without a policy of the plan's own, one that the user gave by numactl stays.
    return "" if rank.memory.policy == "none" else set_memory_policy(rank.memory)


@contextmanager
def bound(rank: RankPlan) -> Iterator[str]:
    """Bind while something is started, then go back to what was before."""
    before = os.sched_getaffinity(0)
    refused = bind(rank)
    try:
        yield refused
    finally:
        os.sched_setaffinity(0, before)
        if rank.memory.policy != "none":
            set_memory_policy(Memory("none", ()))


def set_memory_policy(memory: Memory) -> str:
    """Set this thread's NUMA policy, which children inherit. Returns why it could not be, or ""."""
    mask = (ctypes.c_ulong * (_MASK_BITS // 64))()
    for node in memory.nodes:
        mask[node // 64] |= 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    pointer = mask if memory.nodes else None
    if libc.syscall(_SET_MEMPOLICY, _MODES[memory.policy], pointer, _MASK_BITS) == 0:
        return ""
    if memory.policy == "none":
        return ""  # a container may forbid the call, and nothing is lost
    reason = os.strerror(ctypes.get_errno())
    return (
        f"memory {memory.policy} {format_cpulist(memory.nodes)}: the kernel refuses it ({reason}); "
        "memory comes from the nearest node"
    )


def cpus_from_launcher(world: World, environment: Mapping[str, str]) -> tuple[frozenset[int], bool]:
    """The CPUs that a plan may use, and whether the launcher gave them to this rank alone, so that
    the plan is for them and not for all ranks of the node.

    Intel's mpiexec pins each rank where nobody asked it to; there the plan takes its place.
    """
    mine = frozenset(os.sched_getaffinity(0))
    if world.local_size == 1:
        return mine, False
    by_mpiexec = "I_MPI_PIN_INFO" in environment
    if "SLURM_STEP_ID" in environment and not by_mpiexec:
        kind, masks = (environment.get(f"SLURM_CPU_BIND_{name}", "") for name in ("TYPE", "LIST"))
        apart = kind.startswith(("mask_cpu", "map_cpu")) and len(set(masks.split(","))) > 1
        return mine, apart
    try:
        parent = frozenset(os.sched_getaffinity(os.getppid()))
    except (PermissionError, ProcessLookupError):
        return mine, False
    if by_mpiexec and not any(name in environment for name in _PINNING):
        return parent, False
    return mine, mine < parent

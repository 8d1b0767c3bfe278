"""Proof of a binding: the live masks of every thread of every rank, and its memory policy."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from knl.cpulist import format_cpulist, parse_cpulist
from knl.plan import Plan, RankPlan

# Watching ends when no new thread has come for so long, but not before a slow file system can have
# brought torch and its threads; and at once when a thread stays outside for longer than it may
# take to bind itself.
_QUIET_S = 8.0
_AT_LEAST_S = 60.0
_STRAY_S = 1.0
_EVERY_S = 0.1


@dataclass(frozen=True)
class Thread:
    """A thread as last seen. `process`: the command's name; `cpus`: those that it may run on;
    `policy`: of its process's memory, as numa_maps words it ("" where unknown)."""

    process: str
    name: str
    tid: int
    cpus: tuple[int, ...]
    policy: str


@dataclass(frozen=True)
class Proof:
    """What was seen of each rank, and what of it is against the plan."""

    rows: tuple[tuple[str, ...], ...]
    errors: tuple[str, ...]

    def table(self) -> str:
        """Aligned text: one row for each rank, process, thread name and role."""
        head = ("rank", "process", "thread", "count", "role", "CPUs", "memory")
        rows = [head, *self.rows]
        widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows
        )


def watch(
    plan: Plan, processes: Mapping[int, int], running: Callable[[], bool]
) -> dict[int, list[Thread]]:
    """Look at the ranks (local rank -> process id) and all that they start for a minute and until
    no new thread comes, or until `running` says that they have ended, or until a thread is seen to
    stay outside its rank's CPUs. Returns each thread as last seen."""
    seen: dict[int, dict[int, Thread]] = {rank: {} for rank in processes}
    policies: dict[int, str] = {}
    began = last_new = time.monotonic()
    inside = began
    while True:
        alive = running()
        before = sum(map(len, seen.values()))
        current = {rank: threads_of(pid, policies) for rank, pid in processes.items()}
        for rank, threads in current.items():
            seen[rank].update({thread.tid: thread for thread in threads})
        if sum(map(len, seen.values())) > before:
            last_new = time.monotonic()
        now = time.monotonic()
        if not any(
            role_of(plan.ranks[rank], thread.cpus) == "OUTSIDE"
            for rank, threads in current.items()
            for thread in threads
        ):
            inside = now
        quiet = now - last_new > _QUIET_S and now - began > _AT_LEAST_S
        if not alive or quiet or now - inside > _STRAY_S:
            return {rank: list(found.values()) for rank, found in seen.items()}
        time.sleep(_EVERY_S)


def threads_of(pid: int, policies: dict[int, str]) -> list[Thread]:
    """The threads of a process and of all that descend from it, now. `policies`: of processes seen
    before, as the kernel walks all of a process's memory to tell."""
    found = []
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            found += _threads(process.pid, policies)
    return found


def prove(plan: Plan, seen: Mapping[int, Sequence[Thread]]) -> Proof:
    """Compare what was seen with the plan."""
    rows: list[tuple[str, ...]] = []
    errors: list[str] = []
    for number, threads in sorted(seen.items()):
        rank = plan.ranks[number]
        if not threads:
            errors.append(f"rank {number}: ended before any thread of it could be seen")
        groups: dict[tuple[str, str, str, str], list[Thread]] = {}
        for thread in threads:
            role = role_of(rank, thread.cpus)
            key = (thread.process, thread.name, role, thread.policy)
            groups.setdefault(key, []).append(thread)
        for (process, name, role, policy), members in sorted(groups.items()):
            masks = {thread.cpus for thread in members}
            cpus = format_cpulist({cpu for mask in masks for cpu in mask})
            each = " one each" if len(members) > 1 and all(len(mask) == 1 for mask in masks) else ""
            rows.append((str(number), process, name, str(len(members)), role, cpus + each, policy))
            if role == "OUTSIDE":
                errors.append(
                    f"rank {number}: thread {name} ({members[0].tid}) of {process} may run on CPUs "
                    f"{cpus}, outside the rank's {format_cpulist(rank.cpus)}"
                )
        errors += _wrong_memory(rank, threads)
    return Proof(tuple(rows), tuple(errors))


def role_of(rank: RankPlan, cpus: Sequence[int]) -> str:
    """compute, comm, loader; "rank" for a mask over several of these; OUTSIDE for one beyond."""
    mine = set(cpus)
    roles = {"compute": rank.compute_cpus, "comm": rank.comm_cpus, "loader": rank.loader_cpus}
    for role, place in roles.items():
        if mine <= set(place):
            return role
    return "rank" if mine <= rank.cpus else "OUTSIDE"


def _threads(pid: int, policies: dict[int, str]) -> list[Thread]:
    found = []
    with contextlib.suppress(OSError):  # it has just ended
        process = (Path("/proc") / str(pid) / "comm").read_text().strip()
        policy = policies[pid] if pid in policies else policies.setdefault(pid, _policy(pid))
        for task in (Path("/proc") / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                status = (task / "status").read_text()
                allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.M)
                state = re.search(r"^State:\s*(\S)", status, re.M)
                if allowed and state and state[1] not in "ZX":
                    name = (task / "comm").read_text().strip()
                    cpus = parse_cpulist(allowed[1])
                    found.append(Thread(process, name, int(task.name), cpus, policy))
    return found


def _policy(pid: int) -> str:
    """The policy of a process's heap or, before it has one, of its first mapping."""
    try:
        lines = (Path("/proc") / str(pid) / "numa_maps").read_text().splitlines()
    except OSError:
        return ""
    chosen = next((line for line in lines if " heap" in line), lines[0] if lines else "")
    return chosen.split()[1] if chosen else ""


def _wrong_memory(rank: RankPlan, threads: Sequence[Thread]) -> list[str]:
    if rank.memory.policy == "none":
        return []  # whatever the user gave
    wanted = {"preferred": "prefer", "bind": "bind"}[rank.memory.policy]
    nodes = format_cpulist(rank.memory.nodes)
    wrong = {
        (thread.process, thread.policy)
        for thread in threads
        if thread.policy and not re.fullmatch(rf"{wanted}[^:]*:{nodes}", thread.policy)
    }
    return [
        f"rank {rank.local_rank}: memory policy of {process} is {policy}, planned is "
        f"{wanted}:{nodes}"
        for process, policy in sorted(wrong)
    ]

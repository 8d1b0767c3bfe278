"""Where everything runs on one node: CPUs, memory, environment. By rule, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from knl.choices import Choices, allocators, find_library, layout_problem, rule_choices
from knl.cpulist import format_cpulist
from knl.packages import ONEDNN, version_of
from knl.placement import Placement, domains, place
from knl.settings import Setting, Source, settings
from knl.topology import Topology

# A working set has to fit this far into fast memory before a policy may refuse any other.
_SURELY = 0.7


class Memory(msgspec.Struct, frozen=True):
    """NUMA policy of a rank. "preferred" takes other memory when `nodes` are full, "bind" fails."""

    policy: Literal["none", "preferred", "bind"]
    nodes: tuple[int, ...]


class RankPlan(msgspec.Struct, frozen=True):
    """One rank's CPUs, by the kernel's numbers, disjoint; and its memory. Workers or loader with no
    CPU of their own share the compute CPUs."""

    local_rank: int
    compute_cpus: tuple[int, ...]
    comm_cpus: tuple[int, ...]
    loader_cpus: tuple[int, ...]
    memory: Memory

    @property
    def cpus(self) -> frozenset[int]:
        """All that this rank may run on."""
        return frozenset(self.compute_cpus + self.comm_cpus + self.loader_cpus)


class Plan(msgspec.Struct, frozen=True):
    """A node's plan. `spare_cpus`: allowed, and left to the operating system."""

    choices: Choices
    ranks: tuple[RankPlan, ...]
    spare_cpus: tuple[int, ...]
    env: dict[str, Setting]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `knl plan --json` prints; its keys are a contract."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]


def plan_by_rule(node: Topology, ranks: int | None, environment: Mapping[str, str]) -> Plan:
    """The plan for `ranks` ranks (None: one for each NUMA domain), with nothing measured.

    Raises InputError when the node has too few allowed cores.
    """
    choices = rule_choices(node, domains(node) if ranks is None else ranks, environment)
    return make_plan(node, choices, environment, "rule")


def make_plan(
    node: Topology,
    choices: Choices,
    environment: Mapping[str, str],
    source: Source,
    working_set: int | None = None,
) -> Plan:
    """The plan that follows from these choices.

    `environment`: the user's, which is kept; `working_set`: bytes a rank uses at most, where known.
    Raises InputError when the choices do not fit the node.
    """
    placements = place(
        node,
        choices.ranks_per_node,
        choices.threads_per_core,
        choices.reserve_cores,
        choices.comm_workers,
    )
    ranks = tuple(
        RankPlan(
            local_rank=number,
            compute_cpus=placement.compute,
            comm_cpus=placement.comm,
            loader_cpus=placement.loader,
            memory=_memory(node, placement, placements, choices, working_set),
        )
        for number, placement in enumerate(placements)
    )
    used = frozenset().union(*(rank.cpus for rank in ranks))
    env = settings(node, placements, choices, environment, source)
    return Plan(
        choices=choices,
        ranks=ranks,
        spare_cpus=tuple(cpu for cpu in node.allowed_cpus if cpu not in used),
        env=env,
        warnings=(
            *_idle(node, ranks),
            *_shared(ranks, choices),
            *_missing(choices, environment),
            *_measured_otherwise(choices),
            *filter(None, [layout_problem(node, env["KNL_LAYOUT"].value)]),
            *_kept(env),
        ),
    )


def crowded_plan(node: Topology, ranks: int, environment: Mapping[str, str]) -> Plan:
    """For more ranks than cores: nobody is bound, each has one thread, and nobody spins."""
    cpus = node.allowed_cpus
    choices = msgspec.structs.replace(
        rule_choices(node, 1, environment), openmp="libgomp", blocktime_ms=0, comm_workers=0
    )
    everywhere = Placement((cpus[0],), (), (), ())
    env = settings(node, [everywhere] * ranks, choices, environment, "rule")
    for name in ("I_MPI_PIN_DOMAIN", "OMP_PLACES", "OMP_PROC_BIND"):
        env.pop(name)
    rank = RankPlan(0, cpus, (), (), Memory("none", ()))
    return Plan(
        choices=choices,
        ranks=tuple(msgspec.structs.replace(rank, local_rank=n) for n in range(ranks)),
        spare_cpus=(),
        env=env,
        warnings=(f"{ranks} ranks share {len(cpus)} CPUs: not bound, one thread each",),
    )


def describe(plan: Plan) -> str:
    """The plan in lines for a reader."""
    lines = []
    for rank in plan.ranks:
        parts = [f"compute {format_cpulist(rank.compute_cpus)}"]
        parts += [f"comm {format_cpulist(rank.comm_cpus) or 'shared'}"]
        parts += [f"loader {format_cpulist(rank.loader_cpus) or 'shared'}"]
        if rank.memory.policy != "none":
            parts.append(f"memory {rank.memory.policy} {format_cpulist(rank.memory.nodes)}")
        lines.append(f"rank {rank.local_rank}: {'; '.join(parts)}")
    lines.append(f"spare: {format_cpulist(plan.spare_cpus) or 'none'}")
    for name, setting in plan.env.items():
        lines.append(f"{name}={setting.value}  [{setting.source}] {setting.reason}")
    return "\n".join(lines)


def _memory(
    node: Topology,
    placement: Placement,
    placements: Sequence[Placement],
    choices: Choices,
    working_set: int | None,
) -> Memory:
    """Fast memory of the rank's own cluster, where it has nodes of its own (flat, hybrid mode)."""
    fast = {
        memory.id: memory.bytes
        for memory in node.memory_nodes
        if memory.kind in ("mcdram", "hbm")
        and not memory.cpus
        and memory.nearest_cpu_node in placement.nodes
    }
    if choices.memory == "none" or not fast:
        return Memory("none", ())
    sharers = sum(placement.nodes == other.nodes for other in placements)
    fits = working_set is not None and working_set * sharers < _SURELY * sum(fast.values())
    return Memory("bind" if fits else "preferred", tuple(sorted(fast)))


def _idle(node: Topology, ranks: Sequence[RankPlan]) -> list[str]:
    parts = domains(node)
    if len(ranks) >= parts or len({core.node for core in node.cores}) == 1:
        return []
    used = {cpu for rank in ranks for cpu in rank.compute_cpus}
    idle = sum(not used & set(core.cpus) for core in node.allowed_cores)
    if idle < len(node.cores) // 4:
        return []
    return [
        f"{len(ranks)} rank(s) leave {idle} cores idle, as a rank stays within one of the "
        f"{parts} NUMA domains: {parts} ranks use all (-n {parts}, or --ranks-per-node {parts})"
    ]


def _shared(ranks: Sequence[RankPlan], choices: Choices) -> list[str]:
    found = []
    if not all(rank.loader_cpus for rank in ranks):
        found.append("no CPU to give to the loader: it shares the compute CPUs")
    if len(ranks) > 1 and not all(rank.comm_cpus for rank in ranks):
        how = (
            "its workers share the compute CPUs"
            if choices.comm_workers
            else "between nodes no overlap, sums move when backward is done (workers on one core "
            "with it made a step 9 to 21 % slower)"
        )
        found.append(f"no CPU to give to oneCCL: {how}")
    return found


def _kept(env: Mapping[str, Setting]) -> list[str]:
    return [f"{n}={s.value}: {s.reason}" for n, s in env.items() if s.source == "user"]


def _missing(choices: Choices, environment: Mapping[str, str]) -> list[str]:
    """Second-best paths that are taken for lack of a library."""
    found = []
    if choices.allocator == "glibc-heap" and allocators(environment)[-1] == "glibc-heap":
        found.append(
            "neither tcmalloc nor jemalloc is installed: glibc's malloc is told to keep its pages"
        )
    if choices.layout != "blocked" and not version_of(ONEDNN):
        found.append(
            f"{ONEDNN} is not installed: layout {choices.layout} in place of blocked; "
            "pip install it again with the stack"
        )
    for library in (choices.allocator, choices.openmp):
        wanted = library in ("tcmalloc", "jemalloc", "libiomp5")
        if wanted and not find_library(library, environment):
            found.append(f"{library} is not installed here: its settings have no effect")
    return found


def _measured_otherwise(choices: Choices) -> list[str]:
    """What a plan cannot set, as it belongs to the recipe."""
    wanted = [("dtype", "bf16", choices.dtype == "bf16"), ("compile", "true", choices.compile)]
    return [
        f"measured with train.{key} = {value}: knl train needs --set train.{key}={value} for it"
        for key, value, differs in wanted
        if differs
    ]

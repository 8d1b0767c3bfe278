"""Laws that hold for every plan: of any node, any part of it, any number of ranks, any choice."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.choices import Choices
from knl.cpulist import parse_cpumap
from knl.errors import InputError
from knl.plan import make_plan

from ..topology.trees import GB
from .nodes import all_cpus, nodes, usable


def mostly(usual, odd):
    return st.integers(0, 9).flatmap(lambda number: odd if number == 9 else usual)


CHOICES = st.builds(
    Choices,
    ranks_per_node=mostly(st.integers(1, 9), st.integers(0, 140)),
    threads_per_core=mostly(st.integers(1, 2), st.integers(0, 5)),
    reserve_cores=mostly(st.none() | st.integers(0, 12), st.integers(-2, 300)),
    comm_workers=mostly(st.none() | st.integers(0, 4), st.integers(-2, 300)),
    openmp=st.sampled_from(["libgomp", "libiomp5"]),
    memory=st.sampled_from(["auto", "none"]),
)
WORKING_SETS = st.none() | st.integers(0, 20 * GB)


def places(node, cpus, what):
    """The sockets, nodes or tiles of these CPUs."""
    return {getattr(core, what) for core in node.cores if set(core.cpus) & set(cpus)}


@settings(max_examples=500, deadline=None)
@given(nodes(), CHOICES, WORKING_SETS)
def test_a_plan_keeps_all_laws_or_is_refused_in_one_line(node, choices, working_set):
    cores = usable(node)
    possible = (
        1 <= choices.ranks_per_node <= len(cores)
        and 1 <= choices.threads_per_core <= max(map(len, cores.values()))
        and (choices.reserve_cores or 0) >= 0
        and (choices.comm_workers or 0) >= 0
    )
    if not possible:
        with pytest.raises(InputError) as refusal:
            make_plan(node, choices, {}, "rule", working_set)
        assert "\n" not in str(refusal.value)
        return
    plan = make_plan(node, choices, {}, "rule", working_set)
    assert [rank.local_rank for rank in plan.ranks] == list(range(choices.ranks_per_node))
    cpus = [cpu for rank in plan.ranks for cpu in all_cpus(rank)]
    assert sorted([*cpus, *plan.spare_cpus]) == list(
        node.allowed_cpus
    )  # disjoint, and nothing lost
    assert_cores_are_whole_and_equal(plan, cores)
    assert_nobody_straddles(plan, node)
    assert_tiles_stay_together(plan, node)
    assert_workers_and_loaders_are_fair(plan)
    assert_memory_is_near(plan, node, working_set)
    assert_environment_says_the_same(plan)


def assert_cores_are_whole_and_equal(plan, cores):
    """Compute is the first threads of cores; as many cores for each rank, none of them shared."""
    counts = set()
    for rank in plan.ranks:
        mine = [cpus for cpus in cores.values() if set(cpus) & set(rank.compute_cpus)]
        first = [cpu for cpus in mine for cpu in cpus[: plan.choices.threads_per_core]]
        assert sorted(first) == list(rank.compute_cpus)
        counts.add(len(mine))
    assert len(counts) == 1


def assert_nobody_straddles(plan, node):
    """A rank stays in one node of an Intel machine; elsewhere in a socket, and in a node where
    there are ranks for all of them."""
    wide = node.uarch == "GenuineIntel"  # the trees' word for what is no Intel many-core
    within = "node"
    if wide and len(plan.ranks) < len(places(node, node.allowed_cpus, "node")):
        within = "socket"
    for rank in plan.ranks:
        assert len(places(node, all_cpus(rank), within)) == 1


def assert_tiles_stay_together(plan, node):
    """No tile computes for two ranks where each could have one; and where all tiles are alike and
    nobody asked for half of one, ranks have whole ones."""
    kept = plan.choices.reserve_cores or 0
    tiles = [places(node, rank.compute_cpus, "tile") for rank in plan.ranks]
    domains = {frozenset(places(node, rank.compute_cpus, "node")) for rank in plan.ranks}
    for domain in domains:
        mine = [t for r, t in zip(plan.ranks, tiles)
                if places(node, r.compute_cpus, "node") == domain]  # fmt: skip
        cores = [core for core in usable(node) if core.node in domain]
        if len({core.tile for core in cores}) - kept >= len(mine):
            assert not any(a & b for a, b in combinations(mine, 2))
    whole = len(usable(node)) == len(node.cores) and len({*sizes(node.cores)}) == 1
    if whole and kept == 0 and len(plan.ranks) * 2 <= len(set().union(*tiles)):
        used = {cpu for rank in plan.ranks for cpu in rank.compute_cpus}
        computing = [core for core in node.cores if used & set(core.cpus)]
        assert {*sizes(computing)} == {*sizes(node.cores)}


def sizes(cores):
    tiles = [core.tile for core in cores]
    return [tiles.count(tile) for tile in set(tiles)]


def assert_workers_and_loaders_are_fair(plan):
    wanted = plan.choices.comm_workers
    counts = {len(rank.comm_cpus) for rank in plan.ranks}
    assert wanted is None or max(counts) <= wanted
    assert wanted is not None or len(counts) == 1
    for rank in plan.ranks:
        assert len(rank.loader_cpus) <= max(1, len(rank.compute_cpus) // 8)


def assert_memory_is_near(plan, node, working_set):
    """Memory of a rank: fast, without CPUs, of its own cluster; only who is known to fit into it is
    refused any other."""
    known = {memory.id: memory for memory in node.memory_nodes}
    for rank in plan.ranks:
        memory = rank.memory
        mine = [known[number] for number in memory.nodes]
        assert (memory.policy == "none") == (not mine)
        near = places(node, rank.compute_cpus, "node")
        assert all(m.nearest_cpu_node in near and not m.cpus for m in mine)
        assert all(m.kind in ("mcdram", "hbm") for m in mine)
        if memory.policy == "bind":
            sharers = sum(r.memory.nodes == memory.nodes for r in plan.ranks)
            assert working_set * sharers < sum(m.bytes for m in mine)


def assert_environment_says_the_same(plan):
    value = {name: setting.value for name, setting in plan.env.items()}
    assert all(setting.reason and setting.source == "rule" for setting in plan.env.values())
    assert int(value["OMP_NUM_THREADS"]) == min(len(rank.compute_cpus) for rank in plan.ranks)
    domains = value["I_MPI_PIN_DOMAIN"].strip("[]").split(",")
    assert [parse_cpumap(mask) for mask in domains] == [rank.compute_cpus for rank in plan.ranks]
    runtime = "KMP_" if plan.choices.openmp == "libiomp5" else "OMP_P"
    names = {name for name in value if name.startswith(("KMP_", "OMP_P"))}
    assert names and all(name.startswith(runtime) for name in names)
    if value["CCL_WORKER_OFFLOAD"] == "0":
        assert "CCL_WORKER_AFFINITY" not in value and not plan.ranks[0].comm_cpus
        return
    workers = int(value["CCL_WORKER_COUNT"])
    cpus = list(map(int, value["CCL_WORKER_AFFINITY"].split(",")))
    assert len(cpus) == workers * len(plan.ranks)
    for rank, first in zip(plan.ranks, range(0, len(cpus), workers)):
        mine = cpus[first : first + workers]
        assert mine[: len(rank.comm_cpus)] == list(rank.comm_cpus)
        assert set(mine[len(rank.comm_cpus) :]) <= set(rank.compute_cpus)

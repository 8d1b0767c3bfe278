"""Facts of plans for nodes that are known, most of them published by those who tuned them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from knl.choices import Choices
from knl.errors import InputError
from knl.plan import Memory, crowded_plan, describe, make_plan

from ..topology.trees import GB, TREES
from .nodes import all_cpus, by_rule, read, usable


@pytest.mark.parametrize("name", ["quadrant-cache", "quadrant-flat", "no-hyper-threading"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_64_of_the_68_cores_of_a_7250_compute_and_core_0_does_not(name, ranks):
    plan = by_rule(name, ranks)
    assert [len(rank.compute_cpus) for rank in plan.ranks] == [64 // ranks] * ranks
    cpus = {cpu for rank in plan.ranks for cpu in rank.compute_cpus}
    assert cpus == set(range(4, 68))
    assert all(rank.comm_cpus and max(rank.comm_cpus) < 4 for rank in plan.ranks)
    if ranks < 4:  # with four, each of the four cores has a worker
        assert {0, 68, 136, 204} & set(read(name).allowed_cpus) <= set(plan.spare_cpus)


def test_four_ranks_of_snc4_flat_have_a_cluster_and_its_mcdram_each():
    node, plan = read("snc4-flat"), by_rule("snc4-flat", 4)
    assert [rank.memory for rank in plan.ranks] == [
        Memory("preferred", (number,)) for number in (5, 7, 4, 6)  # nearest, not in order
    ]  # fmt: skip
    for rank, cluster in zip(plan.ranks, node.memory_nodes):
        assert set(all_cpus(rank)) <= set(cluster.cpus)
        assert (len(rank.compute_cpus), len(rank.comm_cpus)) == (16, 1)
        assert rank.loader_cpus
    assert 0 in plan.spare_cpus


@pytest.mark.parametrize("name", ["quadrant-cache", "snc4-cache", "max-cache", "max-hbm-only"])
def test_memory_that_is_all_there_is_needs_no_policy(name):
    assert {rank.memory.policy for rank in by_rule(name, None).ranks} == {"none"}


def test_a_xeon_max_in_flat_mode_prefers_the_hbm_of_its_quarter():
    plan = by_rule("max-snc4-flat", 8)
    assert [rank.memory for rank in plan.ranks] == [Memory("preferred", (8 + n,)) for n in range(8)]
    assert {len(rank.compute_cpus) for rank in plan.ranks} == {14}


@pytest.mark.parametrize(
    ("ranks", "gigabytes", "choice", "policy"),
    [
        (1, 11, "auto", "bind"),
        (1, 12, "auto", "preferred"),  # 16 GB less what kernel and page cache have of it
        (2, 5, "auto", "bind"),
        (2, 6, "auto", "preferred"),  # twice
        (1, None, "auto", "preferred"),
        (1, 60, "auto", "preferred"),
        (1, 1, "none", "none"),
    ],
)
def test_only_a_working_set_that_surely_fits_is_bound(ranks, gigabytes, choice, policy):
    choices = Choices(ranks_per_node=ranks, memory=choice)
    working_set = gigabytes and gigabytes * GB
    plan = make_plan(read("quadrant-flat"), choices, {}, "rule", working_set)
    assert {rank.memory.policy for rank in plan.ranks} == {policy}


@pytest.mark.parametrize("name", TREES)
def test_one_allowed_cpu_is_planned_for(name):
    cpu = read(name).allowed_cpus[-1]
    plan = by_rule(name, None, allowed_cpus=(cpu,))
    (rank,) = plan.ranks
    assert (all_cpus(rank), plan.spare_cpus) == ([cpu], ())
    assert (plan.env["OMP_NUM_THREADS"].value, plan.env["CCL_WORKER_OFFLOAD"].value) == ("1", "0")
    assert any("loader" in warning for warning in plan.warnings)


@pytest.mark.parametrize("name", TREES)
def test_more_ranks_than_cores_are_refused_with_values_and_cure(name):
    cores = len(usable(read(name)))
    by_rule(name, cores)
    with pytest.raises(InputError, match=f"= {cores + 1}: must be 1 to {cores}, .* ask for fewer"):
        by_rule(name, cores + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 48])
def test_ranks_of_a_skylake_with_alternating_numbers_stay_on_even_or_odd_cpus(ranks):
    for rank in by_rule("skx-alternating", ranks).ranks:
        assert len({cpu % 2 for cpu in all_cpus(rank)}) == 1


@pytest.mark.parametrize(("ranks", "each"), [(1, 60), (2, 60), (4, 30), (8, 15), (16, 7)])
def test_an_epyc_is_used_whole_though_a_rank_may_take_several_of_its_quarters(ranks, each):
    assert {len(r.compute_cpus) for r in by_rule("epyc-nps4", ranks).ranks} == {each}


def test_half_a_node_is_planned_like_a_node_of_that_size():
    (rank,) = by_rule("half-cpuset", 1).ranks
    assert rank.compute_cpus == tuple(range(2, 34))
    assert max(rank.loader_cpus) <= 237


def test_all_ranks_have_a_worker_s_cpu_or_none_has():
    """Of 17 cores of one socket five stay free, of 12 of the other none; two threads a core leave
    no hardware threads either."""
    node = read("skx-alternating")
    allowed = (*range(0, 34, 2), *range(1, 24, 2))
    both = replace(node, allowed_cpus=tuple(sorted(c + t for c in allowed for t in (0, 48))))
    for threads, workers in ((1, 1), (2, 0)):
        choices = Choices(ranks_per_node=2, threads_per_core=threads)
        plan = make_plan(both, choices, {}, "rule")
        assert {len(rank.comm_cpus) for rank in plan.ranks} == {workers}


def test_without_a_number_there_is_a_rank_for_each_numa_node():
    expected = {"quadrant-flat": 1, "snc4-flat": 4, "snc2-flat": 2, "max-snc4-flat": 8,
                "skx-alternating": 2, "epyc-nps4": 8, "vm": 1}  # fmt: skip
    assert {name: len(by_rule(name, None).ranks) for name in expected} == expected


def test_fewer_ranks_than_clusters_are_told_what_they_leave():
    (warning,) = [w for w in by_rule("snc4-flat", 2).warnings if "idle" in w]
    assert "4 ranks use all (-n 4, or --ranks-per-node 4)" in warning
    assert not [w for w in by_rule("snc4-flat", 4).warnings if "idle" in w]


def test_a_crowd_is_not_bound_and_does_not_spin():
    plan = crowded_plan(read("vm"), 5, {})
    assert [rank.compute_cpus for rank in plan.ranks] == [(0, 1)] * 5
    value = {name: setting.value for name, setting in plan.env.items()}
    assert (value["OMP_NUM_THREADS"], value["OMP_WAIT_POLICY"]) == ("1", "passive")
    assert not {"OMP_PLACES", "OMP_PROC_BIND", "I_MPI_PIN_DOMAIN"} & set(value)
    assert "5 ranks share 2 CPUs" in plan.warnings[0]


def test_a_plan_is_described_with_every_part_and_every_reason():
    plan = by_rule("snc4-flat", 4)
    text = describe(plan)
    assert "rank 1: compute 20-35; comm 19; loader 238-239; memory preferred 7" in text
    assert all(s.reason in text and f"[{s.source}]" in text for s in plan.env.values())

"""Sums within a node in shared memory, by a provider between nodes, against NumPy."""

from __future__ import annotations

import pytest

from .launch import Outcomes, check_ranks

LAYOUTS = ("one node", "two nodes", "two nodes by turns")
PLACES = [(p, name) for p in ("oneccl", "mpi") for name in LAYOUTS] + [("gloo", "one node")]
everywhere = pytest.mark.parametrize(("provider", "layout"), PLACES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Outcomes:
    return check_ranks("ranks_node.py", 4, tmp_path_factory.mktemp("ranks"))


@everywhere
def test_sums_are_numpy_s_round_after_round(ranks, provider, layout):
    ranks.require(f"{provider}, {layout}: sums")


@everywhere
def test_all_ranks_get_the_same_bits(ranks, provider, layout):
    ranks.require(f"{provider}, {layout}: same bits")


@everywhere
def test_a_sum_leaves_its_squares_the_same_on_all_ranks(ranks, provider, layout):
    ranks.require(f"{provider}, {layout}: squares")


@everywhere
def test_tensors_elsewhere_are_summed_by_the_provider(ranks, provider, layout):
    ranks.require(f"{provider}, {layout}: others")


@pytest.mark.parametrize("provider", ["oneccl", "mpi", "gloo"])
def test_a_late_rank_of_the_node_is_named(ranks, provider):
    ranks.require(f"{provider}: late rank")


@pytest.mark.parametrize("provider", ["oneccl", "mpi"])
def test_nodes_meet_over_their_sums_in_the_order_of_their_start(ranks, provider):
    ranks.require(f"{provider}: same order between nodes")


@pytest.mark.parametrize("provider", ["oneccl", "mpi"])
def test_gradients_go_by_the_provider_where_there_is_no_room_for_new_buckets(ranks, provider):
    ranks.require(f"{provider}: no room for the next layout")


@pytest.mark.parametrize("case", ["apart", "unlike", "gloo between nodes", "no room", "not shared"])
def test_the_provider_does_it_alone_where_nodes_cannot_and_says_why(ranks, case):
    ranks.require(case)


def test_the_ranks_end_in_order(ranks):
    ranks.require_orderly_end()

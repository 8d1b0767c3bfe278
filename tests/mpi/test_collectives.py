"""The collectives of every provider, between real ranks, against NumPy."""

from __future__ import annotations

import importlib.util

import pytest

from knl.comm.bootstrap import SingleBootstrap
from knl.comm.collectives import open_ranks
from knl.comm.world import SINGLE

from .launch import Outcomes, check_ranks

every_provider = pytest.mark.parametrize("provider", ["oneccl", "mpi", "gloo"])
without_torch_ccl = pytest.mark.skipif(
    any(map(importlib.util.find_spec, ("oneccl_bindings_for_pytorch", "torch_ccl"))),
    reason="oneccl-bind-pt is installed: this is about its absence",
)


@pytest.fixture(scope="module", params=[2, 3], ids="{}-ranks".format)
def ranks(request, tmp_path_factory) -> Outcomes:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "broken" / "lib").mkdir(parents=True)
    (folder / "broken" / "lib" / "libccl.so.1").write_text("not a library")
    return check_ranks("ranks_collectives.py", request.param, folder)


@every_provider
def test_allreduce_is_numpy_s_sum_in_place_and_leaves_the_neighbours(ranks, provider):
    ranks.require(f"{provider}: allreduce_sums")


@every_provider
def test_allreduce_rounds_no_more_than_its_type(ranks, provider):
    ranks.require(f"{provider}: allreduce_rounds_like_its_type")


@every_provider
def test_broadcast_gives_every_rank_what_any_root_has(ranks, provider):
    ranks.require(f"{provider}: broadcasts")


@every_provider
def test_a_barrier_waits_for_the_last_rank(ranks, provider):
    ranks.require(f"{provider}: barrier_waits_for_all")


@every_provider
def test_asking_a_handle_is_enough_for_it_to_become_done(ranks, provider):
    ranks.require(f"{provider}: handle_becomes_done")


@every_provider
def test_allreduces_in_flight_may_be_waited_for_in_any_order(ranks, provider):
    ranks.require(f"{provider}: several_in_flight")


@every_provider
def test_a_rank_that_comes_late_makes_the_others_time_out(ranks, provider):
    ranks.require(f"{provider}: late_rank_is_told")


@every_provider
def test_a_provider_closes_and_the_next_one_opens(ranks, provider):
    ranks.require(f"{provider}: close")


@without_torch_ccl
def test_auto_takes_oneccl_and_says_so(ranks):
    ranks.require("auto takes oneccl")


@without_torch_ccl
def test_a_provider_that_is_not_installed_is_refused_with_the_reason(ranks):
    ranks.require("torch_ccl is not there")


@without_torch_ccl
def test_a_provider_that_one_rank_cannot_load_is_passed_over_by_all(ranks):
    ranks.require("one rank without oneccl")


def test_what_fails_on_one_rank_fails_on_all_with_its_words(ranks):
    ranks.require("one rank fails before there are collectives")


def test_the_ranks_end_in_order(ranks):
    ranks.require_orderly_end()


@pytest.mark.parametrize("provider", ["auto", "oneccl", "gloo"])
def test_a_world_of_one_needs_no_provider(provider):
    alone = open_ranks(SINGLE, SingleBootstrap(), provider, 1.0)
    assert alone.provider == "single"
    assert alone.describe() == "1 rank(s) over single"

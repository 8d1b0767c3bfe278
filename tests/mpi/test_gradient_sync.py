"""Gradients summed by knl against torch's DistributedDataParallel, and what the sync promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from knl.comm.agreement import flat
from knl.comm.collectives import Alone, Ranks
from knl.comm.gradient_sync import GradientSync, make_dense
from knl.comm.world import SINGLE

from .launch import Outcomes, check_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Outcomes:
    return check_ranks("ranks_gradient_sync.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_resnet50_gets_the_gradients_of_ddp_without_a_copy(ranks, layout):
    ranks.require(f"like DDP, {layout}")


@pytest.mark.parametrize("rank", [0, 1])
def test_unused_and_frozen_parameters_do_not_disturb_the_sum_of_lanes(ranks, rank):
    ranks.require(f"rank {rank} alone uses a branch")


def test_the_squares_that_come_with_sums_are_those_that_lars_would_make(ranks):
    ranks.require("squares_for_lars")


def test_buckets_adopt_the_order_in_which_rank_0_s_gradients_arrive(ranks):
    ranks.require("order_of_arrival")


def test_a_number_is_carried_along_with_the_first_bucket(ranks):
    ranks.require("carried_number")


def test_several_are_and_the_layout_of_buckets_can_be_restored(ranks):
    ranks.require("carried_numbers")


def test_every_rank_starts_with_rank_0_s_weights(ranks):
    ranks.require("weights_of_rank_0")


def test_models_that_differ_are_refused_by_the_name_of_the_tensor(ranks):
    ranks.require("different_models")


def test_buckets_that_differ_are_refused_by_the_name_of_the_key(ranks):
    ranks.require("different_buckets")


def test_a_weight_changed_on_one_rank_is_found_with_its_name_and_rank(ranks):
    ranks.require("changed_weight")


def test_a_late_rank_is_reported_with_the_bucket_that_waits(ranks):
    ranks.require("late_rank")


def test_the_ranks_end_in_order(ranks):
    ranks.require_orderly_end()


def test_a_world_of_one_has_no_buckets_and_no_hooks(monkeypatch):
    def hooked(*_):
        raise AssertionError("a hook was called")

    monkeypatch.setattr(GradientSync, "_gradient_ready", hooked)
    model = nn.Linear(3, 2)
    sync = GradientSync(
        list(model.named_parameters()),
        Ranks(SINGLE, Alone()),
        bucket_bytes=1,
        first_bucket_bytes=1,
        timeout=1.0,
    )
    for _ in range(2):
        sync.zero()
        sync.arm()
        model(torch.ones(1, 3)).sum().backward()
        sync.finish()
        assert sync.waited == 0.0
        assert sync.buckets == [] and sync.squares([0]) is None
        assert model.weight.grad.eq(1).all()


@settings(deadline=None)
@given(data=st.data())
def test_a_parameter_made_dense_keeps_its_values_and_has_no_holes(data):
    whole = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    view = whole.permute(data.draw(st.permutations(range(4))))
    steps = [data.draw(st.integers(1, 3)) for _ in range(4)]
    view = view[tuple(slice(None, None, step) for step in steps)]
    parameter = nn.Parameter(view)
    make_dense(parameter)
    assert parameter.detach().equal(view)
    assert sorted(flat(parameter).tolist()) == sorted(view.flatten().tolist())


def test_a_dense_parameter_stays_where_it_is():
    parameter = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    before = parameter.data_ptr()
    make_dense(parameter)
    assert parameter.data_ptr() == before

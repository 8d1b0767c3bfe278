"""Gradients that are bfloat16 between nodes, over real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from knl.sysfs import read_topology

from .launch import Outcomes, check_ranks, knl, run
from .runs import ARGUMENTS, finished

HAS_BF16 = "avx512_bf16" in read_topology(Path("/")).isa


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Outcomes:
    return check_ranks("ranks_bf16.py", 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Outcomes:
    return check_ranks("ranks_bf16.py", 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("where", ["oneccl", "two nodes"])
def test_sums_are_rounded_and_the_same_on_all_ranks_and_what_is_carried_is_exact(four, where):
    four.require(where)


def test_within_a_node_sums_stay_float32(four):
    four.require("one node")


@pytest.mark.parametrize("provider", ["gloo", "mpi", "mpi within nodes"])
def test_a_provider_adds_it_up_or_is_refused_by_name(four, provider):
    four.require(provider)


def test_ranks_with_another_type_on_the_wire_are_found(four):
    four.require("different recipes")


def test_weights_are_near_those_of_a_float32_wire_and_the_same_on_both_ranks(two):
    two.require("training")


def test_one_and_two_ranks_come_to_the_same_weights_in_bfloat16(two):
    two.require("one and two ranks")


def test_the_ranks_end_in_order(four, two):
    four.require_orderly_end()
    two.require_orderly_end()


def test_knl_train_takes_it_and_says_where_it_has_no_effect(tmp_path):
    """On one node; a CPU that is no good at it refuses before work starts."""
    command = knl(*ARGUMENTS, "-n", "2", "--set", "comm.dtype=bf16")
    done = run(command, cwd=tmp_path, timeout=120.0, OMP_NUM_THREADS="1")
    if HAS_BF16:
        losses = finished(done, tmp_path).losses
        assert losses[-1] < losses[0]
        assert done.stderr.count("comm.dtype = 'bf16' has no effect on one node") == 1
    else:
        assert done.returncode == 2
        assert "comm.dtype = 'bf16': on this CPU, which has no avx512_bf16" in done.stderr
        assert not list(tmp_path.iterdir())

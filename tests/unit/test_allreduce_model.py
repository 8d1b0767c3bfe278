"""Laws of the models of allreduce, overlap and stragglers; SimGrid as the referee of the first."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from knl.config import Comm
from knl.scaling import allreduce
from knl.scaling.backtest import smpi_rows
from knl.scaling.layers import Layer
from knl.scaling.overlap import Bucket, buckets_of, exposed
from knl.scaling.stragglers import assumed_sample, expected_excess, interval
from knl.site import Network

sizes = st.integers(4, 1 << 30)
counts = st.integers(1, 4096)
ranks = st.integers(1, 8)
algorithms = st.sampled_from(allreduce.ALGORITHMS)
networks = st.builds(
    Network,
    latency_us=st.floats(0.1, 50),
    node_gb_s=st.floats(0.5, 50),
    rank_gb_s=st.floats(0.5, 50),
    leaf_nodes=st.integers(1, 64),
    leaf_uplinks=st.integers(1, 64),
)


@given(algorithms, sizes, sizes, counts, ranks, networks)
def test_more_bytes_take_no_less_time(name, size, more, nodes, per_node, net):
    time = allreduce.seconds(name, size, nodes, per_node, net)
    assert 0 <= time <= allreduce.seconds(name, size + more, nodes, per_node, net) * (1 + 1e-12)


@given(algorithms, sizes, counts, ranks, networks, st.floats(1, 100))
def test_a_better_network_takes_no_more_time(name, size, nodes, per_node, net, factor):
    time = allreduce.seconds(name, size, nodes, per_node, net) * (1 + 1e-12)
    faster = structs.replace(
        net, node_gb_s=net.node_gb_s * factor, rank_gb_s=net.rank_gb_s * factor
    )
    nearer = structs.replace(net, latency_us=net.latency_us / factor)
    wider = structs.replace(net, leaf_uplinks=math.ceil(net.leaf_uplinks * factor))
    for better in (faster, nearer, wider):
        assert allreduce.seconds(name, size, nodes, per_node, better) <= time


@given(sizes, counts, ranks, networks)
def test_the_best_is_no_slower_than_any_and_one_of_them(size, nodes, per_node, net):
    name, time = allreduce.best(size, nodes, per_node, net)
    times = [allreduce.seconds(each, size, nodes, per_node, net) for each in allreduce.ALGORITHMS]
    assert time == min(times) == allreduce.seconds("best", size, nodes, per_node, net)
    assert name in allreduce.ALGORITHMS


@given(algorithms, sizes, st.integers(2, 4096), networks)
def test_no_algorithm_beats_what_must_go_over_a_node_s_link(name, size, nodes, net):
    """Each node has to send and to receive 2 (n - 1) / n of the bytes (Patarasuk, Yuan 2009), in
    ceil(log2 n) messages one after another at least."""
    bytes_a_second = min(net.node_gb_s, net.rank_gb_s) * 1e9
    least = 2 * (nodes - 1) / nodes * size / bytes_a_second
    least = max(least, math.ceil(math.log2(nodes)) * net.latency_us * 1e-6)
    assert allreduce.seconds(name, size, nodes, 1, net) >= least * (1 - 1e-12)


def test_one_rank_has_nothing_to_sum_and_ring_is_its_formula():
    net = Network(latency_us=2, node_gb_s=10, rank_gb_s=5, leaf_nodes=28, leaf_uplinks=20)
    assert all(allreduce.seconds(name, 1e8, 1, 1, net) == 0 for name in allreduce.ALGORITHMS)
    assert allreduce.ring(1e8, 4, 1, net) == pytest.approx(6 * (2e-6 + 25e6 / 5e9))
    assert allreduce.halving_doubling(1e8, 4, 1, net) == pytest.approx(4 * 2e-6 + 150e6 / 5e9)


def test_a_full_leaf_puts_two_streams_on_a_link():
    net = Network(latency_us=1, node_gb_s=10, rank_gb_s=10, leaf_nodes=28, leaf_uplinks=20)
    even = structs.replace(net, leaf_uplinks=28)
    assert allreduce.halving_doubling(1e8, 64, 1, net) > allreduce.halving_doubling(
        1e8, 64, 1, even
    )
    assert allreduce.halving_doubling(1e8, 16, 1, net) == allreduce.halving_doubling(
        1e8, 16, 1, even
    )


@pytest.mark.one_stack
@pytest.mark.skipif(shutil.which("smpicc") is None, reason="needs SimGrid (libsimgrid-dev)")
def test_within_a_fifth_of_a_real_allreduce_on_simulated_nodes():
    for row in smpi_rows(nodes=(8, 64), sizes=(1 << 20, 1 << 24)):
        assert abs(row["error"]) < 0.2, row


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1)), min_size=1, max_size=20),
    st.floats(0, 10),
    st.floats(1e-4, 0.1),
)
def test_what_is_exposed_lies_between_the_last_bucket_and_all(parts, backward, cost):
    buckets = [Bucket(size, ready) for size, ready in sorted(parts, key=lambda part: part[1])]
    buckets[-1] = Bucket(buckets[-1].size, 1.0)
    total = sum(bucket.size for bucket in buckets) * cost
    hidden = exposed(buckets, backward, lambda size: size * cost)
    assert buckets[-1].size * cost * (1 - 1e-9) - 1e-9 <= hidden <= total * (1 + 1e-9) + 1e-9
    assert exposed(buckets, 0.0, lambda size: size * cost) == pytest.approx(total)
    assert hidden == pytest.approx(_replayed(buckets, backward, cost))


def _replayed(buckets, backward, cost):
    """The other way round: the longest chain from a bucket's readiness to the end."""
    chains = [
        bucket.ready * backward + sum(later.size for later in buckets[number:]) * cost
        for number, bucket in enumerate(buckets)
    ]
    return max(0.0, max(chains) - backward)


def test_buckets_close_as_gradient_sync_closes_them():
    layers = [Layer(str(n), (1 << 20,), 1.0) for n in range(6)]
    comm = Comm(bucket_mb=2.0, first_bucket_mb=1.0)
    assert buckets_of(layers, comm) == [
        Bucket(1 << 20, pytest.approx(1 / 6)),
        Bucket(2 << 20, pytest.approx(1 / 2)),
        Bucket(2 << 20, pytest.approx(5 / 6)),
        Bucket(1 << 20, 1.0),
    ]


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=60), st.floats(1, 1e5))
def test_more_nodes_wait_no_less_for_the_slowest(sample, draws):
    assert 0 <= expected_excess(sample, draws) <= expected_excess(sample, 2 * draws) + 1e-9
    assert expected_excess(sample, 1) == 0
    assert expected_excess([sample[0]] * 9, draws) == pytest.approx(0, abs=1e-12)


def test_the_expected_slowest_is_that_of_drawn_ones():
    rng = np.random.default_rng(1)
    for nodes in (4, 64, 512):
        drawn = rng.normal(1.0, 0.01, (4000, nodes)).max(axis=1).mean() - 1.0
        assert expected_excess(assumed_sample(1.0, 0.01), nodes) == pytest.approx(drawn, rel=0.15)
        exponential = rng.exponential(0.01, (4000, nodes)).max(axis=1).mean() - 0.01
        sample = rng.exponential(0.01, 5000)
        assert expected_excess(sample, nodes) == pytest.approx(exponential, rel=0.15)
    low, high = interval(assumed_sample(1.0, 0.01), 64)
    assert low < expected_excess(assumed_sample(1.0, 0.01), 64) < high

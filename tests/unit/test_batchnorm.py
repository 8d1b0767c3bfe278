"""BatchNorm's running statistics over lanes, against NumPy, for any split over ranks."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from knl.data.lanes import lanes_of
from knl.train.batchnorm import RunningStatistics

quick = settings(deadline=None, max_examples=30)
CHANNELS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of so small a layer wait for each other for longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Threads:
    """Allreduce between threads of this process, one a rank."""

    def __init__(self, size):
        self.barrier, self.parts = Barrier(size, timeout=60), []

    def allreduce(self, tensor):
        self.parts.append(tensor.clone())
        self.barrier.wait()
        tensor.copy_(sum(self.parts))
        self.barrier.wait()
        self.parts.clear()
        return self

    def wait(self, timeout):
        self.barrier.wait(timeout)


def network(momentum):
    """Two layers with momenta of their own, and statistics that are not those of a new layer."""
    norms = [nn.BatchNorm2d(CHANNELS, momentum=m) for m in (momentum, momentum / 2)]
    torch.manual_seed(0)
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return nn.ModuleList(norms)


def batch(step, lane):
    random = np.random.default_rng([step, lane])
    return random.normal(lane, 1.0 + lane, size=(4, CHANNELS, 2, 3)).astype(np.float32)


def train_step(model, statistics, step, mine):
    for number, lane in enumerate(mine):
        statistics.begin_lane(number)
        for norm in model:
            norm(torch.from_numpy(batch(step, lane)))


def reference(model, momentum, lanes, steps):
    """old (1 - m) + m times the mean over lanes of each lane's mean and unbiased variance."""
    results = []
    for norm, m in zip(model, (momentum, momentum / 2)):
        mean, var = norm.running_mean.numpy().astype(float), norm.running_var.numpy().astype(float)
        for step in range(steps):
            values = [by_channel(batch(step, lane)) for lane in range(lanes)]
            means = [x.mean(axis=1) for x in values]
            variances = [x.var(axis=1, ddof=1) for x in values]
            mean = (1 - m) * mean + m * np.mean(means, axis=0)
            var = (1 - m) * var + m * np.mean(variances, axis=0)
        results += [mean, var]
    return results


def by_channel(x):
    return x.astype(float).transpose(1, 0, 2, 3).reshape(CHANNELS, -1)


def found(model):
    return [b.numpy() for norm in model for b in (norm.running_mean, norm.running_var)]


def assert_close(model, expected):
    for ours, theirs in zip(found(model), expected):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


@quick
@given(st.integers(1, 7), st.integers(1, 3), st.floats(0.01, 1.0))
def test_all_lanes_of_a_step_count_alike(lanes, steps, momentum):
    model = network(momentum)
    expected = reference(model, momentum, lanes, steps)
    statistics = RunningStatistics(model, lanes, lanes)
    for step in range(steps):
        train_step(model, statistics, step, range(lanes))
    assert_close(model, expected)
    together = torch.empty(statistics.size)
    statistics.give(together)
    statistics.take(together)
    assert_close(model, expected)


@quick
@given(st.integers(2, 7), st.data(), st.floats(0.01, 1.0))
def test_any_number_of_ranks_comes_to_the_same_statistics(lanes, data, momentum):
    size = data.draw(st.integers(2, min(lanes, 4)))
    steps = data.draw(st.integers(1, 3))
    model = network(momentum)
    expected = reference(model, momentum, lanes, steps)
    collectives = Threads(size)

    def rank_of(rank):
        copied, mine = copy.deepcopy(model), lanes_of(rank, size, lanes)
        statistics = RunningStatistics(copied, len(mine), lanes)
        for step in range(steps):
            train_step(copied, statistics, step, mine)
            carried = torch.empty(statistics.size)
            statistics.give(carried)
            collectives.allreduce(carried).wait(60.0)
            statistics.take(carried)
        return copied

    with ThreadPoolExecutor(size) as pool:
        models = list(pool.map(rank_of, range(size)))
    for copied in models:
        assert_close(copied, expected)
        for ours, first in zip(found(copied), found(models[0])):
            np.testing.assert_array_equal(ours, first)


def test_statistics_of_a_step_that_is_left_out_are_put_back():
    model = network(0.1)
    before = [array.copy() for array in found(model)]
    statistics = RunningStatistics(model, 2, 2)
    kept = statistics.copy()
    train_step(model, statistics, 0, range(2))
    statistics.take(kept)
    for ours, old in zip(found(model), before):
        np.testing.assert_array_equal(ours, old)


def test_a_network_without_statistics_has_nothing_to_give():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    statistics = RunningStatistics(model, 1, 2)
    statistics.begin_lane(0)
    assert statistics.size == 0
    statistics.give(torch.empty(0))
    statistics.take(statistics.copy())
    assert statistics.norms == []

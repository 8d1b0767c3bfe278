"""The sampler: every sample once an epoch, the same batches for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.data.lanes import Lanes, lanes_of
from knl.errors import InputError

quick = settings(deadline=None, max_examples=150)
epochs = st.integers(0, 1000)


@st.composite
def sets(draw):
    """Lanes over a set of one to twelve global batches and a rest."""
    lanes, lane_batch = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    whole = draw(st.integers(1, 12)) * lanes * lane_batch
    samples = whole + draw(st.integers(0, lanes * lane_batch - 1))
    seed, chunk = draw(st.integers(0, 2**63 - 1)), draw(st.integers(1, 2 * samples))
    return Lanes(samples, lanes, lane_batch, seed, chunk)


def step_of(lanes, epoch, step, numbers=None):
    numbers = range(lanes.lanes) if numbers is None else numbers
    return [lanes.batch(epoch, step, lane).tolist() for lane in numbers]


def everything(lanes, epoch):
    return [n for s in range(lanes.steps_per_epoch) for b in step_of(lanes, epoch, s) for n in b]


@quick
@given(sets(), epochs)
def test_an_epoch_sees_each_sample_once_but_for_less_than_a_step(lanes, epoch):
    seen = everything(lanes, epoch)
    assert len(seen) == len(set(seen)) == lanes.steps_per_epoch * lanes.global_batch
    assert set(seen) <= set(range(lanes.samples))
    assert lanes.samples - len(seen) < lanes.global_batch


@quick
@given(sets(), epochs)
def test_every_batch_is_full(lanes, epoch):
    for step in (0, lanes.steps_per_epoch - 1):
        sizes = [len(batch) for batch in step_of(lanes, epoch, step)]
        assert sizes == [lanes.lane_batch] * lanes.lanes


@quick
@given(st.integers(1, 64), st.data())
def test_each_lane_belongs_to_exactly_one_rank(lanes, data):
    size = data.draw(st.integers(1, lanes))
    shares = [lanes_of(rank, size, lanes) for rank in range(size)]
    assert sorted(lane for share in shares for lane in share) == list(range(lanes))
    assert all(lane % size == rank for rank, share in enumerate(shares) for lane in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@quick
@given(sets(), epochs, st.data())
def test_any_number_of_ranks_computes_the_same_batches(lanes, epoch, data):
    size = data.draw(st.integers(1, lanes.lanes))
    step = data.draw(st.integers(0, lanes.steps_per_epoch - 1))
    alone = step_of(lanes, epoch, step)
    together = [None] * lanes.lanes
    for rank in range(size):
        again = Lanes(lanes.samples, lanes.lanes, lanes.lane_batch, lanes.seed, lanes.chunk)
        for lane in lanes_of(rank, size, lanes.lanes):
            together[lane] = again.batch(epoch, step, lane).tolist()
    assert together == alone


@quick
@given(sets(), epochs)
def test_a_lane_reads_runs_of_neighbouring_records(lanes, epoch):
    for lane in range(lanes.lanes):
        steps = range(lanes.steps_per_epoch)
        stream = np.concatenate([lanes.batch(epoch, step, lane) for step in steps])
        breaks = np.flatnonzero(np.diff(stream) != 1) + 1
        # A run ends where a chunk, or the set, does.
        ends = stream[breaks - 1]
        assert all((n + 1) % lanes.chunk == 0 or n + 1 == lanes.samples for n in ends)
        assert all(n % lanes.chunk == 0 for n in stream[breaks])


@pytest.mark.parametrize("chunk", [1, 8])
def test_epochs_and_seeds_differ(chunk):
    orders = {
        (seed, epoch): tuple(everything(Lanes(256, 4, 8, seed, chunk), epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)


def test_an_epoch_can_be_read_again_after_others():
    lanes = Lanes(100, 4, 5, seed=3)
    before = everything(lanes, 0)
    others = [everything(lanes, epoch) for epoch in range(1, 6)]
    assert everything(lanes, 0) == before
    assert before not in others


def test_every_sample_is_about_equally_likely_to_come_first():
    pairs = [(seed, epoch) for seed in range(30) for epoch in range(100)]
    firsts = [Lanes(10, 1, 1, seed).batch(epoch, 0, 0)[0] for seed, epoch in pairs]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 300) ** 2 / 300).sum() < 33.7  # 9 degrees of freedom: one in ten thousand


def test_the_leftover_samples_change_from_epoch_to_epoch():
    lanes = Lanes(103, 4, 5, seed=1)
    left_out = [frozenset(range(103)) - set(everything(lanes, epoch)) for epoch in range(5)]
    assert all(len(samples) == 3 for samples in left_out)
    assert len(set(left_out)) > 1


def test_a_batch_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        Lanes(100, 4, 5, seed=3).batch(0, 0, 0)[0] = 7


@pytest.mark.parametrize("samples", [0, 1, 255])
def test_a_set_smaller_than_a_global_batch_is_refused_in_one_line(samples):
    with pytest.raises(InputError) as refusal:
        Lanes(samples, 4, 64, seed=0)
    line = str(refusal.value)
    assert "\n" not in line
    for part in ("256", f"{samples} samples", "train.lanes", "train.lane_batch"):
        assert part in line
    assert Lanes(256, 4, 64, seed=0).steps_per_epoch == 1

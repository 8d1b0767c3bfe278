"""Where the time of a step goes: the laws that its parts keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.scaling.breakdown import PARTS, Timed, parts_of, quantile, step_seconds, summary

_SECONDS = st.floats(0.0, 1e3)


@st.composite
def timed(draw):
    data, compute, waited, lars, rest = (draw(_SECONDS) for _ in range(5))
    return Timed(data, compute, waited, lars, data + compute + waited + lars + rest)


@st.composite
def worlds(draw):
    ranks, steps = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return [[draw(timed()) for _ in range(steps)] for _ in range(ranks)]


@given(worlds())
def test_the_parts_of_a_rank_add_up_to_the_step(ranks):
    whole = step_seconds(ranks)
    for rank, timed_steps in zip(parts_of(ranks), ranks):
        for seconds, parts, times in zip(whole, rank, timed_steps):
            assert set(parts) == set(PARTS) and min(parts.values()) >= 0
            assert sum(parts.values()) == pytest.approx(seconds)
            assert parts["straggler"] + parts["exposed_sync"] == pytest.approx(times.waited)


@given(worlds())
def test_who_comes_last_waits_for_nobody(ranks):
    parts = parts_of(ranks)
    for step in range(len(ranks[0])):
        arrivals = [rank[step].data + rank[step].compute for rank in ranks]
        assert parts[arrivals.index(max(arrivals))][step]["straggler"] == 0


def test_waiting_is_shared_out_between_the_late_rank_and_the_sum():
    ranks = [[Timed(0.0, 5.0, 4.0, 1.0, 10.0)], [Timed(1.0, 7.0, 1.0, 1.0, 10.5)]]
    first, second = (rank[0] for rank in parts_of(ranks))
    assert (first["straggler"], first["exposed_sync"], first["other"]) == (3.0, 1.0, 0.5)
    assert (second["straggler"], second["exposed_sync"], second["other"]) == (0.0, 1.0, 0.5)
    told = summary(ranks, ["a", "b"])
    assert told["breakdown"]["straggler"] == 1.5 and told["step_s"]["all"] == [10.5]
    assert [rank["host"] for rank in told["per_rank"]] == ["a", "b"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_are_numpys(values, share):
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), abs=1e-6)

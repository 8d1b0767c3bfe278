"""Stateless random numbers: SplitMix64 against its published values and plain Python integers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.data.hashing import mix, uniform

quick = settings(deadline=None, max_examples=100)
words = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def splitmix64(state):
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def chained(parts):
    state = 0
    for part in parts:
        state = splitmix64(state ^ part)
    return state


def test_one_part_gives_the_published_first_number_of_splitmix64():
    assert [int(mix(seed)[0]) for seed in (0, 1234567)] == [0xE220A8397B1DCDAF, 6457827717110365317]


@quick
@given(st.lists(words, min_size=1, max_size=4))
def test_parts_are_chained_as_in_plain_integers(parts):
    assert int(mix(*parts)[0]) == chained(parts)


@quick
@given(words, st.lists(words, min_size=1, max_size=8), words)
def test_an_array_gives_what_its_elements_give_one_by_one(before, middle, after):
    together = mix(before, np.array(middle, dtype=np.uint64), after)
    assert together.tolist() == [chained([before, part, after]) for part in middle]


def test_parts_broadcast():
    rows, columns = np.arange(3)[:, None], np.arange(4)
    table = mix(7, rows, columns)
    assert table.shape == (3, 4)
    assert table[2, 3] == chained([7, 2, 3])


def test_the_order_of_the_parts_matters():
    assert mix(1, 2)[0] != mix(2, 1)[0]
    assert mix(0)[0] != mix(0, 0)[0]


@quick
@given(words, words)
def test_uniform_numbers_are_the_upper_53_bits(one, other):
    value = uniform(one, other)[0]
    assert 0.0 <= value < 1.0
    assert value == (chained([one, other]) >> 11) / 2**53


def test_neighbouring_parts_give_independent_numbers():
    table = uniform(3, np.arange(300)[:, None], np.arange(300))
    counts, _ = np.histogram(table, bins=100, range=(0, 1))
    chi_square = ((counts - 900) ** 2 / 900).sum()
    assert 50 < chi_square < 165  # 99 degrees of freedom: beyond is one in ten thousand
    for shifted in (table[1:], table[:, 1:]):
        part = table[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(part.ravel(), shifted.ravel())[0, 1]) < 0.02

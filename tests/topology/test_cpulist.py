"""Lists and masks of CPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.cpulist import format_cpulist, format_cpumask, parse_cpulist, parse_cpumap

SETS = st.sets(st.integers(0, 300))


@given(SETS)
def test_a_list_reads_back(cpus):
    assert parse_cpulist(format_cpulist(cpus)) == tuple(sorted(cpus))


@given(SETS)
def test_a_mask_reads_back_with_and_without_commas(cpus):
    mask = format_cpumask(cpus)
    assert parse_cpumap(mask) == tuple(sorted(cpus))
    words = [mask[max(0, end - 8) : end] for end in range(len(mask), 0, -8)][::-1]
    assert parse_cpumap(",".join(words)) == tuple(sorted(cpus))


@pytest.mark.parametrize(
    ("cpus", "mask"),
    [
        ((4, 5, 6, 7), "f0"),
        ((7, 4, 6, 5, 4), "f0"),
        ((0,), "1"),
        ((64,), "1" + "0" * 16),
        ((), "0"),
    ],
)
def test_a_mask_is_one_word_without_prefix(cpus, mask):
    assert format_cpumask(cpus) == mask


@pytest.mark.parametrize("text", ["x", "1-", "-", "0x3", "1 2"])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cpulist(text)

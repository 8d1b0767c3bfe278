"""The algorithm per size: what a plan may hold, what the tuner makes of its measurements."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.bench.allreduce import rows_of
from knl.bench.overhead import line
from knl.choices import ALLREDUCE_ALGORITHMS, Choices
from knl.plan import make_plan
from knl.tune.allreduce import SIZES, best, probe

from .nodes import read


def decoded(text: str) -> Choices:
    return msgspec.json.decode(
        msgspec.json.encode({"ranks_per_node": 2, "allreduce": text}), type=Choices
    )


@pytest.mark.parametrize(
    "text", ["", "nreduce", "ring:0-4096", "direct:0-65536;nreduce:65537-max", probe()[0]]
)
def test_a_plan_holds_one_algorithm_or_one_for_each_range(text):
    assert decoded(text).allreduce == text


@pytest.mark.parametrize(
    "text", ["fastest", "ring:", "ring:0-", "ring:max-0", "ring;nreduce", "ring:0-9;", "ring\n"]
)
def test_what_oneccl_would_not_understand_is_refused(text):
    with pytest.raises(msgspec.ValidationError, match="allreduce"):
        decoded(text)


def test_the_plan_s_algorithm_and_bucket_become_variables():
    node = read("vm")
    text = "direct:0-65536;nreduce:65537-max"
    env = make_plan(
        node, Choices(ranks_per_node=2, allreduce=text, bucket_mb=4.0), {}, "profile"
    ).env
    assert env["CCL_ALLREDUCE"].value == text
    assert int(env["CCL_ALLREDUCE_NREDUCE_SEGMENT_SIZE"].value) > 0
    assert env["KNL_BUCKET_MB"].value == "4"
    ring = make_plan(node, Choices(ranks_per_node=2, allreduce="ring"), {}, "profile").env
    assert "CCL_ALLREDUCE_NREDUCE_SEGMENT_SIZE" not in ring
    mine = make_plan(
        node, Choices(ranks_per_node=2, allreduce=text), {"CCL_ALLREDUCE": "2d"}, "rule"
    ).env
    assert (mine["CCL_ALLREDUCE"].value, mine["CCL_ALLREDUCE"].source) == ("2d", "user")


def algorithm_at(table: str, size: int) -> str:
    """As oneCCL reads a table."""
    if ":" not in table:
        return table
    for name, start, end in re.findall(r"(\w+):(\d+)-(\d+|max)", table):
        if int(start) <= size and (end == "max" or size <= int(end)):
            return name
    raise AssertionError(f"{size} bytes are not in {table}")


def test_the_probe_s_table_gives_each_size_the_algorithm_that_it_stands_for():
    table, meant = probe()
    assert len(meant) == len(SIZES) * len(ALLREDUCE_ALGORITHMS)
    for size, (wanted, algorithm) in meant.items():
        assert algorithm_at(table, size) == algorithm
        assert size % 4 == 0 and abs(size - wanted) < 0.2 * wanted


@given(st.lists(st.sampled_from(ALLREDUCE_ALGORITHMS), min_size=len(SIZES), max_size=len(SIZES)))
def test_a_clear_winner_is_taken_at_its_size(winners):
    _, meant = probe()
    seconds = {
        size: [size * (0.5 if winners[SIZES.index(wanted)] == algorithm else 1.0)]
        for size, (wanted, algorithm) in meant.items()
    }
    table = best(seconds, meant)
    assert decoded(table).allreduce == table
    assert [algorithm_at(table, size) for size in SIZES] == winners
    algorithm_at(table, 0), algorithm_at(table, 10**12)  # no size is left out


def test_a_difference_within_noise_leaves_one_algorithm_for_all():
    _, meant = probe()
    seconds = {
        size: [size * (0.98 if algorithm == "ring" and wanted == SIZES[0] else 1.0)]
        for size, (wanted, algorithm) in meant.items()
    }
    seconds[SIZES[-1]] = [SIZES[-1] * 0.9]  # the first algorithm, at the largest size
    assert best(seconds, meant) == ALLREDUCE_ALGORITHMS[0]


def test_ratios_are_quotients_of_one_size():
    rows = rows_of({(8, "oneccl"): 2.0, (8, "imb"): 4.0, (16, "oneccl"): 3.0, (16, "copy"): 1.0})
    assert [(r["ratio_to_imb"], r["ratio_to_copy"]) for r in rows if r["rival"] == "oneccl"] == [
        (0.5, None),
        (None, 3.0),
    ]


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_points_on_a_line_give_that_line(slope, intercept):
    import numpy as np

    x = np.array([10.0, 100.0, 300.0])
    found = line(x, slope * x + intercept)
    assert found["per_tensor_s"] == pytest.approx(slope, abs=1e-9)
    assert found["intercept_s"] == pytest.approx(intercept, abs=1e-7)

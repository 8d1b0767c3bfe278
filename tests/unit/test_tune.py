"""The parts of the search that need no trial: space, history, comparison, budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.choices import Choices, allocators, rule_choices
from knl.config import load_recipe
from knl.errors import InputError
from knl.profile import Trial
from knl.tune.command import parse_budget
from knl.tune.compare import gain_of
from knl.tune.display import describe, words
from knl.tune.history import History
from knl.tune.space import canonical, fits, neighbours, space

from .nodes import read


def test_what_can_be_varied_follows_from_the_node():
    vm = space(read("vm"), 64, {}, with_compile=False)
    assert vm["ranks_per_node"] == (1, 2)
    assert {"threads_per_core", "reserve_cores", "memory", "dtype", "compile"}.isdisjoint(vm)
    knl = space(read("snc4-flat"), 64, {}, with_compile=True)
    assert knl["ranks_per_node"] == (1, 2, 4)
    assert knl["threads_per_core"] == (1, 2)
    assert knl["memory"] == ("auto", "none")
    assert knl["compile"] == (False, True)
    assert knl["comm_workers"] == (None, 0, 1, 2, 3, 4)
    assert "dtype" not in knl  # a KNL has no bfloat16
    assert space(read("vm"), 63, {}, with_compile=False).get("ranks_per_node") is None


def test_every_neighbour_differs_and_is_worth_a_trial():
    node = read("quadrant-flat")
    found = space(node, 64, {}, with_compile=False)
    best = canonical(rule_choices(node, 1, {}))
    near = [choices for choices in neighbours(found, best) if choices != best]
    assert len(near) > 10
    for choices in near:
        assert choices == canonical(choices)
    assert all(fits(node, choices) for choices in near)


def test_choices_without_effect_are_not_told_apart():
    one = Choices(ranks_per_node=1, comm_workers=3, allreduce="ring", blocktime_ms=1)
    assert canonical(one) == Choices(ranks_per_node=1)
    two = Choices(ranks_per_node=2, comm_workers=3, allreduce="ring", openmp="libiomp5")
    assert canonical(two) == two


def test_more_ranks_than_cores_do_not_fit():
    assert fits(read("vm"), Choices(ranks_per_node=2))
    assert not fits(read("vm"), Choices(ranks_per_node=4))
    assert not fits(read("vm"), Choices(ranks_per_node=1, threads_per_core=2))


def trial(number, choices, speed, state="complete"):
    label = "search" if number else "as-is"
    return Trial(number, label, choices, state, speed, (1.0,), "" if speed else "it broke")


def test_an_interrupted_search_is_found_again_with_all_its_trials(tmp_path):
    node, recipe = read("vm"), load_recipe("resnet50-bench")
    found = space(node, 64, {}, with_compile=False)
    first = History(node, recipe, found, tmp_path / "journal")
    first.set_size(16, 5)
    trials = [
        trial(0, None, 2.0),
        trial(1, Choices(ranks_per_node=1), 3.0),
        trial(2, Choices(ranks_per_node=2), 5.0, "pruned"),
        trial(3, Choices(ranks_per_node=1, layout="channels_last"), 0.0, "failed"),
    ]
    for one in trials:
        first.add(one)
    again = History(node, recipe, found, tmp_path / "journal")
    assert (again.images, again.steps, again.trials) == (16, 5, trials)
    assert again.best == trials[1]  # neither as-is nor one that was cut short
    other = load_recipe("resnet50-bench", ["data.image_size=128"])
    assert History(node, other, found, tmp_path / "journal").trials == []


def test_tpe_suggests_only_what_was_not_tried():
    node, recipe = read("vm"), load_recipe("resnet50-bench")
    history = History(node, recipe, {"layout": ("contiguous", "channels_last")}, None)
    near = Choices(ranks_per_node=1)
    other = Choices(ranks_per_node=1, layout="channels_last")
    assert history.suggest(near, lambda choices: choices == other) == other
    assert history.suggest(near, lambda choices: False) is None


def test_a_damaged_journal_is_told_with_its_cure(tmp_path):
    (tmp_path / "journal").write_text("{nonsense\n")
    with pytest.raises(InputError, match=r"journal: .*remove the file"):
        History(read("vm"), load_recipe("digits"), {}, tmp_path / "journal")


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_clear_difference_is_sure_and_a_gain_is_a_ratio(slow, fast):
    gain = gain_of(64, {"as-is": [slow] * 5, "rule": [slow] * 5, "best": [fast] * 5})
    assert gain.as_is_images_per_s == pytest.approx(64 / slow)
    assert gain.gain == pytest.approx(slow / fast)
    assert gain.gain_low == pytest.approx(gain.gain) == gain.gain_high
    assert gain.sure == gain.sure_over_rule == (1.0 if slow > fast else 0.0)


def test_noise_widens_the_interval_and_lowers_the_certainty():
    noisy = {"as-is": [1.0, 2.0, 3.0], "rule": [1.0, 2.0, 3.0], "best": [0.9, 1.9, 2.9]}
    gain = gain_of(10, noisy)
    assert gain.gain_low < 1 < gain.gain_high
    assert 0.2 < gain.sure < 0.9


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_a_budget_is_a_time(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "10 parsecs", "29s", "-5m"])
def test_a_wrong_budget_is_refused(text):
    with pytest.raises(InputError, match=r"--budget .*: must be a time of at least 30s"):
        parse_budget(text)


def test_a_trial_is_one_line_that_says_what_was_tried():
    line = describe(trial(7, Choices(ranks_per_node=2, hugepages=True), 0.0, "failed"))
    assert line.count("\n") == 0
    assert "failed: it broke" in line and "2 rank(s)" in line and "hugepages=True" in line
    assert words(None) == "no plan, torch's own settings"


def test_the_rule_takes_an_allocator_that_is_here():
    assert allocators({})[:2] == ["glibc", "glibc-heap"]

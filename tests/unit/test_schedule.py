"""The learning rate on fractional epochs: warm-up, the three decays, and Goyal's recipe."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.config import Schedule, load_recipe
from knl.optim.schedule import lr_at

DECAYS = ("poly", "multi-step", "constant")
quick = settings(deadline=None, max_examples=200)
rates = st.floats(0, 100)
shares = st.floats(0, 1)


@st.composite
def runs(draw):
    """A schedule, and the epochs of its run: warm-up ends in it."""
    epochs = draw(st.floats(0.5, 200))
    warmup = draw(st.one_of(st.just(0.0), st.floats(0.01, 0.9))) * epochs
    schedule = Schedule(
        lr=draw(rates),
        warmup_lr=draw(rates),
        warmup_epochs=warmup,
        decay=draw(st.sampled_from(DECAYS)),
        power=draw(st.floats(0.1, 5)),
        milestones=tuple(sorted(draw(st.lists(st.floats(warmup + 0.1, 200), max_size=4)))),
        gamma=draw(shares),
    )
    return schedule, epochs


@pytest.mark.parametrize("epoch", [0, 0.25, 1.5, 3.999])
@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_is_a_straight_line(decay, epoch):
    schedule = Schedule(lr=8.0, warmup_lr=2.0, warmup_epochs=4, decay=decay)
    assert lr_at(schedule, epoch, 10) == pytest.approx(2.0 + 6.0 * epoch / 4)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_poly_falls_with_the_share_of_epochs_left_after_warm_up(power):
    schedule = Schedule(lr=8.0, warmup_epochs=2, decay="poly", power=power)
    assert lr_at(schedule, 2, 10) == 8.0
    assert lr_at(schedule, 4.5, 10) == pytest.approx(8.0 * (5.5 / 8) ** power)
    assert lr_at(schedule, 10, 10) == 0.0


def test_multi_step_falls_at_each_milestone_even_within_an_epoch():
    schedule = Schedule(lr=8.0, decay="multi-step", milestones=(1.5, 4), gamma=0.25)
    epochs = (0, 1.499, 1.5, 3.999, 4, 9)
    assert [lr_at(schedule, e, 10) for e in epochs] == [8.0, 8.0, 2.0, 2.0, 0.5, 0.5]


def test_constant_stays():
    schedule = Schedule(lr=8.0, warmup_epochs=1, decay="constant")
    assert {lr_at(schedule, e, 10) for e in (1, 5.5, 9.99)} == {8.0}


@quick
@given(runs(), shares)
def test_the_rate_is_finite_and_never_negative(run, share):
    schedule, epochs = run
    rate = lr_at(schedule, share * epochs, epochs)
    assert math.isfinite(rate) and 0.0 <= rate <= max(schedule.lr, schedule.warmup_lr) * (1 + 1e-12)


@quick
@given(runs())
def test_warm_up_ends_without_a_jump(run):
    schedule, epochs = run
    end = schedule.warmup_epochs
    assert lr_at(schedule, end, epochs) == schedule.lr
    if end:
        steepest = abs(schedule.lr - schedule.warmup_lr) / end
        for near in (1e-3, 1e-6):
            before = lr_at(schedule, end - near * end, epochs)
            assert abs(before - schedule.lr) <= steepest * near * end + 1e-9


@quick
@given(runs(), shares, shares)
def test_after_warm_up_the_rate_never_rises(run, one, other):
    schedule, epochs = run
    after = epochs - schedule.warmup_epochs
    early, late = (schedule.warmup_epochs + share * after for share in sorted((one, other)))
    assert lr_at(schedule, late, epochs) <= lr_at(schedule, early, epochs)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.1),
        (2.5, 1.65),
        (5, 3.2),
        (29.9, 3.2),
        (30, 0.32),
        (60, 0.032),
        (79.9, 0.032),
        (80, 0.0032),
    ],
)
def test_the_baseline_recipe_has_goyals_rates(epoch, rate):
    recipe = load_recipe("resnet50-8k")
    assert recipe.optim.form == "sgd"
    assert lr_at(recipe.schedule, epoch, recipe.train.epochs) == pytest.approx(rate)
    assert recipe.schedule.lr == pytest.approx(0.1 * recipe.global_batch / 256)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_run_shorter_than_its_warm_up_stays_on_the_line(decay):
    schedule = Schedule(lr=8.0, warmup_epochs=5, decay=decay)
    rates = [lr_at(schedule, e, 3) for e in (0, 1.5, 2.9, 3)]
    assert rates == pytest.approx([0.0, 2.4, 4.64, 4.8])


@pytest.mark.parametrize("decay", DECAYS)
def test_a_run_as_long_as_its_warm_up_ends_at_the_full_rate(decay):
    schedule = Schedule(lr=8.0, warmup_epochs=5, decay=decay)
    assert lr_at(schedule, 5, 5) == 8.0

"""What asks a run to stop: signals, clocks, and what a user may write."""

from __future__ import annotations

import os
import signal
import time

import pytest

from knl.errors import InputError
from knl.train import orders
from knl.train.orders import ORDERS, Deadlines, Signals, deadlines, parse_time, stop_asked


@pytest.fixture
def signals():
    before = {name: signal.getsignal(getattr(signal, name)) for name in orders.SIGNALS}
    found = Signals()
    found.listen()
    yield found
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", orders.SIGNALS)
def test_a_signal_is_noted(signals, name):
    os.kill(os.getpid(), getattr(signal, name))
    assert list(signals.heard) == [name]


def test_a_second_interrupt_interrupts(signals):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)


def test_any_rank_s_order_counts_and_a_checkpoint_is_none():
    assert stop_asked(dict.fromkeys(ORDERS, 0.0)) == ""
    assert stop_asked({**dict.fromkeys(ORDERS, 0.0), orders.CHECKPOINT: 1.0}) == ""
    assert stop_asked({**dict.fromkeys(ORDERS, 0.0), "SIGUSR1": 512.0}) == "SIGUSR1"


def test_the_margin_grows_with_what_must_still_be_done(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(orders.time, "monotonic", lambda: now[0])
    limits = Deadlines(limit=1100.0, max_time=None)
    assert limits.passed(write_s=0.0) == []
    now[0] = 1020.0  # a step of 20 s: 40 s for it and the next, 10 s beside
    assert limits.passed(write_s=0.0) == []
    assert limits.passed(write_s=20.0) == [orders.TIME_LIMIT]
    now[0] = 1051.0
    assert limits.passed(write_s=0.0) == [orders.TIME_LIMIT]


def test_the_nearest_limit_counts_and_max_time_has_no_margin(monkeypatch):
    now = time.monotonic()
    environment = {"KNL_TIME_LIMIT": "50", "SLURM_JOB_END_TIME": str(time.time() + 500)}
    assert deadlines(environment, None, now).limit == pytest.approx(now + 50)
    environment = {"KNL_TIME_LIMIT": "500", "SLURM_JOB_END_TIME": str(time.time() + 50)}
    assert deadlines(environment, None, now).limit == pytest.approx(now + 50, abs=1.0)
    assert deadlines({}, 60.0, now) == Deadlines(None, now + 60.0)
    assert Deadlines(None, now - 1.0).passed(0.0) == [orders.MAX_TIME]
    assert Deadlines(None, now + 5.0).passed(0.0) == []


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(InputError, match=rf"KNL_TIME_LIMIT='{value}': must be .* above 0"):
        deadlines({"KNL_TIME_LIMIT": value}, None, 0.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("45m", 2700), ("1.5h", 5400), ("2d", 172800)],
)
def test_times(text, seconds):
    assert parse_time(text, "--max-time") == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1 h", "1:30", "soon"])
def test_what_is_no_time(text):
    with pytest.raises(InputError, match=r"--max-time .*: must be a time such as"):
        parse_time(text, "--max-time")

"""What asks a run to stop or to write a checkpoint, before its recipe is done.

Each rank notes what it hears; the numbers travel with the first gradients of a step, so all ranks
stop after the same one.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knl.errors import InputError

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
STOP_FILE, TIME_LIMIT, MAX_TIME, CHECKPOINT, LOST = (
    "the file STOP", "the time limit", "--max-time", "checkpoint", "lost",
)  # fmt: skip
# In the order in which they are carried.
ORDERS = (*SIGNALS, STOP_FILE, TIME_LIMIT, MAX_TIME, CHECKPOINT, LOST)
_STOPS = ORDERS[: ORDERS.index(CHECKPOINT)]
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LEAST_MARGIN_S = 10.0


@dataclass
class Signals:
    """The signals that this process has been sent, from `listen` on."""

    heard: dict[str, bool] = field(default_factory=dict)

    def listen(self) -> None:
        """Note signals in place of dying of them. A second SIGINT is a KeyboardInterrupt."""
        for name in SIGNALS:
            signal.signal(getattr(signal, name), self._hear)

    def leave(self) -> None:
        """Die of signals again, as whoever cannot stop in order any more should."""
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_DFL)

    def _hear(self, number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and name in self.heard:
            raise KeyboardInterrupt
        self.heard[name] = True


@dataclass
class Deadlines:
    """Times of the monotonic clock, in seconds. `limit`: when the job is ended from outside, with
    what must be done before: a step or an evaluation, and a write; `max_time`: when to stop."""

    limit: float | None
    max_time: float | None
    longest_s: float = 0.0  # between two looks at the clock
    _looked: float | None = None

    def passed(self, write_s: float) -> Sequence[str]:
        """Which of them are; `write_s`: what a checkpoint takes."""
        now = time.monotonic()
        if self._looked is not None:
            self.longest_s = max(self.longest_s, now - self._looked)
        self._looked = now
        margin = _LEAST_MARGIN_S + 2 * self.longest_s + 2 * write_s
        found = []
        if self.limit is not None and now > self.limit - margin:
            found.append(TIME_LIMIT)
        if self.max_time is not None and now > self.max_time:
            found.append(MAX_TIME)
        return found


def deadlines(environment: Mapping[str, str], max_time_s: float | None, began: float) -> Deadlines:
    """The nearest of KNL_TIME_LIMIT (seconds from the start), SLURM_JOB_END_TIME (seconds since
    1970) and none; and `began` + `max_time_s`. Raises InputError for what is no number.

    The clock on the wall is asked once: it may be set while the job runs.
    """
    limits = []
    if "KNL_TIME_LIMIT" in environment:
        limits.append(began + _number(environment, "KNL_TIME_LIMIT"))
    if environment.get("SLURM_JOB_END_TIME"):
        left = _number(environment, "SLURM_JOB_END_TIME") - time.time()
        limits.append(time.monotonic() + left)
    return Deadlines(
        min(limits) if limits else None, None if max_time_s is None else began + max_time_s
    )


def stop_asked(agreed: Mapping[str, float]) -> str:
    """Why to stop, from the sums over all ranks; "" to go on."""
    return next((name for name in _STOPS if agreed.get(name)), "")


def parse_time(text: str, option: str) -> float:
    """Seconds of 90s, 45m, 1.5h, 2d or a number of seconds. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not found:
        raise InputError(f"{option} {text}: must be a time such as 90s, 45m, 1.5h or 2d")
    return float(found[1]) * _UNITS_S[found[2]]


def _number(environment: Mapping[str, str], name: str) -> float:
    try:
        seconds = float(environment[name])
        if 0 < seconds < float("inf"):
            return seconds
    except ValueError:
        pass
    raise InputError(f"{name}={environment[name]!r}: must be a number of seconds above 0")

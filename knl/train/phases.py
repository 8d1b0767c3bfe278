"""How long a job takes to start, and with what: on hundreds of nodes it may be minutes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

import psutil


class Phases:
    """Seconds of each phase since the process began. `launch` is before that: from the time at
    which a job script started its launcher (KNL_LAUNCHED_AT, seconds since 1970)."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        created = psutil.Process().create_time()
        self.began = self._since = time.monotonic() - max(0.0, time.time() - created)
        self.seconds: dict[str, float] = {}
        with contextlib.suppress(KeyError, ValueError):
            self.seconds["launch"] = max(0.0, created - float(environment["KNL_LAUNCHED_AT"]))

    def end(self, name: str) -> None:
        """The phase of this name is over, and the next begins."""
        now = time.monotonic()
        self.seconds[name] = now - self._since
        self._since = now

    def describe(self) -> str:
        """In one line."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"started in {sum(self.seconds.values()):.1f} s: {parts}"

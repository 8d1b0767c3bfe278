"""How far a packer is: a bar on a terminal, a line now and then in a log. On stderr."""

from __future__ import annotations

import threading
import time

from rich.console import Console

from knl.bar import progress_bar
from knl.errors import say

_LINE_EVERY_S = 30.0


class PackProgress:
    """Of `total` pictures, of which `before` were there already."""

    def __init__(self, total: int, before: int) -> None:
        self._total, self._before = total, before
        self._began = self._shown = time.monotonic()
        console = Console(stderr=True, highlight=False)
        self._bar = progress_bar(console, "images")
        self._task = self._bar.add_task("", total=total, completed=before)
        self._quiet = not console.is_terminal
        if before:
            say(f"{before:,} of {total:,} images are in whole shards already")
        self._bar.start()
        self._done, self._lock = 0, threading.Lock()

    def add(self, more: int) -> None:
        """So many pictures more are done; from any thread."""
        with self._lock:
            self._done += more
            self.show(self._done)

    def show(self, done: int) -> None:
        """`done`: pictures by this packer so far."""
        now = time.monotonic()
        rate = done / max(now - self._began, 1e-9)
        self._bar.update(
            self._task, completed=self._before + done, description=f"{rate:,.0f} images/s"
        )
        if self._quiet and now - self._shown > _LINE_EVERY_S and done:
            self._shown = now
            left = (self._total - self._before - done) / rate
            say(
                f"{self._before + done:,} of {self._total:,} images, {rate:,.0f} images/s, "
                f"{left / 60:.0f} min left"
            )

    def close(self) -> None:
        self._bar.stop()

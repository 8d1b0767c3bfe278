"""What a user sees of a run: a bar on a terminal, plain lines in a log. Always on stderr."""

from __future__ import annotations

import contextlib
import os
import time

from rich.console import Console

from knl.bar import progress_bar
from knl.train.evaluate import Evaluation
from knl.train.metrics import StepMetrics

# Seconds between two lines about steps in a log.
_LINE_EVERY_S = 10.0


def open_console() -> Console:
    """A console on stderr. Ranks write through pipes; `knl` says there how wide its terminal is."""
    columns = os.environ.get("KNL_TERMINAL_COLUMNS")
    if columns and columns.isdigit():
        return Console(stderr=True, force_terminal=True, width=int(columns), highlight=False)
    return Console(stderr=True, highlight=False, soft_wrap=True)


def tell(console: Console, text: str) -> None:
    """Print a line; a full disk under a log is no reason to stop."""
    with contextlib.suppress(OSError):
        console.print(text, markup=False)


class Display:
    """Shows steps and evaluations of a run of `steps` steps; on rank 0 alone."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self._steps, self._shown = steps, 0.0
        self._bar = progress_bar(console, "step")
        self._task = self._bar.add_task("", total=steps)
        self._bar.start()

    def step(self, m: StepMetrics) -> None:
        text = (
            f"epoch {m.epoch:.2f}  loss {m.loss:.4f}  lr {m.lr:.4g}  {m.images_per_s:,.1f} images/s"
        )
        if self.console.is_terminal:
            self._bar.update(self._task, completed=m.step, description=text)
        elif time.monotonic() - self._shown > _LINE_EVERY_S or m.step == self._steps:
            self._shown = time.monotonic()
            self.say(f"step {m.step}/{self._steps}  {text}")

    def evaluation(self, epoch: float, result: Evaluation) -> None:
        self.say(
            f"epoch {epoch:.2f}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
            f"test loss {result.loss:.4f}"
        )

    def say(self, text: str) -> None:
        tell(self.console, text)

    def close(self) -> None:
        self._bar.stop()

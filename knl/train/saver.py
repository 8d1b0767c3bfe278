"""When rank 0 writes checkpoints, which it keeps, and the thread that writes them."""

from __future__ import annotations

import contextlib
import threading
import time

from knl.bind import on_loader_cpus
from knl.errors import say
from knl.train.checkpoint import (
    Checkpoint,
    listed,
    name_of,
    remove_temporaries,
    step_of,
    write,
)
from knl.train.run_dir import RunDirectory
from knl.train.state import all_finite

# Ends of epochs may come every second: no more often than this, and a twentieth of the time.
_LEAST_APART_S = 10.0
_SHARE = 20.0


class Saver:
    """Writes checkpoints of a run, at most one at a time, while training goes on.

    A failure (disk full, quota, read-only) leaves what is there, is told once, and is tried again
    at the next occasion.
    """

    def __init__(self, run: RunDirectory, minutes: float, keep: int) -> None:
        self._run, self._folder, self._every_s, self._keep = (
            run,
            run.checkpoints,
            minutes * 60,
            keep,
        )
        self._last = time.monotonic()  # began the last one
        self._thread: threading.Thread | None = None
        self._best: Checkpoint | None = None  # copied, to be written with the next one
        self._told = self._abandoned = False
        self.write_s = 0.0  # the longest
        self.problem = ""  # why the last one could not be written
        self.newest = max((step_of(path) for path in listed(self._folder)), default=0)
        remove_temporaries(self._folder)

    def due(self, epoch_ends: bool) -> bool:
        """Whether it is time for one."""
        if self._thread is not None and self._thread.is_alive():
            return False
        passed = time.monotonic() - self._last
        if self._every_s and passed >= self._every_s:
            return True
        return epoch_ends and passed >= max(_LEAST_APART_S, _SHARE * self.write_s)

    def hold_best(self, checkpoint: Checkpoint) -> None:
        """The best so far, at a step where none is due: it is written with the next one."""
        self._best = checkpoint

    def save(self, checkpoint: Checkpoint) -> None:
        """Start to write what training will not touch any more."""
        self.wait()
        self._last = time.monotonic()
        best, self._best = self._best, None
        with on_loader_cpus():
            self._thread = threading.Thread(target=self._write_all, args=(checkpoint, best))
            self._thread.start()

    def abandon(self) -> None:
        """The folder is another job's now: write and remove nothing more."""
        self._abandoned = True

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def _write_all(self, checkpoint: Checkpoint, best: Checkpoint | None) -> None:
        """The best first: whoever reads that it is the best must find it."""
        try:
            self._folder.mkdir(exist_ok=True)
            self._run.sync()
            mark = checkpoint.state.best
            if best is not None and mark is not None and best.state.step == mark.step:
                self._write(best)
            self._write(checkpoint)
        except Exception as error:  # a full disk, no memory: whatever it is, it is not written
            self._best = self._best or best
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self._failed(checkpoint.state.step, why)
            return
        if self._told:
            say(f"checkpoint of step {checkpoint.state.step} is written: there is room again")
        self.problem, self._told = "", False
        self.newest = checkpoint.state.step
        self._remove_old(mark.step if mark else -1)

    def _write(self, checkpoint: Checkpoint) -> None:
        if broken := all_finite(checkpoint.tensors):
            raise OSError(0, f"{broken} is not finite")
        if self._abandoned:
            raise OSError(0, "the run directory is another job's")
        began = time.monotonic()
        write(self._folder, checkpoint)
        self.write_s = max(self.write_s, time.monotonic() - began)

    def _failed(self, step: int, why: str) -> None:
        self.problem = why
        if not self._told:
            self._told = True
            say(
                f"checkpoint of step {step} cannot be written to {self._folder} ({why}): those "
                "before it stay, training goes on, and the next one is tried in its turn"
            )

    def _remove_old(self, best: int) -> None:
        for path in listed(self._folder)[self._keep :]:
            if path.name != name_of(best):
                with contextlib.suppress(OSError):
                    path.unlink()

"""All steps of a recipe, with evaluations, checkpoints, and an end in order when one is asked."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import msgspec
import torch

from knl import __version__
from knl.comm.collectives import allreduce_numbers
from knl.errors import FailedError, NonFiniteError, StoppedError
from knl.train.checkpoint import Checkpoint, Mark, State
from knl.train.evaluate import Evaluation
from knl.train.metrics import StepMetrics
from knl.train.orders import CHECKPOINT, LOST, STOP_FILE, Deadlines, Signals, stop_asked
from knl.train.progress import Display
from knl.train.run_dir import RunDirectory
from knl.train.saver import Saver
from knl.train.state import Place, copied, places
from knl.train.trainer import Trainer

# Rows of trust ratios by layer that a run writes at most.
_TRUST_ROWS = 200
_LOOK_S = 1.0  # between two looks at the run directory, whose file system may be slow


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `images_per_s`: median over steps but the first, which warms up;
    `damaged`: training records that others had to stand in for."""

    evaluation: Evaluation
    steps: int
    epochs: float
    images_per_s: float
    weights_crc32: str
    damaged: int


@dataclass
class Keeper:
    """What rank 0 has besides the training: where it writes, what it listens to."""

    run: RunDirectory
    display: Display
    saver: Saver
    deadlines: Deadlines
    _looked: float = -math.inf
    _found: list[str] = field(default_factory=list)

    def orders(self, epoch_ends: bool) -> list[str]:
        """What the clock and the run directory ask for."""
        now = time.monotonic()
        if now - self._looked > _LOOK_S:
            self._looked = now
            self._found = [STOP_FILE] if self.run.stop_wanted() else []
            self._found += [LOST] if self.run.lock.lost() else []
        due = [CHECKPOINT] if self.saver.due(epoch_ends) else []
        return [*self._found, *self.deadlines.passed(self.saver.write_s), *due]


@dataclass
class Progress:
    """How far a run has come; the same on every rank."""

    step: int = 0
    evaluation: Mark | None = None
    best: Mark | None = None
    checksum: str = ""


class Run:
    """The training of one recipe on this rank. `keeper`: on rank 0 alone; `max_steps`: of this
    start, 0 for all."""

    def __init__(
        self,
        trainer: Trainer,
        signals: Signals,
        keeper: Keeper | None,
        progress: Progress,
        max_steps: int,
    ) -> None:
        self.trainer, self.signals, self.keeper = trainer, signals, keeper
        self.progress = progress
        self._end = progress.step + max_steps if max_steps else math.inf
        self._places: list[Place] = places(trainer.plain, trainer.optimiser)
        self._speeds: list[float] = []

    def train(self) -> Outcome:
        """To the end. Raises StoppedError, on every rank, after a checkpoint that was asked for,
        and FailedError when the last one could not be written."""
        total, timeout = self.trainer.total_steps, self.trainer.timeout
        self._evaluate_what_was_left()
        while self.progress.step < total:
            metrics = self._step(self.progress.step)
            step = self.progress.step = metrics.step
            agreed = self.trainer.agreed
            if agreed[LOST]:
                if self.keeper:
                    self.keeper.saver.abandon()
                raise FailedError(
                    f"stopped after step {step}: the run directory's lock is not this job's any "
                    "more: it was removed, or another job has taken it over; nothing can be saved",
                    shared=True,
                )
            reason = "--max-steps" if step >= self._end else stop_asked(agreed)
            spoiled, last = self.trainer.damage.problem, step == total
            # A run that is told to stop may have no time to evaluate: the next start does it.
            evaluates = self._evaluates_after(step) and not spoiled and (last or not reason)
            is_best = self._evaluate(step) if evaluates else False
            if last or reason or spoiled or agreed[CHECKPOINT]:
                self.progress.checksum = self.trainer.check_weights(f"after step {step}")
                if self.keeper:
                    self.keeper.saver.save(self._copy())
            elif is_best and self.keeper:
                self.keeper.saver.hold_best(self._copy())
            if last or reason or spoiled:
                self._settle(timeout)
            if spoiled:
                raise FailedError(f"stopped after step {step}: {spoiled}", shared=True)
            if reason and not last:
                raise StoppedError(self._stopped(reason), shared=True)
        if self.progress.evaluation is None or self.progress.evaluation.step != total:
            self._evaluate(total)  # stopped here before, where nobody knew it for the end
        return self._outcome()

    def _evaluate_what_was_left(self) -> None:
        step, mark = self.progress.step, self.progress.evaluation
        missing = mark is None or mark.step != step
        if 0 < step < self.trainer.total_steps and self._evaluates_after(step) and missing:
            is_best = self._evaluate(step)
            if is_best and self.keeper:
                self.keeper.saver.hold_best(self._copy())

    def _step(self, step: int) -> StepMetrics:
        epoch_ends = (step + 1) % self.trainer.lanes.steps_per_epoch == 0
        orders = [*self.signals.heard, *(self.keeper.orders(epoch_ends) if self.keeper else ())]
        try:
            metrics = self.trainer.step(step, orders)
        except NonFiniteError as error:
            raise self._with_last_good(error) from None
        self._speeds.append(metrics.images_per_s)
        if self.keeper:
            self.keeper.run.step(metrics)
            if metrics.step % math.ceil(self.trainer.total_steps / _TRUST_ROWS) == 0:
                ratios = self.trainer.optimiser.trust_by_name()
                self.keeper.run.trust(metrics.step, ratios)
            self.keeper.display.step(metrics)
        return metrics

    def _evaluates_after(self, step: int) -> bool:
        every = self.trainer.recipe.train.eval_every
        whole_epochs, rest = divmod(step, self.trainer.lanes.steps_per_epoch)
        return step == self.trainer.total_steps or (
            every > 0 and rest == 0 and whole_epochs % every == 0
        )

    def _evaluate(self, step: int) -> bool:
        """Whether it is the best so far."""
        epoch = self.trainer.epoch_at(step)
        self.progress.checksum = self.trainer.check_weights(f"after step {step}")
        found = self.trainer.evaluate()
        mark = self.progress.evaluation = Mark(step, found.top1, found.top5, found.loss)
        best = self.progress.best
        is_best = best is None or mark.top1 > best.top1
        if is_best:
            self.progress.best = mark
        if self.keeper:
            self.keeper.run.evaluation(step, epoch, found, self.progress.checksum)
            self.keeper.display.evaluation(epoch, found)
        return is_best

    def _copy(self) -> Checkpoint:
        """All that is needed to go on, in memory of its own."""
        trainer, progress = self.trainer, self.progress
        state = State(
            step=progress.step,
            epoch=trainer.epoch_at(progress.step),
            recipe=msgspec.to_builtins(trainer.recipe),
            ranks=trainer.ranks.world.size,
            samples=trainer.lanes.samples,
            order=trainer.sync.order,
            weights_crc32=progress.checksum,
            skipped=trainer.skipped,
            evaluation=progress.evaluation,
            best=progress.best,
            versions={"knl": __version__, "torch": str(torch.__version__)},
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        return Checkpoint(state, copied(self._places))

    def _settle(self, timeout: float) -> None:
        """Wait for the last checkpoint. Raises FailedError on every rank when it is not written."""
        problem = ""
        if self.keeper:
            self.keeper.saver.wait()
            problem = self.keeper.saver.problem
        ranks = self.trainer.ranks
        failed = [float(bool(problem))]
        if allreduce_numbers(ranks.collectives, failed, timeout, "the last checkpoint")[0]:
            raise FailedError(
                f"the checkpoint after step {self.progress.step} could not be written ({problem}); "
                f"{self._last_good()}; see to the cause, then start the same command again",
                shared=True,
            )

    def _stopped(self, reason: str) -> str:
        step, total = self.progress.step, self.trainer.total_steps
        remove = f"remove {self._path()}/STOP, then " if reason == STOP_FILE else ""
        return (
            f"stopped after step {step} of {total} ({reason}), with a checkpoint: {remove}start "
            f"the same command with --run-dir {self._path()}, without --fresh, to go on"
        )

    def _with_last_good(self, error: NonFiniteError) -> NonFiniteError:
        more = ""
        if self.keeper and error.detail:
            more = f"; more in {self.keeper.run.diagnosis(error.detail)}"
        return NonFiniteError(
            f"{error}{more}; {self._last_good()}", shared=error.shared, detail=error.detail
        )

    def _last_good(self) -> str:
        """On rank 0, which is the one to tell it."""
        newest = 0
        if self.keeper:
            self.keeper.saver.wait()
            newest = self.keeper.saver.newest
        return f"the last good checkpoint is of step {newest}" if newest else "no checkpoint yet"

    def _path(self) -> Path:
        return self.keeper.run.path if self.keeper else Path()

    def _outcome(self) -> Outcome:
        mark = self.progress.evaluation
        assert mark is not None  # the last step evaluates
        total = self.trainer.total_steps
        return Outcome(
            evaluation=Evaluation(mark.top1, mark.top5, mark.loss),
            steps=total,
            epochs=self.trainer.epoch_at(total),
            images_per_s=median(self._speeds[1:] or self._speeds or [0.0]),
            weights_crc32=self.progress.checksum,
            damaged=self.trainer.damage.total,
        )

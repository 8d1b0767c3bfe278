"""The training loop."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import nn

from knl.comm.agreement import Named, require_same_weights
from knl.comm.collectives import Ranks, allreduce_numbers
from knl.comm.gradient_sync import Arrival, GradientSync
from knl.config import Recipe
from knl.data.dataset import Dataset
from knl.data.hashing import mix
from knl.data.lanes import Lanes, lanes_of
from knl.data.loader import Arrays, Batch, Loader
from knl.errors import NonFiniteError
from knl.models import build_model, require_pixels
from knl.optim.lars import Lars
from knl.optim.schedule import lr_at
from knl.train.batchnorm import RunningStatistics
from knl.train.damage import Damage
from knl.train.evaluate import Evaluation, evaluate
from knl.train.forward import forward, to_layout
from knl.train.metrics import StepMetrics
from knl.train.orders import ORDERS

# What is carried before the running statistics: loss, damaged records, ORDERS.
_COUNTED = 2 + len(ORDERS)

_MB = 1024 * 1024


def set_interop_threads() -> None:
    """As the node's plan has it; torch has no variable of its own for it."""
    if "KNL_INTEROP_THREADS" in os.environ:
        with contextlib.suppress(RuntimeError):  # a second job in one process finds it settled
            torch.set_num_interop_threads(int(os.environ["KNL_INTEROP_THREADS"]))


class Trainer:
    """A network in training on this rank: its lanes, its gradients, its optimiser.

    Raises InputError when the set is smaller than a global batch or its pictures do not fit the
    network, FailedError when the ranks' models differ.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, ranks: Ranks) -> None:
        train, comm = recipe.train, recipe.comm
        self.recipe, self.dataset, self.ranks = recipe, dataset, ranks
        self.timeout = comm.timeout_s
        self.lanes = Lanes(
            dataset.train_samples, train.lanes, train.lane_batch, train.seed, recipe.data.chunk
        )
        require_pixels(recipe.model, dataset.pixels)
        self.my_lanes = lanes_of(ranks.world.rank, ranks.world.size, train.lanes)
        torch.manual_seed(train.seed)
        model = build_model(recipe.model, dataset.channels, dataset.classes)
        model = to_layout(model, train.layout)
        self.plain = model
        self.model = torch.compile(model) if train.compile else model
        self.loss = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        self.statistics = RunningStatistics(model, len(self.my_lanes), train.lanes)
        self.named: Named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.sync = GradientSync(
            self.named,
            ranks,
            bucket_bytes=int(comm.bucket_mb * _MB),
            first_bucket_bytes=int(comm.first_bucket_mb * _MB),
            timeout=self.timeout,
            carry=_COUNTED + self.statistics.size,
            narrow=comm.dtype == "bf16",
        )
        o = recipe.optim
        self.damage = Damage(dataset, ranks, recipe.data.max_damaged, self.timeout)
        batch_bytes = 4 * train.lane_batch * dataset.channels * dataset.pixels**2
        self.loader = Loader(train.layout, batch_bytes, recipe.data.prefetch_mb)
        self._coming: Iterator[Batch] = iter(())
        self._coming_step = 0
        self._damaged = 0  # found in this step, summed over ranks
        self.optimiser = Lars(
            self.named,
            form=o.form,
            momentum=o.momentum,
            weight_decay=o.weight_decay,
            eta=o.eta,
            skip=o.skip,
        )
        self.agreed = dict.fromkeys(ORDERS, 0.0)
        self.skipped = 0
        self.check_weights("at the start")

    @property
    def total_steps(self) -> int:
        steps = max(1, round(self.recipe.train.epochs * self.lanes.steps_per_epoch))
        return min(steps, self.recipe.train.steps or steps)

    def epoch_at(self, step: int) -> float:
        """Epochs done after so many steps."""
        return step / self.lanes.steps_per_epoch

    def step(self, step: int, orders: Collection[str] = ()) -> StepMetrics:
        """One update over all lanes; `step` counts from 0. `orders`: which of ORDERS this rank has
        heard; then `agreed` says for each how many ranks have.

        Raises NonFiniteError on every rank, naming step, lane and layer. A loss at fault has not
        reached the weights; where a gradient is, layers after it may have moved.
        """
        batches = self._batches(step)
        lr = lr_at(self.recipe.schedule, self.epoch_at(step), self.recipe.train.epochs)
        began = time.perf_counter()
        t_data = t_forward = 0.0
        losses: list[float] = []
        before = self.statistics.copy() if self._skips else torch.zeros(0)
        self.sync.zero()
        for number, lane in enumerate(self.my_lanes):
            asked = time.perf_counter()
            images, labels = next(batches)
            given = time.perf_counter()
            lane_loss = self._forward(step, number, lane, images, labels)
            losses.append(float(lane_loss.item()))
            t_data += given - asked
            t_forward += time.perf_counter() - given
            if number == len(self.my_lanes) - 1:
                self._load(sum(losses), orders)
                self.sync.arm()
            lane_loss.backward()
        computed = time.perf_counter()
        try:
            loss = self._update(lr)
        except NonFiniteError as error:
            self.sync.finish()  # nothing may be under way when the ranks look for the cause
            if not self._may_leave_out(error):
                what = self._layer_at_fault() or str(error)
                raise self._diagnosis(step, lr, losses, what) from None
            self.statistics.take(before)
            self.skipped, loss = self.skipped + 1, math.nan
        self.damage.learn(self._damaged)
        report = self.optimiser.report()
        ended = time.perf_counter()
        return StepMetrics(
            step=step + 1,
            epoch=self.epoch_at(step + 1),
            loss=loss / self.recipe.train.lanes,
            lr=lr,
            images_per_s=self.lanes.global_batch / (ended - began),
            t_data=t_data,
            t_compute=computed - began - t_data,
            t_forward=t_forward,
            t_comm_exposed=self.sync.waited,
            t_optim=ended - computed - self.sync.waited,
            trust_min=report.trust_min,
            trust_max=report.trust_max,
        )

    def close(self) -> None:
        """End what makes batches ahead."""
        self.loader.close()

    def _batches(self, step: int) -> Iterator[Batch]:
        """The batches of this rank's lanes from a step on: those that are being made already, when
        steps follow one another."""
        if step != self._coming_step or step == 0 or step >= self.total_steps:
            self._coming = self.loader.run(self._makers(step))
        self._coming_step = step + 1
        return self._coming

    def _makers(self, first: int) -> Iterator[Callable[[], Arrays]]:
        for step in range(first, max(self.total_steps, first + 1)):
            epoch, step_in_epoch = divmod(step, self.lanes.steps_per_epoch)
            for lane in self.my_lanes:
                samples = self.lanes.batch(epoch, step_in_epoch, lane)
                yield partial(self.dataset.train_batch, samples, epoch)

    def _forward(
        self, step: int, number: int, lane: int, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss of one lane, whose backward adds to the gradients of the lanes before."""
        # Dropout masks are the lane's, whichever rank computes it.
        seed = int(mix(self.recipe.train.seed, step, lane)[0]) >> 1
        torch.default_generator.manual_seed(seed)
        self.statistics.begin_lane(number)
        outputs = forward(self.model, images, self.recipe.train.dtype)
        return self.loss(outputs.float(), labels)

    def _load(self, loss: float, orders: Collection[str]) -> None:
        """What travels with the first gradients: loss, counts, running statistics."""
        carried = self.sync.carried
        numbers = [loss, self.damage.here(), *(float(order in orders) for order in ORDERS)]
        carried[:_COUNTED] = torch.tensor(numbers)
        self.statistics.give(carried[_COUNTED:])

    def _unload(self) -> float:
        """Take what has come; returns the loss, summed over all lanes."""
        carried = self.sync.carried
        loss, damaged, *counts = carried[:_COUNTED].tolist()
        self._damaged = round(damaged)
        self.agreed = dict(zip(ORDERS, counts))
        if self.ranks.world.size > 1:
            self.statistics.take(carried[_COUNTED:])
        return loss  # type: ignore[no-any-return]

    def _update(self, lr: float) -> float:
        """Move the weights bucket by bucket, while the sums of later ones are under way. Returns
        the loss, summed over all lanes. Raises NonFiniteError naming it or the gradient at fault;
        where it is the loss, before any weight has moved."""
        scale, loss = 1.0 / self.recipe.train.lanes, float("nan")
        arrivals = self.sync.arrivals()
        if self._skips:
            arrivals = self._if_finite(arrivals)
        for number, (members, gradients) in enumerate(arrivals):
            if number == 0:
                loss = self._unload()
                if not math.isfinite(loss):
                    raise _NothingMovedError("loss")
            try:
                squares = self.sync.squares(members)
                self.optimiser.update(members, gradients, lr, scale, squares)
            except NonFiniteError as error:
                raise NonFiniteError(f"gradient of {error}") from None
        return loss

    def _if_finite(self, arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
        """Hold all buckets back until every gradient is known to be a number. Sums are the same on
        all ranks, so they agree."""
        held = list(arrivals)
        for members, gradients in held:
            for number, gradient in zip(members, gradients):
                if gradient is not None and not torch.isfinite(gradient).all():
                    self._unload()
                    raise _NothingMovedError(f"gradient of {self.named[number][0]}")
        return iter(held)

    @property
    def _skips(self) -> bool:
        return self.recipe.train.on_nonfinite == "skip"

    def _may_leave_out(self, error: NonFiniteError) -> bool:
        """Whether the run may go on without this step's update."""
        within = self.skipped < self.recipe.train.max_skipped
        return self._skips and within and isinstance(error, _NothingMovedError)

    def _layer_at_fault(self) -> str:
        """The first layer whose summed gradient is not finite; "" where all are."""
        for name, parameter in self.named:
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"gradient of {name}"
        return ""

    def evaluate(self) -> Evaluation:
        """Accuracy with the running statistics of all lanes."""
        return evaluate(
            self.model, self.dataset, self.loader, self.recipe.train, self.ranks, self.timeout
        )

    def check_weights(self, when: str) -> str:
        """The checksum of the weights. Raises FailedError naming the tensor and the rank where one
        has drifted, in the weights or in the running statistics."""
        statistics = [(f"running statistics {n}", b) for n, b in enumerate(self.statistics.buffers)]
        return require_same_weights(self.ranks, [*self.named, *statistics], when, self.timeout)

    def _diagnosis(self, step: int, lr: float, losses: list[float], what: str) -> NonFiniteError:
        """The same error on every rank: which lanes lost their footing, whoever computed them."""
        flags = [0.0] * self.recipe.train.lanes
        for lane, loss in zip(self.my_lanes, losses):
            flags[lane] = float(not math.isfinite(loss))
        flags = allreduce_numbers(self.ranks.collectives, flags, self.timeout, "diagnosis")
        lanes = [lane for lane, flag in enumerate(flags) if flag]
        epoch, step_in_epoch = divmod(step, self.lanes.steps_per_epoch)
        samples = {n: self.lanes.batch(epoch, step_in_epoch, n).tolist() for n in lanes}
        where = "no lane's loss, but sums"
        if lanes:
            listed = ", ".join(str(lane) for lane in lanes[:8]) + (" ..." if lanes[8:] else "")
            first = ", ".join(str(sample) for sample in samples[lanes[0]][:8])
            where = f"the loss of lane(s) {listed} (lane {lanes[0]} saw samples {first} ...)"
        left_out = f", after {self.skipped} steps left out" if self.skipped else ""
        report = self.optimiser.report()
        return NonFiniteError(
            f"step {step + 1}: {what} is not finite, from {where}{left_out}; lr was {lr:g}: "
            f"trust ratios were {report.trust_min:.3g} to {report.trust_max:.3g}; "
            "lower schedule.lr, lengthen schedule.warmup_epochs, or check these samples",
            shared=True,
            detail={
                "step": step + 1,
                "what": what,
                "lr": lr,
                "samples_of_lanes": {str(lane): found for lane, found in samples.items()},
                "trust": dict(zip(self.optimiser.names, self.optimiser.trust.tolist())),
            },
        )


class _NothingMovedError(NonFiniteError):
    """Found before any weight has moved."""

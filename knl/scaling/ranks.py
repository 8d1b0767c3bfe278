"""The ranks of a study's point: steps of training, timed on each. `python -m knl.scaling.ranks W`.

W is JSON: {"recipe": of the point, "ranks": how many must be there, "steps", "warmup"}. Rank 0
writes one JSON object a line to stdout: {"step", "step_s"} after each step; then {"measured": keys
of Point and of Study}. A rank that fails writes its reason to stderr and takes the others down.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import msgspec
import torch

from knl.comm.bootstrap import Bootstrap, open_bootstrap, together
from knl.comm.collectives import open_ranks
from knl.comm.gradient_sync import GradientSync
from knl.comm.watchdog import end_job
from knl.comm.world import World, world_from
from knl.config import Recipe
from knl.data.dataset import Dataset, open_dataset
from knl.errors import FailedError, KnlError
from knl.packages import version_of
from knl.profile import fingerprint
from knl.scaling.breakdown import Timed, summary
from knl.sysfs import read_topology
from knl.train.job import resolved
from knl.train.metrics import StepMetrics
from knl.train.trainer import Trainer, set_interop_threads


def main(wanted: dict[str, Any]) -> None:
    """Nothing but facts may stand on stdout, which libraries write to as well."""
    from knl.native import stdout_to

    with stdout_to(2) as stdout:

        def tell(**fact: object) -> None:
            os.write(stdout, b"\n" + json.dumps(fact, allow_nan=False).encode() + b"\n")

        try:
            _measure(wanted, tell)
        except BaseException as error:
            kind = "" if isinstance(error, KnlError) else f"{type(error).__name__}: "
            print(kind + " ".join(str(error).split()), file=sys.stderr, flush=True)
            end_job(FailedError.exit_code)


def _measure(wanted: dict[str, Any], tell: Callable[..., None]) -> None:
    set_interop_threads()
    world = world_from(os.environ)
    if world.size != wanted["ranks"]:
        raise FailedError(f"{wanted['ranks']} rank(s) were asked for, {world.size} came")
    bootstrap = open_bootstrap(world)
    recipe = together(bootstrap, lambda: resolved(msgspec.convert(wanted["recipe"], Recipe)))
    ranks = open_ranks(world, bootstrap, "auto", recipe.comm.timeout_s)
    dataset = together(bootstrap, lambda: open_dataset(recipe.data, recipe.train.seed))
    warmup, steps = wanted["warmup"], wanted["steps"]
    recipe = long_enough(recipe, dataset, warmup + steps)
    trainer = together(bootstrap, lambda: Trainer(recipe, dataset, ranks))
    gradients = GradientTimes(trainer)
    timed: list[Timed] = []
    metrics: list[StepMetrics] = []
    for step in range(warmup + steps):
        ranks.collectives.barrier()
        began = time.perf_counter()
        found = trainer.step(step)
        whole = time.perf_counter() - began
        metrics.append(found)
        timed.append(
            Timed(found.t_data, found.t_compute, found.t_comm_exposed, found.t_optim, whole)
        )
        if world.rank == 0:
            tell(step=step + 1, step_s=whole)
    point = _gathered(timed[warmup:], world, bootstrap)
    trainer.close()
    ranks.collectives.close()
    if world.rank == 0:
        tell(measured={**point, **_of_network(trainer, gradients, metrics[warmup:]), **_of_node()})


def long_enough(recipe: Recipe, dataset: Dataset, steps: int) -> Recipe:
    """With epochs for so many steps: the loader makes batches ahead within a run alone."""
    per_epoch = max(1, dataset.train_samples // recipe.global_batch)
    epochs = max(recipe.train.epochs, math.ceil(steps / per_epoch))
    train = msgspec.structs.replace(recipe.train, epochs=epochs, steps=0)
    return msgspec.structs.replace(recipe, train=train)


class GradientTimes:
    """Notes, on rank 0, when each gradient is there: seconds after the begin of the backward of the
    rank's last lane. A mark a parameter costs a microsecond."""

    def __init__(self, trainer: Trainer) -> None:
        self._began = 0.0
        self.seconds: list[dict[int, float]] = []
        self._nodes: list[Any] = []
        if trainer.ranks.world.rank:
            return
        trainer.loss.register_forward_hook(lambda *_: self._begin())
        for number, (_, parameter) in enumerate(trainer.named):
            node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            node.register_hook(lambda *_, n=number: self._note(n))
            self._nodes.append(node)  # it exists as long as somebody holds it

    def _begin(self) -> None:
        self._began = time.perf_counter()
        self.seconds.append({})

    def _note(self, number: int) -> None:
        self.seconds[-1][number] = time.perf_counter() - self._began

    def medians(self, backwards: int) -> dict[int, float]:
        """Of each parameter's gradient, over the last so many backwards, soonest first."""
        last = self.seconds[-backwards:]
        found = {n: median(each[n] for each in last if n in each) for n in last[0]}
        return dict(sorted(found.items(), key=lambda item: item[1]))


def _gathered(timed: list[Timed], world: World, bootstrap: Bootstrap) -> dict[str, Any]:
    told = [platform.node(), [list(asdict(step).values()) for step in timed]]
    everyone = [json.loads(text) for text in bootstrap.gather(json.dumps(told))]
    if world.rank:
        return {}
    return summary(
        [[Timed(*step) for step in steps] for _, steps in everyone], [host for host, _ in everyone]
    )


def _of_network(
    trainer: Trainer, gradients: GradientTimes, metrics: list[StepMetrics]
) -> dict[str, Any]:
    """Sizes of gradients and buckets, and when they are ready."""
    lanes, sync = len(trainer.my_lanes), trainer.sync
    ready = gradients.medians(len(metrics) * lanes)
    order = sync.order or [*ready]
    order += [n for n in range(len(trainer.named)) if n not in order]
    sizes = [p.numel() * p.element_size() for _, p in trainer.named]
    return {
        "samples": trainer.dataset.train_samples,
        "parameters": sum(parameter.numel() for _, parameter in trainer.named),
        "tensors": [{"name": trainer.named[n][0], "bytes": sizes[n]} for n in order],
        "buckets": _ready_buckets(sync, order, sizes, ready),
        "forward_s": median(m.t_forward for m in metrics) / lanes,
        "backward_s": median(m.t_compute - m.t_forward for m in metrics) / lanes,
    }


def _ready_buckets(
    sync: GradientSync, order: list[int], sizes: list[int], ready: dict[int, float]
) -> list[dict[str, Any]]:
    """As gradient sync lays them out, one after another: none starts before the one before it."""
    buckets, latest = [], 0.0
    for index, members in enumerate(sync.group(order)):
        latest = max([latest, *(ready.get(n, 0.0) for n in members)])
        total = sum(sizes[n] for n in members)
        buckets.append({"index": index, "bytes": total, "ready_s": latest})
    return buckets


def _of_node() -> dict[str, Any]:
    found = msgspec.to_builtins(fingerprint(read_topology()))
    stack = {**found.pop("stack"), "python": platform.python_version()}
    stack["knl"] = version_of("knl") or ""
    stack["torch"] = str(torch.__version__)
    return {"hardware": found, "stack": stack}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""A trial's child: real training steps on made-up pictures, timed. `python -m knl.tune.steps FILE`.

Rank 0 writes one JSON object a line to stdout: {"step_s": seconds} for each step, the first of
which warms up, then {"peak_bytes": the largest rank's}. A rank that fails writes {"reason": why}
and takes the others down.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable

from knl.comm.watchdog import end_job
from knl.comm.world import world_from
from knl.errors import FailedError, KnlError

_KIB = 1024


def main(recipe_file: str, steps: int) -> None:
    """`steps`: to do after the one that warms up."""
    from knl.native import stdout_to

    with stdout_to(2) as stdout:

        def tell(**fact: object) -> None:
            os.write(stdout, json.dumps(fact).encode() + b"\n")

        try:
            _train(recipe_file, steps, tell)
        except BaseException as error:
            kind = "" if isinstance(error, KnlError) else f"{type(error).__name__}: "
            tell(reason=kind + " ".join(str(error).split()))
            end_job(FailedError.exit_code)


def _train(recipe_file: str, steps: int, tell: Callable[..., None]) -> None:
    from knl.comm.bootstrap import open_bootstrap
    from knl.comm.collectives import open_ranks
    from knl.config import load_recipe
    from knl.data.dataset import open_dataset
    from knl.train.trainer import Trainer, set_interop_threads

    set_interop_threads()
    world = world_from(os.environ)
    recipe = load_recipe(recipe_file)
    bootstrap = open_bootstrap(world)
    ranks = open_ranks(world, bootstrap, "auto", recipe.comm.timeout_s)
    trainer = Trainer(recipe, open_dataset(recipe.data, recipe.train.seed), ranks)
    for step in range(steps + 1):
        metrics = trainer.step(step)
        if world.rank == 0:
            tell(step_s=recipe.global_batch / metrics.images_per_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    peaks = [int(text) for text in bootstrap.gather(str(peak))]
    if world.rank == 0:
        tell(peak_bytes=max(peaks))
    ranks.collectives.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

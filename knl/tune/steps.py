"""A trial's child: real training steps on made-up pictures, timed. `python -m knl.tune.steps FILE`.

Rank 0 writes one JSON object a line to stdout: {"step_s": seconds} for each step, the first of
which warms up, then {"peak_bytes": the largest rank's}.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from knl.comm.world import world_from
from knl.errors import KnlError

_KIB = 1024


def main(recipe_file: str, steps: int) -> None:
    """`steps`: to do after the one that warms up."""
    import torch

    from knl.comm.bootstrap import open_bootstrap
    from knl.comm.collectives import open_ranks
    from knl.config import load_recipe
    from knl.data.dataset import open_dataset
    from knl.native import stdout_to
    from knl.train.trainer import Trainer

    torch.set_num_interop_threads(int(os.environ.get("KNL_INTEROP_THREADS", "1")))
    world = world_from(os.environ)
    recipe = load_recipe(recipe_file)
    with stdout_to(2) as stdout:

        def tell(**fact: object) -> None:
            if world.rank == 0:
                os.write(stdout, json.dumps(fact).encode() + b"\n")

        bootstrap = open_bootstrap(world)
        ranks = open_ranks(world, bootstrap, "auto", recipe.comm.timeout_s)
        trainer = Trainer(recipe, open_dataset(recipe.data, recipe.train.seed), ranks)
        for step in range(steps + 1):
            metrics = trainer.step(step)
            tell(step_s=recipe.global_batch / metrics.images_per_s)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
        tell(peak_bytes=max(map(int, bootstrap.gather(str(peak)))))
        ranks.collectives.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except KnlError as error:
        sys.exit(f"knl: {error}")

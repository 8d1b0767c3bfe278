"""The parts of a training step: `python -m knl.bench.step_parts WANTED`, as ranks under a plan.

WANTED is JSON: {"recipe": path, "steps": how many after one that warms up}. Rank 0 tells the
"breakdown" (median seconds of forward, backward, sync, lars, data), the "conv_share" and the
"linear_share" of the step's CPU time that torch's profiler finds in convolutions and in fully
connected layers, and "ops": the largest shares.
"""

from __future__ import annotations

import os
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile

from knl.bench.ranks import as_rank
from knl.comm.bootstrap import open_bootstrap
from knl.comm.collectives import open_ranks
from knl.comm.world import world_from
from knl.config import load_recipe
from knl.data.dataset import open_dataset
from knl.train.trainer import Trainer, set_interop_threads

_SHOWN = 10
# Matrix products, as torch and IPEX name them; a network has them in fully connected layers alone.
_LINEAR = ("aten::mm", "aten::addmm", "aten::mkl_linear", "aten::mkldnn_linear", "ipex_linear")


def _measure(wanted: dict[str, Any]) -> dict[str, Any] | None:
    set_interop_threads()
    world = world_from(os.environ)
    recipe = load_recipe(wanted["recipe"])
    bootstrap = open_bootstrap(world)
    ranks = open_ranks(world, bootstrap, "auto", recipe.comm.timeout_s)
    trainer = Trainer(recipe, open_dataset(recipe.data, recipe.train.seed), ranks)
    steps = [trainer.step(number) for number in range(wanted["steps"] + 1)][1:]
    # Twice: the profiler's own memory makes the first step that it sees touch new pages.
    for number in (1, 2):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            trainer.step(len(steps) + number)
    ranks.collectives.close()
    if world.rank != 0:
        return None
    taken = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    whole = sum(taken.values())
    largest = sorted(taken.items(), key=lambda item: -item[1])[:_SHOWN]
    return {
        "breakdown": {
            "forward_s": median(s.t_forward for s in steps),
            "backward_s": median(s.t_compute - s.t_forward for s in steps),
            "sync_s": median(s.t_comm_exposed for s in steps),
            "lars_s": median(s.t_optim for s in steps),
            "data_s": median(s.t_data for s in steps),
        },
        # _Convolution, aten::convolution_backward, torch_ipex::convolution_forward, ...
        "conv_share": sum(t for name, t in taken.items() if "onvolution" in name) / whole,
        "linear_share": sum(t for name, t in taken.items() if name.endswith(_LINEAR)) / whole,
        "ops": [{"name": name, "share": t / whole} for name, t in largest],
    }


if __name__ == "__main__":
    as_rank(_measure)

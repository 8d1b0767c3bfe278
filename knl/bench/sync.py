"""`knl bench sync`: backward and gradient sync under our layer and under DDP; and the overlap."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from statistics import median
from typing import Any

from knl.bench.ranks import run_ranks
from knl.config import load_recipe
from knl.profile import pixels_of, plan_for
from knl.sysfs import read_topology

ROUNDS = 5
_MODULE = "knl.bench.sync_ranks"
_LIMIT_S = 600.0
_PIXELS = 224


def bench(
    ranks: int, recipe: str, images: int, rounds: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Measure; the object that `knl bench sync --json` prints, its keys are a contract.

    A row: the median seconds of forward, backward and sync of `images` a rank under a rival, and
    their ratio to those of DistributedDataParallel over gloo (below 1 is faster). `overlap`: a
    backward that only sleeps, as long as the communication alone takes, with oneCCL's workers on:
    seconds of both alone and together, and the ratio of these to the larger and to the sum of both.

    Raises InputError for a wrong recipe, FailedError when ranks fail or gradients differ.
    """
    pixels = pixels_of(load_recipe(recipe)) or _PIXELS
    wanted = {"recipe": recipe, "images": images, "pixels": pixels, "rounds": rounds}
    told = run_ranks(_MODULE, ranks, {**wanted, "what": "step"}, environment, _LIMIT_S)
    working = {**environment, **_workers(ranks, environment)}
    overlap = run_ranks(_MODULE, ranks, {**wanted, "what": "overlap"}, working, _LIMIT_S)
    medians = {name: median(seconds) for name, seconds in told["seconds"].items()}
    return {
        "ranks": ranks,
        "node": platform.node(),
        "recipe": recipe,
        "images": images,
        "pixels": pixels,
        "layout": told["layout"],
        "versions": told["versions"],
        "missing": told["missing"],
        "rows": [
            {"rival": name, "median_s": taken, "ratio_to_ddp": taken / medians["ddp-gloo"]}
            for name, taken in medians.items()
        ],
        "overlap": {
            **overlap,
            "ratio_to_max": overlap["step_s"] / max(overlap["compute_s"], overlap["comm_s"]),
            "ratio_to_sum": overlap["step_s"] / (overlap["compute_s"] + overlap["comm_s"]),
        },
    }


def _workers(ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """One worker a rank, on its comm CPU or else its last compute CPU: sleeping ranks leave it."""
    plan, _ = plan_for(read_topology(), ranks, None, environment)
    cpus = [(rank.comm_cpus or rank.compute_cpus[-1:])[0] for rank in plan.ranks]
    return {
        "CCL_WORKER_COUNT": "1",
        "CCL_WORKER_OFFLOAD": "1",
        "CCL_WORKER_AFFINITY": ",".join(map(str, cpus)),
    }


def describe(result: Mapping[str, Any]) -> str:
    """The result in lines for a reader."""
    lines = [
        f"{result['recipe']}, {result['ranks']} ranks x {result['images']} images of "
        f"{result['pixels']} px, {result['layout']}; forward, backward and sync"
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['rival']:<10}{row['median_s'] * 1e3:>9.1f} ms  {row['ratio_to_ddp']:.2f} of DDP"
        )
    both = result["overlap"]
    lines.append(
        f"overlap: sleeps {both['compute_s'] * 1e3:.0f} ms, communication "
        f"{both['comm_s'] * 1e3:.0f} ms, together {both['step_s'] * 1e3:.0f} ms: "
        f"{both['ratio_to_max']:.2f} of the larger, {both['ratio_to_sum']:.2f} of the sum"
    )
    return "\n".join(lines)

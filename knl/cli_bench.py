"""`knl bench`: commands that measure a part beside its peers in the same run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import typer

from knl.comm.world import SINGLE

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a part beside its peers: ratios of medians, taken in turn in one run.",
)

_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
_ROUNDS = typer.Option(0, "--rounds", min=0, help="Measurements of each rival; 0 for the usual.")


@app.command()
def lars(
    recipe: str = typer.Option("resnet50-bench", help="Recipe whose network is updated."),
    rounds: int = _ROUNDS,
    as_json: bool = _JSON,
) -> None:
    """Time one update of a network by LARS, beside torch's SGD and a LARS of torch calls.

    Example: knl bench lars --recipe alexnet-bn-32k

    The limit is the time in which memory moves weights, gradients and momentum once: five passes,
    at the rate of a triad measured in the same rounds.
    """
    from knl.config import load_recipe

    found = load_recipe(recipe)
    _under_plan()
    from knl.bench.lars import bench_lars, describe

    _print(bench_lars(found, rounds), describe, as_json)


@app.command()
def step(
    recipe: str = typer.Option("resnet50-bench", help="Recipe whose network is trained."),
    images: int = typer.Option(0, min=0, help="Of a step on the node; 0 for the recipe's lane."),
    steps: int = typer.Option(0, min=0, help="Of each round, after one to warm up; 0 for 3."),
    profile: Optional[Path] = typer.Option(
        None, help="A profile of knl tune; the newest that fits this node if not given."
    ),
    rounds: int = _ROUNDS,
    as_json: bool = _JSON,
) -> None:
    """Train a network by knl and by a plain script of torch, in turn, on made-up pictures.

    Example: knl bench step --recipe alexnet-bn-32k --json

    The plain script has torch's own settings; run_cpu is the same under torch's launcher; rule and
    tuned are knl under its plan by rule and under a profile. Also: where the time of a step goes,
    and the share of convolutions, which are the limit.
    """
    from knl.bench.step import ROUNDS, STEPS, bench, describe
    from knl.config import load_recipe
    from knl.sysfs import read_topology

    found = load_recipe(recipe)
    result = bench(
        read_topology(Path("/")),
        found,
        images or found.train.lane_batch,
        steps or STEPS,
        rounds or ROUNDS,
        profile,
        os.environ,
    )
    _print(result, describe, as_json)


@app.command()
def allreduce(
    ranks: int = typer.Option(2, "-n", min=2, help="Ranks to start on this host."),
    sizes: list[int] = typer.Option(
        [], "--bytes", min=4, help="A size to measure; repeatable. 4 KB to 244 MB if not given."
    ),
    rounds: int = _ROUNDS,
    as_json: bool = _JSON,
) -> None:
    """Sum over ranks: each provider beside IMB-MPI1, gloo, a bare oneCCL call and a copy.

    Example: knl bench allreduce -n 2 --json
    """
    from knl.bench.allreduce import ROUNDS, SIZES, bench, describe

    wanted = sorted({size // 4 * 4 for size in sizes} or SIZES)
    _print(bench(ranks, wanted, rounds or ROUNDS, os.environ), describe, as_json)


@app.command()
def sync(
    ranks: int = typer.Option(2, "-n", min=2, help="Ranks to start on this host."),
    recipe: str = typer.Option("resnet50-bench", help="Recipe whose network is used."),
    images: int = typer.Option(2, min=1, help="Images of a rank."),
    rounds: int = _ROUNDS,
    as_json: bool = _JSON,
) -> None:
    """Backward and gradient sync: our layer beside DistributedDataParallel; and their overlap.

    Example: knl bench sync -n 2 --images 4 --json
    """
    from knl.bench.sync import ROUNDS, bench, describe

    _print(bench(ranks, recipe, images, rounds or ROUNDS, os.environ), describe, as_json)


@app.command()
def overhead(
    ranks: list[int] = typer.Option([], "-n", min=1, help="Ranks; repeatable. 1, 2, 4, 8 if not."),
    tensors: list[int] = typer.Option(
        [], "--tensors", min=1, help="Tensors; repeatable. 10, 100, 300, 1000 if not given."
    ),
    rounds: int = _ROUNDS,
    as_json: bool = _JSON,
) -> None:
    """Seconds of a step in our own code, outside torch and communication: a line, not a curve.

    Example: knl bench overhead --json
    """
    from knl.bench.overhead import RANKS, ROUNDS, TENSORS, bench, describe

    _print(
        bench(sorted(set(tensors)) or TENSORS, ranks or RANKS, rounds or ROUNDS, os.environ),
        describe,
        as_json,
    )


@app.command()
def data(
    recipe: str = typer.Option("resnet50-bench", help="Recipe whose step reads the images."),
    steps: int = typer.Option(3, min=0, help="Steps of it, after one to warm up; 0 for none."),
    rounds: int = _ROUNDS,
    as_json: bool = _JSON,
) -> None:
    """From record to batch on one core: our loader beside PIL and libjpeg-turbo alone.

    Example: knl bench data --json

    JPEGs as ImageNet has them with random resized crop, JPEGs of short side 256 and raw records
    with plain crop; and how long a training step that reads them has to wait.
    """
    from knl.bench.data import ROUNDS, bench, describe
    from knl.config import load_recipe

    result = bench(load_recipe(recipe), rounds or ROUNDS, steps, os.environ)
    _print(result, describe, as_json)


def _under_plan() -> None:
    """Measure as training would run: bound, in the plan's environment."""
    from knl.bind import PLAN
    from knl.run import become_planned

    if PLAN not in os.environ:
        become_planned(SINGLE, None)


def _print(
    result: dict[str, Any], describe: Callable[[dict[str, Any]], str], as_json: bool
) -> None:
    print(json.dumps(result) if as_json else describe(result))

"""The `knl` command: parses, calls, prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Optional

import typer

from knl import (
    __version__,
    cli_bench,
    cli_bundle,
    cli_checkpoint,
    cli_data,
    cli_node,
    cli_scale,
    cli_slurm,
    cli_study,
)
from knl.comm.watchdog import end_job
from knl.comm.world import SINGLE, Provider, World, world_from
from knl.errors import FailedError, InputError, KnlError, say
from knl.train.orders import parse_time

if TYPE_CHECKING:
    from knl.config import Recipe

STDERR = 2

app = typer.Typer(
    name="knl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Trains ImageNet-class networks with LARS on CPU clusters.",
)


def main() -> None:
    """Entry point: every KnlError ends as one line on stderr and its exit code."""
    _forget_threads_of_module()
    try:
        app()
    except KnlError as error:
        _fail(str(error), error.exit_code, shared=error.shared)
    except KeyboardInterrupt:
        _fail("interrupted", FailedError.exit_code, shared=False)
    except Exception as error:
        if "KNL_TRACEBACK" in os.environ:
            raise
        kind, text = type(error).__name__, " ".join(str(error).split())
        _fail(
            f"internal error, please report it: {kind}: {text} (KNL_TRACEBACK=1 shows where)",
            FailedError.exit_code,
            shared=False,
        )


def _forget_threads_of_module() -> None:
    """The knl module sets OMP_NUM_THREADS for other programs, and says so: it is not the user's."""
    threads = os.environ.pop("KNL_MODULE_OMP_NUM_THREADS", None)
    if threads is not None and threads == os.environ.get("OMP_NUM_THREADS"):
        del os.environ["OMP_NUM_THREADS"]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"knl {__version__}")
        raise typer.Exit


# Defaults carry the options, as Typer on Python 3.9 does not see Annotated behind a deferred
# annotation.
@app.callback()
def _knl(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


@app.command()
def train(
    recipe: Optional[str] = typer.Argument(None, help="Name of a recipe, or path of a TOML file."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
    ),
    run_dir: Optional[Path] = typer.Option(
        None,
        help="Folder to write into, where a run goes on from its newest checkpoint; "
        "runs/RECIPE-TIME if not given.",
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Start anew in --run-dir; what is there moves into old-001 below it."
    ),
    max_time: Optional[str] = typer.Option(
        None, help="Stop after so long, with a checkpoint and exit status 75: 90s, 45m, 1.5h."
    ),
    max_steps: int = typer.Option(
        0, min=0, help="Stop after so many steps of this start in the same way; 0 for no limit."
    ),
    ranks: Optional[int] = typer.Option(
        None, "-n", min=1, help="Ranks to start on this host; the profile's if not given, else 1."
    ),
    profile: Optional[str] = typer.Option(
        None,
        help="A profile of knl tune; the newest that fits this node if not given, else the rule; "
        "none leaves the ranks as they come.",
    ),
    provider: Provider = typer.Option(
        "auto", help="Collectives; auto takes the first that works and says which."
    ),
    stage: Optional[Path] = typer.Option(
        None,
        metavar="DIR",
        help="Node-local folder: each node first copies what its lanes need of a packed set there; "
        "where there is no room it reads in place and says so.",
    ),
    as_json: bool = typer.Option(
        False, "--json", help="Print the result as one JSON object on stdout."
    ),
    list_recipes: bool = typer.Option(False, "--list", help="List the recipes that come with knl."),
    print_recipe: bool = typer.Option(
        False, "--print", help="Print the recipe as resolved, and stop."
    ),
) -> None:
    """Train a recipe.

    Example: knl train digits -n 2 --set train.epochs=10

    Under srun --mpi=pmi2, ibrun, mpiexec or torchrun the same command without -n becomes the rank
    that it is; use one of those for several hosts.
    """
    from knl.config import load_recipe, recipe_names, to_toml

    if list_recipes:
        print("\n".join(recipe_names()))
        return
    if recipe is None:
        raise InputError("which recipe? knl train --list names those that come with knl")
    if print_recipe:
        print(to_toml(load_recipe(recipe, overrides)), end="")
        return
    world = world_from(os.environ)
    if ranks is not None and world.launcher != "single":
        raise InputError(
            f"-n {ranks}: this is already rank {world.rank} of {world.size} of a launch by "
            f"{world.launcher}; leave -n out here, or start knl without a launcher",
            shared=True,
        )
    if fresh and run_dir is None:
        raise InputError("--fresh: of which run? name it with --run-dir", shared=True)
    if max_time is not None:
        parse_time(max_time, "--max-time")
    request = _Request(
        recipe, overrides, run_dir, profile, provider, stage, as_json, fresh, max_time, max_steps
    )
    if ranks is None and world.launcher == "single":
        ranks = _ranks_of_profile(request)
    if ranks is None or ranks == 1:
        _train_as_rank(world, request)
    else:
        _train_as_launcher(ranks, request)


for command in (*cli_node.COMMANDS, *cli_slurm.COMMANDS):
    app.command()(command)
app.command()(cli_bundle.bundle)
app.add_typer(cli_bench.app)
app.add_typer(cli_data.app)
app.add_typer(cli_checkpoint.app)
app.add_typer(cli_scale.app)
app.command()(cli_study.report)


@dataclass(frozen=True)
class _Request:
    """What `knl train` was asked for."""

    recipe: str
    overrides: list[str]
    run_dir: Path | None
    profile: str | None
    provider: str
    stage: Path | None
    as_json: bool
    fresh: bool
    max_time: str | None
    max_steps: int

    @property
    def profile_path(self) -> Path | None:
        return Path(self.profile) if self.profile else None


def _ranks_of_profile(request: _Request) -> int:
    """As many as were measured to be best, as far as there are lanes for them; 1 without one."""
    from knl.bind import PLAN
    from knl.config import load_recipe
    from knl.profile import load_profile, newest_that_fits
    from knl.sysfs import read_topology

    if PLAN in os.environ or request.profile == "none":
        return 1
    path = request.profile_path or newest_that_fits(read_topology(), os.environ)
    if path is None:
        return 1
    ranks = load_profile(path).plan.choices.ranks_per_node
    return min(ranks, load_recipe(request.recipe, request.overrides).train.lanes)


def _train_as_launcher(ranks: int, request: _Request) -> None:
    """Refuse what can be refused before anything starts, then start the ranks."""
    cli_node.refuse_under_plan(f"-n {ranks}")
    from knl.config import load_recipe, require_ranks_fit
    from knl.launch import launch
    from knl.profile import load_profile

    require_ranks_fit(load_recipe(request.recipe, request.overrides), ranks)
    if request.profile not in (None, "none"):
        load_profile(Path(str(request.profile)))
    arguments = ["train", request.recipe, "--provider", request.provider]
    if request.profile:
        arguments += ["--profile", request.profile]
    for override in request.overrides:
        arguments += ["--set", override]
    if request.run_dir is not None:
        arguments += ["--run-dir", str(request.run_dir)]
    if request.stage is not None:
        arguments += ["--stage", str(request.stage)]
    if request.max_time is not None:
        arguments += ["--max-time", request.max_time]
    if request.max_steps:
        arguments += ["--max-steps", str(request.max_steps)]
    arguments += ["--fresh"] if request.fresh else []
    arguments += ["--json"] if request.as_json else []
    columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    raise typer.Exit(launch(ranks, arguments, columns, planned=request.profile != "none"))


def _train_as_rank(world: World, request: _Request) -> None:
    from knl.bind import PLAN
    from knl.launch import become_ready

    if PLAN in os.environ or request.profile == "none":
        if world.launcher == "mpi":
            become_ready()
    else:
        from knl.run import become_planned

        become_planned(world, request.profile_path, _recipe_if_good(request))
    from knl.comm.bootstrap import open_bootstrap
    from knl.native import stdout_to
    from knl.train.job import Request, run_job
    from knl.train.phases import Phases

    phases = Phases()
    phases.end("Python")

    asked = Request(
        request.recipe,
        request.overrides,
        request.run_dir,
        request.provider,
        request.stage,
        request.fresh,
        parse_time(request.max_time, "--max-time") if request.max_time else None,
        request.max_steps,
    )
    with stdout_to(STDERR) as stdout:  # nothing but the result may stand there
        bootstrap = open_bootstrap(world)
        phases.end("MPI")
        result = run_job(world, bootstrap, asked, phases)
        if request.as_json and result is not None:
            os.write(stdout, json.dumps(result).encode() + b"\n")


def _recipe_if_good(request: _Request) -> Recipe | None:
    """None where it is not: the ranks will say so together."""
    from knl.config import load_recipe

    try:
        return load_recipe(request.recipe, request.overrides)
    except InputError:
        return None


def _fail(message: str, code: int, *, shared: bool) -> NoReturn:
    """One line, then the end: an orderly one where every rank fails alike, else by taking the other
    ranks down, who would wait for this one."""
    try:
        world = world_from(os.environ)
    except KnlError:
        world = replace(SINGLE, rank=int(os.environ.get("SLURM_PROCID", 0)))
    if world.rank == 0 or not shared:
        who = f"rank {world.rank}: " if world.size > 1 and not shared else ""
        say(f"{who}{message}")
    if world.size > 1 and not shared:
        end_job(code)
    sys.exit(code)

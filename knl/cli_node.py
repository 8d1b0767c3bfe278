"""Commands about one node: topology, doctor, plan, show, env, run, tune."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer

from knl.comm.world import world_from
from knl.errors import InputError, say

if TYPE_CHECKING:
    from knl.topology import Topology

_STOPPED_EARLY = 75

_FSROOT = typer.Option(Path("/"), help="Read a node's /proc and /sys below this folder.")
_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
_PROFILE = typer.Option(
    None,
    "--profile",
    help="A profile of knl tune; the newest that fits this node if not given, else the rule.",
)


def topology(
    fsroot: Path = _FSROOT,
    xml: Optional[Path] = typer.Option(None, help="Read a file of hwloc's lstopo instead."),
    as_json: bool = _JSON,
) -> None:
    """Show what the node is: cores, tiles, memory, and what of it may be used.

    Example: knl topology --json
    """
    from knl.topology import describe

    node = _read(fsroot, xml)
    print(json.dumps(node.to_json()) if as_json else describe(node))


def plan(
    fsroot: Path = _FSROOT,
    xml: Optional[Path] = typer.Option(None, help="Read a file of hwloc's lstopo instead."),
    ranks: Optional[int] = typer.Option(
        None, "--ranks-per-node", min=1, help="Ranks on the node; one for each NUMA domain."
    ),
    as_json: bool = _JSON,
) -> None:
    """Say where everything would run on this node, by rule: CPUs, memory, environment.

    Example: knl plan --ranks-per-node 2
    """
    from knl.plan import describe, plan_by_rule

    found = plan_by_rule(_read(fsroot, xml), ranks, os.environ)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    print(describe(found))
    _say_all(found.warnings)


def show(
    file: Optional[Path] = typer.Argument(
        None, help="A profile; the one that knl run would use if not given."
    ),
    fsroot: Path = _FSROOT,
    ranks: Optional[int] = typer.Option(None, "--ranks-per-node", min=1, help="Ranks on the node."),
    png: Optional[Path] = typer.Option(None, help="Draw a picture into this file, too."),
) -> None:
    """Draw where each rank runs: one row a rank, one column a core.

    Example: knl show --png placement.png
    """
    from knl.profile import plan_for
    from knl.show import picture, text

    node = _read(fsroot, None)
    found, where = plan_for(node, ranks, file, os.environ)
    print(where)
    print(text(node, found, color=sys.stdout.isatty()))
    if png is not None:
        picture(node, found, png)
    _say_all(found.warnings)


def env(
    file: Optional[Path] = typer.Argument(
        None, help="A profile; the one that knl run would use if not given."
    ),
    ranks: Optional[int] = typer.Option(None, "--ranks-per-node", min=1, help="Ranks on the node."),
) -> None:
    """Print the plan's environment as export lines for a shell.

    Example: eval "$(knl env p.json)"
    """
    from knl.profile import plan_for

    found, where = plan_for(_read(Path("/"), None), ranks, file, os.environ)
    print(f"# {where}")
    for name, setting in found.env.items():
        print(f"export {name}={shlex.quote(setting.value)}  # {setting.source}: {setting.reason}")
    _say_all(found.warnings)


def run(
    command: list[str] = typer.Argument(..., metavar="-- CMD ...", help="The program."),
    profile: Optional[Path] = _PROFILE,
    ranks: Optional[int] = typer.Option(
        None, "-n", min=1, help="Ranks to start; as many as the plan has if not given."
    ),
    verify: bool = typer.Option(
        False,
        "--verify",
        help="Print a proof from the threads of the first minute; end ranks outside their CPUs.",
    ),
    prefix: bool = typer.Option(False, "--prefix", help="Put the rank before lines of output."),
    hostfile: Optional[Path] = typer.Option(
        None,
        metavar="FILE",
        help="Start MPI ranks on these hosts, -n on each: a host or host:slots a line.",
    ),
) -> None:
    """Run any program under the plan: as several bound ranks, or as the rank that a launcher made.

    Example: knl run -n 2 --verify -- python train.py

    Ranks started here find each other by torchrun's variables. For MPI put the launcher outside:
    srun knl run -- ./program, or mpiexec -n 2 knl run -- ./program.

    Where there is no Slurm, knl run --hostfile hosts -- knl train RECIPE starts the ranks of all
    hosts by mpiexec over ssh (I_MPI_HYDRA_BOOTSTRAP names another way). The hosts share this
    folder and this Python, or have them at the same paths. Ctrl-C and SIGTERM reach the ranks as
    SIGUSR1, the second ends them.

    Under libgomp the main thread stays on one CPU once torch is imported, and so would processes
    that load data for it: bind these to the CPUs in KNL_LOADER_CPUS.
    """
    from knl.profile import plan_for, plan_of_rank
    from knl.run import become, start

    if hostfile is not None:
        raise typer.Exit(_run_on_hosts(hostfile, command, profile, ranks, verify, prefix))
    node = _read(Path("/"), None)
    world = world_from(os.environ, needs_pmi=False)
    environment = dict(os.environ)
    if world.launcher == "single":
        found, where = plan_for(node, ranks, profile, environment)
        _say_all([where, *found.warnings])
        raise typer.Exit(start(found, command, environment, where, verify, prefix))
    if ranks is not None:
        raise InputError(
            f"-n {ranks}: this is already rank {world.rank} of {world.size} of a launch by "
            f"{world.launcher}; leave -n out here",
            shared=True,
        )
    if prefix:
        raise InputError(
            "--prefix: the launcher has the output (srun --label, mpiexec -l); leave it out here",
            shared=True,
        )
    if world.launcher == "mpi":
        from knl.launch import mpi_environment

        environment.update(mpi_environment(environment))
    found, number, where = plan_of_rank(node, world, profile, environment)
    if world.rank == 0:
        _say_all([where, *found.warnings])
    become(found, number, command, environment, where, verify)


def _run_on_hosts(
    file: Path,
    command: list[str],
    profile: Path | None,
    ranks: int | None,
    verify: bool,
    prefix: bool,
) -> int:
    """Refuse what can be refused here, then start the ranks."""
    from knl.hosts import read_hosts, run_on_hosts, with_ranks
    from knl.profile import plan_for
    from knl.run import find_program

    world = world_from(os.environ, needs_pmi=False)
    if world.launcher != "single":
        raise InputError(
            f"--hostfile: this is already rank {world.rank} of {world.size} of a launch by "
            f"{world.launcher}; leave one of the two out",
            shared=True,
        )
    refuse_under_plan("--hostfile")
    hosts = read_hosts(file)
    find_program(command[0])
    usual, _ = plan_for(_read(Path("/"), None), None, profile, os.environ)
    hosts = with_ranks(file, hosts, ranks, len(usual.ranks))
    options = ["--profile", str(profile.absolute())] if profile else []
    options += ["--verify"] if verify else []
    return run_on_hosts(hosts, command, os.environ, options=options, prefix=prefix)


def tune(
    recipe: str = typer.Option("resnet50-bench", help="Recipe whose network is trained."),
    budget: str = typer.Option("10m", help="Time to spend: 90s, 10m, 1h."),
    out: Optional[Path] = typer.Option(
        None, help="Profile to write; below ~/.local/share/knl/profiles if not given."
    ),
    with_compile: bool = typer.Option(False, "--compile", help="Try torch.compile, too."),
    as_json: bool = _JSON,
) -> None:
    """Find by measurement how this node trains fastest, and write it as a profile.

    Example: knl tune --budget 10m --out p.json

    Trains real steps on made-up pictures: as torch comes, by rule, then variations. At the end the
    best is measured again beside the first two. Ctrl-C keeps what was learned (exit status 75) and
    the same command goes on. knl train and knl run use the newest profile that fits, but for one
    written elsewhere with --out: give them that with --profile.
    """
    from knl.tune.command import describe, result
    from knl.tune.command import tune as search

    if world_from(os.environ, needs_pmi=False).size > 1:
        raise InputError(
            "knl tune starts the ranks of the node itself: start it once, such as by "
            "srun -N 1 -n 1 -c ALL_CPUS",
            shared=True,
        )
    refuse_under_plan("knl tune")
    profile, path, finished = search(
        _read(Path("/"), None), recipe, budget, out, os.environ, with_compile=with_compile
    )
    print(json.dumps(result(profile, path)) if as_json else describe(profile, path))
    if not finished:
        raise typer.Exit(_STOPPED_EARLY)


def doctor(fsroot: Path = _FSROOT, as_json: bool = _JSON) -> None:
    """Say what this node and its stack really do, and what will be slow or broken.

    Example: knl doctor; knl run -- knl doctor

    Runs a small convolution (a few seconds) to see which instructions oneDNN really uses. Each
    warning comes with its cure; exit status 1 if something is broken or slow, notes do not count.
    It judges the process that it is: start it as you start the training. With --fsroot the hardware
    is read below that folder; the stack, /tmp, /dev/shm and the convolutions are this machine's.
    """
    from knl.doctor import describe, examine

    report = examine(fsroot, os.environ)
    print(json.dumps(report.to_json()) if as_json else describe(report))
    if not report.ok:
        raise typer.Exit(1)


def refuse_under_plan(what: str) -> None:
    """Raise InputError in a shell that knl run started: its CPUs and settings are one rank's."""
    from knl.bind import PLAN

    if plan := os.environ.get(PLAN):
        raise InputError(f"{what}: this shell is under a plan ({PLAN}={plan}); leave knl run first")


def _read(fsroot: Path, xml: Path | None) -> Topology:
    if xml is not None and fsroot != Path("/"):
        raise InputError("--fsroot and --xml: give one of them, each describes a whole node")
    if xml is None:
        from knl.sysfs import read_topology

        return read_topology(fsroot)
    from knl.lstopo import read_lstopo

    return read_lstopo(xml)


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


COMMANDS = (topology, doctor, plan, tune, show, env, run)

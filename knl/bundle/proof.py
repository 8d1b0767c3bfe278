"""Runs in an unpacked bundle, as `python -m knl.bundle.proof`: trains a step on two ranks where the
bundle has an MPI, and prints which files that loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from knl.comm.bootstrap import open_bootstrap
from knl.comm.world import world_from
from knl.errors import KnlError, say
from knl.launch import find_mpi, ranks_command
from knl.native import loaded_libraries, stdout_to

_RANKS = 2
_RANK = "rank"


def main() -> int:
    """Start the ranks; be the only one where there is no MPI of the bundle."""
    arguments = ["-m", "knl.bundle.proof", _RANK]
    try:
        own_mpi = Path(sys.prefix) in find_mpi(os.environ).mpiexec.parents
    except KnlError:
        own_mpi = False
    if not own_mpi:
        return subprocess.run([sys.executable, *arguments]).returncode
    command, environment = ranks_command(_RANKS, arguments, os.environ, planned=True)
    return subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}).returncode


def train_and_tell() -> None:
    """Be a rank; the first prints one JSON object."""
    from knl.train.job import Request, run_job
    from knl.train.phases import Phases

    world = world_from(os.environ)
    with tempfile.TemporaryDirectory() as folder, stdout_to(2) as stdout:
        overrides = ["train.steps=1", "train.eval_every=0"]
        request = Request(
            "digits", overrides, run_dir=Path(folder) / "run" if world.rank == 0 else None
        )
        result = run_job(world, open_bootstrap(world), request, Phases())
        modules = [getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]]
        files = sorted({*(file for file in modules if file.startswith("/")), *loaded_libraries()})
        if result is not None:
            told = {"ranks": world.size, "provider": result["provider"], "files": files}
            os.write(stdout, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    try:
        if sys.argv[1:] == [_RANK]:
            train_and_tell()
        else:
            sys.exit(main())
    except KnlError as error:
        say(str(error))
        sys.exit(error.exit_code)

"""Real launchers: every rank knows its place, and `knl train` fits in or refuses in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from .launch import HERE, knl, mpiexec, rank_environment, run
from .runs import ARGUMENTS, finished


def worlds(folder: Path) -> list[list]:
    """What the ranks of ranks_world.py wrote, in the order of ranks."""
    return sorted(json.loads(path.read_text()) for path in folder.glob("*.json"))


def who(folder: Path) -> list[str]:
    return [sys.executable, str(HERE / "ranks_world.py"), str(folder)]


def other_mpi(program: str, package: str, *options: str, ranks: int = 3) -> list[str]:
    if shutil.which(program) is None:
        pytest.skip(f"no {program}: this machine lacks Debian package {package}")
    return [program, *options, "-n", str(ranks)]


OPENMPI = ("mpirun.openmpi", "openmpi-bin", "--allow-run-as-root", "--oversubscribe")


def test_without_a_launcher_there_is_one_rank(tmp_path):
    assert run(who(tmp_path)).returncode == 0
    assert worlds(tmp_path) == [[[0, 1, 0, 1, "single"]]]


def test_intel_mpi_agrees_with_us_on_who_a_rank_is(tmp_path):
    done = run(mpiexec(3, *who(tmp_path), "mpi"), **rank_environment())
    assert done.returncode == 0, done.stderr
    assert worlds(tmp_path) == [[[rank, 3, rank, 3, "mpi"]] * 2 for rank in range(3)]


@pytest.mark.parametrize(
    ("launcher", "command"),
    [("openmpi", OPENMPI), ("mpi", ("mpiexec.mpich", "mpich"))],
    ids=["Open MPI", "MPICH"],
)
def test_another_mpi_s_ranks_are_recognised(tmp_path, launcher, command):
    done = run([*other_mpi(*command), *who(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert worlds(tmp_path) == [[[rank, 3, rank, 3, launcher]] for rank in range(3)]


def knl_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("knl: ")]


def test_training_under_open_mpi_takes_its_collectives(tmp_path, single):
    command = [*other_mpi(*OPENMPI, ranks=2), *knl(*ARGUMENTS)]
    trained = finished(run(command, cwd=tmp_path, timeout=120.0, OMP_NUM_THREADS="1"), tmp_path)
    assert trained.losses == pytest.approx(single.losses, abs=1e-4)
    assert (trained.result["ranks"], trained.result["provider"]) == (2, "mpi")
    first = trained.done.stderr.splitlines()[0]
    assert "2 rank(s) over mpi Open MPI v" in first
    assert "not oneccl: needs an Intel MPI or MPICH launch, this is openmpi" in first


def test_an_mpi_that_is_not_the_launcher_s_is_refused_instead_of_training_alone(tmp_path):
    mpiexec(2)  # skips where there is no stack
    command = [*other_mpi(*OPENMPI, ranks=2), *knl("train", "digits", "--json")]
    done = run(command, cwd=tmp_path, MPI4PY_MPIABI="impi", **rank_environment())
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    lines = knl_lines(done.stderr)
    assert lines
    for line in lines:
        assert re.match(
            r"knl: rank [01]: the launcher says rank [01] of 2, but Intel\(R\) MPI Library [\d.]+ "
            r"says rank 0 of 1: start the job with that MPI's own mpiexec",
            line,
        )
    assert list(tmp_path.iterdir()) == []


def test_starting_ranks_from_a_rank_is_refused_once(tmp_path):
    done = run(mpiexec(2, *knl("train", "digits", "-n", "2")), cwd=tmp_path, **rank_environment())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "knl: -n 2: this is already rank 0 of 2 of a launch by mpi; leave -n out here, "
        "or start knl without a launcher"
    ]
    assert list(tmp_path.iterdir()) == []

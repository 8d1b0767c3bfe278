"""`knl` on a real Slurm: ranks on two nodes, tasks that cannot find each other, batch scripts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from knl.launch import mpi_environment

from ..mpi.launch import HERE, knl, mpiexec, own_environment
from ..mpi.runs import ARGUMENTS, finished, train_digits
from .cluster import SlurmCluster

PMI2 = ("srun", "-N2", "-n4", "--mpi=pmi2")
TCP = {"FI_PROVIDER": "tcp", "OMP_NUM_THREADS": "1"}
ONE_STEP = ("train", "digits", "--json", "--set", "train.steps=1")


def slurm(
    cluster: SlurmCluster, *command: str, timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; when it takes too long, cancel its job and fail."""
    try:
        return cluster.run(*command, timeout=timeout, **environment)
    except subprocess.TimeoutExpired:
        cluster.run("scancel", "--user=root")
        pytest.fail(f"{shlex.join(command)} runs after {timeout:.0f} s")


def who(folder: Path) -> list[str]:
    return [sys.executable, str(HERE / "ranks_world.py"), str(folder)]


def worlds(folder: Path) -> list[list]:
    return sorted(json.loads(path.read_text())[0] for path in folder.glob("*.json"))


def knl_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("knl: ")]


TWO_BY_TWO = [[rank, 4, rank % 2, 2, "mpi"] for rank in range(4)]


def test_tasks_of_srun_know_their_place(cluster, tmp_path):
    done = slurm(cluster, *PMI2, *who(tmp_path))
    assert done.returncode == 0, done.stderr
    assert worlds(tmp_path) == TWO_BY_TWO


def test_ranks_of_an_mpiexec_in_an_allocation_know_their_place(cluster, tmp_path):
    environment = {**mpi_environment(own_environment()), **TCP}
    command = ("salloc", "-N2", "-n4", *mpiexec(4, *who(tmp_path)))
    done = slurm(cluster, *command, **environment)
    assert done.returncode == 0, done.stderr
    assert worlds(tmp_path) == TWO_BY_TWO


def test_a_batch_script_is_one_rank(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\n{shlex.join(who(tmp_path))}\n")
    output = f"--output={tmp_path}/job.out"
    status = cluster.batch("-N2", "-n4", output, str(script))
    assert status == 0, (tmp_path / "job.out").read_text()
    assert worlds(tmp_path) == [[0, 1, 0, 1, "single"]]


def test_tasks_without_pmi_are_refused_once(cluster, tmp_path):
    train = knl("train", "digits", "--run-dir", str(tmp_path / "run"))
    done = slurm(cluster, "srun", "-N2", "-n4", "--mpi=none", *train)
    assert done.returncode == 2
    assert knl_lines(done.stderr) == [
        "knl: srun started 4 tasks without PMI, so they cannot find each other: use srun --mpi=pmi2"
    ]
    assert list(tmp_path.iterdir()) == []


def test_starting_ranks_from_a_task_is_refused_once(cluster, tmp_path):
    train = knl("train", "digits", "-n", "2", "--run-dir", str(tmp_path / "run"))
    done = slurm(cluster, *PMI2, *train)
    assert done.returncode == 2
    (line,) = knl_lines(done.stderr)
    assert "this is already rank 0 of 4 of a launch by mpi" in line


def test_training_on_two_nodes_is_that_of_one_rank(cluster, tmp_path):
    mpiexec(4)  # skips where there is no stack
    command = knl(*ARGUMENTS, "--run-dir", str(tmp_path / "run"))
    trained = finished(slurm(cluster, *PMI2, *command, timeout=150.0, **TCP), tmp_path)
    assert trained.done.stdout.count("\n") == 1
    assert (trained.result["ranks"], trained.result["provider"]) == (4, "oneccl")
    assert trained.losses == pytest.approx(train_digits(tmp_path, 1).losses, abs=1e-4)
    environment = json.loads((trained.folder / "environment.json").read_text())
    assert environment["launcher"] == "mpi"
    assert environment["variables"]["SLURM_JOB_NUM_NODES"] == "2"


def test_gloo_finds_its_way_between_nodes(cluster, tmp_path):
    mpiexec(4)  # skips where there is no stack
    folder = ("--run-dir", str(tmp_path / "run"))
    command = (*PMI2, *knl(*ONE_STEP, "--provider", "gloo", *folder))
    trained = finished(slurm(cluster, *command, timeout=150.0, **TCP), tmp_path)
    assert (trained.result["ranks"], trained.result["provider"]) == (4, "gloo")


@pytest.mark.parametrize("start", ["a batch script", "a step of one task"])
def test_ranks_can_be_started_on_the_host_of_a_job(cluster, tmp_path, start):
    mpiexec(2)  # skips where there is no stack
    train = knl(*ONE_STEP, "-n", "2", "--run-dir", str(tmp_path / "run"))
    bounded = ["timeout", "--kill-after=2", "80", *train]
    if start == "a batch script":
        script = tmp_path / "job.sh"
        script.write_text(f"#!/bin/sh\n{shlex.join(bounded)}\n")
        files = (f"--output={tmp_path}/out", f"--error={tmp_path}/err")
        status = cluster.batch("-N2", "-n4", *files, str(script))
        out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
        done = subprocess.CompletedProcess(train, status, out, err)
    else:
        done = slurm(cluster, "srun", "-n1", *bounded)
    assert finished(done, tmp_path).result["ranks"] == 2

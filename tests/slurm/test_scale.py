"""`knl scale run --nodes` in a job of a real Slurm."""

from __future__ import annotations

import json

from ..mpi.launch import knl, mpiexec
from .cluster import SlurmCluster
from .test_train import TCP, slurm

ALLOCATION = ("salloc", "-N2", "--ntasks-per-node=1", "--exclusive")
FEW = ("--steps", "2", "--repetitions", "1", "--set", "train.lane_batch=8")


def test_points_are_measured_on_nodes_of_the_job(cluster: SlurmCluster, tmp_path):
    mpiexec(2)  # skips where there is no stack
    command = knl("scale", "run", "digits", "--nodes", "1,2", *FEW, "--out", str(tmp_path))
    done = slurm(cluster, *ALLOCATION, *command, "--json", timeout=150.0, **TCP)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(p["nodes"], p["ranks"], p["failed"]) for p in result["points"]] == [
        (1, 1, None),
        (2, 2, None),
    ]
    assert result["cores_per_rank"] is None and result["note"] == ""


def test_more_nodes_than_the_job_has_are_refused(cluster: SlurmCluster, tmp_path):
    command = knl("scale", "run", "digits", "--nodes", "1,4", *FEW, "--out", str(tmp_path / "out"))
    done = slurm(cluster, *ALLOCATION, *command)
    assert done.returncode != 0 and "--nodes 4: this job has 2 node(s)" in done.stderr
    assert list(tmp_path.iterdir()) == []

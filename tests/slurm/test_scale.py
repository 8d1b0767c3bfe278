"""`knl scale run --nodes` in a job of a real Slurm."""

from __future__ import annotations

import json
import time

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


def test_submitted_jobs_follow_one_another_into_one_study(
    cluster: SlurmCluster, tmp_path, monkeypatch
):
    mpiexec(2)  # skips where there is no stack
    folder = tmp_path / "a study with 100% of 'quotes'"
    command = knl("scale", "submit", "digits", "--nodes", "1,2", *FEW, "--time", "5m")
    monkeypatch.chdir(tmp_path)  # where logs are
    done = slurm(cluster, *command, "--out", str(folder), "--json", **TCP)
    assert done.returncode == 0, done.stderr
    first, second = (job["job_id"] for job in json.loads(done.stdout)["jobs"])
    shown = cluster.run("scontrol", "show", "job", "-o", second).stdout
    assert f"Dependency=afterany:{first}" in shown or "JobState=PENDING" not in shown
    deadline = time.monotonic() + 120
    while cluster.run("squeue", "-h", "-j", f"{first},{second}").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    logs = [path.read_text() for path in sorted(tmp_path.glob("scale-digits-*.out"))]
    assert {path.name for path in (folder / "points").iterdir()} == {"1.json", "2.json"}, logs
    study = json.loads((folder / "study.json").read_text())
    assert [(p["nodes"], p["failed"]) for p in study["points"]] == [(1, None), (2, None)]
    assert study["site"] == "generic" and len(logs) == 2

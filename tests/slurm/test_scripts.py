"""`slurm/tune.sbatch`, `pack.sbatch`, `scaling.sbatch` as they stand, under a real Slurm."""

from __future__ import annotations

import json

import pytest

from ..mpi.launch import knl, run
from ..mpi.runs import SMALL_RECIPE
from .jobs import SCRIPTS, submit


def test_pictures_are_packed_by_all_nodes(cluster, tmp_path):
    made, packed = tmp_path / "made set", tmp_path / "packed set"
    run(knl("data", "synth", str(made), "--images", "60", "--classes", "3"))
    job = submit(cluster, tmp_path, "-N3", str(SCRIPTS / "pack.sbatch"), str(made), str(packed))
    assert job.end() == "COMPLETED", job.text()
    done = run(knl("data", "verify", str(packed), "--json"))
    assert done.returncode == 0, done.stderr
    meta = json.loads((packed / "meta.json").read_text())
    assert meta["splits"]["train"]["records"] + meta["splits"]["val"]["records"] >= 60


@pytest.mark.one_stack
def test_a_search_that_is_warned_goes_back_into_the_queue(cluster, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL_RECIPE)
    options = ("--recipe", str(recipe), "--budget", "10m", "--out", "p.json")
    job = submit(cluster, tmp_path, "-N1", str(SCRIPTS / "tune.sbatch"), *options)
    job.until(lambda: "trial   1" in job.text(), "the second trial")
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.until(lambda: "queued again (start 2)" in job.text(), "the requeue")
    cluster.run("scancel", job.number)


@pytest.mark.one_stack
def test_a_study_needs_a_recipe(cluster, tmp_path):
    job = submit(cluster, tmp_path, "-N1", str(SCRIPTS / "scaling.sbatch"))
    assert job.end() == "FAILED"
    assert "knl: no recipe: sbatch -N 8 slurm/scaling.sbatch" in job.text()

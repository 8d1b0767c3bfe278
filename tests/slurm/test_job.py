"""`slurm/train.sbatch` as it stands, under a real Slurm: ranks, training, names, bundles."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ..mpi.runs import SMALL_RECIPE
from .jobs import SCRIPTS, steps, submit, weights

TRAIN = str(SCRIPTS / "train.sbatch")
EIGHT_LANES = ("digits", "--set", "train.lanes=8", "--set", "train.lane_batch=32")
TWO_EPOCHS = (*EIGHT_LANES, "--set", "train.epochs=2")


@pytest.mark.one_stack
@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_bash_and_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(
        ["shellcheck", "-x", script], cwd=SCRIPTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("per_node", [1, 2])
def test_the_check_finds_every_rank_on_its_node(cluster, tmp_path, per_node):
    job = submit(cluster, tmp_path, "-N8", TRAIN, "--check", KNL_RANKS_PER_NODE=str(per_node))
    assert job.end() == "COMPLETED", job.text()
    assert f"{8 * per_node} distinct ranks of {8 * per_node} on 8 nodes" in job.text()


@pytest.mark.one_stack
def test_where_there_is_an_ibrun_it_starts_the_ranks(cluster, tmp_path):
    """A stand-in: it takes the ranks from Slurm's variables, as TACC's does."""
    ibrun, local = tmp_path / "bin" / "ibrun", tmp_path / "local"
    ibrun.parent.mkdir()
    local.mkdir()
    ibrun.write_text(
        '#!/bin/sh\necho ibrun "$2" >&2\nexec srun -n "$SLURM_NTASKS" --mpi=pmi2 "$@"\n'
    )
    ibrun.chmod(0o755)
    environment = {"PATH": f"{ibrun.parent}:{os.environ['PATH']}", "KNL_LOCAL": str(local)}
    bundle = str(archive_of(tmp_path))
    job = submit(cluster, tmp_path, "-N1", TRAIN, "--check", KNL_BUNDLE=bundle, **environment)
    assert job.end() == "COMPLETED", job.text()
    assert "ibrun -m" in job.text() and "1 distinct ranks of 1 on 1 nodes" in job.text()
    assert f"python of {local}" in job.text() and list(local.iterdir()) == []


def test_a_check_names_the_ranks_that_are_missing(tmp_path):
    line = '{"rank": 1, "size": 4, "host": "c1", "seconds": 1.0}\n'
    command = [sys.executable, "-m", "knl.slurm.check", "gather", "2", "4"]
    done = subprocess.run(command, input=2 * line + "noise\n", capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 of 4 ranks answered; missing: 0, 2, 3; twice: 1" in done.stderr


@pytest.mark.parametrize("nodes", [2, 4, 8] if sys.version_info >= (3, 10) else [4])
def test_nodes_train_alike(cluster, tmp_path, nodes):
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, f"-N{nodes}", TRAIN, *TWO_EPOCHS, "--run-dir", str(run))
    assert job.end() == "COMPLETED", job.text()
    assert f"{nodes} rank(s) over oneccl" in job.text()
    assert steps(run) == 10


@pytest.mark.one_stack
def test_names_may_hold_anything(cluster, tmp_path):
    place = tmp_path / "a b 'c' \"d\" $(touch x) é\n;e"
    place.mkdir()
    recipe = place / "my $(touch y) recipe.toml"
    recipe.write_text(SMALL_RECIPE)
    run = place / "run of $(touch z)"
    job = submit(
        cluster,
        tmp_path,
        "-N2",
        TRAIN,
        str(recipe),
        "--set",
        "train.steps=2",
        cwd=place,
        KNL_RUN_DIR=str(run),
        USER="a 'b",
    )
    assert job.end() == "COMPLETED", job.text()
    assert (run / "metrics.jsonl").exists()
    assert not [path for path in tmp_path.rglob("[xyz]")]


@pytest.mark.one_stack
def test_without_a_recipe_or_an_environment_the_job_says_so(cluster, tmp_path):
    job = submit(cluster, tmp_path, "-N1", TRAIN)
    assert job.end() == "FAILED"
    assert "knl: no recipe: sbatch -N 4" in job.text()
    job = submit(cluster, tmp_path, "-N1", TRAIN, "digits", KNL_ENV="/nowhere")
    assert job.end() == "FAILED"
    assert "knl: KNL_ENV=/nowhere: has no bin/python" in job.text()


def archive_of(folder: Path) -> Path:
    """What `knl bundle` makes, in small: its Python is the one of the tests."""
    python = folder / "knl-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "python of $0" >&2\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    archive = folder / "my bundle.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "knl-env", "knl-env")
    return archive


@pytest.mark.one_stack
def test_a_bundle_is_unpacked_on_every_node_and_cleared_away(cluster, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    bundle = archive_of(tmp_path)
    environment = {"KNL_BUNDLE": str(bundle), "KNL_LOCAL": str(local)}
    # The nodes share this machine's disk, so more than one would unpack to the same place.
    job = submit(cluster, tmp_path, "-N1", TRAIN, "--check", **environment)
    assert job.end() == "COMPLETED", job.text()
    assert f"python of {local}/knl-{os.geteuid()}-{job.number}-0/knl-env/bin/python" in job.text()
    assert list(local.iterdir()) == []


@pytest.mark.one_stack
def test_where_nodes_have_no_room_the_shared_environment_is_used(cluster, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", local], check=True)
    try:
        bundle = archive_of(tmp_path)
        with bundle.open("ab") as file:
            file.write(os.urandom(100_000))
        environment = {"KNL_BUNDLE": str(bundle), "KNL_LOCAL": str(local)}
        job = submit(cluster, tmp_path, "-N1", TRAIN, "--check", **environment)
        assert job.end() == "COMPLETED", job.text()
    finally:
        subprocess.run(["umount", "-l", local], check=True)
    assert "MB free, the bundle needs" in job.text()
    assert "bundle not used: the nodes have no room for it" in job.text()
    assert "1 distinct ranks of 1 on 1 nodes" in job.text()


def test_a_run_is_the_same_on_any_number_of_nodes_and_starts(cluster, tmp_path):
    """Bits: two starts of two nodes are one of two nodes."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    for run, limits in ((once, ()), (twice, ("--max-steps", "4")), (twice, ())):
        job = submit(
            cluster, tmp_path, "-N2", TRAIN, *TWO_EPOCHS, *limits, KNL_RUN_DIR=str(run),
            KNL_MAX_RESTARTS="0",
        )  # fmt: skip
        job.end()
    assert weights(once) == weights(twice)
    assert "KNL_MAX_RESTARTS=0 reached: not queued again" in job.text()

"""Jobs that are stopped before their training is done, and what brings them to its end."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from .cluster import SlurmCluster, start_daemon, wait_until_idle
from .jobs import SCRIPTS, steps, submit, weights

TRAIN = str(SCRIPTS / "train.sbatch")
ENDLESS = ("digits", "--set", "train.epochs=100000", "--set", "train.eval_every=0")
LONG = ("digits", "--set", "train.epochs=100", "--set", "train.eval_every=0")
STEPS = 500


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """The weights of a run on two nodes that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(cluster, folder, "-N2", TRAIN, *LONG, KNL_RUN_DIR=str(folder / "run"))
    assert job.end() == "COMPLETED", job.text()
    assert steps(folder / "run") == STEPS
    return weights(folder / "run")


def test_a_job_that_is_warned_goes_on_until_it_is_done(cluster, tmp_path, whole):
    """USR1 to the batch shell is what Slurm sends before the time limit (--signal=B:USR1)."""
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "-N2", TRAIN, *LONG, KNL_RUN_DIR=str(run))
    job.until(lambda: steps(run) > 20, "training")
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.until(lambda: "queued again (start 2)" in job.text(), "the requeue")
    assert job.end() == "COMPLETED", job.text()
    assert "(SIGUSR1), with a checkpoint" in job.text()
    assert f"job {job.number}, start 2: 2 ranks on 2 nodes" in job.text()
    assert weights(run) == whole
    assert steps(run) == STEPS


@pytest.mark.one_stack
def test_slurm_itself_warns_before_the_time_limit(cluster, tmp_path):
    run = tmp_path / "run"
    limit = ("--time=1", "--signal=B:USR1@45")
    job = submit(cluster, tmp_path, "-N1", *limit, TRAIN, *ENDLESS, KNL_RUN_DIR=str(run))
    job.until(lambda: "queued again (start 2)" in job.text(), "the requeue", 90.0)
    cluster.run("scancel", job.number)
    assert "with a checkpoint" in job.text()
    assert list((run / "checkpoints").glob("step-*"))


@pytest.mark.one_stack
def test_where_jobs_may_not_requeue_a_continuation_is_submitted_once(cluster, tmp_path, whole):
    run = tmp_path / "run"
    job = submit(
        cluster, tmp_path, "-N2", "-J", "my job", TRAIN, *LONG, "--fresh",
        KNL_RUN_DIR=str(run), KNL_REQUEUE="no",
    )  # fmt: skip
    job.until(lambda: steps(run) > 20, "training")
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == "FAILED"  # Slurm's word for an exit status of 75
    job.until(lambda: "rank(s); median" in job.text(), "the end of the continuation")
    assert job.text().count("continues as job ") == 1
    assert "start 2: 2 ranks on 2 nodes" in job.text()
    assert weights(run) == whole and steps(run) == STEPS


@pytest.mark.one_stack
def test_a_cancelled_job_keeps_a_checkpoint_and_stays_away(cluster, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "-N2", TRAIN, *ENDLESS, KNL_RUN_DIR=str(run))
    job.until(lambda: steps(run) > 20, "training")
    cluster.run("scancel", job.number)
    assert job.end() == "CANCELLED"
    job.until(lambda: "not queued again" in job.text(), "the last line", 20.0)
    assert "(SIGTERM), with a checkpoint" in job.text()
    assert "the job is cancelled or over: not queued again" in job.text()


@pytest.mark.one_stack
def test_a_stop_file_ends_it(cluster, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "-N2", TRAIN, *ENDLESS, KNL_RUN_DIR=str(run))
    job.until(lambda: steps(run) > 20, "training")
    (run / "STOP").touch()
    assert job.end() == "FAILED"
    assert f"{run}/STOP is there: not queued again" in job.text()


@pytest.mark.one_stack
def test_a_start_without_progress_is_the_last(cluster, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 75\n")
    python.chmod(0o755)
    job = submit(cluster, tmp_path, "-N1", TRAIN, "digits", KNL_ENV=str(tmp_path))
    assert job.end() == "FAILED"
    assert "no progress since the last start (step -1): not queued again" in job.text()


@pytest.mark.one_stack
def test_a_failed_training_is_not_started_again(cluster, tmp_path):
    job = submit(cluster, tmp_path, "-N1", TRAIN, "digits", "--set", "schedule.lr=1e6")
    assert job.end() == "FAILED"
    assert "queued again" not in job.text() and "continues as" not in job.text()


@pytest.mark.one_stack
def test_a_lost_node_costs_no_more_than_what_follows_the_last_checkpoint(cluster, tmp_path):
    run = tmp_path / "run"
    often = ("--set", "train.checkpoint_minutes=0.02")
    job = submit(
        cluster, tmp_path, "-N2", "-w", "c7,c8", TRAIN, *ENDLESS, *often, KNL_RUN_DIR=str(run)
    )
    job.until(lambda: list((run / "checkpoints").glob("step-*")), "a checkpoint")
    silent = fall_silent(cluster, "c8", job.number)
    try:
        # Slurm notices after SlurmdTimeout; -w would wait for the lost one for ever.
        job.until(lambda: job.state() == "PENDING", "the requeue by Slurm", 90.0)
        done = steps(run)
        cluster.run("scontrol", "update", f"JobId={job.number}", "ReqNodeList=")
        job.until(lambda: steps(run) > done, "the training on other nodes")
    finally:
        for pid in silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        start_daemon(cluster, "c8")
        cluster.run("scancel", job.number)
    assert "start 2: 2 ranks on 2 nodes" in job.text()
    assert job.end() == "CANCELLED"
    wait_until_idle(cluster, timeout=60.0)


def fall_silent(cluster: SlurmCluster, name: str, job: str) -> list[int]:
    """What a node does that hangs or has lost its power: nothing. Its processes for a job."""
    os.kill(int((cluster.folder / f"{name}.pid").read_text()), signal.SIGKILL)
    mine = {f"SLURMD_NODENAME={name}".encode(), f"SLURM_JOB_ID={job}".encode()}
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if mine <= set(Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")):
                found |= {process.pid, process.ppid()}  # of a rank: slurmstepd
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return sorted(found)

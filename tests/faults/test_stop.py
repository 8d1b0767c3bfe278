"""A run is told to stop: all ranks after the same step, with a checkpoint, exit status 75."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from knl.train.checkpoint import listed, read

from ..mpi.launch import knl, mpiexec, rank_environment, run
from .jobs import ENDLESS, knl_lines, only_line, rank, steps, stop, training, until

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


def stopped_line(done, folder: Path, why: str) -> str:
    """What is told once, by a job that stopped in order; and it left what it says."""
    assert done.returncode == 75, done.stderr
    (line,) = knl_lines(done.stderr)
    found = re.match(r"knl: stopped after step (\d+) of \d+ \((.*)\), with a checkpoint: ", line)
    assert found and found[2] == why, line
    newest = read(listed(folder / "checkpoints")[0])
    assert newest.state.step == int(found[1]) == steps(folder)
    assert not (folder / "lock").exists()
    return line


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_launcher_stops_all_ranks_in_order(tmp_path, number):
    folder = tmp_path / "run"
    with training(folder) as job:
        job.process.send_signal(number)
        done = job.finish(30.0)
    stopped_line(done, folder, number.name)


def test_a_signal_to_every_rank_of_another_launcher(tmp_path):
    folder = tmp_path / "run"
    with training(folder, command=mpiexec(2), **rank_environment()) as job:
        for number in (0, 1):
            os.kill(rank(job, number), signal.SIGTERM)
        done = job.finish(30.0)
    assert done.returncode == 75, done.stderr
    stopped_line(done, folder, "SIGTERM")


def test_a_signal_to_one_rank_alone_stops_all(tmp_path):
    folder = tmp_path / "run"
    with training(folder) as job:
        os.kill(rank(job, 1), signal.SIGUSR2)
        done = job.finish(30.0)
    stopped_line(done, folder, "SIGUSR2")


def test_a_second_interrupt_stops_at_once(tmp_path):
    with training(tmp_path / "run") as job:
        stop(rank(job, 1))  # so that nothing can be done in order
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        job.process.send_signal(signal.SIGINT)
        line = only_line(job.finish(30.0))
    assert "SIGINT came a second time" in line


def test_a_second_interrupt_stops_one_rank_at_once(tmp_path):
    """Alone, a rank is its own launcher; here a slow step keeps it from the first order."""
    wide = ("--set", "train.lanes=1", "--set", "train.lane_batch=1024", "-n", "1")
    command = knl("train", "digits", *ENDLESS, *wide, "--run-dir", str(tmp_path / "run"))
    from ..mpi.launch import started

    with started(command, OMP_NUM_THREADS="1") as job:
        until(lambda: steps(tmp_path / "run") >= 1, job)
        job.process.send_signal(signal.SIGINT)
        job.process.send_signal(signal.SIGINT)
        done = job.finish(30.0)
    assert done.returncode in (1, 75), done.stderr  # both may be heard as one
    assert len(knl_lines(done.stderr)) == 1 and "Traceback" not in done.stderr


def test_a_signal_before_training_begins_loses_nothing(tmp_path):
    from ..mpi.launch import started

    command = knl("train", "digits", *ENDLESS, "-n", "2", "--run-dir", str(tmp_path / "run"))
    with started(command, OMP_NUM_THREADS="1") as job:
        until(lambda: len(job.processes("PMI_RANK=1")) == 1, job)
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(60.0)
    assert done.returncode == 75, done.stderr
    (line,) = knl_lines(done.stderr)
    assert "ended by the signal before the ranks listened" in line or "stopped after step" in line


def test_the_file_stop_ends_a_run_until_it_is_removed(tmp_path):
    folder = tmp_path / "run"
    with training(folder) as job:
        (folder / "STOP").touch()
        done = job.finish(30.0)
    assert f"remove {folder}/STOP, then" in stopped_line(done, folder, "the file STOP")
    command = knl("train", "digits", *ENDLESS, "--run-dir", str(folder))
    again = run(command, OMP_NUM_THREADS="1")
    assert again.returncode == 2 and f"{folder}/STOP is there: remove it" in again.stderr


@pytest.mark.parametrize(
    ("options", "environment", "why"),
    [
        ((), {"KNL_TIME_LIMIT": "14"}, "the time limit"),
        ((), {"SLURM_JOB_END_TIME": "soon"}, "the time limit"),
        (("--max-time", "6s"), {}, "--max-time"),
        (("--max-steps", "4"), {"KNL_TIME_LIMIT": "86400"}, "--max-steps"),
    ],
    ids=["limit", "slurm", "time", "steps"],
)
def test_a_limit_stops_a_run_in_time(tmp_path, options, environment, why):
    folder = tmp_path / "run"
    command = knl("train", "digits", *ENDLESS, "-n", "2", "--run-dir", str(folder), *options)
    if "SLURM_JOB_END_TIME" in environment:
        environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + 16)}
        command = ["env", *(f"{k}={v}" for k, v in environment.items()), *command]
        environment = {}
    done = run(command, timeout=60.0, OMP_NUM_THREADS="1", **environment)
    stopped_line(done, folder, why)


@pytest.mark.parametrize(
    ("options", "environment", "what"),
    [
        (("--max-time", "soon"), {}, "--max-time soon: must be a time such as"),
        (("--fresh",), {}, "--fresh: of which run? name it with --run-dir"),
        ((), {"KNL_TIME_LIMIT": "-5"}, "KNL_TIME_LIMIT='-5': must be a number of seconds"),
    ],
)
def test_a_wrong_limit_is_refused(tmp_path, options, environment, what):
    done = run(knl("train", "digits", *options), cwd=tmp_path, **environment)
    assert done.returncode == 2
    assert what in done.stderr and len(done.stderr.splitlines()) == 1

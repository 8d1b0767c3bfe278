"""A rank dies, stops or is late while the job trains."""

from __future__ import annotations

import os
import platform
import re
import signal
import time

import pytest

from knl.comm.roll_call import state_of

from ..mpi.launch import mpiexec, rank_environment
from ..mpi.test_torchrun import torchrun
from .jobs import knl_lines, only_line, rank, steps, stop, training, until

LIMIT = ("--set", "comm.timeout_s=2")


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path, number):
    with training(tmp_path / "run") as job:
        os.kill(rank(job, number), signal.SIGKILL)
        line = only_line(job.finish(30.0))
    assert line.startswith(f"knl: rank {number} was killed by signal 9 (Killed, out of memory?): ")


@pytest.mark.parametrize(
    ("provider", "number", "ranks"),
    [("oneccl", 0, 3), ("oneccl", 1, 2), ("mpi", 1, 2), ("gloo", 1, 3)],
)
def test_a_stopped_rank_is_named_after_the_limit(tmp_path, provider, number, ranks):
    with training(tmp_path / "run", *LIMIT, "--provider", provider, ranks=ranks) as job:
        pid = rank(job, number)
        stop(pid)
        line = only_line(job.finish(30.0))
    assert re.match(
        r"knl: rank [012]: gradient bucket \d+ of \d+ \(from [\w.]+\): .*"
        rf"not done after 2 s.*: rank {number} on host {re.escape(platform.node())} is stopped "
        rf"\(pid {pid}\): .*comm\.timeout_s",
        line,
    ), line
    assert line.count(" is stopped") == 1 and "does not answer" not in line


def test_a_killed_rank_is_named_by_the_others_where_its_connections_break(tmp_path):
    with training(tmp_path / "run", "--provider", "gloo", ranks=3) as job:
        pid = rank(job, 1)
        os.kill(pid, signal.SIGKILL)
        line = only_line(job.finish(30.0))
    assert "rank 1 was killed by signal 9" in line or f"is gone (pid {pid})" in line


def test_a_rank_that_is_late_within_the_limit_is_waited_for(tmp_path):
    limit = ("--set", "comm.timeout_s=30")
    with training(tmp_path / "run", *limit, "--set", "train.steps=40", "--json") as job:
        pid = rank(job, 1)
        stop(pid)
        time.sleep(1.0)
        before = steps(tmp_path / "run")
        os.kill(pid, signal.SIGCONT)
        done = job.finish(60.0)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "run") > max(before, 39)


def test_a_job_of_another_launcher_ends_by_the_ranks_own_limit(tmp_path):
    with training(tmp_path / "run", *LIMIT, command=mpiexec(2), **rank_environment()) as job:
        pid = rank(job, 1)
        stop(pid)
        line = only_line(job.finish(30.0))
    assert f"is stopped (pid {pid})" in line


def test_a_terminated_launcher_takes_its_ranks_along(tmp_path):
    with training(tmp_path / "run") as job:
        assert rank(job, 0) != rank(job, 1)
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(timeout=30.0)
    assert done.returncode != 0


def test_a_launcher_is_terminated_with_a_stopped_rank(tmp_path):
    with training(tmp_path / "run") as job:
        stop(rank(job, 1))
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(timeout=30.0)
    assert done.returncode != 0


def test_ranks_of_torchrun_tell_it_once_too(tmp_path):
    with training(tmp_path / "run", *LIMIT, command=torchrun(3, "--no_python")) as job:
        pid, first = rank(job, 1, "RANK"), rank(job, 0, "RANK")
        stop(pid)
        until(lambda: state_of(first) == "gone", job)
        os.kill(pid, signal.SIGCONT)  # torchrun would wait half a minute for it to obey
        done = job.finish(40.0)
    assert done.returncode == 1
    (line,) = knl_lines(done.stderr)
    assert f": rank 1 on host {platform.node()} is stopped (pid {pid}): " in line

"""How a job of real ranks ends when one of them, or somebody outside, ends it: nobody is left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .launch import Job, knl, started


@contextlib.contextmanager
def training(folder: Path, *arguments: str) -> Iterator[Job]:
    """Two ranks in the midst of a training without end."""
    endless = ("-n", "2", "--set", "train.epochs=100000", "--set", "train.eval_every=0")
    with started(knl("train", "digits", *endless, "--run-dir", str(folder), *arguments)) as job:
        metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 60.0
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert job.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield job


def rank(job: Job, number: int) -> int:
    """The process of a rank."""
    (pid,) = job.processes(f"PMI_RANK={number}")
    return pid


def knl_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("knl: ")]


def test_a_terminated_launcher_takes_its_ranks_along(tmp_path):
    with training(tmp_path / "run") as job:
        assert rank(job, 0) != rank(job, 1)
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(timeout=30.0)
    assert done.returncode != 0


def test_a_killed_rank_ends_the_job(tmp_path):
    with training(tmp_path / "run") as job:
        os.kill(rank(job, 1), signal.SIGKILL)
        done = job.finish(timeout=30.0)
    assert done.returncode != 0


@pytest.mark.parametrize("provider", ["oneccl", "gloo"])
def test_a_rank_that_stops_ends_the_job_in_one_line_after_the_limit(tmp_path, provider):
    limit = ("--set", "comm.timeout_s=1", "--provider", provider)
    with training(tmp_path / "run", *limit) as job:
        os.kill(rank(job, 1), signal.SIGSTOP)
        done = job.finish(timeout=30.0)
    assert done.returncode == 1
    (line,) = knl_lines(done.stderr)
    assert line.startswith("knl: rank 0: ")
    assert "not done after 1 s" in line and "comm.timeout_s" in line

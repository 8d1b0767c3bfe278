"""A rank dies or stops before the ranks have met."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from knl.leftovers import segments_of

from ..mpi.launch import Job, knl, mpiexec, rank_environment, started
from .jobs import ENDLESS, clean, only_line, rank, stop, until

LIMIT_S = "2"


@contextlib.contextmanager
def starting(*launcher: str, **environment: str) -> Iterator[Job]:
    """Ranks that have just been started; the last of them is there and has not met the others."""
    line = [*launcher, *knl("train", "digits", *ENDLESS, *([] if launcher else ["-n", "2"]))]
    with clean(), started(line, KNL_START_TIMEOUT_S=LIMIT_S, **environment) as job:
        until(lambda: len(job.processes("PMI_RANK=1")) == 1, job)
        yield job


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_killed_before_mpi_starts_ends_the_job(number):
    with starting() as job:
        until(lambda: job.processes(f"PMI_RANK={number}"), job)
        os.kill(rank(job, number), signal.SIGKILL)
        line = only_line(job.finish(30.0))
    assert line.startswith(f"knl: rank {number} was killed by signal 9 ")


def in_mpi(job: Job, number: int) -> bool:
    """Whether a rank waits in MPI's start: it has made something for the others."""
    return bool(segments_of(rank(job, number)))


def test_nothing_stays_in_shared_memory_when_mpi_was_starting():
    with starting() as job:
        stop(rank(job, 1))
        until(lambda: in_mpi(job, 0), job)
        os.kill(rank(job, 1), signal.SIGKILL)
        line = only_line(job.finish(30.0))
    assert line.startswith("knl: rank 1 was killed by signal 9 ")


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_stopped_before_mpi_starts_is_named_after_the_limit(number):
    with starting() as job:
        until(lambda: job.processes(f"PMI_RANK={number}"), job)
        pid = rank(job, number)
        stop(pid)
        line = only_line(job.finish(60.0))
    assert line.startswith(
        f"knl: rank {1 - number}: start of MPI: not done after {LIMIT_S} s: "
        f"rank {number} is stopped (pid {pid}): "
    )
    assert "KNL_START_TIMEOUT_S" in line


def test_below_another_launcher_the_others_end_by_themselves():
    with starting(*mpiexec(2), **rank_environment()) as job:
        os.kill(rank(job, 1), signal.SIGKILL)
        done = job.finish(60.0)
    assert done.returncode != 0
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("knl: ")]
    assert line.startswith(f"knl: rank 0: start of MPI: not done after {LIMIT_S} s: 1 of 2 ranks")


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(value, monkeypatch):
    from knl.comm.watchdog import start_timeout
    from knl.errors import InputError

    monkeypatch.setenv("KNL_START_TIMEOUT_S", value)
    with pytest.raises(InputError, match=f"KNL_START_TIMEOUT_S='{value}': must be .* above 0"):
        start_timeout()

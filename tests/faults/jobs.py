"""Trainings of real ranks to break, and what must be left of them: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from knl.comm.roll_call import state_of

from ..mpi.launch import Job, knl, started

ENDLESS = ("--set", "train.epochs=100000", "--set", "train.eval_every=0")
PATIENCE_S = 120.0  # bounds a test that hangs


@contextlib.contextmanager
def clean() -> Iterator[None]:
    """Nothing in here may leave a segment in shared memory: a file that no process has mapped.
    Other jobs may be about to map or remove theirs, so what is new gets a moment to go."""
    before = unmapped()
    yield
    deadline = time.monotonic() + 10.0
    while (new := unmapped() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not new, sorted(new)


def unmapped() -> set[str]:
    """Files in shared memory that no process uses."""
    files = {os.fspath(path) for path in Path("/dev/shm").iterdir()}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has just ended
            files -= {line.rpartition(" ")[2] for line in maps.read_text().splitlines()}
    return files


def until(true: Callable[[], object], job: Job) -> None:
    """Wait until something holds, as long as the job runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert job.process.poll() is None, job.process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def training(
    folder: Path, *arguments: str, ranks: int = 2, command: list[str] | None = None, **env: str
) -> Iterator[Job]:
    """Ranks in the midst of a training without end, by `knl train -n` or below another launcher's
    command."""
    line = [*(command or []), *knl("train", "digits", *ENDLESS, "--run-dir", str(folder))]
    line += [] if command else ["-n", str(ranks)]
    with clean(), started([*line, *arguments], **{"OMP_NUM_THREADS": "1", **env}) as job:
        until(lambda: steps(folder) >= 3, job)
        yield job


def steps(folder: Path) -> int:
    """Steps that the run has written down."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def rank(job: Job, number: int, variable: str = "PMI_RANK") -> int:
    """The process of a rank."""
    while not (pids := job.processes(f"{variable}={number}")):  # it starts itself anew
        assert job.process.poll() is None
    (pid,) = pids
    return pid


def stop(pid: int) -> None:
    """Stop a process, and see it stopped."""
    os.kill(pid, signal.SIGSTOP)
    while state_of(pid) != "stopped":
        time.sleep(0.01)


def knl_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("knl: ")]


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """What the user is told by a job that failed: one line, and nothing as a result."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    lines = knl_lines(done.stderr)
    assert len(lines) == 1, done.stderr
    return lines[0]

"""Starts commands and MPI ranks for tests, bounds their time, and finds what they leave running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from knl.errors import InputError
from knl.launch import find_mpi, mpi_environment

HERE = Path(__file__).parent
_MARK = "KNL_TEST_MARK"
# The tests may themselves run in a job, whose variables would describe it and not the test's ranks.
_OUTER = re.compile(
    r"(PMI|PMIX|OMPI|SLURM|SBATCH|SRUN|HYDRA|HYDI|TORCHELASTIC)_\w+|PMI2?_FD|MPI_LOCALN?RANK\w+"
    r"|RANK|(LOCAL_)?WORLD_SIZE|LOCAL_RANK|MASTER_(ADDR|PORT)|KNL_ENVIRONMENT_READY"
)


def own_environment() -> dict[str, str]:
    """This process's environment without what a launcher has put there."""
    return {name: value for name, value in os.environ.items() if not _OUTER.fullmatch(name)}


class Job:
    """A command under way in a session of its own; its processes carry a mark nobody else has."""

    def __init__(self, command: list[str], cwd: Path | None, environment: dict[str, str]) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**own_environment(), **environment, name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def processes(self, variable: str = "") -> list[int]:
        """Ids of those of its processes whose environment has `variable` (NAME=value) as well."""
        wanted = {item.encode() for item in (self._mark, variable) if item}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found

    def finish(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Its output and status; a failed test when it takes longer or leaves a process behind."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            pytest.fail(
                f"{self.process.args} runs after {timeout:.0f} s:\n{out[-2000:]}{err[-4000:]}"
            )
        deadline = time.monotonic() + 10.0
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"{self.process.args} left processes behind: {left}"
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def started(command: list[str], cwd: Path | None = None, **environment: str) -> Iterator[Job]:
    """A running command; whatever is left of it on leaving is killed."""
    job = Job(command, cwd, environment)
    try:
        with job.process:
            yield job
            job.kill()
    finally:
        job.kill()


def run(
    command: list[str], cwd: Path | None = None, timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; it must leave nothing behind."""
    with started(command, cwd, **environment) as job:
        return job.finish(timeout)


def knl(*arguments: str) -> list[str]:
    """The command line of `knl` in this Python."""
    return [sys.executable, "-m", "knl", *arguments]


def mpiexec(ranks: int, *command: str) -> list[str]:
    """The command line that starts ranks with the stack's MPI; a skip where there is none."""
    try:
        mpi = find_mpi(own_environment())
    except InputError as error:
        pytest.skip(str(error))
    if mpi.kind != "intel":
        pytest.skip(f"{mpi.mpiexec} is not Intel MPI's: pip install a stack")
    return [str(mpi.mpiexec), "-n", str(ranks), *command]


def rank_environment() -> dict[str, str]:
    """What ranks on one host need that a launcher other than knl starts."""
    return {
        **mpi_environment(own_environment()),
        "I_MPI_FABRICS": "shm",
        "I_MPI_HYDRA_BOOTSTRAP": "fork",
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(
    script: str, ranks: int, *arguments: object, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a Python script of this folder as MPI ranks."""
    command = mpiexec(ranks, sys.executable, str(HERE / script), *map(str, arguments))
    return run(command, timeout=timeout, **rank_environment())


class Outcomes:
    """What ranks noted with ranks_common.Checks: the outcome of each check on each of them."""

    def __init__(self, folder: Path, ranks: int, end: str) -> None:
        self.ranks, self._end = ranks, end
        self._noted: list[dict[str, str]] = []
        for rank in range(ranks):
            path = folder / f"rank-{rank}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            self._noted.append(dict(json.loads(line) for line in lines))

    def require(self, check: str) -> None:
        """Every rank came to this check and passed."""
        outcome = {rank: noted.get(check, "not reached") for rank, noted in enumerate(self._noted)}
        failed = [f"rank {rank}: {text}" for rank, text in outcome.items() if text != "ok"]
        assert not failed, "\n".join([*failed, f"the job: {self._end}"])

    def require_orderly_end(self) -> None:
        assert self._end == "exit status 0"


def check_ranks(script: str, ranks: int, folder: Path) -> Outcomes:
    """Run a script of checks; it gets the folder to report into."""
    try:
        done = run_ranks(script, ranks, folder)
        end = f"exit status {done.returncode}"
        if done.returncode != 0:
            end = f"{end}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    except (AssertionError, pytest.fail.Exception) as error:
        end = str(error)
    return Outcomes(folder, ranks, end)

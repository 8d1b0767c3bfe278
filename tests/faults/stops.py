"""How long a job takes to end in order, and what it loses: a part of the campaign."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from knl.train.checkpoint import listed, step_of

from ..mpi.launch import Job, knl, started
from .jobs import ENDLESS, rank, steps, stop, until

PATIENCE_S = 120.0
LIMIT_S = 5.0


@dataclass(frozen=True)
class Stop:
    """One end: its exit status, seconds until it came, steps that are not in the checkpoint."""

    fault: str
    status: int
    end_s: float
    lost: int


def to_launcher(number: int) -> Callable[[Job, Path], None]:
    return lambda job, folder: job.process.send_signal(number)


def to_all_ranks(job: Job, folder: Path) -> None:
    for pid in (rank(job, 0), rank(job, 1)):
        os.kill(pid, signal.SIGTERM)


def stop_file(job: Job, folder: Path) -> None:
    (folder / "STOP").touch()


def stopped_rank(job: Job, folder: Path) -> None:
    stop(rank(job, 1))


def kill_rank(job: Job, folder: Path) -> None:
    os.kill(rank(job, 1), signal.SIGKILL)


# With the exit status that is expected.
FAULTS: dict[str, tuple[Callable[[Job, Path], None], int]] = {
    "SIGTERM to the launcher": (to_launcher(signal.SIGTERM), 75),
    "SIGUSR1 to the launcher": (to_launcher(signal.SIGUSR1), 75),
    "SIGUSR2 to the launcher": (to_launcher(signal.SIGUSR2), 75),
    "SIGINT to the launcher": (to_launcher(signal.SIGINT), 75),
    "SIGTERM to all ranks": (to_all_ranks, 75),
    "the file STOP": (stop_file, 75),
    f"SIGSTOP of a rank, comm.timeout_s = {LIMIT_S:g}": (stopped_rank, 1),
    "kill -9 of a rank": (kill_rank, 1),
}


def stops(place: Path, tries: int, say: Callable[[str], None]) -> list[Stop]:
    found = []
    for fault in FAULTS:
        for number in range(tries):
            found.append(one_stop(place / f"{fault}-{number}", fault))
            say(str(found[-1]))
    return found


def one_stop(folder: Path, fault: str) -> Stop:
    action, status = FAULTS[fault]
    options = ("-n", "2", "--profile", "none", "--set", f"comm.timeout_s={LIMIT_S}",
               "--set", "train.checkpoint_minutes=0.02", "--run-dir", str(folder))  # fmt: skip
    with started(knl("train", "digits", *ENDLESS, *options), OMP_NUM_THREADS="1") as job:
        until(lambda: steps(folder) >= 60 and listed(folder / "checkpoints"), job)
        action(job, folder)
        began = time.monotonic()
        done = job.finish(PATIENCE_S)
        end_s = time.monotonic() - began
    assert done.returncode == status, done.stderr
    newest = max(step_of(path) for path in listed(folder / "checkpoints"))
    return Stop(fault, done.returncode, end_s, steps(folder) - newest)


def table(found: list[Stop]) -> str:
    lines = ["| fault | tried | exit status | steps lost: most | ended after: median, most |",
             "|---|---|---|---|---|"]  # fmt: skip
    for fault, (_, status) in FAULTS.items():
        mine = [one for one in found if one.fault == fault]
        ends = [one.end_s for one in mine]
        lines.append(
            f"| {fault} | {len(mine)} | {status} | {max(one.lost for one in mine)} | "
            f"{median(ends):.1f} s, {max(ends):.1f} s |"
        )
    return "\n".join(lines)

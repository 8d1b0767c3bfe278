"""Kills a random rank of a real training at random moments, many times; `make campaign`.

One run is killed again and again: each start goes on where the one before was killed, and in the
end the weights must be those of a run that was never killed, bit by bit. python -m
tests.faults.campaign [--kills 100] [--ranks 2] prints the table that is in reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from knl.train.checkpoint import listed, step_of

from ..mpi.launch import Job, knl, run, started
from . import stops

HERE = Path(__file__).parent
EPOCHS, PER_EPOCH = 30, 5
STEPS = EPOCHS * PER_EPOCH
RECIPE = (
    "--set", f"train.epochs={EPOCHS}", "--set", "train.eval_every=1",
    "--set", "train.checkpoint_minutes=0.005",
)  # fmt: skip
MOMENTS = ("any", "write", "evaluation", "start")
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Kill:
    """One kill: at which moment it was aimed, whether it fell there, which rank, how many steps had
    to be done again, how long the job took to end, and how it ended."""

    moment: str
    hit: bool
    rank: int
    lost: int
    end_s: float
    status: int
    line: str


@dataclass(frozen=True)
class Report:
    kills: list[Kill]
    checksum: str
    wanted: str
    steps: list[int]

    @property
    def survived(self) -> bool:
        return self.checksum == self.wanted and self.steps == list(range(1, STEPS + 1))


def build_preload(folder: Path) -> Path:
    """The library of slow_and_back.c."""
    library = folder / "slow_and_back.so"
    source = HERE / "slow_and_back.c"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def command(folder: Path, ranks: int) -> list[str]:
    options = (*RECIPE, "--profile", "none", "--run-dir", str(folder))
    return knl("train", "digits", "-n", str(ranks), *options)


def campaign(place: Path, kills: int, ranks: int, seed: int, say: Callable[[str], None]) -> Report:
    """Kill `kills` times and train to the end, in a folder below `place`."""
    chosen = random.Random(seed)
    environment = {"OMP_NUM_THREADS": "1"}
    run(command(place / "whole", ranks), timeout=PATIENCE_S, **environment)
    wanted = weights(place / "whole")
    slow = {
        "LD_PRELOAD": str(build_preload(place)), "KNL_TEST_FSYNC_MS": "60", **environment,
    }  # fmt: skip
    folder, done = place / "killed", []
    while len(done) < kills:
        moment = MOMENTS[len(done) % len(MOMENTS)]
        kill = one_kill(folder, ranks, moment, chosen, slow)
        if kill is None:  # it came to its end before
            report = Report(done, weights(folder), wanted, rows_of(folder))
            assert report.survived, report
            folder = place / f"killed-{len(done)}"
            continue
        done.append(kill)
        say(f"{len(done)}/{kills} {kill}")
    run(command(folder, ranks), timeout=PATIENCE_S, **environment)
    return Report(done, weights(folder), wanted, rows_of(folder))


def one_kill(
    folder: Path, ranks: int, moment: str, chosen: random.Random, environment: dict[str, str]
) -> Kill | None:
    """Start, kill a rank at the moment, wait for the end. None where it ended before."""
    victim = chosen.randrange(ranks)
    before = rows_of(folder)
    with started(command(folder, ranks), **environment) as job:
        hit = wait_for(moment, job, folder, before, chosen)
        pids = job.processes(f"PMI_RANK={victim}")
        for pid in pids[:1]:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        done = job.finish(PATIENCE_S)
        end_s = time.monotonic() - began
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("knl: ")]
    newest = step_of(next(iter(listed(folder / "checkpoints")), Path()))
    lost = max(0, max(rows_of(folder), default=0) - max(newest, 0))
    return Kill(moment, hit, victim, lost, end_s, done.returncode, lines[-1] if lines else "")


def wait_for(moment: str, job: Job, folder: Path, before: list[int], chosen: random.Random) -> bool:
    """Return at the moment; whether it is that one."""
    if moment == "start":
        time.sleep(chosen.uniform(0.0, 6.0))
        return True
    until(lambda: trains(folder, before), job)
    time.sleep(chosen.uniform(0.0, 1.5))
    if moment == "write":
        return until(lambda: any((folder / "checkpoints").glob(".step-*.tmp")), job)
    if moment == "evaluation":
        return until(lambda: evaluates(folder), job)
    return True


def until(true: Callable[[], bool], job: Job) -> bool:
    """Wait until it holds; False where the job has ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while job.process.poll() is None:
        if true():
            return True
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return False


def trains(folder: Path, before: list[int]) -> bool:
    """Whether this start has made a step: the rows are cut back first."""
    rows = rows_of(folder)
    return bool(rows) and rows != before


def evaluates(folder: Path) -> bool:
    """The last row is of an epoch's last step, and the evaluation's is not there yet."""
    last = (folder / "metrics.jsonl").read_bytes().splitlines()[-1:]
    match = re.match(rb'{"step": (\d+),.*"lr"', last[0]) if last else None
    return bool(match) and int(match[1]) % PER_EPOCH == 0


def rows_of(folder: Path) -> list[int]:
    """The steps that metrics.jsonl has."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [int(m[1]) for m in (re.match(rb'{"step": (\d+),.*"lr".*}$', x) for x in lines) if m]


def weights(folder: Path) -> str:
    """The checksum of the last evaluation, at the last step."""
    last = json.loads((folder / "metrics.jsonl").read_bytes().splitlines()[-1])
    assert last["step"] == STEPS, last
    return last["weights_crc32"]


def table(report: Report) -> str:
    lines = [
        "| kill -9 of a random rank | tried | hit there | survived | steps done again: median, most"
        " | job ended after: median, most |",
        "|---|---|---|---|---|---|",
    ]
    for moment in MOMENTS:
        found = [kill for kill in report.kills if kill.moment == moment]
        if found:
            lost = [kill.lost for kill in found]
            ends = [kill.end_s for kill in found]
            lines.append(
                f"| {NAMES[moment]} | {len(found)} | {sum(kill.hit for kill in found)} | "
                f"{len(found) if report.survived else 0} | {median(lost):g}, {max(lost)} | "
                f"{median(ends):.1f} s, {max(ends):.1f} s |"
            )
    return "\n".join(lines)


NAMES = {
    "any": "at any moment of training",
    "write": "inside the write of a checkpoint",
    "evaluation": "inside an evaluation",
    "start": "in the first 6 s of a start",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stops", type=int, default=5, help="tries of each other fault")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        report = campaign(Path(place), wanted.kills, wanted.ranks, wanted.seed, print)
        others = stops.stops(Path(place), wanted.stops, print)
    print(table(report), stops.table(others), sep="\n\n")
    print(
        f"{wanted.kills} kills of {wanted.ranks} ranks in {time.monotonic() - began:.0f} s, "
        f"seed {wanted.seed}, {platform.node()}, Python {platform.python_version()}; weights "
        f"{report.checksum}, never killed {report.wanted}: "
        f"{'the same' if report.survived else 'NOT THE SAME'}"
    )
    raise SystemExit(0 if report.survived else 1)


if __name__ == "__main__":
    main()
